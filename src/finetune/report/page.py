"""report.html of a run: one file that says what was trained on what, how it went, how good it is, how to go on.

It refers to nothing outside itself and runs no script. Everything in it that others named (classes, files, texts) is
escaped by the template.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from finetune import __version__
from finetune.base.events import Example
from finetune.base.files import BadFile, make_folders, write_atomically
from finetune.base.formatting import number_text
from finetune.base.intervals import worth_text
from finetune.base.lock import is_held
from finetune.data.batch import Split
from finetune.data.images import decoded_for, names_to_indices, without
from finetune.data.open import open_source, split_data
from finetune.data.preprocess import Preprocessing
from finetune.data.source import FileSource, Source, TextSource
from finetune.errors import FinetuneError, RunError, UsageError, one_line
from finetune.recipe.execution import split_config
from finetune.recipe.spec import located
from finetune.report.charts import (
    calibration_chart,
    confusion_chart,
    curve_charts,
)
from finetune.report.commands import commands_of, configured, loading_of
from finetune.report.data import NOT_AS_WRITTEN, ClassRow, RunData, Validation, gather
from finetune.report.doubts import Doubtful, doubtful
from finetune.report.examples import examples_of
from finetune.report.html import picture_address, render_page
from finetune.report.overview import Overview, overview_of
from finetune.report.words import capitalised, metric_text
from finetune.store.run_folder import RunFolder
from finetune.tasks.doubts import DOUBTFUL

# Of longer tables those rows are shown that matter most, and it is said how many there are.
SHOWN_ROWS = 30
SHOWN_WORST, SHOWN_BEST = 24, 12
STATUS_TEXTS = {
    "finished": "Finished",
    "stopped early": "Stopped early, as nothing got better any more",
    "stopped": "Stopped, can be resumed",
    "running": "Still running",
}


class Shown(NamedTuple):
    """Samples that a report shows.

    Attributes:
        best, worst: of the best validation, the best and the worst first.
        doubtful: those whose labels are probably wrong.
        overview: what the data looks like; None = it is not at hand.
    """

    best: Sequence[Example] = ()
    worst: Sequence[Example] = ()
    doubtful: Doubtful = Doubtful()
    overview: Overview | None = None


def write_report(data: RunData, output: Path, shown: Shown, status: str) -> None:
    """Write the report of a run.

    Args:
        output: the .html file; its folder is made where there is none.
        status: "finished", "stopped early", "stopped", "running" or "failed: ...".

    Raises:
        RunError: the file cannot be written.
    """
    page = render(data, shown, status)
    try:
        make_folders(output.parent)
        write_atomically(output, lambda stream: stream.write(page.encode()))
    except OSError as error:
        raise RunError(f"--output {output}: cannot be written ({error.strerror}); name another file") from None


def samples_to_show(data: RunData, source: Source | None, *, standardised: bool = False) -> Shown:
    """Samples of the best validation, and those whose labels are probably wrong.

    Args:
        source: of the samples; None = it is not there any more.
        standardised: its numbers to predict are, as in a run.

    Raises:
        RunError: validation.json does not fit to it.
    """
    doubts, overview = doubtful(data.run, source), _overview(data, source, standardised)
    if data.validation is None:
        return Shown(doubtful=doubts, overview=overview)
    classes = data.checkpoint.classes if data.checkpoint else [row.name for row in data.validation.classes]
    record = data.validation.record
    try:
        best, worst = (examples_of(samples, classes, source) for samples in (record.best, record.worst))
    except (BadFile, *NOT_AS_WRITTEN) as error:
        raise RunError(
            f"validation of the run {data.run.validation_file} names samples or classes that its data has not "
            f"({one_line(error)}); restore it, or delete it"
        ) from None
    return Shown(best, worst, doubts, overview)


def _overview(data: RunData, source: Source | None, standardised: bool) -> Overview | None:
    """What the run's data looks like; None where it is not at hand, or of another version."""
    if source is None or data.checkpoint is None:
        return None
    try:
        recipe, _ = split_config(data.config)
        if recipe.task.kind == "distillation":
            return None
        skipped = names_to_indices(source, data.checkpoint.skipped)
        split = Split(*(without(part, skipped) for part in split_data(source, recipe)))
        prepared = data.checkpoint.backbone["preprocessing"]
        assert isinstance(prepared, dict)
        images = None if isinstance(source, TextSource) else Preprocessing(**prepared)
        scale = data.checkpoint.target_scale if standardised else ()
        return overview_of(source, split, recipe, images, scale)
    except (FinetuneError, AssertionError, *NOT_AS_WRITTEN):
        return None


# ---- Out of the files of a run alone --------------------------------------------------------------------------------


