"""One training, one folder."""

import os
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.base.files import (
    TEMPORARY_SUFFIX,
    BadFile,
    copy_file,
    make_folders,
    read_json,
    sync_folder,
    write_json,
)
from finetune.base.lock import LOCK_FILE, OWNER_FILE
from finetune.base.migrate import SCHEMA_KEY, Steps, migrate
from finetune.base.plain import Fields, Plain, part_from_plain, part_to_plain
from finetune.errors import RunError, UsageError
from finetune.store.comparison import COMPARISON_FILE, is_comparison, is_unfinished

if TYPE_CHECKING:
    from finetune.store.state import CheckpointState

RUNS_FOLDER = Path("runs")
RECIPE_FILE = "recipe.json"
SCHEMA_VERSION = 4
# From the schema that is the key to the next one; 4 is the first that outlives a version of the kit.
MIGRATIONS: Steps = {}
OTHER_VERSION = "of another version"


@dataclass(frozen=True)
class RunRecord:
    """What recipe.json says of a run.

    Attributes:
        id: of the run: a checkpoint of another run is not taken for one of this.
        name: of the recipe.
        config: every value that determines the result; see `determining_config`.
        settings: how it is saved and watched, where nothing else is given at a resume.
        init_from: the run whose weights it started from, as it was given.
        copy_frozen: the frozen weights were copied, so that the folder stands alone.
        skip_broken: broken samples were left out.
        command: what to type after `finetune` to do the same again; for people, no secrets.
        chosen: values of the recipe that somebody chose; see `recipe.effects`. Of a run of before none are known.
        new_classes: that run's classes may have been others.
    """

    id: str
    name: str
    config: dict[str, object]
    settings: dict[str, object]
    init_from: str
    copy_frozen: bool
    skip_broken: bool
    command: list[str] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)
    new_classes: bool = False

    def to_plain(self) -> Plain:
        return {SCHEMA_KEY: SCHEMA_VERSION} | part_to_plain(self)


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies.

    Attributes:
        path: the folder.
        url: of the remote folder whose mirror it is, if it is one.
    """

    path: Path
    url: str = ""

    def __str__(self) -> str:
        """As a person names the run, and types it."""
        return self.url or str(self.path)

    @property
    def recipe_file(self) -> Path:
        return self.path / RECIPE_FILE

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def latest(self) -> Path:
        """The checkpoint to go on from."""
        return self.checkpoints / "latest.pt"

    @property
    def frozen(self) -> Path:
        return self.path / "frozen"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of a run on texts."""
        return self.frozen / "tokenizer"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def validation_file(self) -> Path:
        """What the best validation made of its samples; see `finetune.tasks.evaluation`."""
        return self.path / "validation.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def loop_validation_file(self) -> Path:
        """The same of the loop's best, where the solved head ships."""
        return self.path / "validation-loop.json"

    @property
    def contents_file(self) -> Path:
        """Digests of the image files, as they were when they were first read."""
        return self.path / "contents.bin"

    @property
    def samples_file(self) -> Path:
        """Names of the files that the data was made of."""
        return self.path / "samples.json.gz"

    @property
    def novelty_file(self) -> Path:
        """What the head read of training samples; see `finetune.tasks.novelty`."""
        return self.path / "novelty.safetensors"

    @property
    def labels_file(self) -> Path:
        """Labels that are probably wrong come first."""
        return self.path / "labels.csv"

    @property
    def bad_batch_file(self) -> Path:
        """The samples of the batch whose loss was no number."""
        return self.path / "bad_batch.json"

    def clear(self) -> None:
        """Take away what a run that died before its first checkpoint left, to begin anew in its folder."""
        for folder in (self.frozen, self.tensorboard):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (
            self.validation_file,
            self.loop_validation_file,
            self.report_file,
            self.labels_file,
            self.novelty_file,
            self.samples_file,
            self.bad_batch_file,
        ):
            with suppress(OSError):
                file.unlink()

    def exists(self) -> bool:
        """Whether a run was begun here: its recipe is written last when a folder is made."""
        return self.recipe_file.is_file()

    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return any(self.checkpoints.glob("*.pt"))

    def make(self) -> None:
        """Make the folder itself.

        Raises:
            UsageError: it cannot be made or written.
        """
        try:
            make_folders(self.path)
        except OSError as error:
            raise UsageError(f"--run {self}: cannot be made ({error.strerror}); give another folder") from None

    @property
    def begun_file(self) -> Path:
        """Lies here while a new folder is filled, and in one whose filling was interrupted: all in it is ours."""
        return self.path / f".begun{TEMPORARY_SUFFIX}"

    def foreign_files(self) -> list[str]:
        """What lies in the folder and is not of a run."""
        if self.exists() or self.begun_file.exists() or not self.path.is_dir():
            return []
        names = [path.name for path in self.path.iterdir() if path.name not in (LOCK_FILE, OWNER_FILE)]
        return sorted(name for name in names if not (name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)))

    def remove(self) -> None:
        """Delete everything that a run puts here, and then the folder. Its lock must be held."""
        for folder in (self.checkpoints, self.code, self.frozen, self.tensorboard, self.path / "wandb"):
            shutil.rmtree(folder, ignore_errors=True)
        for path in [path for path in self.path.iterdir() if path.is_file()]:
            with suppress(OSError):
                path.unlink()
        for folder in (self.path, *([RUNS_FOLDER] if self.path.parent == RUNS_FOLDER else [])):
            with suppress(OSError):
                folder.rmdir()

    def read_recipe(self) -> RunRecord:
        """What recipe.json says.

        Raises:
            RunError: there is none, or it is damaged, or of a schema that cannot be read.
        """
        if not self.path.is_dir():
            raise RunError(f"run folder {self} does not exist; check the path")
        what = str(self.recipe_file)
        plain = migrate(read_json(self.recipe_file, "recipe of the run"), what, SCHEMA_VERSION, MIGRATIONS)
        return part_from_plain(RunRecord, Fields(plain, what))


