"""Runs as they are found in a folder: their state, figures and options. Nothing is written, and nothing is trusted.

Imports torch only where there is a checkpoint to look into.
"""

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.base.events import Best
from finetune.base.files import BadFile
from finetune.base.lock import LOCK_FILE, OWNER_FILE, Owner, is_held, owner_from_text
from finetune.errors import FinetuneError, RunError, UsageError
from finetune.recipe.serialize import flatten
from finetune.store.comparison import is_comparison
from finetune.store.run_folder import RunFolder, RunRecord, peek

if TYPE_CHECKING:
    from finetune.store.state import CheckpointState

STATES = ("running", "resumable", "new", "damaged", "stopped early", "finished")
LARGEST_RECIPE_BYTES, LARGEST_OWNER_LETTERS = 1 << 24, 1 << 12
# A line of metrics.jsonl is far shorter.
LONGEST_LINE_BYTES = 1 << 16
# A log that was tampered with may say anything.
LONGEST_SECONDS = 1e10
SECONDS = re.compile(rb'"time/seconds":\s*(\d+(?:\.\d+)?)')
NUMBERED = re.compile(r"step-(\d+)\.pt")


@dataclass(frozen=True)
class FoundRun:
    """A run, as far as its folder tells.

    Attributes:
        state: one of `STATES`.
        note: what is wrong with it, or who runs it; else "".
        owner: the process that runs it, if it is known.
        options: name -> value: of the recipe, and how it is run.
        epochs_done, epochs: whole ones, and to be done; None = not known.
        best: the best validation, if there was one.
        seconds: of training, until the last line of its log; None = no line.
        files: (device, inode) -> bytes on the disk.
        changed: seconds of the epoch; 0 = not known.
        fingerprint, frozen_sha256: of data and frozen weights; "" = not known.
    """

    path: Path
    state: str
    note: str = ""
    owner: Owner | None = None
    options: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    epochs_done: int | None = None
    epochs: int | None = None
    best: Best = field(default_factory=Best)
    seconds: float | None = None
    files: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)
    changed: float = 0.0
    fingerprint: str = ""
    frozen_sha256: str = ""

    @property
    def name(self) -> str:
        if is_comparison(self.path.parent):
            return f"{self.path.parent.name}/{self.path.name}"
        return self.path.name or str(self.path)

    @property
    def size_bytes(self) -> int:
        """On the disk; what is linked twice counts once."""
        return sum(self.files.values())


# ---- Which folders are runs -----------------------------------------------------------------------------------------


def is_run(path: Path) -> bool:
    """Whether a folder is a run, perhaps a damaged one, or becomes one just now.

    Raises:
        OSError: that cannot be found out.
    """
    if not stat.S_ISDIR(path.stat().st_mode):
        return False
    run = RunFolder(path)
    return any(_is_there(one) for one in (run.recipe_file, run.checkpoints, run.begun_file))


