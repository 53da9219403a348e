"""`finetune evaluate`: how good a checkpoint is, on data that it did not train on."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from finetune.build import make_pipeline, open_data, open_source, split_config, trained_network
from finetune.data.contents import Contents
from finetune.data.images import ImagePipeline, Request
from finetune.data.loader import Loader
from finetune.data.order import batches_from
from finetune.data.source import PARTS, Source
from finetune.data.table import Columns
from finetune.device import autocast, pick_device, set_numerics, to_device
from finetune.errors import RunError, UsageError
from finetune.models.backbones import Backbone, backbone_from_plain
from finetune.recipe import Images, Recipe
from finetune.run import RunFolder
from finetune.tasks import ConfusionTally, MultiLabelTally, make_task

BATCH_SAMPLES = 64
MATRIX_CLASSES = 15  # a larger confusion matrix is shown as its worst mistakes
SHOWN_MISTAKES = 10


def evaluate(
    run: RunFolder, which: str, images: str, columns: Columns, device_name: str, workers: int
) -> dict[str, Any]:
    """Figures of a checkpoint, as plain values.

    Args:
        which: "best" or "latest".
        images: other data with the same classes; "" = the run's own test part, or where it has none its validation
            part.
        columns: of `images`, if that is a table; what is not given is as in the run.

    Raises:
        FinetuneError: the run or the data cannot be used.
    """
    network, state = trained_network(run, which)
    recipe, numerics = split_config(state["config"])
    set_numerics(numerics.deterministic)
    device = pick_device(device_name)
    backbone = backbone_from_plain(state["network"]["backbone"])
    classes = state["data"]["classes"]
    if images:
        source, indices, part = _other_data(images, columns, recipe.data, classes)
        pipeline = make_pipeline(source, recipe.data, backbone, recipe.seed)
    else:
        pipeline, indices, part = _own_data(recipe, backbone, state["data"])
    model = network.module.to(device, memory_format=torch.channels_last).eval()
    zero = torch.zeros(len(classes), dtype=torch.int64)
    tally = make_task(recipe.task, zero, 0).tally(device)
    loader = Loader(pipeline, workers, "auto", device.type == "cuda", Contents(pipeline.source))
    broken: list[str] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        requests = (Request(batch.tolist(), tolerant=True) for batch in batches_from(indices, BATCH_SAMPLES))
        for batch in loader.batches(requests):
            broken.extend(reason for _, reason in batch.broken)
            if len(batch.indices):
                yield to_device(batch.images, device), batch.targets.to(device)

    with torch.inference_mode(), autocast(device, numerics.precision):
        for inputs, targets in batches():
            tally.add(model(inputs), targets)
    if not tally.samples():
        raise RunError(f"finetune evaluate: none of {len(indices)} image(s) could be read; first: {broken[0]}")
    return {
        "run": str(run.path),
        "checkpoint": {"which": which, "step": state["step"]},
        "images": images or recipe.data.images,
        "part": part,
        "samples": tally.samples(),
        **tally.figures(),
        **_details(tally, classes),
        "broken": broken,
    }


def _details(tally: ConfusionTally | MultiLabelTally, classes: list[str]) -> dict[str, Any]:
    """Calibration, figures by class, and the confusion matrix where each image has one class."""
    counts = tally.counts()
    columns = counts.precision(), counts.recall(), counts.f1(), counts.actual
    rows = zip(classes, *(column.tolist() for column in columns), strict=True)
    return {
        "calibration_error": tally.calibration.error(),
        "calibration": tally.calibration.table(),
        "classes": [
            {"name": name, "precision": precision, "recall": recall, "f1": f1, "samples": samples}
            for name, precision, recall, f1, samples in rows
        ],
        "confusion_matrix": tally.confusion.tolist() if isinstance(tally, ConfusionTally) else None,
    }


def _own_data(recipe: Recipe, backbone: Backbone, facts: dict[str, Any]) -> tuple[ImagePipeline, Tensor, str]:
    data = open_data(recipe, backbone, facts["skipped"])
    if data.source.fingerprint != facts["fingerprint"]:
        raise RunError(
            f"{recipe.data.images} is not what the run was trained on any more; say what to evaluate on with --images"
        )
    if len(data.split.test):
        return data.pipeline, data.split.test, "test"
    return data.pipeline, data.split.validation, "validation"


def _other_data(images: str, columns: Columns, spec: Images, classes: list[str]) -> tuple[Source, Tensor, str]:
    """Other data, which samples of it, and what they are called: its test part, else its validation part, else all."""
    names = {"image": "image_column", "label": "label_column", "split": "split_column", "separator": "separator"}
    given = {there: getattr(columns, here) for here, there in names.items() if getattr(columns, here)}
    try:
        source = open_source(dataclasses.replace(spec, images=images, **given), classes)
    except UsageError:
        # The run's columns may not be those of this table, and a folder has none.
        none = dict.fromkeys(("image_column", "label_column", "split_column"), "")
        source = open_source(dataclasses.replace(spec, images=images, **(none | given)), classes)
    if list(source.classes) != classes:
        raise UsageError(f"--images {images}: its classes are not those of the run")
    if source.parts is not None:
        for part in (2, 1):
            indices = (source.parts == part).nonzero().squeeze(1)
            if len(indices):
                return source, indices, PARTS[part]
    return source, torch.arange(len(source.targets)), "all"


# ---- For people ----------------------------------------------------------------------------------------------------


def show(figures: dict[str, Any], console: Console) -> None:
    """Print what `evaluate` found as tables."""
    console.print(
        Text(
            f"{figures['run']}, {figures['checkpoint']['which']} checkpoint (step {figures['checkpoint']['step']}), on "
            f"{figures['images']}, {figures['part']} part: {figures['samples']:,} images"
        )
    )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name in ("loss", "accuracy", "f1", "calibration_error"):
        table.add_row({"f1": "macro F1"}.get(name, name.replace("_", " ")), f"{figures[name]:.4f}")
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("class", "precision", "recall", "F1", "images"):
        table.add_column(name, justify="left" if name == "class" else "right", overflow="fold")
    for row in figures["classes"]:
        values = [f"{row[name]:.3f}" for name in ("precision", "recall", "f1")]
        table.add_row(Text(row["name"]), *values, f"{row['samples']:,}")
    console.print(table)
    if figures["confusion_matrix"]:
        console.print(_mistakes(figures))
    for reason in figures["broken"][:SHOWN_MISTAKES]:
        console.print(Text(f"left out: {reason}"))
    if len(figures["broken"]) > SHOWN_MISTAKES:
        console.print(Text(f"left out: {len(figures['broken']) - SHOWN_MISTAKES} more"))


def _mistakes(figures: dict[str, Any]) -> Table:
    """The confusion matrix; of many classes the most frequent mistakes."""
    names, matrix = [row["name"] for row in figures["classes"]], figures["confusion_matrix"]
    if len(names) <= MATRIX_CLASSES:
        table = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, title="rows: true class; columns: predicted", title_justify="left"
        )
        table.add_column("", overflow="fold")
        for name in names:
            table.add_column(Text(name), justify="right", overflow="fold")
        for number, (name, row) in enumerate(zip(names, matrix, strict=True)):
            cells = [
                Text(str(count) if count else ".", "bold" if number == column else "")
                for column, count in enumerate(row)
            ]
            table.add_row(Text(name), *cells)
        return table
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="most frequent mistakes", title_justify="left")
    for column in ("true class", "taken for", "images"):
        table.add_column(column, justify="right" if column == "images" else "left", overflow="fold")
    mistakes = [
        (count, names[row], names[column])
        for row, counts in enumerate(matrix)
        for column, count in enumerate(counts)
        if count and row != column
    ]
    for count, true, taken in sorted(mistakes, key=lambda mistake: -mistake[0])[:SHOWN_MISTAKES]:
        table.add_row(Text(true), Text(taken), f"{count:,}")
    return table
