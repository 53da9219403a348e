"""A folder of images, or of texts: one sub-folder a class; or train/, val/ and test/, each so."""

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.base.table_names import KNOWN
from finetune.base.words import typed
from finetune.data.decode import PACKAGES, SUFFIXES_BEFORE, is_image
from finetune.data.groups import groups_of, with_groups
from finetune.data.names import is_service_folder, meaning
from finetune.data.source import PART_NAMES, FileSource, Reading, check_inside, make_file_source
from finetune.errors import UsageError

# Before folders of services were known as such, only these were no classes.
NO_CLASSES_BEFORE = (".ipynb_checkpoints", "__MACOSX", ".git")
# Files that tell of samples, and are none.
DESCRIBING_SUFFIXES = {
    ".csv", ".docx", ".htm", ".html", ".ipynb", ".json", ".jsonl", ".log", ".mat", ".md", ".parquet", ".pdf", ".py",
    ".rtf", ".toml", ".tsv", ".txt", ".xls", ".xlsx", ".xml", ".yaml", ".yml",
}  # fmt: skip
SHOWN_KINDS, SHOWN_FOLDERS = 4, 3


@dataclass(frozen=True)
class Kind:
    """Which files of a folder are samples, and which of its folders are classes.

    Attributes:
        is_sample: (folder, file name) -> whether it is one.
        noun: what a sample is called.
        suffixes: for people.
        is_left_aside: (folder name) -> whether it is no class, and nothing below it counts.
        is_strict: nothing else is left aside, as it was before.
    """

    is_sample: Callable[[str, str], bool]
    noun: str
    suffixes: str
    is_left_aside: Callable[[str], bool] = is_service_folder
    is_strict: bool = False


def ends_in(*suffixes: str) -> Callable[[str, str], bool]:
    """Whether a file's name ends so."""
    return lambda _folder, name: name.lower().endswith(suffixes)


IMAGES = Kind(is_image, "image", ".jpg, .png, .webp, .tif, ...")
TEXTS = Kind(ends_in(".txt"), "text", ".txt")


def before(kind: Kind) -> Kind:
    """The kind as it was when files were known by their names alone."""
    is_sample = ends_in(*SUFFIXES_BEFORE) if kind.noun == "image" else kind.is_sample
    is_left_aside = NO_CLASSES_BEFORE.__contains__
    return dataclasses.replace(kind, is_sample=is_sample, is_left_aside=is_left_aside, is_strict=True)


@dataclass
class LeftAside:
    """What of a folder is not taken for a sample.

    Attributes:
        files: how many, by suffix in small letters.
        folders: names of the folders that are no classes.
        nested: names of folders that are in every class, if there is nothing else in any.
        by_content: names without a suffix of files that are samples by their content.
        said: sentences of another kind.
    """

    files: Counter[str] = dataclasses.field(default_factory=Counter)
    folders: list[str] = dataclasses.field(default_factory=list)
    nested: list[str] = dataclasses.field(default_factory=list)
    by_content: list[str] = dataclasses.field(default_factory=list)
    said: list[str] = dataclasses.field(default_factory=list)

    @property
    def text(self) -> str:
        """For people: "8 .heic, 1 without a suffix, 2 folders (.cache, @eaDir)"; "" = nothing."""
        kinds = self.files.most_common(SHOWN_KINDS)
        parts = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in kinds]
        if rest := self.files.total() - sum(count for _, count in kinds):
            parts.append(f"{rest:,} more")
        if self.folders:
            names = sorted(set(self.folders))
            more = ", ..." if len(names) > SHOWN_FOLDERS else ""
            parts.append(f"{len(self.folders):,} folder(s) ({', '.join(names[:SHOWN_FOLDERS])}{more})")
        return ", ".join(parts)

    @property
    def notes(self) -> list[str]:
        """What to do about it, a sentence each."""
        found = {suffix: PACKAGES[suffix] for suffix in self.files if suffix in PACKAGES}
        notes = [
            f"{self.files[suffix]:,} {suffix} left aside: to read that format, pip install {package}"
            for suffix, package in found.items()
        ]
        if self.by_content:
            notes.append(
                f"{len(self.by_content):,} file(s) without a suffix are images by their content, like "
                f"{self.by_content[0]}; move away what is none of the data"
            )
        if self.nested:
            more = ["..."] if len(self.nested) > SHOWN_FOLDERS else []
            names = ", ".join([*map(repr, self.nested[:SHOWN_FOLDERS]), *more])
            notes.append(
                f"every class holds the same folders ({names}) and nothing else: if those are the classes, put what "
                "belongs to each into one folder"
            )
        return notes + self.said


