"""The same head on the same photographs by others: `python photo_peers.py NAME FOLDER --weights FILE --place FOLDER`.

Files on a disk, a frozen MobileNetV2 in eval mode at 224, a new linear layer, AdamW at 3e-3, batches of 64, two worker
processes, a fifth validates after each epoch. Each as its own documentation does it.
"""

import argparse
import json
from pathlib import Path

import torch
import torchvision
from peers import BATCH, LEARNING_RATE, adamw, by_hand, by_lightning
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

WORKERS, EDGE, RESIZED = 2, 224, 256
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class HeadOnly(nn.Module):
    """A frozen backbone, always in eval mode and without gradients, and a head that trains."""

    def __init__(self, weights: Path, class_count: int):
        super().__init__()
        model = torchvision.models.mobilenet_v2()
        model.load_state_dict(torch.load(weights, weights_only=True))
        self.backbone = model.features.eval().requires_grad_(False)
        self.head = nn.Linear(model.last_channel, class_count)

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()
        return self

    def features(self, images):
        with torch.no_grad():
            return self.backbone(images).mean((2, 3))

    def forward(self, images):
        return self.head(self.features(images))


def scaled(path: str) -> Image.Image:
    """A JPEG decoded at a part of its size, still twice as large as it is needed."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * RESIZED, 2 * RESIZED))
        return image.convert("RGB")


def opened(folder: Path, **options) -> ImageFolder:
    prepare = [transforms.Resize(RESIZED), transforms.CenterCrop(EDGE), transforms.ToTensor()]
    return ImageFolder(str(folder), transforms.Compose([*prepare, transforms.Normalize(MEAN, STD)]), **options)


def parts(data: ImageFolder) -> tuple[Subset, Subset]:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    return Subset(data, order[len(data) // 5 :]), Subset(data, order[: len(data) // 5])


def loaders(data: ImageFolder) -> tuple[DataLoader, DataLoader]:
    train, validation = parts(data)
    return (
        DataLoader(train, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True),
        DataLoader(validation, BATCH, num_workers=WORKERS, persistent_workers=True),
    )


def raw(folder: Path, weights: Path, epochs: int, place: Path) -> float:
    data = opened(folder)
    return by_hand(HeadOnly(weights, len(data.classes)), *loaders(data), epochs, place)


def floor(folder: Path, weights: Path, epochs: int, place: Path) -> float:
    """Scaled decoding, the backbone once, its features in memory."""
    data = opened(folder, loader=scaled)
    train, validation = parts(data)
    model = HeadOnly(weights, len(data.classes)).eval()
    with torch.inference_mode():
        rows = [model.features(images) for images, _ in DataLoader(data, 32, num_workers=WORKERS)]
    features, targets = torch.cat(rows).clone(), torch.tensor(data.targets)
    optimizer, accuracy, held = adamw(model), 0.0, torch.tensor(validation.indices)
    for epoch in range(epochs):
        for batch in torch.tensor(train.indices)[torch.randperm(len(train))].split(BATCH):
            loss = functional.cross_entropy(model.head(features[batch]), targets[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.inference_mode():
            accuracy = (model.head(features[held]).argmax(1) == targets[held]).float().mean().item()
        torch.save({"head": model.head.state_dict(), "epoch": epoch}, place / "last.pt")
    return accuracy


def lightning(folder: Path, weights: Path, epochs: int, place: Path) -> float:
    data = opened(folder)
    return by_lightning(HeadOnly(weights, len(data.classes)), *loaders(data), epochs, place)


def fastai(folder: Path, weights: Path, epochs: int, place: Path) -> float:
    from fastai.callback.tracker import SaveModelCallback
    from fastai.data.transforms import Normalize
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from fastai.optimizer import Adam
    from fastai.vision.augment import Resize
    from fastai.vision.data import ImageDataLoaders

    data = ImageDataLoaders.from_folder(
        folder, valid_pct=0.2, seed=0, item_tfms=Resize(EDGE), batch_tfms=Normalize.from_stats(MEAN, STD), bs=BATCH,
        num_workers=WORKERS,
    )  # fmt: skip
    learner = Learner(
        data, HeadOnly(weights, len(data.vocab)), loss_func=nn.CrossEntropyLoss(), opt_func=Adam, lr=LEARNING_RATE,
        metrics=accuracy, path=place, model_dir=".", train_bn=False,
        splitter=lambda m: [list(m.backbone.parameters()), list(m.head.parameters())],
        cbs=SaveModelCallback(every_epoch=True, with_opt=True),
    )  # fmt: skip
    learner.freeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit(epochs)
    return float(learner.recorder.values[-1][-1])


PEERS = {"raw": raw, "floor": floor, "lightning": lightning, "fastai": fastai}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--place", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(json.dumps(PEERS[options.peer](options.folder, options.weights, options.epochs, options.place)))


if __name__ == "__main__":
    main()
