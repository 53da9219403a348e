"""`finetune evaluate`: how good a checkpoint is, on data that it did not train on."""

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from finetune.base.allocator import freed_memory_kept
from finetune.base.device import module_to_device, numerics_put_back, pick_device, set_numerics
from finetune.base.formatting import number_text, printable
from finetune.base.halves import freeing, in_halves
from finetune.base.intervals import share_text, worth_text
from finetune.base.table_names import is_table
from finetune.base.words import typed
from finetune.data.batch import Batch, Request, Split
from finetune.data.contents import Contents
from finetune.data.images import ImagePipeline, names_to_indices, without
from finetune.data.loader import Loader
from finetune.data.open import open_source, split_data
from finetune.data.order import batches_from
from finetune.data.source import PARTS, Source
from finetune.data.texts import TextPipeline
from finetune.errors import RunError, UsageError
from finetune.features.known import KnownRows
from finetune.recipe.data_spec import check_encoding
from finetune.recipe.execution import Machine, split_config
from finetune.recipe.head_options import AnyTable
from finetune.recipe.serialize import spec_from_plain
from finetune.recipe.spec import Data as DataSpec
from finetune.recipe.spec import Distillation, Recipe, Regression
from finetune.runs.same_data import hinting_at_a_move
from finetune.store.finish_state import Finish
from finetune.store.restore import backbone_of_run, shipped_thresholds, trained_network
from finetune.store.run_folder import RunFolder
from finetune.store.state import DataFacts, generators_put_back
from finetune.tasks.evaluation import Evaluation
from finetune.tasks.evaluation import evaluate as evaluate_batches
from finetune.tasks.levels import nearest_level
from finetune.tasks.losses import MultiLabelTask, Outputs, Task, make_task, standardised
from finetune.tasks.thresholds import cross_fitted_of
from finetune.training.dataset import Data, make_pipeline
from finetune.training.phase import known_feed, trained_forward
from finetune.training.setup import Loaders, Setup

BATCH_SAMPLES = 64
MATRIX_CLASSES = 15  # a larger confusion matrix is shown as its worst mistakes
SHOWN_MISTAKES = 10
LABELS = {
    "f1": "macro F1",
    "calibration_error": "calibration error",
    "mae": "mean absolute error",
    "r2": "R2, variance explained",
    "level_accuracy": "nearest level is right",
}
UNDEFINED = "undefined: the numbers are all the same, so there is no variance to explain"


