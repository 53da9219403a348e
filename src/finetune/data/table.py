"""A table of samples: csv, tsv, jsonl or parquet, a row a sample with its label or labels."""

import csv
import importlib.util
import json
import math
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from finetune.data.source import PART_NAMES, FileSource, check_inside, make_file_source
from finetune.errors import UsageError, one_line

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
# Tried in this order where no column is named.
IMAGE_COLUMNS = ("image", "path", "file", "filename", "image_path", "file_path", "filepath", "file_name", "img")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "tags", "intent", "topic", "sentiment")
# A long text is one value.
LARGEST_FIELD = 1 << 26


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; "" = found by their names. With a separator, a row has several labels.

    `content` holds the image's path, or the text.
    """

    content: str = ""
    label: str = ""
    split: str = ""
    separator: str = ""


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """(line number, column name to value) of each row; of a parquet file the number of the row.

    Raises:
        UsageError: the file or one of its lines cannot be read; names the line.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a {', '.join(TABLE_SUFFIXES)} file with a line a sample")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from _json_rows(path, stream) if suffix == ".jsonl" else _csv_rows(path, stream)
    except UnicodeDecodeError:
        raise UsageError(f"{path} line {_undecodable_line(path)}: is not UTF-8; save the file as UTF-8") from None


def _undecodable_line(path: Path) -> int:
    """Number of the first line that is not UTF-8."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UsageError(f"{path}: parquet files need pyarrow; install with: pip install pyarrow, or give a csv")
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({one_line(error)}); save it anew") from None


def _csv_rows(path: Path, stream: TextIO) -> Iterator[tuple[int, dict[str, object]]]:
    header = stream.readline()
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    stream.seek(0)
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    begins = 1  # where the row begins: one that is never closed is read to the end of the file
    try:
        rows = _of_any_length(reader)
        names = [name.strip() for name in next(rows, [])]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"{path}: has several columns called {repeated[0]!r}; rename all but one")
        begins = reader.line_num + 1
        for row in rows:
            if row:
                if len(row) != len(names):
                    raise UsageError(
                        f"{path} line {begins}: has {len(row)} values, the header {len(names)} columns; "
                        "quote values that hold the separator"
                    )
                yield begins, dict(zip(names, row, strict=True))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{path} line {begins}: {error}; check the quotes from there on") from None


def _of_any_length(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """The rows of a csv reader. The limit for a field is one for all of the process: it is put back behind each row."""
    while True:
        before = csv.field_size_limit(LARGEST_FIELD)
        try:
            row = next(reader, None)
        finally:
            csv.field_size_limit(before)
        if row is None:
            return
        yield row


def _json_rows(path: Path, stream: TextIO) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} line {number}: is not JSON ({error}); a line must be one JSON object") from None
        if not isinstance(row, dict):
            raise UsageError(f'{path} line {number}: must be a JSON object, as in {{"label": ..., ...}}')
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


@dataclass(frozen=True)
class Row:
    """A sample as a table lists it.

    Attributes:
        where: file and line, for errors.
        line: number.
        column: the image or text column.
        content: what it holds.
        label: one, or, with a separator, all of them; None where the table is read without labels.
        part: place in `PARTS`; None without a split column.
    """

    where: str
    line: int
    column: str
    content: object
    label: str | tuple[str, ...] | None
    part: int | None


def sample_rows(
    path: Path, columns: Columns, candidates: Sequence[str], option: str, *, labelled: bool = True
) -> Iterator[Row]:
    """The samples that a table lists.

    Args:
        candidates: names of the content column, tried where none is given.
        option: that names it.
        labelled: whether there must be labels.

    Raises:
        UsageError: a line cannot be read, or lacks a label; names it.
    """
    content_column = label_column = ""
    for number, row in read_rows(path):
        if not content_column:
            names = list(row)
            content_column = find_column(path, names, columns.content, candidates, option)
            if labelled:
                label_column = find_column(path, names, columns.label, LABEL_COLUMNS, "--label-column")
            if columns.split:
                find_column(path, names, columns.split, (), "--split-column")
        where, part = f"{path} line {number}", None
        label = _labels(row.get(label_column), columns.separator, where, label_column) if labelled else None
        if columns.split:
            name = str(row.get(columns.split) or "").strip()
            if name.lower() not in PART_NAMES:
                raise UsageError(f"{where}: {columns.split} {name!r} is not allowed; give train, val or test")
            part = PART_NAMES[name.lower()]
        yield Row(where, number, content_column, row.get(content_column), label, part)
    if not content_column:
        raise UsageError(f"{path}: holds no rows; give a line a sample")


def _image_of(row: Row) -> str:
    """The path in a row, with "/"."""
    image = row.content
    if not isinstance(image, str) or not image.strip():
        raise UsageError(f"{row.where}: column {row.column!r} is empty; name an image")
    return image.strip().replace("\\", "/")


def image_paths(path: Path, image_column: str = "") -> list[str]:
    """The image column of a table alone."""
    rows = sample_rows(path, Columns(content=image_column), IMAGE_COLUMNS, "--image-column", labelled=False)
    return [_image_of(row) for row in rows]


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
    labels: list[str | tuple[str, ...]] = []
    parts: list[int] = []
    for row in sample_rows(path, columns, IMAGE_COLUMNS, "--image-column"):
        image = posixpath.normpath(_image_of(row))
        if image in lines:
            raise UsageError(
                f"{row.where}: names {image!r} like line {lines[image]}, and what is trained on must not validate: "
                "remove one line, or join their labels and give --separator"
            )
        lines[image] = row.line
        assert row.label is not None, "the table is read with its labels"
        labels.append(row.label)
        if row.part is not None:
            parts.append(row.part)
    if not allow_outside:
        check_inside(path.parent, list(lines), f"--images {path}")
    given_parts = parts if columns.split else None
    return make_file_source(path.parent, list(lines), labels, given_parts, classes, f"--images {path}")


def plain_value(value: object, where: str) -> object:
    """A value as every format would give it: bytes as text, no number as nothing.

    Raises:
        UsageError: bytes that are no text.
    """
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise UsageError(f"{where}: holds bytes that are not UTF-8; save the file with texts") from None
    return None if isinstance(value, float) and math.isnan(value) else value


def _labels(value: object, separator: str, where: str, column: str) -> str | tuple[str, ...]:
    value = plain_value(value, where)
    if isinstance(value, dict):
        raise UsageError(f"{where}: column {column!r} holds a dict; give a column of labels: --label-column")
    if separator:
        several = value if isinstance(value, list) else ("" if value is None else str(value)).split(separator)
        return tuple(dict.fromkeys(name for one in several if (name := str(one).strip())))
    if isinstance(value, list):
        raise UsageError(f"{where}: {column!r} is a list; several labels a row need --separator, as in --separator ','")
    label = "" if value is None else str(value).strip()
    if not label:
        raise UsageError(f"{where}: column {column!r} is empty; give a label, or remove the line")
    return label
