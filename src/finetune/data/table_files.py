"""From a table on the disk to rows: csv, tsv, jsonl, also gzipped; json; parquet; a sheet of Excel.

What is not in UTF-8 is read where the file itself says so (UTF-16 with a byte order mark), or by `--encoding`.
"""

import codecs
import gzip
import importlib.util
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

from finetune.base.stand_ins import what_stands_in
from finetune.base.table_names import KNOWN, table_suffix
from finetune.base.words import typed
from finetune.data.csv_rows import check_column_names, csv_rows
from finetune.errors import UsageError, one_line

# How files begin that are no text.
GZIP, ZIP, PARQUET, OLD_EXCEL = b"\x1f\x8b", b"PK\x03\x04", b"PAR1", b"\xd0\xcf\x11\xe0"
START_BYTES = 64
# A file of several, as the hub names them: train-00000-of-00002.parquet, train-00000-of-00002-a1b2c3d4e5f60718.parquet.
SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?\.parquet")
# What says by its first bytes that it is no UTF-8.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
UTF_8 = "utf-8"
WINDOWS = "windows-1252"
WESTERN = ("cp1250", "cp1252", "cp1254", "cp1257", "hp_roman8", "iso8859_1", "iso8859_15", "latin_1", "mac_roman")
# Of others those that files are in: with all that there are, short texts look like anything.
COMMON = ("big5", "cp1251", "cp1253", "cp1255", "cp1256", "cp932", "cp949", "euc_jp", "gb18030", "koi8_r", "utf_16")
# So much of a file is looked at to guess how it is written.
GUESSED_BYTES = 1 << 18


