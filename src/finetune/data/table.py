"""A table of images: csv, tsv or jsonl, a row an image with its label or labels."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.source import PART_NAMES, FileSource, make_file_source
from finetune.errors import UsageError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
# Tried in this order where no column is named.
IMAGE_COLUMNS = ("image", "path", "file", "filename", "image_path", "file_path", "filepath", "file_name", "img")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "tags")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; "" = found by their names. With a separator, a row has several labels."""

    image: str = ""
    label: str = ""
    split: str = ""
    separator: str = ""


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, column name to value) of each row.

    Raises:
        UsageError: the file or one of its lines cannot be read; names the line.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a .csv, .tsv or .jsonl file with a line an image")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from _json_rows(path, stream) if path.suffix.lower() == ".jsonl" else _csv_rows(path, stream)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 (byte {error.start} of a block); save it as UTF-8") from None


def _csv_rows(path: Path, stream) -> Iterator[tuple[int, dict[str, str]]]:
    header = stream.readline()
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    stream.seek(0)
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                raise UsageError(
                    f"{path} line {reader.line_num}: has {len(row)} values, the header {len(names)} columns; "
                    "quote values that hold the separator"
                )
            yield reader.line_num, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UsageError(f"{path} line {reader.line_num}: {error}; check its quotes") from None


def _json_rows(path: Path, stream) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path} line {number}: is not JSON ({error}); a line must be one JSON object") from None
        if not isinstance(row, dict):
            raise UsageError(f'{path} line {number}: must be a JSON object, as in {{"image": ..., "label": ...}}')
        yield number, row


def find_column(path: Path, columns: Sequence[str], given: str, candidates: Sequence[str], option: str) -> str:
    """The column meant by the option, or by its own name.

    Raises:
        UsageError: there is no such column.
    """
    if given:
        if given in columns:
            return given
    else:
        plain = {name.strip().lower(): name for name in reversed(columns)}
        for candidate in candidates:
            if candidate in plain:
                return plain[candidate]
    what = f"{option} {given}: no such column" if given else f"no column is called {', '.join(candidates[:4])}, ..."
    raise UsageError(
        f"{path}: {what}; its columns are {', '.join(map(repr, columns))}: give {option} "
        "(the first line of a csv must name the columns)"
    )


def image_paths(path: Path, image_column: str = "") -> list[str]:
    """The image column of a table alone, as written."""
    rows = [row for _, row in read_rows(path)]
    if not rows:
        raise UsageError(f"{path}: holds no rows; give a line an image")
    column = find_column(path, list(rows[0]), image_column, IMAGE_COLUMNS, "--image-column")
    return [str(row.get(column, "")) for row in rows]


def open_table(path: Path, columns: Columns, classes: Sequence[str] | None = None) -> FileSource:
    """The images that a table names, relative to the table's own folder.

    Args:
        columns: `separator` makes it a multi-label data set; a row may then have no label at all.
        classes: the only classes allowed, in order; None = those found.

    Raises:
        UsageError: a line cannot be read or lacks a value; names it.
    """
    paths: list[str] = []
    labels: list[Any] = []
    parts: list[int] = []
    image_column = label_column = ""
    for number, row in read_rows(path):
        if not image_column:
            names = list(row)
            image_column = find_column(path, names, columns.image, IMAGE_COLUMNS, "--image-column")
            label_column = find_column(path, names, columns.label, LABEL_COLUMNS, "--label-column")
            if columns.split:
                find_column(path, names, columns.split, (), "--split-column")
        where = f"{path} line {number}"
        image = str(row.get(image_column) or "").strip().replace("\\", "/")
        if not image:
            raise UsageError(f"{where}: column {image_column!r} is empty; name an image")
        paths.append(image)
        labels.append(_labels(row.get(label_column), columns.separator, where, label_column))
        if columns.split:
            part = str(row.get(columns.split) or "").strip()
            if part.lower() not in PART_NAMES:
                raise UsageError(f"{where}: {columns.split} {part!r} is not allowed; give train, val or test")
            parts.append(PART_NAMES[part.lower()])
    if not paths:
        raise UsageError(f"{path}: holds no rows; give a line an image")
    return make_file_source(path.parent, paths, labels, parts if columns.split else None, classes, f"--images {path}")


def _labels(value: Any, separator: str, where: str, column: str) -> str | tuple[str, ...]:
    if separator:
        several = value if isinstance(value, list) else ("" if value is None else str(value)).split(separator)
        return tuple(dict.fromkeys(name for one in several if (name := str(one).strip())))
    if isinstance(value, list):
        raise UsageError(f"{where}: {column!r} is a list; several labels a row need --separator, as in --separator ','")
    label = "" if value is None else str(value).strip()
    if not label:
        raise UsageError(f"{where}: column {column!r} is empty; give a label, or remove the line")
    return label
