"""What is pretraining worth? A linear head on frozen features, pretrained against random, with few and many labels.

    python benchmarks/pretraining.py --fashion /usr/share/datasets/fashion-mnist

Prints the table that stands in the cards of the bundled backbones. Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017;
Debian's package dataset-fashion-mnist) is left out when --fashion is not given; its 10,000 test images are used, split
like the digits. Each figure is the mean over the seeds: split, labels chosen, order and first weights change with it.
"""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import torch
import tyro

from finetune.data.batch import Request
from finetune.data.digits import load_digits
from finetune.data.images import ImagePipeline, split_source
from finetune.data.order import batches_from, epoch_order, key, keyed_generator
from finetune.data.source import ArraySource
from finetune.models.bundled import BUNDLED
from finetune.models.heads import StandardisedLinear
from finetune.models.network import build_network
from finetune.models.standardisation import standardise
from finetune.models.weight_files import read_weights
from finetune.models.weights import choose_weights
from finetune.training.optimizer import build_optimizer, set_learning_rates
from finetune.training.schedule import schedule_factor

EPOCHS_BY_LABELS = {50: 60, 100: 60, 0: 15}
BATCH, LEARNING_RATE = 64, 3e-3


def load_fashion(folder: Path) -> ArraySource:
    """The test part of Fashion-MNIST from its idx files."""
    content = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    images = torch.from_numpy(np.frombuffer(content, np.uint8, offset=16).copy()).view(-1, 1, 28, 28)
    targets = torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))
    return ArraySource(images, targets, [str(n) for n in range(10)], hashlib.sha256(content).hexdigest())


def features_of(source: ArraySource, backbone_name: str, weights: str, image_size: int = 0) -> torch.Tensor:
    """(samples, features): what enters the last layer.

    Args:
        image_size: edge in pixels; 0 = what the backbone was trained at.
    """
    backbone, file = choose_weights(backbone_name, weights)
    network = build_network(
        backbone, read_weights(file.path) if file else None, "", head="linear", class_count=10, dropout=0.0,
        head_width=0, seed=0,
    )  # fmt: skip
    network.module.set_submodule(network.head_paths[-1], torch.nn.Identity())
    model = network.module.eval().to(memory_format=torch.channels_last)
    preprocessing = backbone.preprocessing.at(image_size) if image_size else backbone.preprocessing
    pipeline = ImagePipeline(source, preprocessing, "none", 0.0, 0.0, 0)
    rows = []
    with torch.inference_mode():
        for indices in batches_from(torch.arange(len(source.targets)), 256):
            images = pipeline.fetch(Request(indices.tolist())).inputs
            rows.append(model(images.to(memory_format=torch.channels_last)))
    return torch.cat(rows)


def head_accuracy(features: torch.Tensor, source: ArraySource, labels: int, seed: int) -> float:
    """Validation accuracy of the kit's linear head, its optimizer and schedule, trained on the features."""
    train, validation, _ = split_source(source, 0.2, seed, labels)
    with keyed_generator("model", seed):
        head = StandardisedLinear(features.shape[1], 10, dropout=0.0)
    standardise(head, [features[train]])
    head.train()
    optimizer = build_optimizer(dict(head.named_parameters()), "adamw", LEARNING_RATE, 1e-2, 0.9)
    epochs, per_epoch = EPOCHS_BY_LABELS[labels], -(-len(train) // BATCH)
    for step_number in range(epochs * per_epoch):
        epoch, position = divmod(step_number, per_epoch)
        batch = train[epoch_order(seed, epoch, len(train))[position * BATCH : (position + 1) * BATCH]]
        factor = schedule_factor("cosine", step_number, epochs * per_epoch, per_epoch, 0.05, 0.01, 10, 0.1)
        set_learning_rates(optimizer, LEARNING_RATE * factor, warmth=lambda _thawed: 1.0)
        torch.nn.functional.cross_entropy(head(features[batch]), source.targets[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    head.eval()
    with torch.inference_mode():
        return (head(features[validation]).argmax(1) == source.targets[validation]).double().mean().item()


def main(fashion: str = "", seeds: int = 5) -> None:
    """Print the table.

    Args:
        fashion: folder that holds Fashion-MNIST's idx files; "" = digits only.
        seeds: how many to average over.
    """
    torch.manual_seed(key("benchmark"))
    torch.set_num_threads(1)  # the heads are too small for more
    sources = {"digits": load_digits()}
    if fashion:
        sources["Fashion-MNIST (test part)"] = load_fashion(Path(fashion))
    for backbone in BUNDLED:
        print(f"\n{backbone}\n\n| data | labels | pretrained | random |\n|---|---|---|---|")
        for name, source in sources.items():
            features = {weights: features_of(source, backbone, weights) for weights in ("default", "none")}
            for labels in EPOCHS_BY_LABELS:
                figures = [
                    100 * sum(head_accuracy(features[w], source, labels, seed) for seed in range(seeds)) / seeds
                    for w in ("default", "none")
                ]
                print(f"| {name} | {labels or 'all'} | {figures[0]:.1f} % | {figures[1]:.1f} % |")


if __name__ == "__main__":
    tyro.cli(main)
