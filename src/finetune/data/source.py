"""What a data set is to the rest of the kit: classes, a target for each sample, a way to read one.

Images in memory, image files, or texts.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from finetune.data.decode import EVERY_PIXEL, BrokenImage, Decoding, decode, read_bytes
from finetune.data.names import by_meaning, classes_of, meaning, notes_on_names
from finetune.errors import UsageError

# The fixed parts that a data set may bring along, by what people call their folders.
PARTS = ("train", "validation", "test")
PART_NAMES = {
    "train": 0,
    "training": 0,
    "val": 1,
    "valid": 1,
    "validation": 1,
    "dev": 1,
    "test": 2,
    "testing": 2,
}


@dataclass(frozen=True)
class Reading:
    """How files and tables are read: choices of the recipe that decide which samples there are.

    Attributes:
        by_content: know files by their content, leave folders of services aside, and compare names by what they mean;
            else as before there was such a choice.
        quotes: of a csv or tsv: "auto", "none" or "standard"; see `table.read_rows`.
        missing_labels: what is done with a row whose label is spelled like a missing value: "refuse", "leave-out", or
            "class", which takes the spelling for a class.
        group_by: a regular expression; samples of whose names it finds the same stay on one side of a split.
        encoding: of files of text that do not say it themselves.
        is_strict: a table is read to the letter, as before: no path is looked for elsewhere, a list that was printed is
            a text, and no label has a column of its own.
        is_whole: of a data set in several parquet files, of which one is named, all are read.
    """

    by_content: bool = True
    quotes: str = "auto"
    missing_labels: str = "refuse"
    group_by: str = ""
    encoding: str = "utf-8"
    is_strict: bool = False
    is_whole: bool = False


@dataclass(frozen=True)
class ArraySource:
    """Images that lie in memory.

    Attributes:
        images: (samples, channels, height, width) uint8, one or three channels.
        targets: (samples,) int64 class numbers.
        classes: names, by class number.
        fingerprint: changes when the data does.
        groups: (samples,) int64 or None; samples of one group never stand on both sides of a split.
        parts: (samples,) int64 places in `PARTS`, or None where the data brings no split along.
    """

    images: Tensor
    targets: Tensor
    classes: list[str]
    fingerprint: str
    groups: Tensor | None = None
    parts: Tensor | None = None
    noun: ClassVar[str] = "image"

    def read(self, index: int) -> tuple[Tensor, int]:
        """One image, (3, height, width) uint8; and 0, for its content is in the fingerprint."""
        return self.images[index].expand(3, -1, -1), 0

    def name(self, index: int) -> str:
        return f"sample {index}"


@dataclass(frozen=True)
class FileSource:
    """Image files, decoded when asked for. Attributes as in `ArraySource`; `paths` are relative to `folder`.

    `targets` of a multi-label data set are (samples, classes) uint8: 1 where the class applies. `left` says in words
    what lies beside the samples and is none, "" = nothing; `notes` are sentences for whoever trains on them;
    `decoding` says how files become pixels.
    """

    folder: Path
    paths: list[str]
    targets: Tensor
    classes: list[str]
    fingerprint: str
    groups: Tensor | None = None
    parts: Tensor | None = None
    left: str = ""
    notes: tuple[str, ...] = ()
    decoding: Decoding = EVERY_PIXEL
    noun: ClassVar[str] = "image"

    def read(self, index: int) -> tuple[Tensor, int]:
        """One image, (3, height, width), as of `decode`; and a digest of the file's content, a positive int64.

        Raises:
            BrokenImage: the file is missing or cannot be decoded.
        """
        path = self.folder / self.paths[index]
        content = read_bytes(path)
        return decode(content, path, self.decoding), digest_of(content)

    def digest(self, index: int) -> int:
        """The digest that `read` gives, without decoding; 0 = the file cannot be read."""
        try:
            return digest_of(read_bytes(self.folder / self.paths[index]))
        except BrokenImage:
            return 0

    def size_bytes(self, index: int) -> int:
        """Of the file; 0 = there is none."""
        try:
            return os.stat(self.folder / self.paths[index]).st_size
        except (OSError, ValueError):
            return 0

    def changed_ns(self, index: int) -> int:
        """When the file was last changed, moved or copied; -1 = there is none.

        The later of two times: a tool that unpacks or copies files sets the one back, never the other.
        """
        try:
            found = os.stat(os.path.join(self.folder, self.paths[index]))
        except (OSError, ValueError):
            return -1
        return max(found.st_mtime_ns, found.st_ctime_ns)

    def name(self, index: int) -> str:
        return self.paths[index]


@dataclass(frozen=True)
class TextSource:
    """Texts, in memory.

    Attributes:
        texts: as they are; an empty one cannot be used.
        unreadable: why a text could not be read, by its number: it is empty then.
        names: of each: where it stands.
        targets: (samples,) int64 class numbers, (samples, classes) uint8 of several labels, (samples,) float32 numbers
            to predict, or (samples, width) float32 embeddings to come close to.
        classes: names, by class number; none where numbers or embeddings are predicted.
        fingerprint, parts, left, notes: as of the others.
    """

    texts: list[str]
    names: list[str]
    targets: Tensor
    classes: list[str]
    fingerprint: str
    groups: Tensor | None = None
    parts: Tensor | None = None
    left: str = ""
    notes: tuple[str, ...] = ()
    unreadable: Mapping[int, str] = field(default_factory=dict)
    noun: ClassVar[str] = "text"

    def name(self, index: int) -> str:
        return self.names[index]


ImageSource = ArraySource | FileSource
Source = ImageSource | TextSource


def digest_of(content: bytes) -> int:
    """A positive int64."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1 or 1


