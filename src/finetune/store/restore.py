"""The network of a run, as a checkpoint left it."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from finetune.base.files import BadFile
from finetune.base.plain import Plain
from finetune.data.tokens import Tokenization
from finetune.errors import RunError, UsageError
from finetune.models.backbones import Backbone, backbone_from_plain
from finetune.models.heads import last_layer
from finetune.models.network import Network, build_network, load_frozen
from finetune.models.pretrained import sized
from finetune.models.weights import (
    load_state,
)
from finetune.recipe.execution import completed, split_config
from finetune.recipe.serialize import differences
from finetune.recipe.spec import Recipe
from finetune.store.checkpoint import read_checkpoint
from finetune.store.run_folder import RunFolder, peek
from finetune.store.state import CheckpointState, DataFacts


def backbone_of_run(run: RunFolder, state: CheckpointState) -> Backbone:
    """The backbone of a run, with its tokenizer, out of a checkpoint and the run's folder."""
    backbone = backbone_from_plain(state.network.backbone)
    if not isinstance(backbone.preprocessing, Tokenization):
        return backbone
    return dataclasses.replace(backbone, preprocessing=backbone.preprocessing.read(run.tokenizer))


def network_from_run(recipe: Recipe, init_from: str) -> tuple[Backbone, Network, DataFacts]:
    """The recipe's network with another run's weights, frozen and trained ones; its backbone; what that run keeps of
    its data.

    No pretrained file is needed, and images are prepared as in that run.

    Raises:
        RunError: that run has another architecture.
    """
    folder, _, which = init_from.partition(":")
    if which == "final":
        raise UsageError(
            f"--init-from {init_from}: the solved head has seen the samples that validate; give {folder}:best"
        )
    if which not in ("", "best", "latest"):
        raise UsageError(f"--init-from {init_from}: {which!r} is not allowed; give RUN, RUN:best or RUN:latest")
    run = RunFolder(Path(folder))
    other, state = trained_network(run, which or "best", calibrated=False)
    backbone = backbone_of_run(run, state)
    if (backbone.name, other.head_kind) != (recipe.model.full_name, recipe.model.head):
        raise RunError(f"--init-from {folder}: another architecture or head; use the same --backbone and --head")
    has_unit_rows = split_config(state.config)[0].model.unit_rows
    if has_unit_rows != recipe.model.unit_rows:
        what = "give --unit-rows, as its head reads features of norm 1" if has_unit_rows else "leave --unit-rows out"
        raise RunError(f"--init-from {folder}: another head; {what}")
    pooling = backbone.options.get("pooling", "auto")
    if recipe.model.pooling not in ("auto", pooling):
        raise RunError(f"--init-from {folder}: pools by {pooling!r}, not {recipe.model.pooling!r}; leave --pooling out")
    network = build_network(
        backbone,
        None,
        "",
        head=recipe.model.head,
        class_count=state.data.outputs,
        dropout=recipe.model.dropout,
        head_width=recipe.model.head_width,
        unit_rows=recipe.model.unit_rows,
        one_logit=recipe.model.one_logit,
        seed=recipe.seed,
        old_class_count=other.old_class_count,
        new_paths=other.new_paths,
    )
    own, found = network.module.state_dict(), other.module.state_dict()
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in found.items()}:
        raise RunError(f"--init-from {folder}: another head; use the same --head and width")
    network.module.load_state_dict(found)
    network.freeze_map(recipe.trainable).check()
    return sized(backbone, recipe), network, state.data


def with_other_classes(recipe: Recipe, backbone: Backbone, network: Network, places: Sequence[int]) -> Network:
    """A network for other classes: what it knows of old ones stays, and new ones begin at random.

    Args:
        places: of each new class its place among the old ones; -1 = it was none of them.
    """
    new = build_network(
        backbone,
        None,
        "",
        head=recipe.model.head,
        class_count=len(places),
        dropout=recipe.model.dropout,
        head_width=recipe.model.head_width,
        unit_rows=recipe.model.unit_rows,
        seed=recipe.seed,
        old_class_count=network.old_class_count if network.head_kind == "append" else 0,
        new_paths=network.new_paths,
    )
    tensors, old = new.module.state_dict(), network.module.state_dict()
    ours = [place for place, other in enumerate(places) if other >= 0]
    theirs = [other for other in places if other >= 0]
    heads = network.head_paths[-1:] if network.head_kind == "append" else network.head_paths
    layers = [last_layer(path, network.head_kind) for path in heads]
    with_a_row_a_class = {f"{layer}.{name}" for layer in layers for name in ("weight", "bias")}
    for name, value in old.items():
        if name in with_a_row_a_class:
            tensors[name][ours] = value[theirs]
        else:
            tensors[name] = value
    new.module.load_state_dict(tensors)
    new.freeze_map(recipe.trainable).check()
    return new