def _is_there(path: Path) -> bool:
    """As a file or anything else. Unlike `exists`, this does not take what is forbidden for what is missing."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def find_runs(folders: Iterable[str]) -> Iterator[FoundRun]:
    """Those that are given, and those that lie in folders that are given.

    Raises:
        UsageError: a folder is none, or holds no run.
    """
    for folder in folders:
        if "://" in folder:
            raise UsageError(
                f"finetune runs {folder}: only folders of this machine are listed; of one run there: "
                f"finetune evaluate {folder}"
            )
        try:
            if is_run(Path(folder)):
                yield describe(Path(folder))
                continue
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise UsageError(
                f"finetune runs {folder}: cannot be looked into ({error.strerror}); give a folder that holds runs, or "
                "begin one: finetune vgg_head"
            ) from None
        yield from _runs_inside(Path(folder), names)


def _runs_inside(folder: Path, names: list[str]) -> Iterator[FoundRun]:
    """Folders that cannot be looked into might be runs; where no other is one, they are not taken for some."""
    runs, unknown = [], []
    for path in (folder / name for name in names):
        try:
            if is_run(path):
                runs.append(path)
            elif is_comparison(path):
                runs += [path / name for name in sorted(os.listdir(path)) if is_run(path / name)]
        except OSError as error:
            unknown.append(FoundRun(path, "damaged", f"cannot be looked into ({error.strerror})"))
    if not runs:
        also = f" ({len(unknown)} folder(s) in it cannot be looked into)" if unknown else ""
        raise UsageError(
            f"finetune runs {folder}: there is no run in it{also}; give the folder that holds runs, or begin one: "
            "finetune vgg_head"
        )
    yield from unknown
    yield from map(describe, runs)


# ---- What a run tells -----------------------------------------------------------------------------------------------


def describe(path: Path) -> FoundRun:
    """All that is shown of a run. Whatever is wrong with it is its state, never an error."""
    run = RunFolder(path)
    values: dict[str, Any] = {"path": path, "state": "new"}
    try:
        values["files"], values["changed"] = _files(path)
        values["seconds"] = training_seconds(run.metrics_file)
        record = _read_recipe(run)
        values["options"] = flatten(record.config) | flatten(record.settings) | {"init_from": record.init_from}
        values |= _progress(run, record)
    except (RunError, OSError, RecursionError) as error:
        values |= {"state": "damaged", "note": _why(error)}
        if run.begun_file.exists():  # until its recipe is there
            values |= {"state": "new", "note": "it was interrupted before its first step"}
    owner = _living_owner(path)
    if owner is not None:
        values |= {"state": "running", "owner": owner if owner.pid else None}
        values["note"] = f"by {owner}" if owner.pid else "by a process that is not known"
    return FoundRun(**values)


def _why(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename} cannot be read ({error.strerror})"
    return str(error) if isinstance(error, RunError) else f"its recipe is damaged ({error!r}); restore it from a copy"


def _read_recipe(run: RunFolder) -> RunRecord:
    if run.exists() and run.recipe_file.stat().st_size > LARGEST_RECIPE_BYTES:
        raise RunError(f"recipe of the run {run.recipe_file} is too large for one; restore it from a copy")
    if not run.exists() and _is_there(run.recipe_file):
        raise RunError(f"recipe of the run {run.recipe_file} is no file; restore it from a copy")
    return run.read_recipe()


def _progress(run: RunFolder, record: RunRecord) -> dict[str, Any]:
    """How far it is, of its newest checkpoint.

    Raises:
        RunError: that is damaged, or is of another run.
    """
    numbered = [(NUMBERED.fullmatch(path.name), path) for path in run.checkpoints.glob("step-*.pt")]
    # A process may have died after it wrote a numbered file and before it moved the name.
    newest = max(((int(match[1]), path) for match, path in numbered if match), default=(0, run.latest))[1]
    path = run.latest if run.latest.exists() else newest
    if not path.is_file():
        return {"epochs_done": 0, "epochs": _epochs(record)}
    try:
        state = peek(path)
    except BadFile as error:
        raise RunError(f"{error}; an older checkpoint may be good: finetune resume {run}") from None
    if state.run_id != record.id:
        raise RunError(f"{path} is of another run than recipe.json says; restore it from a copy")
    from finetune.store.finish_state import shipped_best

    progress = state.progress
    status = {"running": "resumable"}.get(progress.status, progress.status)
    if status not in STATES:
        raise RunError(f"{path} has the status {status!r}, which is none; restore it from a copy")
    return {
        "state": status,
        "step": progress.step,
        "epochs_done": progress.epoch,
        "epochs": _epochs(record, state),
        "best": shipped_best(progress.best, progress.finish),
        "fingerprint": state.data.fingerprint,
        "frozen_sha256": state.frozen.sha256,
    }


def _epochs(record: RunRecord, state: "CheckpointState | None" = None) -> int | None:
    """How many are to be done; None = not known."""
    if state is not None and state.data.train_samples:
        from finetune.recipe.execution import split_config
        from finetune.store.steps import count_steps

        with suppress(FinetuneError):  # of another version, or edited
            return count_steps(split_config(record.config)[0], state.data.train_samples, state.progress).epochs
    epochs = record.config.get("epochs")
    return epochs if isinstance(epochs, int) and epochs > 0 else None


NOBODY_KNOWN = Owner(0, "", "", "")


def _living_owner(path: Path) -> Owner | None:
    """Who holds the run's lock; `NOBODY_KNOWN` = somebody; None = nobody who lives."""
    owner = None
    try:
        if is_plain_file(path / OWNER_FILE):
            with open(path / OWNER_FILE, errors="replace") as stream:
                owner = owner_from_text(stream.read(LARGEST_OWNER_LETTERS))
        held = is_plain_file(path / LOCK_FILE) and is_held(path)
    except PermissionError:  # somebody else's folder: its lock cannot be tried, so who is noted there must do
        held = owner is not None
    except OSError:
        return None
    if not held or (owner is not None and owner.is_dead()):
        return None
    return owner or NOBODY_KNOWN


def is_plain_file(path: Path) -> bool:
    """A real one, no link: nothing outside a run is looked into, and no pipe is waited for."""
    return _is_there(path) and stat.S_ISREG(path.lstat().st_mode)


def _files(folder: Path) -> tuple[dict[tuple[int, int], int], float]:
    """Every file below, and when something was last changed. Links are not followed."""
    files: dict[tuple[int, int], int] = {}
    changed, waiting = 0.0, [folder]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                        continue
                    size_bytes = found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size
                    files[found.st_dev, found.st_ino] = size_bytes
                    if entry.name not in (LOCK_FILE, OWNER_FILE):
                        changed = max(changed, found.st_mtime)
    return files, changed


def training_seconds(path: Path) -> float | None:
    """Of all processes that trained the run: each began to count anew."""
    total, last = 0.0, None
    if not is_plain_file(path):
        return None
    with open(path, "rb") as stream:
        for line in iter(lambda: stream.readline(LONGEST_LINE_BYTES), b""):
            found = SECONDS.search(line)
            if found:
                seconds = min(float(found[1]), LONGEST_SECONDS)
                if last is not None and seconds < last:
                    total += last
                last = seconds
    return None if last is None else total + last


# ---- Options --------------------------------------------------------------------------------------------------------


def differing(runs: Iterable[FoundRun]) -> list[str]:
    """Names of the options that are not the same in all runs, in the order of the recipe.

    What one has and another does not, like an option of images, counts only where it is set to something.
    """
    all_options = [run.options for run in runs if run.options]
    names = {name: None for options in all_options for name in options}
    return [name for name in names if len({_comparable(options.get(name)) for options in all_options}) > 1]


def _comparable(value: Any) -> str:
    return "" if value in (None, "", "none", 0, []) else json.dumps(value)
