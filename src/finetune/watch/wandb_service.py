"""Weights & Biases. Runs in the process that talks to the outside."""

import io
import json
import math
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from filelock import FileLock, Timeout

from finetune.base.events import Begun, Example, Validated
from finetune.base.files import link_or_copy
from finetune.base.formatting import printable
from finetune.errors import one_line
from finetune.watch.pipe import Ended, Logged, Told

STATE_FILE, LOCK_FILE = "wandb-step.json", "wandb-step.lock"
# Whoever told it of a run that was killed may still be busy with its last words when the run goes on.
EARLIER_SECONDS = 30.0
DEFAULT_PROJECT = "finetune"
NO_ACCOUNT = (
    "no account is configured here; log in once with `wandb login`, or set WANDB_MODE=offline to keep everything on "
    "this machine; the run goes on without it"
)
# wandb's own limit is 90 s; some of its versions do not keep it.
LATE_SECONDS = 120
LATE = "has not answered for two minutes, and goes on trying; the run goes on without it"
# Of an exit: wandb shows a run as finished, as failed, or (told so before) as preempted, to be gone on with.
EXIT_CODES = {"finished": 0, "stopped early": 0, "stopped": 75, "failed": 1, "died": 1}
COLUMNS = ["sample", "picture", "text", "true", "predicted", "probability", "loss"]


