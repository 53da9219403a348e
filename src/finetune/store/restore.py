"""Builds what a training or an export needs: data, network, weights; new from a recipe or as a run left them."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.base.files import BadFile
from finetune.data.tokens import Tokenization
from finetune.errors import RunError, UsageError
from finetune.models.backbones import Backbone, backbone_from_plain, check_image_size
from finetune.models.freeze import check_rules, frozen_tensors
from finetune.models.network import Network, build_network, check_padding, load_frozen
from finetune.models.weights import (
    Weights,
    choose_teacher,
    choose_text_weights,
    choose_weights,
    load_state,
    read_weights,
)
from finetune.recipe.serialize import differences, from_plain, to_plain
from finetune.recipe.spec import Distillation, Recipe, Texts
from finetune.store.checkpoint import read_checkpoint
from finetune.store.run_folder import RunFolder


@dataclass(frozen=True)
class Numerics:
    """Choices that change the last bits, saved with the run.

    Attributes:
        precision: of the arithmetic.
        deterministic: deterministic algorithms only.
        backbone_precision: of the frozen part before what trains; "" = the same.
        cache: whether features may be kept.
    """

    precision: str = "fp32"
    deterministic: bool = True
    backbone_precision: str = ""
    cache: bool = True

    @property
    def of_backbone(self) -> str:
        """The precision of the frozen part."""
        return self.backbone_precision or self.precision

    @property
    def splits(self) -> bool:
        """Whether the frozen part computes in another precision than the rest."""
        return self.of_backbone != self.precision


def check_precision(numerics: Numerics, device: torch.device) -> None:
    """Refuse a precision that the device has no arithmetic for.

    Raises:
        UsageError: names the option.
    """
    for option in ("precision", "backbone_precision"):
        if getattr(numerics, option) == "fp16" and device.type != "cuda":
            raise UsageError(
                f"--{option.replace('_', '-')} fp16: not on {device.type}; allowed there are fp32 and bf16"
            )


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
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        raise RunError(f"the saved recipe is not one ({error}); restore recipe.json from a copy") from None


def find_pretrained(recipe: Recipe) -> tuple[Backbone, Weights | None]:
    """The recipe's backbone, prepared for its data, and its weights: None for random ones."""
    model = recipe.model
    if isinstance(recipe.task, Distillation):
        backbone, weights = choose_teacher(model.backbone)
    elif isinstance(recipe.data, Texts):
        backbone, weights = choose_text_weights(model.backbone, model.revision, model.weights, model.pooling)
    else:
        backbone, weights = choose_weights(model.backbone, model.weights)
    return sized(backbone, recipe), weights


def sized(backbone: Backbone, recipe: Recipe) -> Backbone:
    """The backbone for the recipe's image size or length of text, if it has one.

    Raises:
        UsageError: the architecture cannot take it, or is of the other kind.
    """
    if backbone.reads_texts != isinstance(recipe.data, Texts):
        raise UsageError(f"--backbone {backbone.name}: does not go with {recipe.data.option} {recipe.data.place}")
    if isinstance(backbone.preprocessing, Tokenization):
        length = recipe.data.max_length or backbone.preprocessing.max_length
        return dataclasses.replace(backbone, preprocessing=backbone.preprocessing.at(length))
    size = recipe.data.image_size or backbone.preprocessing.image_size
    check_image_size(backbone, size)
    return dataclasses.replace(backbone, preprocessing=backbone.preprocessing.at(size))


def backbone_of_run(run: RunFolder, state: dict[str, Any]) -> Backbone:
    """The backbone of a run, with its tokenizer, out of a checkpoint and the run's folder."""
    backbone = backbone_from_plain(state["network"]["backbone"])
    if not isinstance(backbone.preprocessing, Tokenization):
        return backbone
    return dataclasses.replace(backbone, preprocessing=backbone.preprocessing.read(run.tokenizer))