def check_inside(folder: Path, paths: Sequence[str], what: str, noun: str = "image") -> None:
    """Refuse files that are not below `folder`: a data set from elsewhere must not lead to what else lies on the disk.

    Args:
        paths: relative to `folder`, or from the root.
        what: names the data in the error.

    Raises:
        UsageError: a path leads out of the folder, by itself or through a link; names the first.
    """
    root = os.path.realpath(folder)

    def is_inside(path: str) -> bool:
        try:
            return os.path.realpath(path).startswith(os.path.join(root, ""))
        except ValueError:
            return True  # no path at all: found to be broken like any other file

    folders: dict[str, bool] = {}
    outside = []
    for path in paths:
        full = os.path.join(folder, path)
        parent = os.path.dirname(full)
        if parent not in folders:
            folders[parent] = is_inside(os.path.join(parent, "any"))
        if not folders[parent] or (os.path.islink(full) and not is_inside(full)):
            outside.append(path)
    if outside:
        raise UsageError(
            f"{what}: {len(outside)} {noun}(s) lie outside {folder}, like {outside[0]}; if you trust whoever made this "
            "data, give --allow-outside"
        )


def encode_labels(
    labels: Sequence[str | tuple[str, ...]],
    parts: Sequence[int] | None,
    classes: Sequence[str] | None,
    what: str,
    noun: str = "image",
    reading: Reading = Reading(),
    way_out: str = "",
) -> tuple[Tensor, list[str], list[str]]:
    """Labels as numbers: (samples,) int64, or, multi-label, (samples, classes) uint8; the classes' names; and what a
    person should know of them.

    Args:
        labels, parts, classes, what: see `make_file_source`.
        way_out: what to do where there are no two classes; "" = the usual.

    Raises:
        UsageError: fewer than two classes, or a label that is no class.
    """
    multi_label = bool(labels) and isinstance(labels[0], tuple)
    sets = [label if isinstance(label, tuple) else (label,) for label in labels]
    counts, notes = Counter(name for one in sets for name in one), list[str]()
    usual = f"put the {noun}s of each class into a sub-folder of its own, or name the classes in a csv"
    if classes is not None and not labels:
        raise UsageError(f"{what}: holds no {noun}s with a class; {way_out or usual}")
    if classes is None:
        training = sets if parts is None else [one for one, part in zip(sets, parts, strict=True) if part == 0]
        found = [name for one in training for name in one]
        classes = sorted(classes_of(found).values() if reading.by_content else set(found))
        notes = notes_on_names(counts, noun) if reading.by_content else []
        if len(classes) < 2:
            found_text = f"{len(classes)} class(es) found" + (f" ({', '.join(classes)})" if classes else "")
            raise UsageError(f"{what}: {found_text}, at least 2 are needed; {way_out or usual}")
    for name in classes:
        if name.encode("utf-8", "replace").decode() != name:
            raise UsageError(f"{what}: class {name!r} has a name that is no text (UTF-8); rename it")
    numbers = {name: number for number, name in enumerate(classes)}
    alike = by_meaning(classes)
    numbers = {name: alike.get(meaning(name), -1) for name in counts} | numbers
    strange = sorted(name for name in counts if numbers[name] < 0)
    if strange:
        raise UsageError(
            f"{what}: class {', '.join(map(repr, strange[:5]))} is not among those trained on "
            f"({', '.join(map(repr, classes[:10]))}{', ...' if len(classes) > 10 else ''}); rename or remove it"
        )
    if not multi_label:
        return torch.tensor([numbers[one[0]] for one in sets], dtype=torch.int64), list(classes), notes
    targets = torch.zeros(len(labels), len(classes), dtype=torch.uint8)
    for row, one in enumerate(sets):
        for name in one:
            targets[row, numbers[name]] = 1
    return targets, list(classes), notes


