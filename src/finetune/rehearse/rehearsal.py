"""`finetune rehearse`: a short run made twice, unbroken and killed, and held against each other; then what it measured.

All of it happens in a temporary folder and in processes of its own, and goes with them.
"""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from finetune.base.formatting import seconds_text
from finetune.base.signals import StopRequest
from finetune.errors import FinetuneError, RunError, StoppedEarly, UsageError
from finetune.rehearse.cause import Cause, cause_of
from finetune.rehearse.compare import Comparison, compare
from finetune.rehearse.extent import Asked, Extent
from finetune.rehearse.measure import Measured, measure
from finetune.rehearse.part import OPTION, Part
from finetune.rehearse.process import Ended, carry_out, environment
from finetune.store.run_folder import RunFolder

ERRORS: dict[int, type[FinetuneError]] = {2: UsageError, 75: StoppedEarly}


@dataclass(frozen=True)
class Rehearsal:
    """What came of it.

    Attributes:
        found: the unbroken run against the resumed one; None: the resume failed.
        complaint: what that said.
        cause: why they differ; None: they do not.
    """

    extent: Extent
    found: Comparison | None
    complaint: str
    cause: Cause | None
    measured: Measured

    @property
    def is_same(self) -> bool:
        return self.found is not None and self.found.is_same


# Shown while the block runs: what is being done.
Status = Callable[[str], AbstractContextManager[object]]


def rehearse(asked: Asked, extent: Extent, stop: StopRequest, status: Status, say: Callable[[str], None]) -> Rehearsal:
    """Rehearse a training.

    Args:
        say: told how long each run took.

    Raises:
        StoppedEarly: asked for. Nothing is left.
        FinetuneError: not even the unbroken run comes to its end; as it would say it.
    """
    # A short name: see `process.environment`.
    with tempfile.TemporaryDirectory(prefix="rehearse-") as folder:
        stage = _Stage(asked, extent, Path(folder), stop, status, say)
        whole, ended = stage.unbroken("unbroken")
        measured = measure(asked, extent, ended, whole, stage.kept)
        broken = stage.killed("killed")
        complaint = stage.resumed(broken, by_recipe=False)
        found = None if complaint else compare(whole, broken)
        cause = None
        if found is None or not found.is_same:
            cause = _find_cause(stage, whole, found)
        return Rehearsal(extent, found, complaint, cause, measured)


def _find_cause(stage: "_Stage", whole: RunFolder, found: Comparison | None) -> Cause:
    """Two more runs tell the causes apart."""
    again, _ = stage.unbroken("unbroken, once more")
    repeated = compare(whole, again)
    by_recipe = None
    if repeated.is_same:
        other = stage.killed("killed, once more")
        if not stage.resumed(other, by_recipe=True):
            by_recipe = compare(whole, other)
    asked = stage.asked
    return cause_of(stage.extent.kill_step, found, repeated, by_recipe, is_free=asked.is_free, code=asked.code)


@dataclass(frozen=True)
class _Stage:
    """Where it happens."""

    asked: Asked
    extent: Extent
    folder: Path
    stop: StopRequest
    status: Status
    say: Callable[[str], None]

    @property
    def kept(self) -> Path:
        """Where features are kept: by all of the runs, as by all of a machine."""
        return self.folder / "features"

    def unbroken(self, name: str) -> tuple[RunFolder, Ended]:
        """A run that nobody interrupts.

        Raises:
            FinetuneError: what it said, if it failed.
        """
        run = self._new(name)
        ended = self._carry_out(name, self._words(self.extent.part(str(run))))
        if ended.failed:
            raise ERRORS.get(ended.code, RunError)(ended.complaint)
        return run, ended

    def killed(self, name: str) -> RunFolder:
        """A run that is killed in mid-epoch.

        Raises:
            FinetuneError: it ended by itself.
        """
        run = self._new(name)
        ended = self._carry_out(name, self._words(self.extent.part(str(run), killed=True)), killed_in=run.path)
        if not ended.was_killed:
            raise ERRORS.get(ended.code, RunError)(f"the run that was to be killed ended by itself: {ended.complaint}")
        return run

    def resumed(self, run: RunFolder, *, by_recipe: bool) -> str:
        """Go on with a killed run, by `finetune resume` or by the recipe's own command.

        Returns:
            What it said, if it failed; else "".
        """
        if by_recipe:
            words = self._words(self.extent.part(str(run), resume=True))
            ended = self._carry_out("resumed by the recipe's own command", words)
        else:
            ended = self._carry_out("resumed", ["resume", str(run), *self.asked.machine_words])
        return ended.complaint if ended.failed else ""

    def _words(self, part: Part) -> list[str]:
        """The command that carries out one of the runs by the recipe."""
        return ["rehearse", OPTION, part.to_text(), *self.asked.words]

    def _new(self, name: str) -> RunFolder:
        return RunFolder(self.folder / name.replace(", ", "-").replace(" ", "-"))

    def _carry_out(self, name: str, words: list[str], killed_in: Path | None = None) -> Ended:
        with self.status(f"{name} ..."):
            ended = carry_out(words, environment(self.folder, self.kept), self.stop, killed_in)
        self.say(f"  {name}: {seconds_text(ended.seconds)}")
        return ended
