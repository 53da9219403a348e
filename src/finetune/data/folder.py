"""A folder of images, or of texts: one sub-folder a class; or train/, val/ and test/, each so."""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.base.table_names import KNOWN, is_table
from finetune.base.words import typed
from finetune.data.groups import groups_of, with_groups
from finetune.data.layout import class_folders, layout_before, layout_of, samples_in
from finetune.data.source import PART_NAMES, FileSource, Reading, check_inside, make_file_source
from finetune.data.walk import IMAGES, SHOWN_FOLDERS, Kind, LeftAside, before, files_below, sub_folders
from finetune.errors import UsageError

# Files that tell of samples, and are none.
DESCRIBING_SUFFIXES = {
    ".csv", ".docx", ".htm", ".html", ".ipynb", ".json", ".jsonl", ".log", ".mat", ".md", ".parquet", ".pdf", ".py",
    ".rtf", ".toml", ".tsv", ".txt", ".xls", ".xlsx", ".xml", ".yaml", ".yml",
}  # fmt: skip
# How the names of tables with the labels of what lies beside them begin.
LIKELY_TABLES = ("label", "metadata", "train", "annotation")
SHOWN_EMPTY = 5
# Folders of a data set that are no classes either, if all others are parts, too.
CONTAINERS = (
    "annotations", "data", "image", "images", "img", "imgs", "labels", "masks", "photos", "pictures", "unlabeled",
)  # fmt: skip
# A link may lead back to where we came from.
DEEPEST = 8


@dataclass(frozen=True)
class Listing:
    """The samples of a folder: paths relative to it, the class of each, its place in `PARTS` (None: no parts), and what
    else lies between them."""

    paths: list[str]
    labels: list[str]
    parts: list[int] | None
    left: LeftAside


def list_folder(folder: Path, kind: Kind, what: str, allow_outside: bool) -> Listing:
    """Files by class folder, in the order of their names.

    Args:
        kind: which files count.
        what: names the data in an error.
        allow_outside: follow links that lead out of the folder.

    Raises:
        UsageError: a class without samples, or a link that leads out of the folder.
    """
    layout = (layout_before if kind.is_strict else layout_of)(folder, kind, what)
    paths: list[str] = []
    labels: list[str] = []
    parts: list[int] = []
    empty: dict[str, str] = {}
    left = LeftAside(folders=list(layout.aside), said=list(layout.notes))
    if layout.has_parts:
        left.folders += sub_folders(folder, kind.is_left_aside)[1]
    if not kind.is_strict:
        _leave_loose(folder, kind, left)
    for part_name, part in layout.parts.items():
        part_folder = folder / part_name
        class_names, aside = sub_folders(part_folder, kind.is_left_aside)
        left.folders += aside
        for class_name in class_names:
            place = os.path.join(part_name, class_name)
            files, others = files_below(part_folder / class_name, kind)
            if not files and not kind.is_strict and _describes(others):
                left.folders.append(class_name)
                left.said.append(f"{place}/ holds {others.text}, so it is no class")
                continue
            left.files += others.files
            left.folders += others.folders
            left.by_content += others.by_content
            if not files:
                empty[place] = "; ".join(["", *([f"it holds {others.text}"] if others.text else []), *others.notes])
            prefix = f"{part_name}/{class_name}/" if layout.has_parts else f"{class_name}/"
            paths += [prefix + file for file in files]
            labels += [class_name] * len(files)
            parts += [part] * len(files)
    if empty:
        place, found = next(iter(empty.items()))
        shown = ", ".join(list(empty)[1:SHOWN_EMPTY]) + (", ..." if len(empty) > SHOWN_EMPTY else "")
        more = f", and so do {len(empty) - 1:,} more: {shown}" if len(empty) > 1 else ""
        it = "them" if more else "it"
        raise UsageError(
            f"{what}: class folder {place!r} holds no {kind.noun}s ({kind.suffixes}){found}{more}; fill or remove {it}"
        )
    left.nested = _nested(paths, labels, 2 if layout.has_parts else 1)
    if not allow_outside:
        check_inside(folder, paths, what, kind.noun)
    return Listing(paths, labels, parts if layout.has_parts else None, left)


