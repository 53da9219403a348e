"""Rows of a csv or tsv, with the lines that they stand in; and what a quote means there."""

import csv
import itertools
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TextIO

from finetune.errors import UsageError

# A long text is one value.
LARGEST_FIELD = 1 << 26
QUOTE = '"'
# What Excel writes, and reads, before the header.
SEPARATOR_LINE = re.compile(r'"?sep=([,;|\t])"?[,;|\t]*\s*', re.IGNORECASE)
# Values that are remembered of a column, to know a row by.
MOST_VALUES, LONGEST_VALUE = 10_000, 100
# Of more different numbers a column holds figures, and any other one between them is one, too.
FEW_VALUES = 20
# Where it is not known whether a quote is a letter.
SAYS = "close the quote, or say what one is: --quotes none (a letter) or standard (it holds a value together)"


def check_column_names(path: Path, names: Sequence[str]) -> None:
    """Raises: UsageError: several columns have one name."""
    if repeated := sorted({name for name in names if name and names.count(name) > 1}):
        raise UsageError(f"{path}: has several columns called {repeated[0]!r}; rename all but one")


class _Lines:
    """The lines of a file, of which the newest are at hand."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.number = 0
        self.newest: list[str] = []
        self._ahead: str | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def peek(self) -> str:
        """The line that comes next, without taking it; "" at the end."""
        if self._ahead is None:
            self._ahead = next(self._stream, "")
        return self._ahead

    def __next__(self) -> str:
        line = self._ahead if self._ahead is not None else next(self._stream)
        self._ahead = None
        if not line:
            raise StopIteration
        self.number += 1
        self.newest.append(line)
        return line


def csv_rows(
    path: Path, suffix: str, stream: TextIO, quotes: str, is_strict: bool = False
) -> Iterator[tuple[int, dict[str, object]]]:
    """(number of its first line, column name to value) of each row; see `table_files.read_rows`.

    What a spreadsheet leaves around the data is no part of it: a first line that names the separator ("sep=;"), rows
    without any value, columns without a name.

    Args:
        suffix: of the file: .csv or .tsv.
        is_strict: rows without any value are rows.

    Raises:
        UsageError: a row that is none; names the line.
    """
    header = stream.readline()
    if named := SEPARATOR_LINE.fullmatch(header):
        delimiter, lines = named[1], _Lines(stream)
        lines.number = 1
    else:
        delimiter = "\t" if suffix == ".tsv" else max(",;\t", key=header.count)
        if suffix == ".csv" and delimiter not in header and "|" in header:
            delimiter = "|"
        stream.seek(0)
        lines = _Lines(stream)
    letters = quotes == "none"
    read = partial(csv.reader, lines, delimiter=delimiter, strict=True)
    standard = read(quoting=csv.QUOTE_NONE) if letters else read()
    begins = 1  # where the row begins: one that is never closed is read to the end of the file
    try:
        names = [name.strip() for name in _next(standard) or []]
        check_column_names(path, names)
        suspicion = _Suspicion(delimiter, len(names))
        between_tabs = delimiter == "\t" and quotes == "auto"
        records = _between_tabs(lines, len(names)) if between_tabs else iter(standard)
        while True:
            begins = lines.number + 1
            lines.newest.clear()
            row = _next(records)
            if row is None:
                if quotes == "auto":
                    suspicion.check(path)
                return
            if not row or not (is_strict or any(value.strip() for value in row)):
                continue
            newest = list(lines.newest)
            if len(row) > len(names) and not any(value.strip() for value in row[len(names) :]):
                row = row[: len(names)]
            if len(row) != len(names):
                raise UsageError(
                    f"{path} line {begins}: has {len(row)} values, the header {len(names)} columns; "
                    "quote values that hold the separator"
                )
            suspicion.note(begins, newest, row)
            yield begins, dict(zip(names, row, strict=True))
    except csv.Error as error:
        swallowed = "" if letters else f"; {SAYS}"
        raise UsageError(f"{path} line {begins}: {error}; check the quotes from there on{swallowed}") from None


def _next(records: Iterator[list[str]]) -> list[str] | None:
    """The next row; None at the end. The limit for a value is one for all of the process: it is put back."""
    before = csv.field_size_limit(LARGEST_FIELD)
    try:
        return next(records, None)
    finally:
        csv.field_size_limit(before)


class _Suspicion:
    """Rows of several lines each of which looks like a row: a quote that was a letter may have swallowed them.

    A letter of several lines, well quoted, can have as many separators a line. So each line must also have, in one of
    the columns, what that column holds in other rows: a label, or a number.
    """

    def __init__(self, delimiter: str, columns: int):
        self._delimiter, self._columns = delimiter, columns
        self._rows: list[tuple[int, list[str]]] = []
        self._seen: list[set[str]] = [set() for _ in range(columns)]

    def note(self, begins: int, lines: list[str], row: list[str]) -> None:
        """Take a row that stands in `lines`."""
        if len(lines) > 1 and all(line.count(self._delimiter) == self._columns - 1 > 0 for line in lines):
            self._rows.append((begins, lines))
            return
        for seen, value in zip(self._seen, row, strict=True):
            if len(seen) < MOST_VALUES and len(value) <= LONGEST_VALUE:
                seen.add(value.strip())

    def check(self, path: Path) -> None:
        """Raises: UsageError: a row has swallowed others; names its lines."""
        ranges = list(map(_range_of, self._seen)) if self._rows else []
        for begins, lines in self._rows:
            columns = zip(*(line.strip("\r\n").split(self._delimiter) for line in lines), strict=True)
            if not any(map(_has_such, self._seen, ranges, columns)):
                continue
            raise UsageError(
                f"{path} line {begins}: the quote that begins there holds {len(lines)} lines together, up to line "
                f"{begins + len(lines) - 1}, and each of them looks like a row; {SAYS}"
            )


def _range_of(seen: set[str]) -> tuple[float, float] | None:
    """The ends of a column of figures; None = it holds others."""
    if len(seen) <= FEW_VALUES or not all(map(_is_number, seen)):
        return None
    numbers = list(map(float, seen))
    return min(numbers), max(numbers)


def _has_such(seen: set[str], ends: tuple[float, float] | None, values: tuple[str, ...]) -> bool:
    """Whether a column holds such values in other rows."""
    plain = [value.strip() for value in values]
    if seen and seen.issuperset(plain):
        return True
    return ends is not None and all(map(_is_number, plain)) and all(ends[0] <= float(one) <= ends[1] for one in plain)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _between_tabs(lines: _Lines, columns: int) -> Iterator[list[str]]:
    """Rows between tabs: a quote is a letter unless its value begins and ends with one.

    Where that does not give one value for each column, quotes may hold a tab or a line break: then they are read by
    the standard.
    """
    for line in lines:
        values = [_unquoted(value) for value in line.rstrip("\r\n").split("\t")] if line.strip("\r\n") else []
        begun = [value for value in line.split("\t") if value.startswith(QUOTE)]
        # A quote that begins the last value, and is followed by what is no row, holds lines together.
        is_open = bool(begun) and values[-1].startswith(QUOTE) and lines.peek().count("\t") != columns - 1
        if values and begun and (len(values) != columns or (is_open and lines.peek())):
            values = next(csv.reader(itertools.chain([line], lines), delimiter="\t", strict=True))
        yield values


def _unquoted(value: str) -> str:
    """The value without the quotes around it, if they are that."""
    inner = value[1:-1]
    is_quoted = len(value) > 1 and value[0] == value[-1] == QUOTE and QUOTE not in inner.replace(QUOTE * 2, "")
    return inner.replace(QUOTE * 2, QUOTE) if is_quoted else value