class WandbService:
    """One wandb run for a run of ours, however often that is killed and goes on: its id is the run's own.

    A row of figures is sent once it is whole: when something of a later step comes, when it holds a validation, or at
    the end. Steps of wandb never go back, so what a resumed run repeats is left out, up to the last row that was sent.

    Args:
        state_folder: where that step is kept.
        run_pid: the process whose memory and use of the machine wandb shows.
        problem: told what fails and leaves the rest as it is.
    """

    name = "wandb"

    def __init__(self, state_folder: Path, run_pid: int, problem: Callable[[str, str], None]):
        self._state_file, self._lock = state_folder / STATE_FILE, FileLock(state_folder / LOCK_FILE)
        self._run_pid, self._problem = run_pid, problem
        self._run: Any = None
        self._folder, self._run_id = Path(), ""
        self._step, self._row = -1, dict[str, float]()
        self._sent_step = -1

    def tell(self, told: list[Told]) -> None:
        for thing in told:
            if isinstance(thing, Begun):
                self._begin(thing)
            elif self._run is None:
                pass  # the run ended before it began
            elif isinstance(thing, Logged):
                self._add(thing.step, thing.values)
            elif isinstance(thing, Validated):
                self._add(thing.step, thing.values)
                if thing.step == self._step:
                    self._send_row()
                if thing.is_best:
                    best = thing.best
                    figures = {best["metric"]: best["value"], "step": best["step"], "epoch": best["epoch"]}
                    self._run.summary.update({f"best/{name}": value for name, value in figures.items()})
            elif isinstance(thing, Ended):
                self._end(thing)

    # ---- Begin -----------------------------------------------------------------------------------------------------

    def _begin(self, begun: Begun) -> None:
        assert begun.folder is not None  # a run that is told to others has one
        self._folder, self._run_id = begun.folder, begun.run_id
        with suppress(Timeout, OSError):
            self._lock.acquire(timeout=EARLIER_SECONDS)
        self._read_state()
        import wandb

        project = wandb.setup().settings.project or DEFAULT_PROJECT

        def init(mode: Literal["offline"] | None) -> Any:
            return wandb.init(
                project=project,
                name=os.environ.get("WANDB_NAME") or printable(begun.name),
                id=begun.run_id,
                resume="allow",
                dir=str(begun.folder),
                config=begun.config,
                mode=mode,
                settings=wandb.Settings(**self._settings(wandb.Settings)),
            )

        late = threading.Timer(LATE_SECONDS, self._problem, (self.name, LATE))
        late.daemon = True
        late.start()
        try:
            run = init(None)
            self._run = None if run.disabled else run
        except wandb.errors.AuthenticationError as error:
            self._problem(self.name, f"{one_line(error)}; the run goes on without it")
        except wandb.errors.UsageError as error:
            text = one_line(error)
            no_account = "key" in text.lower()
            self._problem(self.name, NO_ACCOUNT if no_account else f"{text}; the run goes on without it")
        except wandb.errors.CommError as error:
            wandb.teardown()  # else it would hold that a run of this id goes on already
            self._run = init("offline")
            self._problem(
                self.name,
                f"did not take the run ({one_line(error)}); everything is kept on this machine instead, to be sent "
                f"later by: wandb sync {Path(self._run.dir).parent}",
            )
        finally:
            late.cancel()

    def _settings(self, known: Any) -> dict[str, Any]:
        """What wandb is not to look at unless it was asked to: this process's output, code, git, packages."""
        wanted = {
            "console": "off",
            "save_code": False,
            "disable_code": True,
            "disable_git": True,
            "x_disable_meta": True,
            "x_save_requirements": False,
            "silent": True,
            "x_stats_pid": self._run_pid,
        }
        asked_for = {name for name in wanted if f"WANDB_{name.upper()}" in os.environ}
        return {name: value for name, value in wanted.items() if name in known.model_fields and name not in asked_for}

    # ---- Rows ------------------------------------------------------------------------------------------------------

    def _add(self, step: int, values: dict[str, float]) -> None:
        """Take figures of a step; numbers that are not finite are shown by wandb as what they are."""
        if step <= self._sent_step:
            return
        if step != self._step:
            self._send_row()
        self._step = step
        self._row |= values

    def _send_row(self) -> None:
        if self._row and self._step > self._sent_step:
            self._run.log(self._row, step=self._step, commit=True)
            self._sent_step = self._step
        self._row = {}
        self._write_state()

    def _read_state(self) -> None:
        with suppress(OSError, ValueError, KeyError, TypeError):  # the worst is that wandb is told something again
            state = json.loads(self._state_file.read_text(encoding="utf-8"))
            if state["run_id"] == self._run_id:  # else of a run that was begun anew here
                self._sent_step, self._step = int(state["sent_step"]), int(state["step"])
                self._row = dict(state["row"])

    def _write_state(self) -> None:
        """Not synced to the disk, unlike what a run cannot do without."""
        temporary = self._state_file.with_name(f".{STATE_FILE}.tmp")
        state = {"run_id": self._run_id, "sent_step": self._sent_step, "step": self._step, "row": self._row}
        with suppress(OSError):
            temporary.write_text(json.dumps(state), encoding="utf-8")
            os.replace(temporary, self._state_file)

    # ---- End -------------------------------------------------------------------------------------------------------

    def _end(self, ended: Ended) -> None:
        import wandb

        # A run that goes on may have more to say of its last step, as the validation that it died in.
        if ended.status in ("finished", "stopped early"):
            self._send_row()
        self._write_state()
        self._lock.release()
        copies = list[Path]()
        try:
            if ended.worst:
                self._run.summary["worst"] = _table(wandb, ended.worst)
            copies = self._log_checkpoints(wandb, ended)
            if ended.status == "stopped":
                self._run.mark_preempting()
        finally:  # whatever fails before: wandb must not show a run that failed as finished
            self._run.finish(exit_code=EXIT_CODES[ended.status])
            if not self._run.offline:
                for copy in copies:
                    with suppress(OSError):
                        copy.unlink()
            wandb.teardown()

    def _log_checkpoints(self, wandb: ModuleType, ended: Ended) -> list[Path]:
        """Hand over the loop's best checkpoint, and that of the solved head where it ships; the files that wandb reads.

        Args:
            ended: its `best` is {} where that is not known for sure, as of a run that was killed.
        """
        copies = []
        for name in dict.fromkeys(["best", ended.ships]):
            # Its own name for it: best.pt may be another file by the time it is sent.
            copy = Path(self._run.dir).resolve().parent / f"{name}.pt"
            with suppress(FileNotFoundError):
                link_or_copy(self._folder / "checkpoints" / f"{name}.pt", copy)
                copies.append(copy)
        if not copies:
            return []
        # Its metadata is JSON, which has no infinity.
        metadata = {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in ended.best.items()
        }
        if ended.ships != "best":
            metadata["ships"] = ended.ships
        artifact = wandb.Artifact(f"model-{self._run.id}", type="model", metadata=metadata)
        for copy in copies:
            artifact.add_file(str(copy), name=copy.name, policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=["best"])
        return copies


def _table(wandb: ModuleType, examples: tuple[Example, ...]) -> object:
    from PIL import Image

    rows = []
    for one in examples:
        picture = wandb.Image(Image.open(io.BytesIO(one.picture))) if one.picture else None
        probability = dict(one.probabilities).get(one.predicted)
        words = [printable(one.name), picture, one.text or None, printable(one.true), printable(one.predicted)]
        rows.append([*words, probability, one.loss])
    return wandb.Table(columns=COLUMNS, data=rows, allow_mixed_types=True)
