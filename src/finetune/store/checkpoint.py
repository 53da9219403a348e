"""Checkpoint files: written whole or not at all, checked when read, the newest good one found."""

import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

import torch

from finetune.base.files import (
    TEMPORARY_SUFFIX,
    BadFile,
    link_or_copy,
    make_folders,
    remove_leftovers,
    verify_trailer,
    write_atomically,
)
from finetune.base.safe_load import load_plain
from finetune.errors import RunError, one_line
from finetune.store.state import CheckpointState, Progress

LATEST, BEST, FINAL = "latest.pt", "best.pt", "final.pt"
STEP_FILE = re.compile(r"step-(\d+)\.pt")
SUPERSEDED = "superseded"
# A network drive that hangs for a moment, or room that another program is just making, is no reason to give up.
RETRY_AFTER_SECONDS = 2.0
MB = 1_000_000


def step_file_name(step: int) -> str:
    return f"step-{step:06d}.pt"


def step_files(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of the numbered checkpoints, oldest first."""
    found = [(STEP_FILE.fullmatch(path.name), path) for path in folder.glob("step-*.pt")]
    return sorted((int(match[1]), path) for match, path in found if match)


def _write_state(path: Path, state: CheckpointState) -> None:
    plain = state.to_plain()
    write_atomically(path, lambda stream: torch.save(plain, cast(IO[bytes], stream)), trailer=True)


def write_checkpoint(folder: Path, state: CheckpointState, *, is_best: bool, keep: int) -> Path:
    """Write `state` once, then point (`best.pt` and) `latest.pt` at it, then prune.

    Each step leaves a folder to resume from: the new file is on disk before a name moves to it, and old files go
    last.

    Args:
        keep: numbered files to keep, the newest; `latest.pt` and `best.pt` stay besides.

    Returns:
        The numbered file.

    Raises:
        RunError: it cannot be written, at the second attempt neither; the checkpoints that were there are still there.
    """
    path = folder / step_file_name(state.progress.step)

    def attempt() -> None:
        _write_state(path, state)
        # In this order: whoever finds `latest.pt` finds the best of that time, too.
        if is_best:
            link_or_copy(path, folder / BEST)
        link_or_copy(path, folder / LATEST)

    _at_second_attempt(folder, path, attempt)
    for _, old in step_files(folder)[:-keep]:
        with suppress(OSError):
            old.unlink()
    return path


def write_final(folder: Path, state: CheckpointState) -> None:
    """Write the checkpoint of a solved head beside those of the loop.

    Raises:
        RunError: it cannot be written, at the second attempt neither.
    """
    path = folder / FINAL
    _at_second_attempt(folder, path, lambda: _write_state(path, state))


def _at_second_attempt(folder: Path, path: Path, attempt: Callable[[], None]) -> None:
    """Write a checkpoint, after a while once more if need be.

    Raises:
        RunError: neither worked; says which of before is good.
    """
    try:
        attempt()
    except OSError:
        time.sleep(RETRY_AFTER_SECONDS)
        try:
            attempt()
        except OSError as error:
            good = [
                name for name in (LATEST, *(file.name for _, file in step_files(folder))) if (folder / name).exists()
            ]
            kept = f"{folder / good[-1]} is good" if good else "there is none from before"
            raise RunError(
                f"checkpoint {path} cannot be written, nor at a second attempt ({one_line(error)}); {kept}: make room, "
                "or put the disk right, then resume"
            ) from None


def check_room(folder: Path, state: CheckpointState, keep: int, optimizer_bytes: int) -> None:
    """Try, before the first step, that a checkpoint can be written, and that the disk has room for all of a run's.

    Args:
        state: a checkpoint of the run, as it is now.
        optimizer_bytes: by how much a later one is larger: an optimizer has no state before its first step.

    Raises:
        RunError: it has not; says how much is needed.
    """
    trial, link = (folder / f".{name}{TEMPORARY_SUFFIX}" for name in ("trial", "trial-link"))
    have_bytes = {file.stat().st_ino: file.stat().st_size for file in folder.glob("*.pt")}
    try:
        make_folders(folder)
        _write_state(trial, state)
        size_bytes = trial.stat().st_size + optimizer_bytes
        try:
            link.hardlink_to(trial)
            names = 0
        except OSError:
            names = 1  # latest.pt is a copy then
        link.unlink(missing_ok=True)
        trial.unlink()
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        remove_leftovers(folder)
        raise RunError(
            f"{folder}: a checkpoint cannot be written there ({one_line(error)}); make room, give yourself the right, "
            "or give another --run"
        ) from None
    # Those kept, the best, and the new one before an old one goes.
    count = keep + 2 + names
    if sum(have_bytes.values()) + free_bytes < count * size_bytes:
        raise RunError(
            f"{folder}: too little room: up to {count} checkpoints of {size_bytes / MB:,.1f} MB lie there at a time, "
            f"and {free_bytes / MB:,.1f} MB are free; make room, give --keep 1, or another --run"
        )


def read_checkpoint(path: Path, run_id: str, *, mapped: bool = False) -> CheckpointState:
    """A checkpoint whose checksum holds.

    Args:
        run_id: of the run that it must be of.
        mapped: leave tensors on the disk.

    Raises:
        BadFile: damaged, not a checkpoint of this kit, or of another run.
        RunError: missing, or of a schema that cannot be read.
    """
    if not path.is_file():
        raise RunError(f"checkpoint {path} does not exist; check the path")
    verify_trailer(path)
    state = CheckpointState.from_plain(load_plain(path, mapped=mapped), f"checkpoint {path}")
    if state.run_id != run_id:
        raise BadFile(f"{path} is of another run than recipe.json says")
    return state


def newest_good(folder: Path, run_id: str) -> tuple[Path, CheckpointState, list[str]] | None:
    """The newest checkpoint that can be read, its state, and what was found bad on the way; None without any file.

    Raises:
        RunError: there are checkpoints, but none is good.
    """
    numbered = [path for _, path in reversed(step_files(folder))]
    # The newest numbered file may be newer than `latest.pt`, where the process died between the two, and older, where
    # somebody deleted files.
    newest = [path for path in (*numbered[:1], folder / LATEST) if path.exists()]
    if len(newest) == 2 and newest[0].samefile(newest[1]):
        newest.pop()
    older = [path for path in (*numbered[1:], folder / BEST) if path.exists()]
    bad: list[str] = []
    for candidates in (newest, *([path] for path in older)):
        good = []
        for path in candidates:
            try:
                good.append((path, read_checkpoint(path, run_id)))
            except BadFile as error:
                bad.append(str(error))
        if good:
            return *max(good, key=lambda found: found[1].progress.step), bad
    if bad:
        raise RunError(f"no good checkpoint in {folder}: {'; '.join(bad)}")
    return None


def repair_names(folder: Path, path: Path, progress: Progress) -> None:
    """Point `latest.pt` at the checkpoint that a run resumes from, and `best.pt` too where it is the best.

    A process may have died after it wrote a numbered file and before it moved the names.
    """
    # One that was saved while the head was solved is a later one of the same step: the names were moved before.
    if progress.best.get("step") == progress.step and path.name != BEST and not progress.finish.tried:
        link_or_copy(path, folder / BEST)
    if path.name != LATEST:
        link_or_copy(path, folder / LATEST)


def repair_best(folder: Path, best_step: int, run_id: str) -> str:
    """Make sure that `best.pt` is a good checkpoint, of a numbered file of that step if it is not.

    Returns:
        What is wrong with it, where nothing can be done; else "".
    """
    problem = ""
    for path in (folder / BEST, folder / step_file_name(best_step)):
        try:
            read_checkpoint(path, run_id, mapped=True)
        except RunError as error:
            problem = problem or str(error)
            continue
        if path.name != BEST:
            link_or_copy(path, folder / BEST)
        return ""
    return problem


def _set_aside(file: Path, name: str) -> None:
    """Move a file to superseded/, beside whatever has its name there."""
    aside = file.parent / SUPERSEDED
    target, number = aside / f"{name}.pt", 2
    while target.exists():
        target, number = aside / f"{name}-{number}.pt", number + 1
    file.replace(target)


def rewind(folder: Path, path: Path, run_id: str) -> None:
    """Make `path` the newest checkpoint: later files move to superseded/, nothing is deleted.

    `best.pt` goes back to the best of that time if its file is still there; else it moves too.
    """
    progress = read_checkpoint(path, run_id).progress
    make_folders(folder / SUPERSEDED)
    best_step = progress.best.get("step")
    kept = folder / ".rewind.pt.tmp"
    link_or_copy(path, kept)
    for file in (folder / LATEST, folder / BEST, folder / FINAL):
        if not file.exists():
            continue
        try:
            step = read_checkpoint(file, run_id).progress.step
        except BadFile:
            _set_aside(file, f"{file.stem}-damaged")
        else:
            if step > progress.step:
                _set_aside(file, f"{file.stem}-step-{step:06d}")
    for step, file in step_files(folder):
        if step > progress.step:
            _set_aside(file, file.stem)
        elif step == best_step:
            link_or_copy(file, folder / BEST)
    link_or_copy(kept, folder / step_file_name(progress.step))
    link_or_copy(kept, folder / LATEST)
    kept.unlink()