def read_rows(
    path: Path, quotes: str = "auto", encoding: str = UTF_8, *, is_strict: bool = False, is_whole: bool = False
) -> Iterator[tuple[int, dict[str, object]]]:
    """(line number, column name to value) of each row; of a file without lines the number of the row.

    Args:
        quotes: of a csv or tsv. "standard": a value that begins with a quote ends with the next one, lines later if it
            must (RFC 4180); "none": a quote is a letter; "auto": standard, but a quote that would swallow whole rows is
            refused, and between tabs one is a letter unless the value both begins and ends with one.
        encoding: of a file that does not say it itself.
        is_strict: rows without any value are rows, and numbers of classes stay numbers where a parquet file of the hub
            has names for them, as before.
        is_whole: of a data set in several parquet files, of which one is named, all are read.

    Raises:
        UsageError: the file or one of its lines cannot be read; names the line.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a {KNOWN} file with a line a sample")
    suffix = _kind_of(path)
    if suffix == ".parquet":
        yield from _parquet_rows(shards_of(path) if is_whole else [path], not is_strict)
    elif suffix == ".xlsx":
        yield from _sheet_rows(path)
    else:
        try:
            with _opened(path) as stream, _decoded(stream, encoding) as text:
                if suffix == ".json":
                    yield from _json_rows(path, text)
                else:
                    is_csv = suffix != ".jsonl"
                    yield from csv_rows(path, suffix, text, quotes, is_strict) if is_csv else _jsonl_rows(path, text)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UsageError(f"{path}: cannot be unpacked ({one_line(error)}); make or fetch it anew") from None
        except UnicodeError:
            raise UsageError(f"{path} {undecodable(path, encoding)}") from None


def _kind_of(path: Path) -> str:
    """What kind of table a file is: by its content, where that says so, else by its suffix.

    Raises:
        UsageError: it is none.
    """
    with path.open("rb") as stream:
        start = stream.read(START_BYTES)
    if instead := what_stands_in(start):
        raise UsageError(f"{path}: {instead}")
    if start.startswith(OLD_EXCEL):
        raise UsageError(f"{path}: is in Excel's format of before 2007, or locked by a password; save it as csv")
    if start.startswith(ZIP):
        if _is_workbook(path):
            return ".xlsx"
        unpack = typed(["python", "-m", "zipfile", "-e", str(path), str(path.with_suffix(""))])
        raise UsageError(f"{path}: is a zip archive by its content; unpack it: {unpack}")
    return ".parquet" if start.startswith(PARQUET) else table_suffix(path)


def _is_workbook(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return "[Content_Types].xml" in archive.namelist()
    except Exception:  # of a damaged file whatever its reader raises
        return True


def _opened(path: Path) -> BinaryIO:
    """A file of text, perhaps gzipped, whatever it is called: browsers unpack what they fetch, and keep its name."""
    with path.open("rb") as stream:
        is_packed = stream.read(len(GZIP)) == GZIP
    return gzip.open(path) if is_packed else path.open("rb")  # type: ignore[return-value]


def _decoded(stream: BinaryIO, encoding: str) -> TextIO:
    start = stream.read(4)
    stream.seek(0)
    return io.TextIOWrapper(stream, encoding=_encoding_of(start, encoding), newline="")


def _encoding_of(start: bytes, encoding: str) -> str:
    """What a file is written in, by its first bytes, or as somebody says."""
    marked = next((name for mark, name in MARKS.items() if start.startswith(mark)), "")
    return marked or ("utf-8-sig" if codecs.lookup(encoding).name == UTF_8 else encoding)


def decoded(content: bytes, encoding: str = UTF_8) -> str:
    """The text of a whole file; one that says by its first bytes what it is, is that.

    Raises:
        UnicodeError: it is something else.
    """
    return content.decode(_encoding_of(content[:4], encoding))


def undecodable(path: Path, encoding: str) -> str:
    """Which line of a file is not as it should be, what it looks like, and what to do."""
    is_utf8 = codecs.lookup(encoding).name == UTF_8
    with _opened(path) as stream:
        start = stream.read(GUESSED_BYTES)
        stream.seek(0)
        number, wrong = next(
            ((number, line) for number, line in enumerate(stream, start=1) if not _is_decodable(line, encoding)),
            (1, b""),
        )
        stream.seek(0)
        is_ascii = all(line.isascii() for _, line in zip(range(number - 1), stream, strict=False))
    letters = _whole_letters(wrong) if is_utf8 else None
    # A letter of more than one byte before it tells that the file is in UTF-8.
    if letters is not None and not (is_ascii and letters.isascii()):
        return f"line {number}: ends in the middle of a letter: the file was cut off; fetch or save it anew"
    # What stands about the line tells more than it does, and is looked at where it is near.
    guess = _guessed(start if wrong in start else wrong)
    name = "UTF-8" if is_utf8 else encoding
    looks = f", but looks like {guess} (--encoding {guess} reads it)" if guess else " (--encoding NAME reads another)"
    return f"line {number}: is not {name}{looks}; save the file as UTF-8"


def _is_decodable(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeError:
        return False
    return True


def _whole_letters(line: bytes) -> str | None:
    """A line without the beginning of a letter that it ends with; None = it is no UTF-8 for another reason."""
    try:
        return codecs.getincrementaldecoder(UTF_8)().decode(line)
    except UnicodeError:
        return None


def _guessed(content: bytes) -> str:
    """What bytes are probably written in; "" = nobody knows."""
    from charset_normalizer import from_bytes

    best = from_bytes(content, cp_isolation=[*COMMON, *WESTERN]).best()
    if best is None:
        return ""
    # Of those that differ in a few letters only, nearly all files are in the code page of Windows.
    return WINDOWS if best.encoding in WESTERN and _is_decodable(content, WINDOWS) else best.encoding


# ---- By kind ------------------------------------------------------------------------------------------------------


def _parquet_rows(paths: Sequence[Path], names_classes: bool) -> Iterator[tuple[int, dict[str, object]]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UsageError(f"{paths[0]}: parquet files need pyarrow; install with: pip install pyarrow, or give a csv")
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for path in paths:
            if instead := what_stands_in(path):
                raise UsageError(f"{path}: {instead}")
            file = pyarrow.parquet.ParquetFile(path)
            names = _names_of_classes(file.schema_arrow.metadata or {}) if names_classes else {}
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    for column, classes in names.items():
                        row[column] = _name_of(row.get(column), classes)
                    yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({one_line(error)}); save it anew") from None


def shards_of(path: Path) -> list[Path]:
    """The files of which a data set of the hub is made, where one of them is named; of another file itself.

    Raises:
        UsageError: one of them is not there.
    """
    found = SHARD.fullmatch(path.name)
    if found is None or not path.is_file() or int(found["number"]) >= int(found["count"]):
        return [path]
    beside = {one.name: one for one in path.parent.iterdir()}
    shards = []
    for number in range(int(found["count"])):
        # Some end in a hash, each in its own.
        start = f"{found['name']}-{number:05}-of-{found['count']}"
        named = [name for name in beside if SHARD.fullmatch(name) and name.startswith(start)]
        if len(named) != 1:
            what = "is there more than once; remove one" if named else "is not there; fetch it"
            raise UsageError(
                f"{path}: is one of {int(found['count']):,} files, and {start}.parquet {what}, or rename this one to "
                "read it alone"
            )
        shards.append(beside[named[0]])
    return shards


def _names_of_classes(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """By column, what its numbers stand for, where a data set of the Hugging Face hub says so."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        found = {column: one.get("names") for column, one in features.items() if one.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {column: list(map(str, names)) for column, names in found.items() if isinstance(names, list)}


