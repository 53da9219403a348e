"""Classify image files with an export. Needs only the file and its JSON; executes nothing from either."""

import csv
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from finetune.data.decode import read_image
from finetune.data.folder import image_files_below
from finetune.data.preprocess import Preprocessing
from finetune.data.source import check_inside
from finetune.data.table import TABLE_SUFFIXES, image_paths
from finetune.device import pick_device
from finetune.errors import RunError, UsageError
from finetune.export import load_described
from finetune.recipe import TASKS
from finetune.tasks import Task, make_task
from finetune.text import json_line, printable

# Of several labels, those with a probability above this apply.
THRESHOLD = 0.5


def image_files(inputs: Iterable[str], image_column: str = "", allow_outside: bool = False) -> list[Path]:
    """The files meant: a file as it stands, a folder with every image below it in the order of their names, a csv, tsv
    or jsonl with the images that it names, relative to its own folder.

    Raises:
        UsageError: an input that does not exist, a folder without images, a table that cannot be read, or one of both
            that leads out of its folder, unless `allow_outside`.
    """

    def below(folder: Path, found: list[str], what: str) -> list[Path]:
        if not allow_outside:
            check_inside(folder, found, what)
        return [folder / file for file in found]

    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found, _ = image_files_below(path)
            if not found:
                raise UsageError(f"folder {path}: holds no images")
            files += below(path, found, f"folder {path}")
        elif path.suffix.lower() in TABLE_SUFFIXES:
            files += below(path.parent, image_paths(path, image_column), str(path))
        elif path.exists():
            files.append(path)
        else:
            raise UsageError(f"{path}: no such file or folder; give images, folders, or a csv that names them")
    return files


def read_batches(
    files: list[Path], preprocessing: Preprocessing, batch_size: int
) -> Iterator[list[tuple[Path, Tensor | RunError]]]:
    """Batches of (file, image or what is wrong with it), in order; the next is decoded while one is computed."""

    def read(path: Path) -> Tensor | RunError:
        try:
            return preprocessing.resize(read_image(path))
        except RunError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        starts = range(0, len(files), batch_size)
        ahead = [pool.submit(read, path) for path in files[:batch_size]]
        for start in starts:
            ready, paths = ahead, files[start : start + batch_size]
            following = files[start + batch_size : start + 2 * batch_size]
            ahead = [pool.submit(read, path) for path in following]
            yield [(path, future.result()) for path, future in zip(paths, ready, strict=True)]


def predict(
    file: Path,
    inputs: Iterable[str],
    *,
    top_k: int,
    batch_size: int,
    device_name: str,
    image_column: str,
    allow_outside: bool,
    as_csv: bool,
) -> int:
    """Print a line an image, in the order of the images: file and classes with their probabilities, or file and error.

    Returns:
        0, or 1 when an image could not be read.
    """
    if top_k < 1 or batch_size < 1:
        raise UsageError(f"--top-k {top_k} --batch-size {batch_size}: both must be 1 or more")
    device = pick_device(device_name)
    model, description = load_described(file)
    model = model.to(device, memory_format=torch.channels_last)
    classes, several = description["classes"], description["task"] == "multi-label"
    task = make_task(TASKS[description["task"]](), torch.zeros(len(classes), dtype=torch.int64), 0)
    preprocessing = Preprocessing(**description["preprocessing"])
    files = image_files(inputs, image_column, allow_outside)
    write = csv_writer(min(top_k, len(classes))) if as_csv else write_json_line
    failed = 0
    bar = Progress(
        TextColumn("predicting"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        transient=True,
        # Where the lines themselves go to the terminal, they show how far it is.
        disable=not sys.stderr.isatty() or sys.stdout.isatty(),
    )
    with bar:
        shown = bar.add_task("", total=len(files))
        for batch in read_batches(files, preprocessing, batch_size):
            good = [image for _, image in batch if isinstance(image, Tensor)]
            rows = iter(())
            if good:
                images = preprocessing.normalise(torch.stack(good)).to(device, memory_format=torch.channels_last)
                rows = iter(classify(model, images, task))
            for path, image in batch:
                if isinstance(image, Tensor):
                    write(prediction(str(path), next(rows), classes, top_k, several))
                else:
                    failed += 1
                    write({"file": str(path), "error": str(image)})
            sys.stdout.flush()
            bar.advance(shown, len(batch))
    if failed:
        print(f"finetune: {failed} of {len(files)} image(s) could not be read", file=sys.stderr)
    return 1 if failed else 0


@torch.inference_mode()
def classify(model: nn.Module, images: Tensor, task: Task) -> Tensor:
    """(batch, classes) probabilities, on the CPU; of several labels each on its own."""
    return task.probabilities(model(images)).cpu()


def prediction(file: str, probabilities: Tensor, classes: list[str], top_k: int, several: bool) -> dict[str, Any]:
    """One line of the output as a value."""
    values, numbers = probabilities.topk(min(top_k, len(classes)))
    top = [
        {"label": classes[number], "probability": round(value, 6)}
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True)
    ]
    if several:
        labels = [name for name, value in zip(classes, probabilities.tolist(), strict=True) if value > THRESHOLD]
        return {"file": file, "labels": labels, "top": top}
    return {"file": file, **top[0], "top": top}


def write_json_line(row: dict[str, Any]) -> None:
    print(json_line(row))


def csv_writer(top_k: int):
    """A function that writes a row as csv; the header comes first."""
    numbers = ["", *(f"_{place}" for place in range(2, top_k + 1))]
    columns = [name + number for number in numbers for name in ("label", "probability")]
    writer = csv.DictWriter(sys.stdout, ["file", *columns, "labels", "error"], lineterminator="\n")
    writer.writeheader()

    def write(row: dict[str, Any]) -> None:
        flat = {"file": row["file"], "error": row.get("error", ""), "labels": ";".join(row.get("labels", []))}
        for number, entry in zip(numbers, row.get("top", []), strict=False):
            flat |= {f"label{number}": entry["label"], f"probability{number}": entry["probability"]}
        if sys.stdout.isatty():
            flat = {name: printable(value) if isinstance(value, str) else value for name, value in flat.items()}
        writer.writerow(flat)

    return write