def report_run(run: RunFolder, output: Path, place: str, say: Callable[[str], None]) -> None:
    """`finetune report`: the report of a run as its files tell of it, with samples out of its data.

    Args:
        place: where the run's data lies now; "" = where the run says.
        say: told what of the data could not be found.

    Raises:
        RunError: see `gather`, `samples_to_show` and `write_report`.
        UsageError: what lies at `place` is not the run's data.
    """
    data = gather(run)
    source = None
    try:
        source = _open_data(data, place)
    except FinetuneError as error:
        if place:
            raise
        say(f"no pictures or texts in the report: {error.args[0]}")
    shown = samples_to_show(data, source)
    status = data.checkpoint.progress.status if data.checkpoint else "stopped"
    if status not in ("finished", "stopped early"):
        status = "running" if is_held(run.path) else "stopped"
    write_report(data, output, shown, status)


def _open_data(data: RunData, place: str) -> Source | None:
    """The data that the samples of the best validation are of.

    Raises:
        FinetuneError: it is not there, or not what the run was trained on.
    """
    if data.validation is None or data.checkpoint is None:
        return None
    recipe, _ = split_config(data.config)
    spec = located(recipe, place).data
    source = open_source(spec, recipe.task.kind)
    if source.fingerprint != data.checkpoint.fingerprint:
        raise UsageError(
            f"{spec.option} {spec.place}: is not what run {data.run} was trained on; say where that lies now with "
            f"{spec.option}"
        )
    prepared = data.checkpoint.backbone.get("preprocessing")
    if isinstance(source, FileSource) and isinstance(prepared, dict):
        with suppress(TypeError, ValueError):
            source = decoded_for(source, Preprocessing(**prepared))
    return source


# ---- The page -------------------------------------------------------------------------------------------------------


def render(data: RunData, shown: Shown, status: str) -> str:
    """The page as HTML."""
    validation = data.validation
    return render_page(
        "page.html.j2",
        overview=shown.overview,
        name=data.run.url.rstrip("/").rpartition("/")[2] or data.run.path.resolve().name,
        version=__version__,
        status=_status(data, status),
        notices=data.notices,
        figures=_figures(data),
        facts=_facts(data),
        charts=curve_charts(data),
        events=data.events,
        history=_history(data),
        validation=validation,
        noun=configured(data, "data", "kind"),
        outcome=_outcome(validation),
        classes=_shown_classes(validation),
        confusion=confusion_chart(validation) if validation else None,
        calibration=calibration_chart(validation) if validation else None,
        samples=_samples(data, shown.best, shown.worst),
        doubts=_doubts(data, shown.doubtful),
        commands=commands_of(data),
        loading=loading_of(data),
        shown_rows=SHOWN_ROWS,
    )


class _Status(NamedTuple):
    """The state of the run: a word for the style sheet, and words for people."""

    kind: str
    text: str
    progress: str


def _status(data: RunData, status: str) -> _Status:
    kind = status.partition(":")[0].replace(" ", "-")
    text = STATUS_TEXTS.get(status) or f"{status[:1].upper()}{status[1:]}"
    if data.checkpoint is None:
        return _Status(kind, text, "no checkpoint yet")
    step, steps_per_epoch = data.checkpoint.progress.step, data.steps_per_epoch
    epochs = f", {round(step / steps_per_epoch, 2):g} epochs" if steps_per_epoch else ""
    return _Status(kind, text, f"{step:,} steps{epochs}")


def _figures(data: RunData) -> list[tuple[str, str, str]]:
    """What to know at once: of the best validation; what it is called, the figure, and what that is worth."""
    validation = data.validation
    is_of_best = validation is not None and (
        data.shows_solved or (validation.step == data.best.get("step") and not validation.is_solved)
    )
    record = validation.record if validation is not None and is_of_best else None
    found = []
    for name, value in data.best_figures().items():
        worth = "" if record is None else worth_text(name, value, record.samples, record.intervals)
        found.append((capitalised(metric_text(name)), number_text(value), worth))
    if record is not None:
        if record.calibration_error is not None:
            found.append(("Calibration error", number_text(record.calibration_error), ""))
        found.append(("Samples that validate", f"{record.samples:,}", ""))
    return found


