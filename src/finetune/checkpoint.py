"""Checkpoint files: written whole or not at all, checked when read, the newest good one found."""

import pickle
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from finetune.errors import RunError
from finetune.files import BadFile, link_or_copy, verify_trailer, write_atomically
from finetune.state import SCHEMA_VERSION

LATEST, BEST = "latest.pt", "best.pt"
STEP_FILE = re.compile(r"step-(\d+)\.pt")
SUPERSEDED = "superseded"


def step_file_name(step: int) -> str:
    return f"step-{step:06d}.pt"


def step_files(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of the numbered checkpoints, oldest first."""
    found = [(STEP_FILE.fullmatch(path.name), path) for path in folder.glob("step-*.pt")]
    return sorted((int(match[1]), path) for match, path in found if match)


def write_checkpoint(folder: Path, state: dict[str, Any], *, is_best: bool, keep: int) -> Path:
    """Write `state` once, then point `latest.pt` (and `best.pt`) at it, then prune.

    Each step leaves a folder to resume from: the new file is on disk before a name moves to it, and old files go
    last.

    Args:
        keep: numbered files to keep, the newest; `latest.pt` and `best.pt` stay besides.

    Returns:
        The numbered file.
    """
    path = folder / step_file_name(state["step"])
    write_atomically(path, lambda stream: torch.save({"schema_version": SCHEMA_VERSION} | state, stream), trailer=True)
    link_or_copy(path, folder / LATEST)
    if is_best:
        link_or_copy(path, folder / BEST)
    for _, old in step_files(folder)[:-keep]:
        with suppress(FileNotFoundError):
            old.unlink()
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint whose checksum holds.

    Raises:
        BadFile: damaged, or not a checkpoint of this kit.
        RunError: missing, or of another schema.
    """
    if not path.is_file():
        raise RunError(f"checkpoint {path} does not exist; check the path")
    verify_trailer(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise BadFile(f"checkpoint {path} cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict) or "schema_version" not in state:
        raise BadFile(f"{path} is not a checkpoint of this kit")
    if state["schema_version"] != SCHEMA_VERSION:
        raise RunError(
            f"checkpoint {path} has schema {state['schema_version']}, this finetune reads {SCHEMA_VERSION}; use the "
            "version that wrote it"
        )
    return state


def newest_good(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest checkpoint that can be read, its state, and what was found bad on the way; None without any file.

    Raises:
        RunError: there are checkpoints, but none is good.
    """
    # A numbered file may be newer than `latest.pt`: the process died between the two.
    candidates = [path for _, path in reversed(step_files(folder))]
    candidates += [folder / name for name in (LATEST, BEST) if (folder / name).exists()]
    bad: list[str] = []
    for path in candidates:
        try:
            return path, read_checkpoint(path), bad
        except BadFile as error:
            bad.append(str(error))
    if bad:
        raise RunError(f"no good checkpoint in {folder}: {'; '.join(bad)}")
    return None


def repair_names(folder: Path, path: Path, state: dict[str, Any]) -> None:
    """Point `latest.pt` at the checkpoint that a run resumes from, and `best.pt` too where it is the best.

    A process may have died after it wrote a numbered file and before it moved the names.
    """
    if path.name not in (LATEST, BEST) or path.name == BEST:
        link_or_copy(path, folder / LATEST)
    if state["best_metric"].get("step") == state["step"] and path.name != BEST:
        link_or_copy(path, folder / BEST)


def rewind(folder: Path, path: Path) -> None:
    """Make `path` the newest checkpoint: later files move to superseded/, nothing is deleted.

    `best.pt` goes back to the best of that time if its file is still there; else it moves too.
    """
    state = read_checkpoint(path)
    aside = folder / SUPERSEDED
    aside.mkdir(exist_ok=True)
    best_step = state["best_metric"].get("step")
    kept = folder / ".rewind.pt.tmp"
    link_or_copy(path, kept)
    for file in (folder / LATEST, folder / BEST):
        if not file.exists():
            continue
        try:
            step = read_checkpoint(file)["step"]
        except BadFile:
            file.replace(aside / f"{file.stem}-damaged.pt")
        else:
            if step > state["step"]:
                file.replace(aside / f"{file.stem}-step-{step:06d}.pt")
    for step, file in step_files(folder):
        if step > state["step"]:
            file.replace(aside / file.name)
        elif step == best_step:
            link_or_copy(file, folder / BEST)
    link_or_copy(kept, folder / step_file_name(state["step"]))
    link_or_copy(kept, folder / LATEST)
    kept.unlink()