def new_network(
    recipe: Recipe,
    backbone: Backbone,
    weights: Weights | None,
    output_count: int,
    tensors: dict[str, Tensor] | None = None,
) -> Network:
    """The recipe's network with its pretrained weights and a fresh head, on the CPU.

    Args:
        tensors: what it begins with, where no file holds just that.
    """
    try:
        if tensors is None and weights is not None:
            tensors = read_weights(weights.path)
    except BadFile as error:
        raise UsageError(f"--weights {recipe.model.weights}: {error}") from None
    network = build_network(
        backbone,
        tensors,
        f"--weights {weights.path}" if weights else "",
        head=recipe.model.head,
        class_count=output_count,
        dropout=recipe.model.dropout,
        head_width=recipe.model.head_width,
        seed=recipe.seed,
    )
    check_rules(network.module, network.rules(recipe.trainable.rules))
    if backbone.reads_texts:
        check_padding(network, backbone, f"--backbone {backbone.name}")
    return network


def network_from_run(recipe: Recipe, init_from: str) -> tuple[Backbone, Network, dict[str, Any]]:
    """The recipe's network with another run's weights, frozen and trained ones; its backbone; what that run keeps of
    its data.

    No pretrained file is needed, and images are prepared as in that run.

    Raises:
        RunError: that run has another architecture.
    """
    folder, _, which = init_from.partition(":")
    if which not in ("", "best", "latest"):
        raise UsageError(f"--init-from {init_from}: {which!r} is not allowed; give RUN, RUN:best or RUN:latest")
    run = RunFolder(Path(folder))
    other, state = trained_network(run, which or "best")
    backbone = backbone_of_run(run, state)
    if (backbone.name, other.head_kind) != (recipe.model.full_name, recipe.model.head):
        raise RunError(f"--init-from {folder}: another architecture or head; use the same --backbone and --head")
    pooling = backbone.options.get("pooling", "auto")
    if recipe.model.pooling not in ("auto", pooling):
        raise RunError(f"--init-from {folder}: pools by {pooling!r}, not {recipe.model.pooling!r}; leave --pooling out")
    network = build_network(
        backbone,
        None,
        "",
        head=recipe.model.head,
        class_count=state["data"]["outputs"],
        dropout=recipe.model.dropout,
        head_width=recipe.model.head_width,
        seed=recipe.seed,
        old_class_count=other.old_class_count,
        new_paths=other.new_paths,
    )
    own, found = network.module.state_dict(), other.module.state_dict()
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in found.items()}:
        raise RunError(f"--init-from {folder}: another head; use the same --head and width")
    network.module.load_state_dict(found)
    check_rules(network.module, network.rules(recipe.trainable.rules))
    return sized(backbone, recipe), network, state["data"]


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
    backbone = backbone_from_plain(state["network"]["backbone"])
    kind, tensors = load_frozen(run.frozen)
    network = build_network(
        backbone,
        tensors if kind == "source" else None,
        f"frozen weights of {run}",
        head=recipe.model.head,
        class_count=state["data"]["outputs"],
        dropout=recipe.model.dropout,
        head_width=recipe.model.head_width,
        seed=recipe.seed,
        old_class_count=state["network"]["old_class_count"],
        new_paths=state["network"]["new_paths"],
    )
    module = network.module
    what = f"checkpoint of {run} does not fit its recipe"
    if kind == "tensors" and tensors is not None:
        _put(module, tensors, what)
    frozen = frozen_tensors(module, network.rules(recipe.trainable.rules), state["frozen"]["epoch"])
    # Counted here, not by load_state_dict: BatchNorm never reports a missing counter.
    mismatch = set(module.state_dict()) ^ (set(frozen) | set(state["model"]))
    if mismatch or set(frozen) & set(state["model"]):
        raise RunError(f"{what}: {', '.join(sorted(mismatch))}")
    _put(module, state["model"], what)
    return network


def _put(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Load a part of the network's tensors."""
    try:
        load_state(module, tensors, None, what)
    except UsageError as error:
        raise RunError(str(error)) from None


def trained_network(run: RunFolder, which: str) -> tuple[Network, dict[str, Any]]:
    """The network of a run's `best` or `latest` checkpoint, on the CPU, in eval mode, and the checkpoint."""
    record = run.read_recipe()
    recipe, _ = split_config(record["config"])
    path = run.checkpoints / f"{which}.pt"
    if not path.exists():
        raise RunError(f"run {run} has no {which} checkpoint yet; train it first: finetune resume {run}")
    state = read_checkpoint(path, record["id"])
    check_same_config(record["config"], state["config"], f"{path} is not of the recipe in {run.recipe_file}")
    network = saved_network(run, recipe, state)
    network.module.eval()
    return network, state
