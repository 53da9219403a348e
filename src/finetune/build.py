"""Builds what a training or an export needs: data, network, weights; new from a recipe or as a run left them."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.checkpoint import read_checkpoint
from finetune.data.images import ImagePipeline, Request, open_images, split_source
from finetune.data.loader import one_thread
from finetune.data.order import batches_from
from finetune.data.source import Source
from finetune.device import to_device
from finetune.errors import RunError, UsageError
from finetune.files import BadFile
from finetune.models.backbones import Backbone, find_backbone
from finetune.models.freeze import check_rules, frozen_tensors
from finetune.models.heads import standardise, standardised_layers
from finetune.models.network import Network, build_network, load_frozen
from finetune.models.weights import WeightsFile, find_weights, read_weights
from finetune.recipe import Recipe, differences, from_plain, to_plain
from finetune.run import RunFolder

# Enough samples for a mean and a deviation; more would only cost time.
STANDARDISE_SAMPLES = 16_384
STANDARDISE_BATCH = 256


@dataclass(frozen=True)
class Numerics:
    """Choices that change the last bits, saved with the run."""

    precision: str = "fp32"
    deterministic: bool = True


@dataclass(frozen=True)
class Data:
    """The opened data set, split, and its pipeline."""

    source: Source
    train: Tensor
    validation: Tensor
    pipeline: ImagePipeline

    @property
    def class_count(self) -> int:
        return len(self.source.classes)

    def facts(self) -> dict[str, Any]:
        return {
            "fingerprint": self.source.fingerprint,
            "classes": list(self.source.classes),
            "train_samples": len(self.train),
            "validation_samples": len(self.validation),
        }


def open_data(recipe: Recipe, backbone: Backbone) -> Data:
    """Open and split what the recipe names.

    Raises:
        UsageError: no such data, or too little of it.
    """
    spec = recipe.data
    source = open_images(spec.images, spec.fonts)
    train_indices, validation_indices = split_source(source, spec.validation_fraction, recipe.seed, spec.train_samples)
    if not len(validation_indices):
        raise UsageError(
            f"--images {spec.images}: no class has two images, so nothing is left to validate with; add images"
        )
    pipeline = ImagePipeline(
        source,
        spec.image_size or backbone.image_size,
        spec.augment,
        backbone.mean,
        backbone.std,
        recipe.seed,
    )
    return Data(source, train_indices, validation_indices, pipeline)


def determining_config(recipe: Recipe, numerics: Numerics) -> dict[str, Any]:
    """Everything that determines the result, as plain values: what a resume must find unchanged."""
    return to_plain(recipe) | dataclasses.asdict(numerics)


def split_config(config: dict[str, Any]) -> tuple[Recipe, Numerics]:
    """What `determining_config` put together.

    Raises:
        RunError: values that no recipe has: the file was edited.
    """
    names = {field.name for field in dataclasses.fields(Numerics)}
    try:
        recipe = from_plain({name: value for name, value in config.items() if name not in names})
        return recipe, Numerics(**{name: config[name] for name in names if name in config})
    except (TypeError, AttributeError, ValueError) as error:
        raise RunError(f"the saved recipe is not one ({error}); restore recipe.json from a copy") from None


def new_network(recipe: Recipe, class_count: int) -> tuple[Network, WeightsFile | None]:
    """The recipe's network with its pretrained weights and a fresh head, on the CPU."""
    backbone = find_backbone(recipe.model.backbone)
    weights = find_weights(recipe.model.weights, backbone)
    try:
        tensors = read_weights(weights.path) if weights else None
    except BadFile as error:
        raise UsageError(f"--weights {recipe.model.weights}: {error}") from None
    network = build_network(
        backbone,
        tensors,
        f"--weights {weights.path}" if weights else "",
        head=recipe.model.head,
        class_count=class_count,
        dropout=recipe.model.dropout,
        head_width=recipe.model.head_width,
        seed=recipe.seed,
    )
    check_rules(network.module, network.rules(recipe.trainable.rules))
    return network, weights


