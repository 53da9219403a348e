"""From `--texts` to batches of tokens."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from finetune.base.table_names import KNOWN, TEXT_COLUMNS, is_table
from finetune.data.archives import how_to_unpack, is_archive
from finetune.data.batch import Batch, Request
from finetune.data.folder import list_folder, way_to_classes
from finetune.data.groups import groups_of, with_groups
from finetune.data.source import PARTS, Reading, TextSource, encode_labels
from finetune.data.table import Columns, Found, made_of_others, plain_value, sample_rows
from finetune.data.table_files import decoded, undecodable
from finetune.data.tokens import TokenTable
from finetune.data.walk import TEXTS as TEXT_FILES
from finetune.data.walk import before
from finetune.errors import RunError, UsageError

BUNDLED = "messages"
# What was a table when tables were read to the letter.
TABLES_BEFORE = (".csv", ".tsv", ".jsonl", ".parquet")
TEXT_SUFFIXES = (".txt",)
LARGEST_FILE_BYTES = 1 << 26
# So much of a text stands for it in a message.
SHOWN_CHARACTERS = 40


# One, several, or none.
Label = str | tuple[str, ...] | None


class BrokenText(RunError):
    """One text that cannot be used."""


def bundled_file() -> Path:
    """The labelled messages that ship with the kit; see bundled/messages.md."""
    return Path(str(resources.files("finetune"))) / "bundled" / "messages.csv"


def open_texts(
    texts: str,
    kind: str,
    columns: Columns = Columns(),
    classes: Sequence[str] | None = None,
    allow_outside: bool = False,
    reading: Reading = Reading(),
) -> TextSource:
    """The data set that `--texts` names: `messages`, a csv, tsv, jsonl or parquet file, a folder of class/*.txt; for
    "distillation" also a .txt file with a text a line, and no labels.

    Args:
        kind: of the task: "classification", "multi-label", "regression" or "distillation".
        classes: the only classes allowed, in order; None = those found.
        allow_outside: texts may lie outside the folder.

    Raises:
        UsageError: there is no such data, or a line or file of it cannot be read.
    """
    what, path = f"--texts {texts}", Path(os.path.expanduser(texts))
    if texts == BUNDLED:  # a folder of that name is ./messages
        path = bundled_file()
    labels: Sequence[Label]
    parts: list[int] | None
    left, of_rows, notes, row_groups, unreadable = "", Found(), list[str](), list[str](), dict[int, str]()
    way_out = ""
    if path.is_dir():
        if columns != Columns():
            raise UsageError(f"{what}: columns and --separator belong to a table; leave them out")
        found = list_folder(path, TEXT_FILES if reading.by_content else before(TEXT_FILES), what, allow_outside)
        contents, unreadable = _read_files(path, found.paths, reading.encoding)
        names, labels = found.paths, found.labels
        way_out = way_to_classes(path, TEXT_FILES, "--texts") if len(set(labels)) < 2 else ""
        parts, left, notes = found.parts, found.left.text, found.left.notes
    elif is_table(path) and not (reading.is_strict and path.suffix.lower() not in TABLES_BEFORE):
        rows = list(
            sample_rows(
                path, columns, TEXT_COLUMNS, "--text-column", labelled=kind != "distillation", reading=reading,
                found=of_rows,
            )
        )  # fmt: skip
        contents = [text_of(row.content, row.where) for row in rows]
        names = [f"line {row.line}" for row in rows]  # not the file's name: it may be moved
        labels, row_groups = [row.label for row in rows], [row.group for row in rows]
        parts = [row.part for row in rows if row.part is not None] if columns.split else None
    elif kind == "distillation" and path.is_file():
        contents = [line for line in read_text(path, reading.encoding).splitlines() if line.strip()]
        names = [f"text {number}" for number in range(1, len(contents) + 1)]
        if not contents:
            raise UsageError(f"{what}: is empty; give a line a text")
        labels, parts = [None] * len(contents), None
    elif is_archive(path):
        raise UsageError(f"{what}: {how_to_unpack(path, '--texts')}")
    elif path.is_file():
        raise UsageError(
            f"{what}: is a file, and no table ({KNOWN}); give one, or a folder with one sub-folder of .txt files a "
            "class"
        )
    else:
        raise UsageError(
            f"{what}: no such data; give {BUNDLED!r}, a {KNOWN} file, or a folder with one "
            "sub-folder of .txt files a class"
        )
    targets, classes, of_names = _targets(kind, labels, parts, classes, names, what, reading, way_out)
    notes += [*of_rows.notes, *of_names]
    files = names if path.is_dir() else []
    groups, of_groups = groups_of(files, row_groups, columns.group, reading.group_by, "text")
    notes += of_groups
    fingerprint = with_groups(_fingerprint(contents, labels, parts), groups)
    part_numbers = None if parts is None else torch.tensor(parts, dtype=torch.int64)
    return TextSource(
        contents, names, targets, classes, fingerprint, groups, part_numbers, left, tuple(notes), unreadable
    )


def _read_files(folder: Path, paths: Sequence[str], encoding: str) -> tuple[list[str], dict[int, str]]:
    """What files hold; of those that cannot be read nothing, and why, by their numbers."""
    contents, unreadable = list[str](), dict[int, str]()
    for number, path in enumerate(paths):
        try:
            contents.append(read_text(folder / path, encoding))
        except UsageError as error:
            contents.append("")
            unreadable[number] = str(error)
    return contents, unreadable


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """A text file.

    Raises:
        UsageError: it cannot be read, or is not in its encoding; names the line.
    """
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise UsageError(f"{path}: has more than {LARGEST_FILE_BYTES:,} bytes; split or remove it")
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); repair or remove it") from None
    try:
        return decoded(content, encoding)
    except UnicodeError:
        raise UsageError(f"{path} {undecodable(path, encoding)}") from None


def text_of(content: object, where: str) -> str:
    """What a table holds in its text column; what is missing is "".

    Raises:
        UsageError: it is no text.
    """
    content = plain_value(content, where)
    if isinstance(content, dict | list):
        raise UsageError(f"{where}: its text is a {type(content).__name__}; give a column of texts: --text-column")
    return "" if content is None else str(content)


def _targets(
    kind: str,
    labels: Sequence[Label],
    parts: list[int] | None,
    classes: Sequence[str] | None,
    names: list[str],
    what: str,
    reading: Reading,
    way_out: str = "",
) -> tuple[Tensor, list[str], list[str]]:
    """Targets and classes as in `TextSource`, and what to say of the classes' names."""
    if kind == "distillation":
        return torch.zeros(len(labels), 0), [], []
    if kind == "regression":
        numbers = [_number(label, name, what) for label, name in zip(labels, names, strict=True)]
        return torch.tensor(numbers, dtype=torch.float64), [], []
    # Only what is to be distilled has no labels.
    given = [label for label in labels if label is not None]
    targets, found, notes = encode_labels(given, parts, classes, what, "text", reading, way_out)
    notes += made_of_others(given, classes)
    if classes is None and kind == "classification" and len(found) > 20 and all(map(_is_fraction, found)):
        raise UsageError(
            f"{what}: {len(found)} labels, all of them numbers ({', '.join(found[:3])}, ...): to predict numbers, give "
            "--task regression"
        )
    return targets, found, notes


def _is_fraction(label: str) -> bool:
    try:
        return not float(label).is_integer()
    except (ValueError, OverflowError):
        return False


def _number(label: Label, name: str, what: str) -> float:
    try:
        value = float(label) if isinstance(label, str) else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{what}, {name}: {label!r} is no number, and --task regression predicts numbers; mend it")
    return value


def _fingerprint(texts: list[str], labels: Sequence[Label], parts: list[int] | None) -> str:
    """A hash over every text, its label and part."""
    listing = hashlib.sha256()
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        part = "" if parts is None else PARTS[parts[row]]
        label = label if isinstance(label, tuple) else (label or "",)
        content = "\0".join([part, *label, text]).encode("utf-8", "surrogatepass")
        listing.update(len(content).to_bytes(8, "little") + content)
    return f"texts {listing.hexdigest()}"


@dataclass(frozen=True)
class TextPipeline:
    """Gives tokens. Stateless, so that any process can fetch any batch in any order.

    Attributes:
        table: the tokens of the source's texts.
    """

    source: TextSource
    table: TokenTable

    @property
    def lengths(self) -> Tensor:
        """(samples,) int64: tokens of each."""
        return self.table.lengths

    def is_broken(self, indices: Tensor) -> Tensor:
        """(samples,) bool: which texts are empty."""
        return torch.tensor([not self.source.texts[index].strip() for index in indices.tolist()], dtype=torch.bool)

    def fetch(self, request: Request) -> Batch:
        """A batch of tokens.

        Raises:
            BrokenText: one of the texts is empty, unless the request is tolerant.
        """
        broken = [(index, self._reason(index)) for index in request.indices if not self.source.texts[index].strip()]
        if broken and not request.tolerant:
            raise BrokenText(broken[0][1])
        bad = {index for index, _ in broken}
        indices = [index for index in request.indices if index not in bad]
        chosen = torch.tensor(indices, dtype=torch.int64)
        digests = torch.zeros_like(chosen)
        return Batch(self.table.batch(indices), self.source.targets[chosen], chosen, digests, broken)

    def _reason(self, index: int) -> str:
        if index in self.source.unreadable:
            return self.source.unreadable[index]
        return f"text of {self.source.name(index)} is empty; write or remove it"
