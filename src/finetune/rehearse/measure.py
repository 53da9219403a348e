"""What a rehearsal measures: how long the training will take, how much memory and disk it wants."""

import json
import os
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from finetune.base.cache_folders import features_folder
from finetune.base.formatting import parse_size
from finetune.base.memory import MB
from finetune.features.cache import FREE_SHARE
from finetune.rehearse.extent import Asked, Extent
from finetune.rehearse.process import Ended
from finetune.store.run_folder import RUNS_FOLDER, RunFolder

# Said before and after the backbone runs over the samples.
PASS_BEGINS, PASS_ENDS = "features: kept; the frozen backbone runs over", "backbone "


@dataclass(frozen=True)
class Room:
    """What something takes on a disk, and what is free there."""

    folder: Path
    bytes: int
    free_bytes: int

    @property
    def suffices(self) -> bool:
        return self.bytes <= self.free_bytes


@dataclass(frozen=True)
class Measured:
    """Of the training itself, worked out from the rehearsal.

    Attributes:
        step_seconds: of an optimizer step; epoch_seconds: of an epoch with its validation.
        pass_seconds: of the frozen backbone, once over all samples; 0 = it runs in every epoch, or not at all.
        start_seconds: until the first step, without that.
        total_seconds: of everything.
        peak_bytes: the most memory, worker processes included; device_bytes: of the GPU.
        checkpoint_bytes: of one.
        run: the room for the run's folder; None where it lies elsewhere.
        features: for kept features; None = there are none.
        are_kept: they will be: there is room for them.
    """

    step_seconds: float
    epoch_seconds: float
    pass_seconds: float
    start_seconds: float
    total_seconds: float
    peak_bytes: int
    device_bytes: int
    checkpoint_bytes: int
    run: Room | None
    features: Room | None
    are_kept: bool


def measure(asked: Asked, extent: Extent, ended: Ended, run: RunFolder, kept: Path) -> Measured:
    """Work out what the training will take.

    Args:
        ended: the unbroken run's process; `run`: its folder; `kept`: that of its features.
    """
    lines = [json.loads(line) for line in run.metrics_file.read_text(encoding="utf-8").splitlines()]
    features_bytes = sum(path.stat().st_size for path in kept.glob("*.safetensors")) if kept.is_dir() else 0
    step_seconds = _step_seconds(lines, extent, waits=not features_bytes)
    validation_seconds = _validation_seconds(lines)
    whole, short = extent.whole, extent.short
    validation_seconds *= whole.validation / max(short.validation, 1)
    epoch_seconds = step_seconds * whole.steps + validation_seconds
    views = max(asked.recipe.data.views, 1)
    growth = (whole.train * views + whole.validation) / max(short.train * views + short.validation, 1)
    short_pass, begins = _pass_seconds(ended)
    start_seconds = max(begins - short_pass, 0.0)
    checkpoint_bytes = run.latest.stat().st_size
    frozen_bytes = sum(path.stat().st_size for path in run.frozen.rglob("*") if path.is_file() and _is_own(path))
    # Those kept, the best, and the new one before an old one goes: as `checkpoint.check_room` has it.
    run_bytes = (asked.keep + 2 + (run.latest.stat().st_nlink == 1)) * checkpoint_bytes + frozen_bytes
    features = _room(features_folder(), int(features_bytes * growth)) if features_bytes else None
    allowed = (
        parse_size(asked.cache_limit) if asked.cache_limit else (features.free_bytes * FREE_SHARE if features else 0)
    )
    return Measured(
        step_seconds=step_seconds,
        epoch_seconds=epoch_seconds,
        pass_seconds=short_pass * growth,
        start_seconds=start_seconds,
        total_seconds=start_seconds + short_pass * growth + extent.whole_epochs * epoch_seconds,
        peak_bytes=ended.peak_bytes,
        device_bytes=int(max((line.get("memory/cuda_peak_mb", 0.0) for line in lines), default=0.0) * MB),
        checkpoint_bytes=checkpoint_bytes,
        run=None if "://" in asked.place else _room(Path(asked.place or RUNS_FOLDER), run_bytes),
        features=features,
        are_kept=features is not None and features.bytes <= allowed,
    )


def _is_own(path: Path) -> bool:
    """Whether a file takes room of its own: no link to one that lies elsewhere."""
    return path.stat().st_nlink == 1


def _step_seconds(lines: list[dict[str, float]], extent: Extent, *, waits: bool) -> float:
    """Time of a step in the last epoch, where most trains, without the one that a save came before.

    Args:
        waits: steps wait for samples, that are read ahead of them: the wait for the first is a part of their mean.
    """
    times = {int(line["step"]): line["time/seconds"] for line in lines if "train/loss" in line}
    first = extent.steps - extent.short.steps
    seconds = {step: times[step] - times[step - 1] for step in range(first + 2, extent.steps + 1)}
    if not extent.thaws and (waits or not seconds):
        before = max(line["time/seconds"] for line in lines if line["step"] <= first)
        seconds[first + 1] = times[first + 1] - before
    if len(seconds) > 1:
        seconds.pop(extent.save_step + 1, None)
    return (statistics.fmean if waits else statistics.median)(seconds.values()) if seconds else 0.0


def _validation_seconds(lines: list[dict[str, float]]) -> float:
    """Time of the last validation."""
    for before, line in zip(reversed(lines[:-1]), reversed(lines[1:]), strict=True):
        if "val/loss" in line:
            return line["time/seconds"] - before["time/seconds"]
    return 0.0


def _pass_seconds(ended: Ended) -> tuple[float, float]:
    """How long the frozen backbone ran, and when the training began, in seconds since the process started."""
    begin = next((seconds for seconds, text in ended.lines if text.startswith(PASS_BEGINS)), None)
    end = next((seconds for seconds, text in ended.lines if text.startswith(PASS_ENDS)), 0.0)
    return (end - begin if begin is not None else 0.0), end


def _room(folder: Path, size_bytes: int) -> Room:
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    return Room(folder, size_bytes, shutil.disk_usage(os.fspath(there)).free)