@numerics_put_back()
@generators_put_back()
@freed_memory_kept()
def evaluate(
    run: RunFolder,
    which: str,
    place: str,
    table: AnyTable,
    device_name: str,
    workers: int | None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Figures of a checkpoint, as plain values.

    Args:
        say: told when fewer samples at once are to do.
        which: "best", "latest" or "final".
        place: other data with the same classes; "" = the run's own test part, or where it has none its validation
            part.
        table: of that data, if it is one; what is not given is as in the run.

    Raises:
        FinetuneError: the run or the data cannot be used.
    """
    network, state = trained_network(run, which)
    recipe, numerics = split_config(state.config)
    set_numerics(numerics.deterministic, numerics.tf32)
    device = pick_device(device_name)
    if isinstance(recipe.task, Distillation):
        raise UsageError(f"{run} is a distillation; how near it came to its teacher is in {run.metrics_file}")
    backbone = backbone_of_run(run, state)
    judged = _data_to_judge_on(run, recipe, state.data, place, table)
    source = judged.source
    if scale := state.data.scale:
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        source = dataclasses.replace(source, targets=standardised(source.targets, scale, dtype))
    pipeline = make_pipeline(source, recipe.data, backbone, recipe.seed)
    loader = Loader(pipeline, workers, "auto", device.type == "cuda", judged.contents)
    module_to_device(network.module, device)
    setup = Setup(
        recipe, numerics, Machine(device_name), backbone, network, network.freeze_map(recipe.trainable),
        _data_of(judged, pipeline, state.data), Loaders(loader, loader), device, "", "",
    )  # fmt: skip
    forward, rows = _known(setup, judged)
    if forward is None:
        forward = trained_forward(network, recipe, numerics, state, backbone, device)
    network.module.eval()
    # Figures of today, by whatever way the run itself went.
    kind = Regression() if isinstance(recipe.task, Regression) else recipe.task
    task = make_task(kind, state.data.outputs, state.data.scale)
    thresholds = shipped_thresholds(which, state)
    held = _held_out(state.progress.finish, judged, recipe) if judged.is_own else None
    if held is not None:
        judged = judged._replace(indices=held.samples)
    elif thresholds and isinstance(task, MultiLabelTask):
        task = dataclasses.replace(task, cuts=torch.tensor(thresholds).logit())
    count = len(judged.indices)

    def attempt(halvings: int) -> Evaluation:
        parts = batches_from(judged.indices, max(1, BATCH_SAMPLES >> halvings))
        requests = (Request(batch.tolist(), tolerant=True) for batch in parts)
        with closing(loader):
            batches = loader.batches(requests) if rows is None else rows.batches(requests)
            if held is not None:
                return _look_up(batches, held, task, count)
            return evaluate_batches(forward, batches, task, device, numerics.precision, samples=count)

    with nullcontext() if rows is None else closing(rows):
        evaluation, _ = in_halves(attempt, BATCH_SAMPLES, 0, freeing(device, say))
    noun = judged.source.noun
    if not evaluation.samples:
        raise RunError(f"--{noun}s {place}: none of {count} {noun}(s) could be read; {evaluation.broken[0]}")
    record = evaluation.record(source)
    figures: dict[str, Any] = {
        "run": str(run),
        "checkpoint": {"which": which, "step": state.progress.step},
        f"{noun}s": place or recipe.data.place,
        "part": judged.part,
        "out_of_fold": held is not None,
        **({"optimism": state.progress.finish.judged["optimism"]} if held is not None else {}),
        # The loop's best was chosen, and its thresholds were, by the samples that validate.
        "chosen_by_these": which == "best" and judged.is_own and judged.part == "validation",
        **({"thresholds": thresholds} if thresholds else {}),
        "samples": record.samples,
        **record.figures,
        "intervals": record.intervals,
        **({"r2": record.figures.get("r2")} if isinstance(recipe.task, Regression) else {}),
        **_level_figures(evaluation, state.data),
    }
    if record.classes is not None:
        figures |= {"calibration_error": record.calibration_error, "calibration": record.calibration}
        figures["classes"] = [row._asdict() for row in record.class_rows(state.data.classes)]
        figures |= {"confusion_matrix": record.confusion, "mistakes": record.mistakes}
    return figures | {"broken": evaluation.broken}


def _level_figures(evaluation: Evaluation, facts: DataFacts) -> dict[str, float]:
    """Of numbers that are steps of a scale: how many predictions are nearest to the right one."""
    if not facts.levels:
        return {}
    mean, deviation = facts.scale
    outputs, targets = (one.double().reshape(-1) * deviation + mean for one in evaluation.given())
    found, wanted = (nearest_level(one, facts.levels) for one in (outputs, targets))
    return {"level_accuracy": (found == wanted).double().mean().item()}


class _Judged(NamedTuple):
    """The samples that are evaluated, what that part of the data is called, and what their files should hold."""

    source: Source
    indices: Tensor
    part: str
    contents: Contents
    split: Split | None = None

    @property
    def is_own(self) -> bool:
        """Whether it is of the data that the run was trained on, which is split then."""
        return self.split is not None


def _data_of(judged: _Judged, pipeline: ImagePipeline | TextPipeline, facts: DataFacts) -> Data:
    """What is evaluated, as a run opens its data."""
    none = torch.zeros(0, dtype=torch.int64)
    split = judged.split or Split(none, judged.indices, none)
    kept = Split(*(without(part, names_to_indices(judged.source, facts.skipped)) for part in split))
    return Data(pipeline.source, kept, split, pipeline)


def _known(setup: Setup, judged: _Judged) -> tuple[Callable[[Tensor], Outputs], KnownRows] | tuple[None, None]:
    """The features that the run kept of these samples, where no file has changed: then none is decoded."""
    found = known_feed(setup, judged.indices) if judged.is_own and judged.part == "validation" else None
    return (None, None) if found is None else found


class _Held(NamedTuple):
    """Samples that are to be judged on and that the solved head was trained on in the end; what heads gave of them that
    were solved without; from which output on each class applies, found without them."""

    samples: Tensor
    outputs: Tensor
    cuts: Tensor | None


def _held_out(finish: Finish, judged: _Judged, recipe: Recipe) -> _Held | None:
    """None = the head was not trained on them."""
    samples, outputs = finish.held_samples, finish.held_outputs
    here = torch.isin(samples, judged.indices)
    if not here.any():
        return None
    cuts = cross_fitted_of(recipe.task, outputs, judged.source.targets[samples])
    return _Held(samples[here], outputs[here], None if cuts is None else cuts[here])


def _look_up(batches: Iterable[Batch], held: _Held, task: Task, count: int) -> Evaluation:
    """What was given of samples before. They are read all the same: that they are what they were then is checked."""
    evaluation = Evaluation(task, torch.device("cpu"), count)
    order = held.samples.argsort()
    for batch in batches:
        evaluation.broken += [reason for _, reason in batch.broken]
        if len(batch.indices):
            places = order[torch.searchsorted(held.samples[order], batch.indices)]
            cuts = None if held.cuts is None else held.cuts[places]
            evaluation.add(batch.indices, held.outputs[places], batch.targets, cuts)
    return evaluation


def _data_to_judge_on(run: RunFolder, recipe: Recipe, facts: DataFacts, place: str, table: AnyTable) -> _Judged:
    """Of the run's own data (also where it was moved) what it did not train on: its test part, else its validation
    part. Of other data the test part, else the validation part, else all."""
    spec = _located(recipe.data, place, table) if place else recipe.data
    elsewhere = typed(["finetune", "evaluate", str(run), spec.option, "PLACE"])
    with hinting_at_a_move(recipe, place, elsewhere):
        source = _opened(spec, recipe.task.kind, facts, place)
    if source.fingerprint == facts.fingerprint:
        split = split_data(source, recipe)
        indices, part = (split.test, "test") if len(split.test) else (split.validation, "validation")
        indices = without(indices, names_to_indices(source, facts.skipped))
        return _Judged(source, indices, part, Contents(source, run.contents_file), split)
    if spec.samples:  # of the run's own data
        source = open_source(dataclasses.replace(spec, samples=0), recipe.task.kind, facts.classes or None)
    if not place:
        raise RunError(
            f"{recipe.data.place} is not what the run was trained on any more; say what to evaluate on with "
            f"{recipe.data.option}"
        )
    if list(source.classes) != facts.classes:
        others = sorted(set(source.classes) ^ set(facts.classes))
        raise UsageError(
            f"{recipe.data.option} {place}: its classes are not those of the run ({', '.join(map(repr, others[:5]))} "
            "on one side only); give data with the same"
        )
    if source.parts is not None:
        for number in (2, 1):
            indices = (source.parts == number).nonzero().squeeze(1)
            if len(indices):
                return _Judged(source, indices, PARTS[number], Contents(source))
    return _Judged(source, torch.arange(len(source.targets)), "all", Contents(source))


def _opened(spec: DataSpec, kind: str, facts: DataFacts, place: str) -> Source:
    """The data; grouped as in the run if it is the run's own, for nothing is split of other data."""
    classes = (facts.classes or None) if place else None
    if not place or not (spec.group_column or spec.group_by):
        return open_source(spec, kind, classes)
    with suppress(UsageError):
        source = open_source(spec, kind, classes)
        if source.fingerprint == facts.fingerprint:
            return source
    return open_source(dataclasses.replace(spec, group_column="", group_by=""), kind, classes)


def _located(spec: DataSpec, place: str, table: AnyTable) -> DataSpec:
    """The run's data description for other data: a table has the columns that are given, or, where none is given,
    those of the run; a folder has none."""
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    if table.encoding:
        check_encoding(table.encoding)
    given = {name: getattr(table, name) for name in values if hasattr(table, name)}
    given |= {name: given[name] or getattr(spec, name) for name in ("quotes", "missing_labels", "encoding")}
    columns = {name: value for name, value in given.items() if name.endswith("_column")}
    if is_table(Path(place)):
        given["separator"] = table.separator or spec.separator
        if not any(columns.values()):
            given = {name: value for name, value in given.items() if name not in columns}
    return spec_from_plain(type(spec), values | given | {spec.kind: place})


# ---- For people ----------------------------------------------------------------------------------------------------


def show(figures: dict[str, Any], console: Console) -> None:
    """Print what `evaluate` found as tables."""
    noun = "images" if "images" in figures else "texts"
    console.print(
        Text(
            f"{figures['run']}, {figures['checkpoint']['which']} checkpoint (step {figures['checkpoint']['step']}), on "
            f"{figures[noun]}, {figures['part']} part: {figures['samples']:,} {noun}"
        )
    )
    if figures["out_of_fold"]:
        chosen = (
            f"as lambda was chosen by such losses, the loss looks better by about {number_text(figures['optimism'])}"
        )
        console.print(Text(f"out of fold: each was judged by a head that was solved without it; {chosen}"))
    if figures["chosen_by_these"]:
        what = "this checkpoint and its thresholds were" if "thresholds" in figures else "this checkpoint was"
        console.print(Text(f"{what} chosen by these very {noun}: on others it may be less good"))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name in ("loss", "accuracy", "f1", "calibration_error", "mae", "r2", "level_accuracy"):
        if name in figures:
            value = number_text(figures[name]) if figures[name] is not None else UNDEFINED
            worth = worth_text(name, figures[name], figures["samples"], figures["intervals"])
            worth = share_text(figures[name], figures["samples"]) if name == "level_accuracy" else worth
            table.add_row(LABELS.get(name, name), value, worth)
    console.print(table)
    for reason in figures["broken"][:SHOWN_MISTAKES]:
        console.print(Text(printable(f"left out: {reason}")))
    if len(figures["broken"]) > SHOWN_MISTAKES:
        console.print(Text(f"left out: {len(figures['broken']) - SHOWN_MISTAKES} more"))
    if "classes" not in figures:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("class", "precision", "recall", "F1", noun):
        table.add_column(name, justify="left" if name == "class" else "right", overflow="fold")
    for row in figures["classes"]:
        values = [f"{row[name]:.3f}" for name in ("precision", "recall", "f1")]
        table.add_row(Text(printable(row["name"])), *values, f"{row['samples']:,}")
    console.print(table)
    names, matrix = [row["name"] for row in figures["classes"]], figures["confusion_matrix"]
    if matrix and len(names) <= MATRIX_CLASSES:
        console.print(_matrix(names, matrix))
    elif figures["mistakes"]:
        console.print(_mistakes(names, figures["mistakes"], noun))


def _matrix(names: list[str], matrix: list[list[int]]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title="rows: true class; columns: predicted", title_justify="left"
    )
    table.add_column("", overflow="fold")
    for name in names:
        table.add_column(Text(printable(name)), justify="right", overflow="fold")
    for number, (name, row) in enumerate(zip(names, matrix, strict=True)):
        cells = [
            Text(str(count) if count else ".", "bold" if number == column else "") for column, count in enumerate(row)
        ]
        table.add_row(Text(printable(name)), *cells)
    return table


def _mistakes(names: list[str], mistakes: list[list[int]], noun: str) -> Table:
    """Of many classes, which are taken for which most often."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="most frequent mistakes", title_justify="left")
    for column in ("true class", "taken for", noun):
        table.add_column(column, justify="right" if column == noun else "left", overflow="fold")
    for true, taken, count in mistakes[:SHOWN_MISTAKES]:
        table.add_row(Text(printable(names[true])), Text(printable(names[taken])), f"{count:,}")
    return table