def make_file_source(
    folder: Path,
    paths: Sequence[str],
    labels: Sequence[str | tuple[str, ...]],
    parts: Sequence[int] | None,
    classes: Sequence[str] | None,
    what: str,
    reading: Reading = Reading(),
    way_out: str = "",
) -> FileSource:
    """A source of the listed files. No file is opened: the fingerprint takes path, size and label.

    Args:
        labels: of each file: its class, or, multi-label, all of its classes.
        parts: of each file: its place in `PARTS`; or None.
        classes: the only classes allowed, in order; None = those of the training part, sorted.
        what: names the data in an error.
        way_out: see `encode_labels`.

    Raises:
        UsageError: fewer than two classes, or a label that is no class.
    """
    targets, names, notes = encode_labels(labels, parts, classes, what, reading=reading, way_out=way_out)
    return FileSource(
        folder,
        list(paths),
        targets,
        names,
        _fingerprint(folder, paths, labels, parts),
        parts=None if parts is None else torch.tensor(parts, dtype=torch.int64),
        notes=tuple(notes),
    )


def _fingerprint(
    folder: Path,
    paths: Sequence[str],
    labels: Sequence[str | tuple[str, ...]],
    parts: Sequence[int] | None,
) -> str:
    """A hash over path, size, part and labels of every file."""
    listing = hashlib.sha256()
    root = os.fspath(folder)
    for row, path in enumerate(paths):
        try:
            size_bytes = os.stat(os.path.join(root, path)).st_size
        except (OSError, ValueError):
            size_bytes = -1  # missing: found to be broken like any other, and named
        part = "" if parts is None else PARTS[parts[row]]
        label = labels[row]
        names = (label,) if isinstance(label, str) else label
        line = f"{path}\0{size_bytes}\0{part}\0" + "\0".join(names) + "\n"
        listing.update(line.encode("utf-8", "surrogatepass"))
    return f"files {listing.hexdigest()}"


def class_counts(targets: Tensor, class_count: int) -> Tensor:
    """(classes,) int64: how many samples each class has; nothing where numbers are predicted."""
    if targets.is_floating_point():
        return torch.zeros(0, dtype=torch.int64)
    if targets.dim() == 2:
        return targets.sum(0, dtype=torch.int64)
    return torch.bincount(targets, minlength=class_count)
