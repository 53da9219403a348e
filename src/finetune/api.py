"""The kit from Python, as in a notebook: the same runs, options and errors as on the command line."""

import dataclasses
import difflib
import functools
import html
import inspect
import json
import os
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from finetune.base.events import Best
from finetune.base.signals import StopRequest
from finetune.commands import training
from finetune.errors import RunError, UsageError, os_error_text
from finetune.export.model import LoadedModel, Prediction, load_model
from finetune.options import ResumeOptions, RunOptions, check_workers
from finetune.recipe.spec import Recipe

if TYPE_CHECKING:
    from IPython.display import HTML

    from finetune.store.state import Progress
    from finetune.training.context import RunContext

__all__ = ["FinishedRun", "LoadedModel", "Prediction", "fit", "load", "resume"]
Options = TypeVar("Options", RunOptions, ResumeOptions)
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _files_in_words(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function, but of a file that cannot be read or written it says which and what to do."""

    @functools.wraps(function)
    def call(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        try:
            return function(*arguments, **options)
        except OSError as error:
            raise RunError(os_error_text(error)) from error

    return call


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

    @_files_in_words
    def export(self, output: str | Path = "") -> Path:
        """The best weights, for `finetune.load` and for stock torchvision, timm or transformers.

        Args:
            output: .pt, .safetensors, .onnx or .pt2; default: model.pt in the run's folder.

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

    @_files_in_words
    def load(self) -> LoadedModel:
        """The model that ships, out of model.pt in the run's folder, which is written where it is not there or old.

        Raises:
            FinetuneError: see `finetune export`. Where the folder cannot be written, `export` to another place, and
                `finetune.load` that.
        """
        from finetune.export.load import is_export_of
        from finetune.store.restore import shipped
        from finetune.store.run_folder import RunFolder

        run, path = RunFolder(self.folder), self.folder / "model.pt"
        if not is_export_of(path, run, shipped(run, "auto")):
            self.export()
        return load_model(path)

    def predict(self, inputs: object, **options: Any) -> Any:
        """Predict with the model that ships; see `LoadedModel.predict`."""
        return self.load().predict(inputs, **options)

    @_files_in_words
    def evaluate(
        self, data: str | Path = "", *, device: str = "auto", workers: int | None = None, checkpoint: str = "auto"
    ) -> dict[str, Any]:
        """Loss, accuracy, F1 by class, confusion matrix, ..., as `finetune evaluate --json` gives them.

        Args:
            data: other images or texts with the same classes; default: the run's own test part, else its validation
                part.
            device: "auto" (cuda, else mps, else cpu), or a device of torch.
            workers: processes that read images ahead; None = for image files one a core.
            checkpoint: "best", "latest", "final", or "auto": what ships.

        Raises:
            FinetuneError: see `finetune evaluate`.
        """
        from finetune.recipe.head_options import AnyTable
        from finetune.runs.evaluate import evaluate
        from finetune.store.restore import shipped
        from finetune.store.run_folder import RunFolder

        run = RunFolder(self.folder)
        which = shipped(run, checkpoint)
        return evaluate(run, which, str(data), AnyTable(), device, check_workers(workers))

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
        return HTML(f"<div><iframe srcdoc='{page}' {frame}></iframe></div>")  # of a bare frame IPython warns

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        rows = {"run": str(self.folder), self.status: self.outcome, "report": str(self.report)}
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in rows.items()
        )
        return f"<table>{cells}</table>"