def _name_of(value: object, classes: list[str]) -> object:
    if isinstance(value, int) and 0 <= value < len(classes):
        return classes[value]
    return None if value == -1 else value  # so the hub writes that there is none


def _jsonl_rows(path: Path, stream: TextIO) -> Iterator[tuple[int, dict[str, object]]]:
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


def _json_rows(path: Path, stream: TextIO) -> Iterator[tuple[int, dict[str, object]]]:
    """Of a list of objects; a file with an object a line is taken for what it is."""
    try:
        content = json.load(stream)
    except (ValueError, RecursionError) as error:
        stream.seek(0)
        first = stream.readline().strip()
        if first.startswith("{") and first.endswith("}"):
            stream.seek(0)
            yield from _jsonl_rows(path, stream)
            return
        raise UsageError(f"{path}: is not JSON ({error}); give a list of objects, one a sample") from None
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        what = (
            f"an object with {', '.join(map(repr, list(content)[:5]))}"
            if isinstance(content, dict)
            else "something else"
        )
        raise UsageError(
            f"{path}: is JSON, but {what}; give a list of objects, one a sample, as in "
            '[{"label": ..., ...}, ...], or a csv'
        )
    yield from enumerate(content, start=1)


def _sheet_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Of the sheet that a workbook opens with; what formulas gave when it was saved."""
    if importlib.util.find_spec("openpyxl") is None:
        raise UsageError(f"{path}: Excel files need openpyxl; install with: pip install openpyxl, or save it as csv")
    names: list[str] = []
    for number, cells in enumerate(_cells(path), start=1):
        values = [value.strip() if isinstance(value, str) else value for value in cells]
        if all(value is None or value == "" for value in values):
            continue
        if not names:
            names = ["" if value is None else str(value) for value in values]
            check_column_names(path, names)
            continue
        yield number, {name: _cell(value) for name, value in zip(names, values, strict=False) if name}


def _cells(path: Path) -> Iterator[Sequence[object]]:
    """Row by row, as far as there are any, whatever size the file claims to have.

    Raises:
        UsageError: it is damaged.
    """
    import openpyxl

    try:
        with path.open("rb") as stream:  # whatever it is called
            book = openpyxl.load_workbook(stream, read_only=True, data_only=True)
            book.active.reset_dimensions()
            yield from book.active.iter_rows(values_only=True)
    except Exception as error:  # of a damaged file whatever its readers raise
        raise UsageError(f"{path}: cannot be read ({one_line(error)}); save it anew, or as csv") from None


def _cell(value: object) -> object:
    """As a csv would give it; whole numbers as such."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str | int | float) or value is None else str(value)
