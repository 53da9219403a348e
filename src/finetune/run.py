"""One training, one folder."""

import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.checkpoint import LATEST
from finetune.errors import RunError, UsageError
from finetune.files import read_json, write_json

RUNS_FOLDER = Path("runs")
RECIPE_FILE = "recipe.json"
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / RECIPE_FILE

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def frozen(self) -> Path:
        return self.path / "frozen"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def contents_file(self) -> Path:
        """Digests of the image files, as they were when they were first read."""
        return self.path / "contents.bin"

    def exists(self) -> bool:
        """Whether a run was begun here: its recipe is written last when a folder is made."""
        return self.recipe_file.is_file()

    def make(self) -> None:
        """Make the folder itself.

        Raises:
            UsageError: it cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self.code.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"--run {self.path}: cannot be made ({error.strerror}); give another folder") from None

    def foreign_files(self) -> list[str]:
        """What lies in the folder and is not there because a run is about to begin."""
        expected = {"lock", "lock.owner"} | {
            folder.name for folder in (self.checkpoints, self.code) if folder.is_dir() and not any(folder.iterdir())
        }
        return sorted(path.name for path in self.path.iterdir() if path.name not in expected)

    def remove(self) -> None:
        """Delete everything that a run puts here, and then the folder. Its lock must be held."""
        for folder in (self.checkpoints, self.code, self.frozen):
            shutil.rmtree(folder, ignore_errors=True)
        for path in [path for path in self.path.iterdir() if path.is_file()]:
            with suppress(OSError):
                path.unlink()
        with suppress(OSError):
            self.path.rmdir()

    def read_recipe(self) -> dict[str, Any]:
        """recipe.json: {"schema_version", "name", "config", "settings", ...}."""
        if not self.path.is_dir():
            raise RunError(f"run folder {self.path} does not exist; check the path")
        record = read_json(self.recipe_file, "recipe of the run")
        if not isinstance(record, dict) or not {"schema_version", "name", "config", "settings"} <= set(record):
            raise RunError(f"{self.recipe_file} is not the recipe of a run; restore it from a copy")
        if record["schema_version"] != SCHEMA_VERSION:
            raise RunError(
                f"{self.recipe_file} has schema {record['schema_version']}, this finetune reads {SCHEMA_VERSION}; use "
                "the version that wrote it"
            )
        return record


def next_folder(name: str) -> Path:
    """runs/NAME-1, or the next free number. The folder is made, so that two runs never share one."""
    RUNS_FOLDER.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = RUNS_FOLDER / f"{name}-{number}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def make_folder(run: RunFolder, record: dict[str, Any], code: list[Path]) -> None:
    """Lay out a new run folder; recipe.json comes last, so that half a folder is never taken for a run.

    Args:
        code: the recipe file and the modules it imported from its own folder, copied with their relative places.
    """
    if code:
        base = Path(os.path.commonpath([file.parent for file in code]))
        for file in code:
            target = run.code / file.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    write_json(run.recipe_file, {"schema_version": SCHEMA_VERSION} | record)


def run_status(run: RunFolder) -> str:
    """ "new" (no checkpoint yet), "damaged", or the status in the newest checkpoint."""
    path = run.checkpoints / LATEST
    if not path.is_file():
        return "new"
    try:
        # Mapped, not read: listing runs must not read gigabytes.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["status"]
    except (RuntimeError, OSError, EOFError, KeyError, ValueError):
        return "damaged"


def newest_unfinished() -> RunFolder:
    """The run below runs/ that was active last and is not finished.

    Raises:
        UsageError: there is none.
    """
    runs = [RunFolder(path.parent) for path in RUNS_FOLDER.glob(f"*/{RECIPE_FILE}")]
    runs.sort(key=lambda run: max(_changed(run.metrics_file), _changed(run.recipe_file)), reverse=True)
    for run in runs:
        if run_status(run) not in ("finished", "stopped early"):
            return run
    found = f"{len(runs)} run(s) there, all finished" if runs else "no run there"
    raise UsageError(
        f"no unfinished run in {RUNS_FOLDER.resolve()} ({found}); give the run's folder: finetune resume RUN"
    )


def _changed(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------


class MetricsFile:
    """One JSON line a logged step or validation. At a resume, lines after the checkpoint's step go away."""

    def __init__(self, path: Path, last_step: int):
        self.path = path
        lines = []
        if path.exists():
            for line in path.read_bytes().split(b"\n"):
                if _line_step(line) <= last_step:
                    lines.append(line + b"\n")
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(b"".join(lines))
        os.replace(temporary, path)
        self.stream = open(path, "ab")  # noqa: SIM115 - open as long as the run
        self.started = time.monotonic()

    def write(self, values: dict[str, float | int]) -> None:
        line = values | {"time/seconds": round(time.monotonic() - self.started, 3)}
        self.stream.write(json.dumps(line).encode() + b"\n")
        self.stream.flush()

    def sync(self) -> None:
        """Before a checkpoint: it must not be ahead of the lines that lead to it."""
        os.fsync(self.stream.fileno())

    def close(self) -> None:
        self.stream.close()


def _line_step(line: bytes) -> float:
    """The step of a line; infinite for a torn or empty one, which is thereby dropped."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
