"""The kit from Python, as in a notebook: the same runs, options and errors as on the command line."""

import dataclasses
import difflib
import html
import json
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from finetune.base.events import Best
from finetune.base.signals import StopRequest
from finetune.commands import training
from finetune.errors import RunError, UsageError
from finetune.options import ResumeOptions, RunOptions
from finetune.recipe.spec import Recipe

if TYPE_CHECKING:
    from IPython.display import HTML

    from finetune.store.state import Progress
    from finetune.training.context import RunContext

Options = TypeVar("Options", RunOptions, ResumeOptions)


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended.

    Attributes:
        folder: of the run.
        status: "finished" or "stopped early" (nothing got better any more).
        best: {"metric", "value", "step", "epoch", ...} of what ships, on the samples that validate: the loop's best, or
            the solved head ("is_solved").
        outcome: the same in words.
    """

    folder: Path
    status: str
    best: Best
    outcome: str

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def validations(self) -> list[dict[str, float | None]]:
        """A dict each: step, epoch, train/epoch_loss, val/loss, val/accuracy, ...; None = no finite number."""
        lines = []
        for text in (self.folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):  # a line that a kill has torn
                lines.append(json.loads(text))
        return [line for line in lines if isinstance(line, dict) and "val/loss" in line]

    def export(self, output: str | Path = "") -> Path:
        """The best weights, for `finetune.load` and for stock torchvision or transformers.

        Args:
            output: .pt, .safetensors or .onnx; default: model.pt in the run's folder.

        Raises:
            FinetuneError: see `finetune export`.
        """
        from finetune.export.weights import FORMATS, export
        from finetune.store.restore import shipped
        from finetune.store.run_folder import RunFolder

        path = Path(output) if output else self.folder / "model.pt"
        if path.suffix not in FORMATS:
            raise UsageError(f"output {path}: must end in {' or '.join(FORMATS)}")
        run = RunFolder(self.folder)
        export(run, shipped(run, "auto"), path)
        return path

    def show_report(self, height_pixels: int = 600) -> "HTML":
        """The report within the notebook.

        Raises:
            RunError: the run has none.
        """
        if not self.report.is_file():
            raise RunError(f"{self.report} does not exist; write it with: finetune report {self.folder}")
        from IPython.display import HTML

        # The page itself, not its place: a notebook of Colab cannot reach a file on the machine it runs on.
        page = html.escape(self.report.read_text(encoding="utf-8"))
        frame = (
            f"width='100%' height='{height_pixels}' style='border: 0' title='report of {html.escape(str(self.folder))}'"
        )
        return HTML(f"<iframe srcdoc='{page}' {frame}></iframe>")

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        rows = {"run": str(self.folder), self.status: self.outcome, "report": str(self.report)}
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in rows.items()
        )
        return f"<table>{cells}</table>"


def fit(
    recipe: Recipe,
    run: str | Path = "",
    *,
    name: str = "notebook",
    trackers: Sequence[object] = (),
    stop: StopRequest | None = None,
    **options: object,
) -> FinishedRun:
    """Train a recipe. With `run`, the same call goes on where the last one ended: after a crash, run the cell again.

    Args:
        recipe: as a recipe function, `image_head` or `text_head` returns it; it may be made in a notebook's cell.
        run: the run's folder; default: the next free runs/NAME-N, a new one with each call.
        name: of the recipe, for that folder.
        trackers: objects with some of the methods of `finetune.base.events.Tracker` (begin, logged, validated, ...),
            which are told what happens. What they raise ends the run, which can be resumed, and reaches the caller.
        stop: whoever holds it can ask the run to stop, from any thread: `stop.ask("by the button")`. The step is
            finished, the state saved, and StoppedEarly raised.
        options: those of `finetune RECIPE --help` that every run has, with _ in place of -: device="cpu",
            save_every_minutes=5, notify=("slack://...",), cache=False.

    Raises:
        FinetuneError: as the command line would say it; StoppedEarly when it was interrupted, and saved.
    """
    if not isinstance(recipe, Recipe):
        raise UsageError(
            f"fit: {type(recipe).__name__} is no Recipe; call the recipe function, as in fit(recipe(lr=1e-3)), or "
            "image_head(images=..., backbone=...)"
        )
    given = _given(RunOptions, "RECIPE", run, {"resume": bool(run)} | options)
    _check_handed_in(trackers, stop)
    return training.train(name, (), recipe, given, [], _conclude, trackers=trackers, stop=stop)


def resume(
    run: str | Path = "",
    *,
    trackers: Sequence[object] = (),
    stop: StopRequest | None = None,
    **options: object,
) -> FinishedRun:
    """Go on with a run as if it had never stopped.

    Args:
        run: its folder; default: the newest unfinished below runs/.
        trackers, stop: as of `fit`.
        options: those of `finetune resume --help`, with _ in place of -: epochs=30, device="cuda", from_="...".

    Raises:
        FinetuneError: as the command line would say it.
    """
    given = _given(ResumeOptions, "resume", run, options)
    _check_handed_in(trackers, stop)
    return training.resume(given, _conclude, trackers=trackers, stop=stop)


def _check_handed_in(trackers: object, stop: object) -> None:
    if isinstance(trackers, str) or not isinstance(trackers, Sequence):
        found = trackers if isinstance(trackers, str) else type(trackers).__name__
        raise UsageError(
            f"trackers: {found!r} is no list; give trackers=[...] objects with methods like validated, and names like "
            '"tensorboard" by track="tensorboard"'
        )
    if stop is not None and not isinstance(stop, StopRequest):
        raise UsageError(f"stop: {type(stop).__name__} is no finetune.StopRequest; make one: stop=StopRequest()")


def _given(kind: type[Options], command: str, run: str | Path, options: dict[str, object]) -> Options:
    """Options, checked as those of the command line are, and by the same parser."""
    from finetune.cli import parse

    names = [field.name for field in dataclasses.fields(kind) if field.name != "run"]
    words: list[str] = []
    for name, value in options.items():
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"allowed are {', '.join(sorted(names))}"
            raise UsageError(f"option {name}: unknown; {hint}")
        option = name.strip("_").replace("_", "-")
        if isinstance(getattr(kind, name), bool) and not isinstance(value, bool):
            raise UsageError(f"option {name} {value!r}: give True or False")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif name == "notify" and isinstance(value, list | tuple):
            words += [f"--{option}={one}" for one in value]
        elif value is not None:
            words.append(f"--{option}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}")
    state = random.getstate()
    try:
        parsed = parse(kind, command, "", words)
    finally:
        random.setstate(state)  # the parser draws from these numbers, which are the caller's
    return dataclasses.replace(parsed, run=str(run))


def _conclude(context: "RunContext", progress: "Progress") -> FinishedRun:
    run = context.run
    if run.url:
        context.say(f"{run}: a copy of it lies in {run.path}")
    if progress.status not in ("finished", "stopped early"):
        raise RunError(f"run {run} is {progress.status} at step {progress.step}; go on with finetune.resume")
    from finetune.store.finish_state import outcome_text, shipped_best

    return FinishedRun(
        run.path,
        progress.status,
        shipped_best(progress.best, progress.finish),
        outcome_text(progress.best, progress.finish),
    )
