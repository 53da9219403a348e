"""`finetune predict`: classify images or texts with an export, a line each. Needs only the file and what lies beside
it; executes nothing of it."""

import csv
import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from finetune.base.allocator import freed_memory_kept
from finetune.base.formatting import json_line, printable
from finetune.base.terminal import say_aside
from finetune.data.inputs import ImageInputs, TextInputs, image_files, texts_in
from finetune.data.source import Reading
from finetune.data.tokens import Tokenization
from finetune.errors import UsageError
from finetune.export.model import LoadedModel, load_model
from finetune.recipe.data_spec import check_encoding


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
    encoding: str = "utf-8",
    unsure_below: float = 0.0,
) -> int:
    """Print a line a sample, in their order: where it is from and its classes with their probabilities, or the number
    that is predicted, or what is wrong with it.

    Args:
        file: the export, or the run's folder.

    Returns:
        0, or 1 when a sample could not be read.
    """
    model = load_model(file, device_name, in_fast_format=True)
    model.check(top_k, batch_size, unsure_below)
    samples = _samples(model, inputs, image_column, text_column, quotes, encoding, allow_outside)
    columns = min(top_k, len(model.classes))
    write = csv_writer(samples.fields, columns, model, unsure_below > 0) if as_csv else write_json_line
    failed = 0
    with freed_memory_kept(), progress_bar() as bar:
        shown = bar.add_task("", total=samples.count)

        def advance(count: int) -> None:
            sys.stdout.flush()
            bar.advance(shown, count)

        for one in model.predictions(
            samples, top_k=top_k, unsure_below=unsure_below, batch_size=batch_size, first_samples=1, advance=advance
        ):
            failed += bool(one.error)
            write(one.to_plain())
    if failed:
        say_aside(f"finetune: {failed} of {samples.count} {samples.noun}(s) could not be read")
    return 1 if failed else 0


def _samples(
    model: LoadedModel,
    inputs: Iterable[str],
    image_column: str,
    text_column: str,
    quotes: str,
    encoding: str,
    allow_outside: bool,
) -> ImageInputs | TextInputs:
    """What is to be predicted, as the command line names it.

    Raises:
        UsageError: an option of the other kind of data, or nothing that can be read.
    """
    preprocessing = model.preprocessing
    reads = "texts" if isinstance(preprocessing, Tokenization) else "images"
    for option, value, of in (("--image-column", image_column, "images"), ("--text-column", text_column, "texts")):
        if value and of != reads:
            raise UsageError(f"{option} {value}: has no effect, {model.file} reads {reads}; leave it out")
    check_encoding(encoding)
    reading = dataclasses.replace(Reading(quotes=quotes) if quotes else model.reading, encoding=encoding)
    if isinstance(preprocessing, Tokenization):
        return TextInputs(texts_in(inputs, text_column, allow_outside, say_aside, reading), preprocessing)
    return ImageInputs(image_files(inputs, image_column, allow_outside, say_aside, reading), preprocessing)


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


def write_json_line(row: dict[str, object]) -> None:
    print(json_line(row))


def csv_writer(
    fields: list[str], top_k: int, model: LoadedModel, tells_unsure: bool
) -> Callable[[dict[str, Any]], None]:
    """A function that writes a row as csv; the header comes first.

    Args:
        fields: that say where a sample is from.
        top_k: classes to list; 0 = a number is predicted.
        tells_unsure: whether there is a column for why nobody should rely on a row.
    """
    numbers = ["", *(f"_{place}" for place in range(2, top_k + 1))] if top_k else []
    columns = [name + number for number in numbers for name in ("label", "probability")]
    besides = ["level"] if "levels" in model.description else []
    besides += ["low", "high"] if "interval" in model.description else []
    columns += ["labels"] if top_k else ["value", *besides]
    after = ["distance_percentile"] if model.novelty is not None else []
    after += [*(["unsure"] if after or tells_unsure else []), "error"]
    writer = csv.DictWriter(sys.stdout, [*fields, *columns, *after], lineterminator="\n")
    writer.writeheader()

    def write(row: dict[str, Any]) -> None:
        flat = {name: row.get(name, "") for name in [*fields, *after]}
        if top_k:
            flat |= {"labels": ";".join(row.get("labels", []))}
        else:
            flat |= {name: row.get(name, "") for name in ("value", *besides)}
        for number, entry in zip(numbers, row.get("top", []), strict=False):
            flat |= {f"label{number}": entry["label"], f"probability{number}": entry["probability"]}
        if "label" in row and row["label"] is None:  # nothing to rely on: the first class stands in no column
            flat |= {"label": "", "probability": ""}
        if sys.stdout.isatty():
            flat = {name: printable(value) if isinstance(value, str) else value for name, value in flat.items()}
        writer.writerow(flat)

    return write