def next_folder(name: str) -> Path:
    """runs/NAME-1, or the next free number. The folder is made, so that two runs never share one."""
    number = 1
    while True:
        path = RUNS_FOLDER / f"{name}-{number}"
        try:
            make_folders(RUNS_FOLDER)
            path.mkdir()
            sync_folder(RUNS_FOLDER)
            return path
        except FileExistsError:
            number += 1
        except FileNotFoundError:  # another run has just failed, and taken the empty folder with it
            continue


def new_run_id() -> str:
    return uuid.uuid4().hex


def fill_folder(run: RunFolder, record: RunRecord, code: list[Path]) -> None:
    """Lay out a new run; recipe.json comes last, so that half a folder is never taken for a run.

    Args:
        code: the recipe file and the modules it imported from its own folder, copied with their relative places.
    """
    run.begun_file.touch()
    sync_folder(run.path)
    for folder in (run.checkpoints, run.code):
        make_folders(folder)
    if code:
        base = Path(os.path.commonpath([file.parent for file in code]))
        for file in code:
            target = run.code / file.relative_to(base)
            make_folders(target.parent)
            copy_file(file, target)
    write_json(run.recipe_file, record.to_plain())
    run.begun_file.unlink()


def peek(path: Path) -> "CheckpointState":
    """What a checkpoint says. Its tensors stay on the disk and its checksum is not looked at: whoever lists runs must
    not read gigabytes.

    Raises:
        BadFile: it cannot be read, or is none.
        RunError: it is of a schema that cannot be read.
    """
    # torch: only where there is something to read.
    from finetune.base.safe_load import load_plain
    from finetune.store.state import CheckpointState

    return CheckpointState.from_plain(load_plain(path, mapped=True), str(path))


def run_status(run: RunFolder) -> str:
    """ "new" (no checkpoint yet), "damaged", "of another version", or the status in the newest checkpoint."""
    if not run.latest.is_file():
        return "new"
    try:
        return peek(run.latest).progress.status
    except BadFile:
        return "damaged"
    except RunError:
        return OTHER_VERSION


def newest_unfinished() -> Path:
    """The folder below runs/ that was active last and is not finished: a run's, or that of a comparison.

    Raises:
        UsageError: there is none.
    """
    found = [path.parent for path in RUNS_FOLDER.glob(f"*/{RECIPE_FILE}")]
    found += [path.parent for path in RUNS_FOLDER.glob(f"*/{COMPARISON_FILE}")]
    others = 0
    for folder in sorted(found, key=_last_active, reverse=True):
        if is_comparison(folder):
            if is_unfinished(folder):
                return folder
            continue
        status = run_status(RunFolder(folder))
        if status not in ("finished", "stopped early", OTHER_VERSION):
            return folder
        others += status == OTHER_VERSION
    said = f"{len(found)} run(s) there, all finished" if found else "no run there"
    if others:
        said = f"{len(found)} run(s) there, {others} of another version of finetune, the others finished"
    raise UsageError(
        f"no unfinished run in {RUNS_FOLDER.resolve()} ({said}); give the run's folder: finetune resume RUN"
    )


def _last_active(folder: Path) -> float:
    """Seconds of the epoch."""
    if is_comparison(folder):
        inside = [_last_active(path) for path in folder.iterdir() if path.is_dir()]
        return max(inside, default=_changed(folder / COMPARISON_FILE))
    run = RunFolder(folder)
    return max(_changed(run.metrics_file), _changed(run.recipe_file))


def _changed(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0