def files_below(folder: Path, kind: Kind = IMAGES) -> tuple[list[str], LeftAside]:
    """Samples in a folder and all below it: paths relative to it, with "/", in the order of their names; and what else
    there is. Hidden files are passed over.

    Raises:
        UsageError: a folder cannot be read.
    """
    found: list[str] = []
    left = LeftAside()
    for place, aside, files in _walked(folder, kind):
        left.folders += aside
        relative = os.path.relpath(place, folder).replace(os.sep, "/")
        prefix = "" if relative == "." else f"{relative}/"
        for name in files:
            if kind.is_sample(place, name):
                found.append(prefix + name)
                left.by_content += [name] * ("." not in name)
            else:
                left.files[os.path.splitext(name)[1].lower()] += 1
    return found, left


def _walked(folder: Path, kind: Kind) -> Iterator[tuple[str, list[str], list[str]]]:
    """Of a folder and all below it: the folder, the names of those in it that are left aside, and of its files, hidden
    ones passed over, in order."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back to where we came from
            folders.clear()
            continue
        seen.add(real)
        aside = [name for name in folders if name.startswith(".") or kind.is_left_aside(name)]
        folders[:] = sorted(set(folders) - set(aside))
        shown = [name for name in aside if kind.is_left_aside(name)]
        yield place, shown, sorted(name for name in files if not name.startswith("."))


def _refuse(error: OSError) -> None:
    raise UsageError(f"folder {error.filename}: cannot be read ({error.strerror}); change its rights or remove it")


def sub_folders(folder: Path, is_left_aside: Callable[[str], bool] = is_service_folder) -> tuple[list[str], list[str]]:
    """Names of the folders in a folder, sorted; and of those among them that are left aside."""
    try:
        names = sorted(name for name in os.listdir(folder) if (folder / name).is_dir())
    except OSError as error:
        raise UsageError(f"folder {folder}: cannot be read ({error.strerror}); change its rights") from None
    return [name for name in names if not is_left_aside(name)], [name for name in names if is_left_aside(name)]


def _samples_in(folder: Path, kind: Kind) -> int:
    """How many samples lie in a folder itself."""
    return sum(kind.is_sample(str(folder), name) for name in os.listdir(folder) if not name.startswith("."))


def _has_samples(folder: Path, kind: Kind) -> bool:
    """Whether there is a sample in a folder, or anywhere below it."""
    return any(kind.is_sample(place, name) for place, _, files in _walked(folder, kind) for name in files)


def _class_folders(folder: Path, kind: Kind) -> list[str]:
    """Names of the folders in a part that hold samples."""
    return [name for name in sub_folders(folder, kind.is_left_aside)[0] if _has_samples(folder / name, kind)]


def _has_more(part: Path, classes: Sequence[str], kind: Kind, loose: int) -> bool:
    """Whether more samples lie in the class folders of a part than beside them."""
    below = (
        True
        for name in classes
        for place, _, files in _walked(part / name, kind)
        for file in files
        if kind.is_sample(place, file)
    )
    return sum(itertools.islice(below, loose + 1)) > loose


@dataclass(frozen=True)
class Layout:
    """Which folders of a folder are parts.

    Attributes:
        parts: place in `PARTS` by name of the folder; {"": 0} = the folder itself holds the classes.
        aside: names of folders that are no part.
        notes: what a person should know of these.
    """

    parts: dict[str, int]
    aside: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def has_parts(self) -> bool:
        return "" not in self.parts


def layout_of(folder: Path, kind: Kind, what: str) -> Layout:
    """Find train/, val/ and test/ with a folder a class in each; what stands beside them is left aside.

    Raises:
        UsageError: they are there by half; names the folder that is in the way.
    """
    names, _ = sub_folders(folder, kind.is_left_aside)
    parts = {name: PART_NAMES[name.lower()] for name in names if name.lower() in PART_NAMES}
    classes = {name: _class_folders(folder / name, kind) for name in parts}
    loose = {name: _samples_in(folder / name, kind) for name in parts}
    # A class that is called "train" holds its samples itself.
    divided = [name for name in parts if classes[name] and _has_more(folder / name, classes[name], kind, loose[name])]
    if not divided:
        return Layout({"": 0})
    found = {name: parts[name] for name in divided}
    if 0 not in found.values():
        if mixed := [name for name in parts if parts[name] == 0 and classes[name]]:
            raise UsageError(
                f"{what}: {mixed[0]}/ holds {loose[mixed[0]]:,} {kind.noun}(s) beside its class folders, as many as in "
                "them or more: move them into these, or away"
            )
        shown = ", ".join(f"{name}/" for name in divided)
        raise UsageError(f"{what}: holds {shown} but no train/ with one sub-folder a class; add it, or rename one")
    for part in set(found.values()):
        twice = [f"{name}/" for name in found if found[name] == part]
        if len(twice) > 1:
            raise UsageError(f"{what}: {' and '.join(twice)} are the same part; put them together, or move one away")
    notes = [
        f"{loose[name]:,} {kind.noun}(s) beside the class folders of {name}/ have no class: left aside"
        for name in divided
        if loose[name]
    ]
    known = {meaning(one) for name in divided if found[name] == 0 for one in classes[name]}
    for name in [name for name in found if found[name] == 2 and not known & {meaning(one) for one in classes[name]}]:
        del found[name]
    for name in [name for name in parts if name not in found]:
        if loose[name] or classes[name]:
            notes.append(
                f"{name}/ holds no folder of a class to train on, so its {kind.noun}s are unlabelled and left aside; "
                f"after the training: {typed(['finetune', 'predict', 'RUN', str(folder / name)])}"
            )
    aside = [name for name in names if name not in found]
    in_the_way = [name for name in aside if name not in parts and _has_samples(folder / name, kind)]
    if in_the_way and set(parts.values()) == {0}:
        raise UsageError(
            f"{what}: {in_the_way[0]}/ stands beside {divided[0]}/ and holds {kind.noun}s: move it away, or into "
            f"{divided[0]}/ if it is a class, or call it val/ or test/ if it is that part"
        )
    notes += [f"{name}/ is no part, and its {kind.noun}s are left aside" for name in in_the_way]
    return Layout(found, aside, notes)


def _layout_before(folder: Path, kind: Kind, what: str) -> Layout:
    """The same as it was when nothing was left aside.

    Raises:
        UsageError: it is laid out so by half.
    """
    names, _ = sub_folders(folder, kind.is_left_aside)
    found = {name: PART_NAMES[name.lower()] for name in names if name.lower() in PART_NAMES}
    divided = [
        name
        for name in found
        if sub_folders(folder / name, kind.is_left_aside)[0]
        and not any(kind.is_sample(str(folder / name), file) for file in os.listdir(folder / name))
    ]
    if not divided:
        return Layout({"": 0})  # no parts, or classes that happen to be called so
    if set(divided) != set(names) or 0 not in found.values() or len(set(found.values())) < len(found):
        raise UsageError(
            f"{what}: holds {', '.join(names)}; to bring parts along it must hold train/, perhaps val/ and "
            "test/, nothing else, and each of them one sub-folder a class"
        )
    return Layout(found)


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
    layout = (_layout_before if kind.is_strict else layout_of)(folder, kind, what)
    paths: list[str] = []
    labels: list[str] = []
    parts: list[int] = []
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
            files, others = files_below(part_folder / class_name, kind)
            if not files and not kind.is_strict and _describes(others):
                left.folders.append(class_name)
                left.said.append(f"{os.path.join(part_name, class_name)}/ holds {others.text}, so it is no class")
                continue
            left.files += others.files
            left.folders += others.folders
            left.by_content += others.by_content
            if not files:
                found = "; ".join(["", *([f"it holds {others.text}"] if others.text else []), *others.notes])
                raise UsageError(
                    f"{what}: class folder {os.path.join(part_name, class_name)!r} holds no {kind.noun}s "
                    f"({kind.suffixes}){found}; fill or remove it"
                )
            prefix = f"{part_name}/{class_name}/" if layout.has_parts else f"{class_name}/"
            paths += [prefix + file for file in files]
            labels += [class_name] * len(files)
            parts += [part] * len(files)
    left.nested = _nested(paths, labels, 2 if layout.has_parts else 1)
    if not allow_outside:
        check_inside(folder, paths, what, kind.noun)
    return Listing(paths, labels, parts if layout.has_parts else None, left)


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
    source = make_file_source(folder, found.paths, found.labels, found.parts, classes, what, reading)
    groups, of_groups = groups_of(found.paths, [], "", reading.group_by, "image")
    notes = (*found.left.notes, *source.notes, *of_groups)
    return dataclasses.replace(
        source, left=found.left.text, notes=notes, groups=groups, fingerprint=with_groups(source.fingerprint, groups)
    )