def way_to_classes(folder: Path, kind: Kind, option: str) -> str:
    """What to give instead of a folder without two classes of its own: a table that lies in it or in one of its parts,
    or a folder further in; "" = there is nothing of that.

    Args:
        option: that named it, as in "--images".
    """
    names = sub_folders(folder, kind.is_left_aside)[0]
    parts = sorted((PART_NAMES[name.lower()], name) for name in names if name.lower() in PART_NAMES)
    for place in [folder, *(folder / name for _, name in parts)]:
        tables = [name for name in os.listdir(place) if is_table(place / name) and not name.startswith(".")]
        if tables:
            likely = min(tables, key=lambda name: (not name.lower().startswith(LIKELY_TABLES), name))
            line = typed([option, str(place / likely)])
            return f"{likely} lies in {place}: if it names the {kind.noun}s and their labels, give {line}"
    inner, within = folder, names
    for _ in range(DEEPEST):
        if len(within) != 1 or samples_in(inner, kind):
            break
        inner = inner / within[0]
        within = sub_folders(inner, kind.is_left_aside)[0]
    if len(within) > 1 and inner != folder:
        shown = ", ".join(within[:SHOWN_FOLDERS]) + (", ..." if len(within) > SHOWN_FOLDERS else "")
        return f"{inner} holds {shown}: give {typed([option, str(inner)])}"
    for name in names:
        if name.lower() in CONTAINERS and len(class_folders(folder / name, kind)) > 1:
            return f"{folder / name} holds folders of classes: give {typed([option, str(folder / name)])}"
    if loose := samples_in(folder, kind):
        return (
            f"{loose:,} {kind.noun}(s) lie in it themselves: put those of each class into a sub-folder of its own, or "
            "name the classes in a csv"
        )
    return ""


def check_no_parts(folder: Path, classes: Sequence[str], kind: Kind, option: str) -> None:
    """Refuse to learn to tell parts from each other.

    Args:
        classes: as they were found in the folder.
        option: that named it, as in "--images".

    Raises:
        UsageError: none of the classes is called like one.
    """
    if not classes or not {name.lower() for name in classes} <= {*PART_NAMES, *CONTAINERS}:
        return
    usual = f"put the {kind.noun}s of each class into a folder of its own, as in train/cat and train/dog"
    raise UsageError(
        f"{option} {folder}: its folders {', '.join(f'{name}/' for name in classes)} are called like parts of a data "
        f"set, not like classes; {way_to_classes(folder, kind, option) or usual}; if they are the "
        "classes, rename one"
    )


def _leave_loose(folder: Path, kind: Kind, left: LeftAside) -> None:
    """Take down what lies in no folder at all."""
    files = [name for name in os.listdir(folder) if not name.startswith(".") and (folder / name).is_file()]
    samples = [name for name in files if kind.is_sample(str(folder), name)]
    left.files += Counter(os.path.splitext(name)[1].lower() for name in files if name not in set(samples))
    if samples:
        left.said.append(f"{len(samples):,} {kind.noun}(s) in no class folder, like {min(samples)}: left aside")


def _describes(left: LeftAside) -> bool:
    """Whether what was found instead of samples tells of them: annotations, lists, notes."""
    return bool(left.files) and set(left.files) <= DESCRIBING_SUFFIXES


def _nested(paths: Sequence[str], labels: Sequence[str], depth: int) -> list[str]:
    """Names of the folders below the class folders, if all of these hold the same ones, several, and nothing else."""
    below: dict[str, set[str]] = {}
    for path, label in zip(paths, labels, strict=True):
        names = path.split("/")[depth:]
        below.setdefault(label, set()).add(names[0] if len(names) > 1 else "")
    found = list(below.values())
    same = len(found) > 1 and all(names == found[0] for names in found) and "" not in found[0]
    return sorted(found[0]) if same and len(found[0]) > 1 else []


def open_folder(
    folder: Path, classes: Sequence[str] | None = None, allow_outside: bool = False, reading: Reading = Reading()
) -> FileSource:
    """Image files by class folder; classes in the order of their names.

    Args:
        classes: the only classes allowed, in order; None = those found.
        allow_outside: follow links that lead out of the folder.

    Raises:
        UsageError: no such folder, a class without images, fewer than two classes, or a link that leads out of it.
    """
    what = f"--images {folder}"
    if not folder.is_dir():
        raise UsageError(
            f"{what}: no such folder; give 'digits', a folder with one sub-folder of images a class, or a {KNOWN} file"
        )
    kind = IMAGES if reading.by_content else before(IMAGES)
    found = list_folder(folder, kind, what, allow_outside)
    way_out = way_to_classes(folder, kind, "--images") if len(set(found.labels)) < 2 else ""
    source = make_file_source(folder, found.paths, found.labels, found.parts, classes, what, reading, way_out)
    groups, of_groups = groups_of(found.paths, [], "", reading.group_by, "image")
    notes = (*found.left.notes, *source.notes, *of_groups)
    return dataclasses.replace(
        source, left=found.left.text, notes=notes, groups=groups, fingerprint=with_groups(source.fingerprint, groups)
    )
