"""Two runs held against each other: every tensor of their checkpoints, every figure of their logs."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finetune.recipe.serialize import differences
from finetune.store.checkpoint import read_checkpoint
from finetune.store.run_folder import RunFolder

# What says when and where, of a checkpoint and of a line of the log, and not what was computed.
OF_THE_RUN = ("run_id", "history", "metrics_file", "retention", "trackers", "versions")
OF_THE_MOMENT = ("time/", "memory/", "device/")


@dataclass
class Comparison:
    """What was compared, and what is not the same.

    Attributes:
        tensors, figures: how many were compared.
        recipe: values of the recipe that differ, a line each.
        figure: the first figure of the log that differs: its name, its step, both values.
        tensor: the first tensor or value of the checkpoints that differs, and in words by how much.
        is_tensor: it is a tensor.
        differing: how many differ, of tensors and other values.
    """

    tensors: int = 0
    figures: int = 0
    recipe: list[str] = field(default_factory=list)
    figure: tuple[str, int, float | None, float | None] | None = None
    tensor: tuple[str, str] | None = None
    is_tensor: bool = False
    differing: int = 0

    @property
    def is_same(self) -> bool:
        return not self.recipe and self.figure is None and self.tensor is None


def compare(one: RunFolder, other: RunFolder) -> Comparison:
    """Hold two finished runs against each other.

    Raises:
        RunError: a checkpoint of theirs cannot be read.
    """
    found = Comparison()
    records = one.read_recipe(), other.read_recipe()
    lines = differences(records[0].config, records[1].config)
    found.recipe = [
        line.replace(" in the run, ", " in one run, ").removesuffix(" now") + " in the other" for line in lines
    ]
    _compare_logs(found, _log(one), _log(other))
    for name in ("best.pt", "latest.pt", "final.pt"):
        if not any((run.checkpoints / name).exists() for run in (one, other)):
            continue  # no head was solved
        ours, theirs = (
            dict(_leaves(read_checkpoint(run.checkpoints / name, record.id).to_plain()))
            for run, record in zip((one, other), records, strict=True)
        )
        _compare_values(found, name.removesuffix(".pt"), ours, theirs)
    return found


def _log(run: RunFolder) -> list[dict[str, float]]:
    """What was logged, without what depends on the moment."""
    lines = [json.loads(line) for line in run.metrics_file.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(OF_THE_MOMENT)} for line in lines]


def _compare_logs(found: Comparison, ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    for number in range(max(len(ours), len(theirs))):
        one, other = (lines[number] if number < len(lines) else {} for lines in (ours, theirs))
        for name in dict.fromkeys([*one, *other]):
            found.figures += 1
            if found.figure is None and not is_equal(one.get(name), other.get(name)):
                step = int((one or other)["step"])
                found.figure = name, step, one.get(name), other.get(name)


def _compare_values(found: Comparison, which: str, ours: Mapping[str, object], theirs: Mapping[str, object]) -> None:
    for name in dict.fromkeys([*ours, *theirs]):
        one, other = ours.get(name), theirs.get(name)
        found.tensors += isinstance(one, Tensor) and isinstance(other, Tensor)
        if not is_equal(one, other):
            found.differing += 1
            is_first = found.tensor is None or (not found.is_tensor and isinstance(one, Tensor))
            if is_first:  # tensors tell more than what was made of them
                found.tensor = f"{name} of the {which} checkpoint", _how_far(one, other)
                found.is_tensor = isinstance(one, Tensor)


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """The tensors and plain values within a checkpoint, by where they stand."""
    if isinstance(value, dict):
        for key, inside in value.items():
            if name or key not in OF_THE_RUN:
                yield from _leaves(inside, f"{name}/{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inside, Tensor) for inside in value):
        for number, inside in enumerate(value):
            yield from _leaves(inside, f"{name}/{number}")
    else:
        yield name, value


def is_equal(one: object, other: object) -> bool:
    """Whether every bit is the same; no number equals no number."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        raw = (value.detach().contiguous().reshape(-1).view(torch.uint8) for value in (one, other))
        return torch.equal(*raw)
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and one == other


def _how_far(one: object, other: object) -> str:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return f"{_short(one)} and {_short(other)}"
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
    if not one.is_floating_point():
        return f"{int((one != other).sum()):,} of {one.numel():,} numbers"
    return f"by up to {(one.double() - other.double()).abs().max().item():.3g}"


def _short(value: object, length: int = 40) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
