"""Backbone, weights and head put together."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.data.order import keyed_generator
from finetune.errors import RunError, UsageError
from finetune.files import copy_file, link_or_copy, read_json, sha256_of_file, write_json
from finetune.models.backbones import Backbone
from finetune.models.freeze import Rule
from finetune.models.heads import attach_head, find_head, trainable_head_path
from finetune.models.weights import WeightsFile, load_backbone_weights, read_weights


@dataclass(frozen=True)
class Network:
    """A module and where its head is.

    Attributes:
        head_path: the stock place of the head.
        old_class_count: classes of the layer that an appended head stands behind; else those of the data.
    """

    module: nn.Module
    head_path: str
    head_kind: str
    old_class_count: int

    def rules(self, rules: tuple[tuple[str, str, int], ...]) -> tuple[Rule, ...]:
        """The recipe's freeze rules with "head" replaced by the path of what trains of it.

        Raises:
            UsageError: a state that is neither "trainable" nor "frozen".
        """
        head = trainable_head_path(self.head_path, self.head_kind)
        for pattern, state, _ in rules:
            if state not in ("trainable", "frozen"):
                raise UsageError(f"freeze rule {pattern!r}: {state!r} is not allowed; give 'trainable' or 'frozen'")
        return tuple(Rule(head if p == "head" else p, state == "trainable", epoch) for p, state, epoch in rules)


def build_network(
    backbone: Backbone,
    state: dict[str, Tensor] | None,
    source: str,
    *,
    head: str,
    class_count: int,
    dropout: float,
    head_width: int,
    seed: int,
    old_class_count: int = 0,
) -> Network:
    """Build the architecture, load pretrained tensors, put the head on.

    Args:
        state: pretrained tensors by their stock names, or None for random ones drawn from `seed`.
        source: what to call `state` in an error.
        head: "linear", "mlp", "append", or "keep" = the architecture's own last layer.
        old_class_count: classes of the old layer under an appended head; 0 = as `state` has.

    Raises:
        UsageError: the weights do not fit, or "append" without weights.
    """
    head_path = find_head(backbone.build)[-1]
    if head != "append":
        old_class_count = class_count
    elif not old_class_count:
        if state is None or f"{head_path}.weight" not in state:
            raise UsageError(
                "--head append needs pretrained weights with their old head; give --weights, or --head linear"
            )
        old_class_count = len(state[f"{head_path}.weight"])
    with keyed_generator("model", seed):
        module = backbone.build(old_class_count)
        if state is not None:
            load_backbone_weights(module, state, [head_path], source)
        if head != "keep":
            attach_head(module, head_path, head, class_count, dropout, head_width)
    return Network(module, head_path, head, old_class_count)


# ---- The frozen tensors of a run --------------------------------------------------------------------------------
# frozen/frozen.json says where they are: "file" in this folder ("source" = a stock weights file, "tensors" = just the
# frozen ones), else the backbone's own weights by name and hash.


def on_one_file_system(path: Path, other: Path) -> bool:
    """Whether a hard link between the two can be made."""
    return path.stat().st_dev == other.stat().st_dev


def store_frozen(folder: Path, weights: WeightsFile | None, frozen: dict[str, Tensor], copy: bool) -> None:
    """Make sure that the frozen tensors can be had again when the run resumes.

    A hard link to the weights file where the file system can; a reference where the same bytes can be found again
    by name and hash; else a copy.

    Args:
        folder: the run's `frozen` folder.
        weights: the file whose tensors `frozen` are, or None when no file has them (random, or taken from a run).
        copy: always copy, so that the run folder stands alone.
    """
    folder.mkdir(exist_ok=True)
    record = {"kind": "none", "file": "", "reference": "", "sha256": ""}
    if weights is not None:
        path = folder / f"weights{weights.path.suffix}"
        if copy or not weights.reference or on_one_file_system(weights.path, folder):
            (copy_file if copy else link_or_copy)(weights.path, path)
            record["file"] = path.name
        record |= {"kind": "source", "reference": weights.reference, "sha256": weights.sha256}
    elif frozen:
        path = folder / "weights.safetensors"
        temporary = folder / ".weights.safetensors.tmp"
        save_file({name: value.detach().cpu().contiguous() for name, value in frozen.items()}, temporary)
        link_or_copy(temporary, path)
        temporary.unlink()
        record |= {"kind": "tensors", "file": path.name, "sha256": sha256_of_file(path)}
    write_json(folder / "frozen.json", record)


def load_frozen(folder: Path, backbone: Backbone) -> tuple[str, dict[str, Tensor] | None]:
    """The tensors that `store_frozen` kept: (kind, tensors); kind is "source", "tensors" or "none".

    Raises:
        RunError: the file is gone, or holds other bytes.
    """
    record = read_json(folder / "frozen.json", "record of the frozen weights")
    if record["kind"] == "none":
        return "none", None
    path = folder / record["file"] if record["file"] else backbone.weights_file
    if path is None or not path.is_file():
        raise RunError(f"frozen weights {path} are gone; put the file with sha256 {record['sha256']} there")
    found = sha256_of_file(path)
    if found != record["sha256"]:
        raise RunError(
            f"frozen weights {path} are not those of this run: sha256 {found}, expected {record['sha256']}; "
            "put the right file there"
        )
    return record["kind"], read_weights(path)