def standardise_head(module: nn.Module, data: Data, device: torch.device) -> None:
    """Measure the features of the training set, without augmentation, for the head that trains on them."""
    if not any(True for _ in standardised_layers(module)):
        return

    def inputs() -> Iterator[Tensor]:
        for indices in batches_from(data.train[:STANDARDISE_SAMPLES], STANDARDISE_BATCH):
            with one_thread():
                images, _ = data.pipeline.fetch(Request(indices.tolist()))
            yield to_device(images, device)

    module.eval()
    standardise(module, inputs())


def load_from_run(network: Network, init_from: str, classes: list[str]) -> None:
    """Load another run's weights, frozen and trained ones.

    Raises:
        RunError: that run has other classes or another architecture.
    """
    folder, _, which = init_from.partition(":")
    if which not in ("", "best", "latest"):
        raise UsageError(f"--init-from {init_from}: {which!r} is not allowed; give RUN, RUN:best or RUN:latest")
    other, state = trained_network(RunFolder(Path(folder)), which or "best")
    if state["data"]["classes"] != classes:
        raise RunError(
            f"--init-from {folder}: trained on other classes ({len(state['data']['classes'])}, here {len(classes)})"
        )
    own, found = network.module.state_dict(), other.module.state_dict()
    if {name: v.shape for name, v in own.items()} != {name: v.shape for name, v in found.items()}:
        raise RunError(f"--init-from {folder}: another architecture or head; use the same --backbone and --head")
    network.module.load_state_dict(found)


# ---- As a run left it ------------------------------------------------------------------------------------------


def check_same_config(record: dict[str, Any], config: dict[str, Any], what: str) -> None:
    """Compare plain values as JSON sees them.

    Raises:
        RunError: they differ; says `what` and in which values.
    """
    found = differences(record, json.loads(json.dumps(config)))
    if found:
        raise RunError(f"{what}: " + "; ".join(found))


def saved_network(run: RunFolder, recipe: Recipe, state: dict[str, Any]) -> Network:
    """The network as a checkpoint left it: frozen tensors from frozen/, everything else from `state`.

    Raises:
        RunError: the two do not make up the whole network.
    """
    backbone = find_backbone(recipe.model.backbone)
    kind, tensors = load_frozen(run.frozen, backbone)
    class_count = len(state["data"]["classes"])
    network = build_network(
        backbone,
        tensors if kind == "source" else None,
        f"frozen weights of {run.path}",
        head=recipe.model.head,
        class_count=class_count,
        dropout=recipe.model.dropout,
        head_width=recipe.model.head_width,
        seed=recipe.seed,
        old_class_count=state["network"]["old_class_count"],
    )
    module = network.module
    if kind == "tensors" and tensors is not None:
        module.load_state_dict(tensors, strict=False)
    frozen = frozen_tensors(module, network.rules(recipe.trainable.rules), state["frozen"]["epoch"])
    # Counted here, not by load_state_dict: BatchNorm never reports a missing counter.
    mismatch = set(module.state_dict()) ^ (set(frozen) | set(state["model"]))
    if mismatch or set(frozen) & set(state["model"]):
        raise RunError(f"checkpoint of {run.path} does not fit its recipe: {', '.join(sorted(mismatch))}")
    try:
        module.load_state_dict(state["model"], strict=False)
    except RuntimeError as error:
        raise RunError(f"checkpoint of {run.path} does not fit its recipe: {' '.join(str(error).split())}") from None
    return network


def trained_network(run: RunFolder, which: str) -> tuple[Network, dict[str, Any]]:
    """The network of a run's `best` or `latest` checkpoint, on the CPU, in eval mode, and the checkpoint."""
    record = run.read_recipe()
    recipe, _ = split_config(record["config"])
    path = run.checkpoints / f"{which}.pt"
    if not path.exists():
        raise RunError(f"run {run.path} has no {which} checkpoint yet; train it first: finetune resume {run.path}")
    state = read_checkpoint(path)
    check_same_config(record["config"], state["config"], f"{path} is not of the recipe in {run.recipe_file}")
    network = saved_network(run, recipe, state)
    network.module.eval()
    return network, state