def _told_of_wrong_names(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function, but for a keyword that it does not have the nearest one is named."""

    @functools.wraps(function)
    def call(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        names = list(inspect.signature(function).parameters)
        for name in options:
            if name not in names:
                nearest = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else f"allowed are {', '.join(sorted(names))}"
                raise UsageError(f"option {name}: unknown; {hint}")
        return function(*arguments, **options)

    return call


@_told_of_wrong_names
def fit(
    recipe: Recipe,
    run: str | Path | None = "",
    *,
    name: str = "notebook",
    trackers: Sequence[object] = (),
    stop: StopRequest | None = None,
    resume: bool | None = None,
    init_from: str | Path = "",
    new_classes: bool = False,
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    backbone_precision: Literal["fp32", "bf16", "fp16"] | None = None,
    tf32: Literal["none", "convolutions", "all"] = "none",
    workers: int | None = None,
    worker_start: Literal["auto", "fork", "forkserver", "spawn"] = "auto",
    cache: bool = True,
    cache_limit: str = "",
    skip_broken: bool = False,
    save_every_steps: int | None = None,
    save_every_minutes: float | None = None,
    keep: int | None = None,
    track: str | Sequence[str] | None = None,
    log_every_steps: int = 10,
    report: bool = True,
    notify: str | Sequence[str] = (),
    notify_every_epochs: int | None = None,
    frozen: Literal["auto", "copy"] = "auto",
    deterministic: bool = True,
    quiet: bool = False,
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
        resume: go on with the run that the folder holds; default: yes, where a folder is given.
        init_from: RUN, RUN:best or RUN:latest: start from that run's weights.
        new_classes: with init_from: the classes may be others; what the head knows of those with the same name is taken
            over.
        device: "auto" (cuda, mps, cpu), or a device of torch.
        precision: of the network's arithmetic; fp16 on CUDA only.
        backbone_precision: of the frozen part alone; default: as `precision`.
        tf32: what an NVIDIA GPU may compute with 10 of fp32's 23 bits.
        workers: processes that read and augment images ahead; 0 = none; default: for image files one a core, 8 at most.
        worker_start: how worker processes start; auto = the platform's way.
        cache: keep what the frozen backbone computes, so that it runs only once.
        cache_limit: how much disk new features may take, like "20GB"; default: a quarter of what is free.
        skip_broken: look at every image or text first, and leave broken ones out.
        save_every_steps: save also every so many steps; 0 = at the end of each epoch only.
        save_every_minutes: save also when so many minutes have passed; 0 = never for that.
        keep: numbered checkpoints to keep, besides latest.pt and best.pt; default: 2.
        track: who else is told: "tensorboard", "wandb", both, or "none"; default: tensorboard.
        log_every_steps: steps between two lines in metrics.jsonl.
        report: write report.html at the end of the run.
        notify: URLs that messages go to (slack://..., mailto://...).
        notify_every_epochs: send a message also every so many epochs.
        frozen: "copy" = keep the frozen weights in the run folder, so that it stands alone.
        deterministic: deterministic algorithms; without them a resume is not exact on CUDA.
        quiet: print nothing but what goes wrong.

    Raises:
        FinetuneError: as the command line would say it; StoppedEarly when it was interrupted, and saved.
    """
    given = locals()
    if not isinstance(recipe, Recipe):
        raise UsageError(
            f"fit: {type(recipe).__name__} is no Recipe; call the recipe function, as in fit(recipe(lr=1e-3)), or "
            "image_head(images=..., backbone=...)"
        )
    options = _given(RunOptions, "RECIPE", run, given | {"resume": bool(run) if resume is None else resume})
    _check_handed_in(trackers, stop)
    return training.train(name, (), recipe, options, [], _conclude, trackers=trackers, stop=stop)


@_told_of_wrong_names
def resume(
    run: str | Path | None = "",
    *,
    trackers: Sequence[object] = (),
    stop: StopRequest | None = None,
    epochs: int = 0,
    lr: float = 0.0,
    from_: str | Path = "",
    images: str | Path = "",
    texts: str | Path = "",
    device: str = "auto",
    workers: int | None = None,
    worker_start: Literal["auto", "fork", "forkserver", "spawn"] = "auto",
    cache_limit: str = "",
    save_every_steps: int | None = None,
    save_every_minutes: float | None = None,
    keep: int | None = None,
    track: str | Sequence[str] | None = None,
    notify: str | Sequence[str] = (),
    notify_every_epochs: int | None = None,
    quiet: bool = False,
) -> FinishedRun:
    """Go on with a run as if it had never stopped.

    Args:
        run: its folder; default: the newest unfinished below runs/.
        trackers, stop: as of `fit`.
        epochs: train to so many epochs in all.
        lr: learning rate of what is added; default: the recipe's final one.
        from_: rewind to this checkpoint first; later ones move to superseded/.
        images: where the same images lie now, if they were moved.
        texts: where the same texts lie now, if they were moved.
        device, workers, worker_start, cache_limit: as of `fit`.
        save_every_steps, save_every_minutes, keep, track: as of `fit`; default: as the run has it.
        notify, notify_every_epochs, quiet: as of `fit`.

    Raises:
        FinetuneError: as the command line would say it.
    """
    given = locals()
    options = _given(ResumeOptions, "resume", run, given)
    _check_handed_in(trackers, stop)
    return training.resume(options, _conclude, trackers=trackers, stop=stop)


@_files_in_words
def load(path: str | Path, device: str = "cpu") -> LoadedModel:
    """Load the model of an export, to predict with: `load("model.pt").predict("photo.jpg")`. Runs no code from it.

    Args:
        path: the .pt or .safetensors; its .json must lie beside it. Or a run's folder: its model.pt.
        device: "cpu", "auto" (cuda, else mps, else cpu), or a device of torch.

    Returns:
        A model that can also be called, like the bare network, which is its `module`: (batch, 3, height, width)
        float32, prepared as the JSON says, to (batch, classes) logits; of texts called as
        `model(**tokenizer(texts, padding=True, return_tensors="pt"))`, with the tokenizer that lies beside the file.
        Numbers come in their own unit: (batch, 1), in float64 where float32 cannot tell them apart.

    Raises:
        RunError: the files are missing, damaged, or do not belong together.
    """
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"load: {type(path).__name__} is no path; give the .pt of an export, or a run's folder")
    return load_model(path, device)


def _check_handed_in(trackers: object, stop: object) -> None:
    if isinstance(trackers, str) or not isinstance(trackers, Sequence):
        found = trackers if isinstance(trackers, str) else type(trackers).__name__
        raise UsageError(
            f"trackers: {found!r} is no list; give trackers=[...] objects with methods like validated, and names like "
            '"tensorboard" by track="tensorboard"'
        )
    if stop is not None and not isinstance(stop, StopRequest):
        raise UsageError(f"stop: {type(stop).__name__} is no finetune.StopRequest; make one: stop=StopRequest()")


def _given(kind: type[Options], command: str, run: str | Path | None, values: dict[str, Any]) -> Options:
    """Options, checked as those of the command line are, and by the same parser.

    Args:
        values: by name; others among them are none of its options.
    """
    from finetune.cli import parse

    words: list[str] = []
    for field in dataclasses.fields(kind):
        if field.name == "run" or field.name not in values or values[field.name] == field.default:
            continue
        option, value = field.name.strip("_").replace("_", "-"), values[field.name]
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise UsageError(f"option {field.name} {value!r}: give True or False")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif field.name == "notify":
            words += [f"--{option}={one}" for one in ([value] if isinstance(value, str) else value)]
        elif value is not None:
            words.append(f"--{option}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}")
    state = random.getstate()
    try:
        parsed = parse(kind, command, "", words)
    finally:
        random.setstate(state)  # the parser draws from these numbers, which are the caller's
    return dataclasses.replace(parsed, run=str(run or ""))


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