def _facts(data: RunData) -> list[tuple[str, str]]:
    """Label and text: those that the terminal showed when the run began, and what the checkpoint adds."""
    facts = dict(data.validation.facts) if data.validation else {}
    checkpoint = data.checkpoint
    if not facts:
        recipe, _ = split_config(data.config)
        facts = {"backbone": recipe.model.full_name, "weights": recipe.model.weights, "data": recipe.data.place}
        if checkpoint is not None:
            facts["data"] += (
                f": {checkpoint.train_samples:,} to train on, {checkpoint.validation_samples:,} to validate, "
                f"{len(checkpoint.classes)} classes"
            )
        facts["training"] = (
            f"{recipe.optimizer.name}, lr {recipe.optimizer.lr:g}, batch {recipe.batch_size}, seed {recipe.seed}"
        )
        facts["run folder"] = str(data.run)
    if checkpoint is not None and "trains" not in facts:
        facts["tensors"] = (
            f"{checkpoint.trained_tensors:,} train ({checkpoint.trained_parameters:,} parameters), "
            f"{checkpoint.frozen_tensors:,} are frozen"
        )
    if checkpoint is not None:
        facts["versions"] = ", ".join(
            f"{name.replace('_', ' ')} {value}" for name, value in checkpoint.versions.items()
        )
    return [(capitalised(label), text) for label, text in facts.items()]


def _history(data: RunData) -> dict[str, object] | None:
    """The validations as a table: the newest ones, and the best."""
    names = [f"val/{name}" for name in (*data.metrics, "loss") if f"val/{name}" in data.curves]
    if not names:
        return None
    steps = data.curves[names[0]].steps.tolist()
    best = data.best.get("step")
    shown = [step for number, step in enumerate(steps) if len(steps) - number <= SHOWN_ROWS or step == best]
    per_epoch = data.steps_per_epoch
    columns = ["train/epoch_loss", *names] if "train/epoch_loss" in data.curves else names
    rows = [
        {
            "step": step,
            "epoch": -(-step // per_epoch) if per_epoch else None,
            "values": [data.curves[name].at(step) for name in columns],
            "is_best": step == best,
        }
        for step in shown
    ]
    labels = ["Training loss" if name == "train/epoch_loss" else capitalised(metric_text(name[4:])) for name in columns]
    return {"labels": labels, "rows": rows, "count": len(steps)}


def _outcome(validation: Validation | None) -> str:
    """Its figures in words."""
    figures = validation.record.figures if validation else {}
    return ", ".join(f"{metric_text(name)} {number_text(value)}" for name, value in figures.items())


def _shown_classes(validation: Validation | None) -> list[ClassRow]:
    """All of them in order; of many the worst."""
    rows = validation.classes if validation else []
    return rows if len(rows) <= SHOWN_ROWS else sorted(rows, key=lambda row: (row.f1, row.recall))[:SHOWN_ROWS]


def _samples(data: RunData, best: Sequence[Example], worst: Sequence[Example]) -> dict[str, object]:
    """The best and the worst ones, ready for the template; of few samples none is both."""
    count = data.validation.record.samples if data.validation else len(worst) + len(best)
    worst, best = worst[: min(SHOWN_WORST, -(-count // 2))], best[: min(SHOWN_BEST, count // 2)]
    shown = [*worst, *best]
    has_data = any(one.picture or one.text for one in shown)
    return {
        "worst": [_sample(one) for one in worst],
        "best": [_sample(one) for one in best],
        "has_data": has_data,
        "has_texts": any(one.text for one in shown),
        "has_classes": bool(data.validation and data.validation.classes),
        "has_truth": any(one.true for one in shown),
    }


def _doubts(data: RunData, found: Doubtful) -> dict[str, object]:
    """Labels that are probably wrong, ready for the template."""
    return {
        "count": found.count,
        "labels": found.labels,
        "samples": [_sample(one) | {"is_marked": one.name in found.marked} for one in found.examples],
        "marked": len(found.marked),
        "file": str(data.run.labels_file),
        "has_data": any(one.picture or one.text for one in found.examples),
        "has_texts": any(one.text for one in found.examples),
        "least": f"{DOUBTFUL:.0%}".replace("%", " %"),
    }


def _sample(example: Example) -> dict[str, object]:
    picture = example.picture
    width, height = (int.from_bytes(picture[place : place + 4], "big") for place in (16, 20))  # of a PNG
    numbers: tuple[str, ...]
    try:
        true, predicted = float(example.true), float(example.predicted)
    except ValueError:
        numbers = ("", "", "")
    else:
        numbers = (_digits(example.true), _digits(example.predicted), _digits(f"{predicted - true:.6g}"))
    return {
        "example": example,
        "true_classes": {example.true, *example.true.split(", ")},
        "picture": picture_address(picture),
        "width": width,
        "height": height,
        "numbers": numbers,
    }


def _digits(number: str) -> str:
    """Of a number as exact as `Example` has it: one that has more than six digits needs them."""
    value, count = float(number), len(re.sub("[^0-9]", "", number.partition("e")[0]))
    if count > 6:
        return f"{Decimal(number):,f}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