# ---- As a run left it ------------------------------------------------------------------------------------------


def check_same_config(record: Plain, config: Plain, what: str) -> None:
    """Compare plain values as JSON sees them.

    Raises:
        RunError: they differ; says `what` and in which values.
    """
    found = differences(record, json.loads(json.dumps(config)))
    if found:
        raise RunError(f"{what}: " + "; ".join(found))


def check_same_recipe(record: Plain, config: Plain, what: str) -> None:
    """Compare the configs of two files of a run, the older of which may lack choices that came later.

    Raises:
        RunError: they differ; says `what` and in which values.
    """
    if json.loads(json.dumps(config)) != record:
        check_same_config(completed(record), completed(config), what)


def saved_network(run: RunFolder, recipe: Recipe, state: CheckpointState) -> Network:
    """The network as a checkpoint left it: frozen tensors from frozen/, everything else from `state`.

    Raises:
        RunError: the two do not make up the whole network.
    """
    backbone = backbone_from_plain(state.network.backbone)
    kind, tensors = load_frozen(run.frozen)
    network = build_network(
        backbone,
        tensors if kind == "source" else None,
        f"frozen weights of {run}",
        head=recipe.model.head,
        class_count=state.data.outputs,
        dropout=recipe.model.dropout,
        head_width=recipe.model.head_width,
        unit_rows=recipe.model.unit_rows,
        one_logit=recipe.model.one_logit,
        seed=recipe.seed,
        old_class_count=state.network.old_class_count,
        new_paths=state.network.new_paths,
    )
    module = network.module
    what = f"checkpoint of {run} does not fit its recipe"
    if kind == "tensors" and tensors is not None:
        _put(module, tensors, what)
    freeze_map = network.freeze_map(recipe.trainable, state.progress.plateaus)
    frozen = freeze_map.at(state.frozen.epoch).frozen()
    # Counted here, not by load_state_dict: BatchNorm never reports a missing counter.
    mismatch = set(module.state_dict()) ^ (set(frozen) | set(state.model))
    if mismatch or set(frozen) & set(state.model):
        raise RunError(f"{what}: {', '.join(sorted(mismatch)[:5])}, ...; restore recipe.json and frozen/ of that run")
    _put(module, state.model, what)
    return network


def _put(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Load a part of the network's tensors."""
    try:
        load_state(module, tensors, None, what)
    except UsageError as error:
        raise RunError(str(error)) from None


def shipped(run: RunFolder, which: str) -> str:
    """Which checkpoint is meant.

    Args:
        which: "best", "latest", "final", or "auto" = the better of the loop's best and the solved head.
    """
    if which != "auto":
        return which
    try:
        return peek(run.latest).progress.finish.ships
    except (BadFile, RunError, OSError):  # where it is read in earnest, what is wrong is said
        return "best"


def trained_network(run: RunFolder, which: str, *, calibrated: bool = True) -> tuple[Network, CheckpointState]:
    """The network of a run's checkpoint, on the CPU, in eval mode, and the checkpoint.

    Args:
        which: "best", "latest" or "final".
        calibrated: as it ships: what the loop's best gives is divided by its temperature.
    """
    record = run.read_recipe()
    recipe, _ = split_config(record.config)
    path = run.checkpoints / f"{which}.pt"
    if which == "final" and not path.exists():
        raise RunError(f"run {run} has no final checkpoint: its head was not solved; give best or latest")
    if not path.exists():
        raise RunError(f"run {run} has no {which} checkpoint yet; train it first: finetune resume {run}")
    state = read_checkpoint(path, record.id)
    check_same_recipe(record.config, state.config, f"{path} is not of the recipe in {run.recipe_file}")
    network = saved_network(run, recipe, state)
    network.module.eval()
    if calibrated and which == "best" and "temperature" in state.progress.best:
        _divide(network.last_layer(), state.progress.best["temperature"])
    return network, state


def shipped_thresholds(which: str, state: CheckpointState) -> list[float]:
    """From which probability on each class applies; [] = one half.

    Args:
        which: of the state: "best", "latest" or "final".
    """
    progress = state.progress
    if which == "final":
        return progress.finish.thresholds
    return progress.best.get("thresholds", []) if which == "best" else []


def shipped_half_width(which: str, state: CheckpointState) -> float:
    """What nine of ten numbers lie within of what is predicted of them, in their own unit; 0 = not known.

    Args:
        which: of the state: "best", "latest" or "final".
    """
    progress = state.progress
    found = progress.finish.half_width if which == "final" else 0.0
    found = progress.best.get("half_width", 0.0) if which == "best" else found
    return found * state.data.scale[1] if found and state.data.scale else 0.0


def _divide(layer: nn.Module | None, temperature: float) -> None:
    """Divide what a linear layer gives."""
    if layer is not None:
        for value in layer.parameters(recurse=False):
            value.data /= temperature
