"""Classify images or texts with an export. Needs only the file and what lies beside it; executes nothing of it."""

import csv
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from finetune.base.device import NO_TF32, module_to_device, numerics_put_back, pick_device, set_tf32, to_device
from finetune.base.formatting import json_line, printable
from finetune.base.halves import freeing, in_halves
from finetune.base.terminal import say_aside
from finetune.data.inputs import ImageInputs, TextInputs, image_files, texts_in
from finetune.data.source import Reading
from finetune.data.tokens import Tokenization
from finetune.errors import UsageError
from finetune.export.load import load_described, prepared
from finetune.recipe.spec import TASKS
from finetune.tasks.losses import Classifying, MultiLabelTask, RegressionTask, Task, make_task

# Classes that are listed unless another number is given.
TOP_K = 3


@numerics_put_back()
def predict(
    file: Path,
    inputs: Iterable[str],
    *,
    top_k: int,
    batch_size: int,
    device_name: str,
    image_column: str,
    text_column: str,
    quotes: str,
    allow_outside: bool,
    as_csv: bool,
) -> int:
    """Print a line a sample, in their order: where it is from and its classes with their probabilities, or the number
    that is predicted, or what is wrong with it.

    Returns:
        0, or 1 when a sample could not be read.
    """
    if top_k < 1 or batch_size < 1:
        raise UsageError(f"--top-k {top_k} --batch-size {batch_size}: both must be 1 or more")
    set_tf32(NO_TF32)
    device = pick_device(device_name)
    model, description = load_described(file)
    model = module_to_device(model, device)
    classes = description["classes"]
    if description["task"] == "distillation":
        raise UsageError(f"{file}: is an encoder without a head, which predicts nothing; train one: finetune bert_head")
    # The scale of numbers is folded into the weights, or stands beside them.
    task = make_task(TASKS[description["task"]](), len(classes), description.get("scale", ()))
    thresholds = torch.tensor(description.get("thresholds") or [0.5] * len(classes))
    preprocessing = prepared(file, description)
    if isinstance(task, RegressionTask) and top_k != TOP_K:
        raise UsageError(f"--top-k {top_k}: has no effect, {file} predicts a number and no classes; leave it out")
    reads = "texts" if isinstance(preprocessing, Tokenization) else "images"
    for option, value, of in (("--image-column", image_column, "images"), ("--text-column", text_column, "texts")):
        if value and of != reads:
            raise UsageError(f"{option} {value}: has no effect, {file} reads {reads}; leave it out")
    # An export of before it said so reads a table as its run did.
    reading = Reading(quotes=quotes or description.get("quotes", "standard"))
    samples: ImageInputs | TextInputs
    if isinstance(preprocessing, Tokenization):
        samples = TextInputs(texts_in(inputs, text_column, allow_outside, say_aside, reading), preprocessing)
    else:
        samples = ImageInputs(image_files(inputs, image_column, allow_outside, say_aside, reading), preprocessing)
    write = csv_writer(samples.fields, min(top_k, len(classes))) if as_csv else write_json_line
    free, failed, halvings = freeing(device, lambda text: say_aside(f"finetune: {text}")), 0, 0
    with progress_bar() as bar:
        shown = bar.add_task("", total=samples.count)
        for batch in samples.batches(batch_size):
            outputs = iter(())
            if batch.inputs is not None:
                attempt = partial(compute, model, batch.inputs, task, device)
                found, halvings = in_halves(attempt, len(batch.inputs), halvings, free)
                outputs = iter(found)
            for where, error in zip(batch.where, batch.errors, strict=True):
                if error:
                    failed += 1
                    write(where | {"error": error})
                else:
                    write(where | prediction(next(outputs), classes, top_k, task, thresholds))
            sys.stdout.flush()
            bar.advance(shown, len(batch.where))
    if failed:
        say_aside(f"finetune: {failed} of {samples.count} {samples.noun}(s) could not be read")
    return 1 if failed else 0


def progress_bar() -> Progress:
    """How far it is, where only people see it."""
    return Progress(
        TextColumn("predicting"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        transient=True,
        # Where the lines themselves go to the terminal, they show how far it is.
        disable=not sys.stderr.isatty() or sys.stdout.isatty(),
    )


@torch.inference_mode()
def compute(model: nn.Module, inputs: Tensor, task: Task, device: torch.device, halvings: int = 0) -> Tensor:
    """(batch, classes) probabilities, of several labels each on its own; or (batch,) numbers; on the CPU.

    Args:
        halvings: of the batch that is computed at once.
    """
    parts = inputs.split(max(1, len(inputs) >> halvings))
    return torch.cat([_decided(model(to_device(part, device)), task) for part in parts])


def _decided(outputs: Tensor, task: Task) -> Tensor:
    if isinstance(task, RegressionTask):
        return task.values(outputs).cpu()
    assert isinstance(task, Classifying), "nothing else predicts"
    return task.probabilities(outputs).cpu()


def prediction(output: Tensor, classes: list[str], top_k: int, task: Task, thresholds: Tensor) -> dict[str, object]:
    """What is predicted of a sample, as a value.

    Args:
        thresholds: (classes,): of several labels those apply whose probability is larger.
    """
    if not isinstance(task, Classifying):
        return {"value": output.item()}
    values, numbers = output.topk(min(top_k, len(classes)))
    top = [
        {"label": classes[number], "probability": round(value, 6)}
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True)
    ]
    if isinstance(task, MultiLabelTask):
        labels = [name for name, applies in zip(classes, output > thresholds, strict=True) if applies]
        return {"labels": labels, "top": top}
    return {**top[0], "top": top}


def write_json_line(row: dict[str, object]) -> None:
    print(json_line(row))


def csv_writer(fields: list[str], top_k: int) -> Callable[[dict[str, Any]], None]:
    """A function that writes a row as csv; the header comes first.

    Args:
        fields: that say where a sample is from.
        top_k: classes to list; 0 = a number is predicted.
    """
    numbers = ["", *(f"_{place}" for place in range(2, top_k + 1))] if top_k else []
    columns = [name + number for number in numbers for name in ("label", "probability")]
    columns += ["labels"] if top_k else ["value"]
    writer = csv.DictWriter(sys.stdout, [*fields, *columns, "error"], lineterminator="\n")
    writer.writeheader()

    def write(row: dict[str, Any]) -> None:
        flat = {name: row.get(name, "") for name in [*fields, "error"]}
        flat |= {"labels": ";".join(row.get("labels", []))} if top_k else {"value": row.get("value", "")}
        for number, entry in zip(numbers, row.get("top", []), strict=False):
            flat |= {f"label{number}": entry["label"], f"probability{number}": entry["probability"]}
        if sys.stdout.isatty():
            flat = {name: printable(value) if isinstance(value, str) else value for name, value in flat.items()}
        writer.writerow(flat)

    return write
