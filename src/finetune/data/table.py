"""A table of images: csv, tsv or jsonl, a row an image with its label or labels."""

import csv
import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.source import PART_NAMES, FileSource, check_inside, make_file_source
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
        names = [name.strip() for name in next(reader, [])]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"{path}: has several columns called {repeated[0]!r}; rename all but one")
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
        except (ValueError, RecursionError) as error:
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


def _image_of(row: dict[str, Any], column: str, where: str) -> str:
    """The path in a row, with "/"."""
    image = row.get(column)
    if not isinstance(image, str) or not image.strip():
        raise UsageError(f"{where}: column {column!r} is empty; name an image")
    return image.strip().replace("\\", "/")


def image_paths(path: Path, image_column: str = "") -> list[str]:
    """The image column of a table alone."""
    paths: list[str] = []
    column = ""
    for number, row in read_rows(path):
        column = column or find_column(path, list(row), image_column, IMAGE_COLUMNS, "--image-column")
        paths.append(_image_of(row, column, f"{path} line {number}"))
    if not paths:
        raise UsageError(f"{path}: holds no rows; give a line an image")
    return paths


def open_table(
    path: Path, columns: Columns, classes: Sequence[str] | None = None, allow_outside: bool = False
) -> FileSource:
    """The images that a table names, relative to the table's own folder.

    Args:
        columns: `separator` makes it a multi-label data set; a row may then have no label at all.
        classes: the only classes allowed, in order; None = those found.
        allow_outside: images may lie outside the table's folder.

    Raises:
        UsageError: a line cannot be read, lacks a value, or names an image for the second time; names it.
    """
    lines: dict[str, int] = {}
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
        image = posixpath.normpath(_image_of(row, image_column, where))
        if image in lines:
            raise UsageError(
                f"{where}: names {image!r} like line {lines[image]}, and what is trained on must not validate: "
                "remove one line, or join their labels and give --separator"
            )
        lines[image] = number
        labels.append(_labels(row.get(label_column), columns.separator, where, label_column))
        if columns.split:
            part = str(row.get(columns.split) or "").strip()
            if part.lower() not in PART_NAMES:
                raise UsageError(f"{where}: {columns.split} {part!r} is not allowed; give train, val or test")
            parts.append(PART_NAMES[part.lower()])
    if not lines:
        raise UsageError(f"{path}: holds no rows; give a line an image")
    if not allow_outside:
        check_inside(path.parent, list(lines), f"--images {path}")
    given_parts = parts if columns.split else None
    return make_file_source(path.parent, list(lines), labels, given_parts, classes, f"--images {path}")


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
