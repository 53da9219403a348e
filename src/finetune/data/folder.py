"""A folder of images, or of texts: one sub-folder a class; or train/, val/ and test/, each so."""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.decode import PACKAGES, SUFFIXES_BEFORE, is_image
from finetune.data.groups import groups_of, with_groups
from finetune.data.names import is_service_folder
from finetune.data.source import PART_NAMES, FileSource, Reading, check_inside, make_file_source
from finetune.errors import UsageError

# Before folders of services were known as such, only these were no classes.
NO_CLASSES_BEFORE = (".ipynb_checkpoints", "__MACOSX", ".git")
SHOWN_KINDS, SHOWN_FOLDERS = 4, 3


@dataclass(frozen=True)
class Kind:
    """Which files of a folder are samples, and which of its folders are classes.

    Attributes:
        is_sample: (folder, file name) -> whether it is one.
        noun: what a sample is called.
        suffixes: for people.
        is_left_aside: (folder name) -> whether it is no class, and nothing below it counts.
    """

    is_sample: Callable[[str, str], bool]
    noun: str
    suffixes: str
    is_left_aside: Callable[[str], bool] = is_service_folder


def ends_in(*suffixes: str) -> Callable[[str, str], bool]:
    """Whether a file's name ends so."""
    return lambda _folder, name: name.lower().endswith(suffixes)


IMAGES = Kind(is_image, "image", ".jpg, .png, .webp, .tif, ...")
TEXTS = Kind(ends_in(".txt"), "text", ".txt")


def before(kind: Kind) -> Kind:
    """The kind as it was when files were known by their names alone."""
    is_sample = ends_in(*SUFFIXES_BEFORE) if kind.noun == "image" else kind.is_sample
    return dataclasses.replace(kind, is_sample=is_sample, is_left_aside=lambda name: name in NO_CLASSES_BEFORE)


@dataclass
class LeftAside:
    """What of a folder is not taken for a sample.

    Attributes:
        files: how many, by suffix in small letters.
        folders: names of the folders that are no classes.
        nested: names of folders that are in every class, if there is nothing else in any.
        by_content: names without a suffix of files that are samples by their content.
    """

    files: Counter[str] = dataclasses.field(default_factory=Counter)
    folders: list[str] = dataclasses.field(default_factory=list)
    nested: list[str] = dataclasses.field(default_factory=list)
    by_content: list[str] = dataclasses.field(default_factory=list)

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
        return notes


def files_below(folder: Path, kind: Kind = IMAGES) -> tuple[list[str], LeftAside]:
    """Samples in a folder and all below it: paths relative to it, with "/", in the order of their names; and what else
    there is. Hidden files are passed over.

    Raises:
        UsageError: a folder cannot be read.
    """
    found: list[str] = []
    left = LeftAside()
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back to where we came from
            folders.clear()
            continue
        seen.add(real)
        aside = [name for name in folders if name.startswith(".") or kind.is_left_aside(name)]
        left.folders += [name for name in aside if kind.is_left_aside(name)]
        folders[:] = sorted(set(folders) - set(aside))
        relative = os.path.relpath(place, folder).replace(os.sep, "/")
        prefix = "" if relative == "." else f"{relative}/"
        for name in sorted(name for name in files if not name.startswith(".")):
            if kind.is_sample(place, name):
                found.append(prefix + name)
                left.by_content += [name] * ("." not in name)
            else:
                left.files[os.path.splitext(name)[1].lower()] += 1
    return found, left


def _refuse(error: OSError) -> None:
    raise UsageError(f"folder {error.filename}: cannot be read ({error.strerror}); change its rights or remove it")


def sub_folders(folder: Path, is_left_aside: Callable[[str], bool] = is_service_folder) -> tuple[list[str], list[str]]:
    """Names of the folders in a folder, sorted; and of those among them that are left aside."""
    try:
        names = sorted(name for name in os.listdir(folder) if (folder / name).is_dir())
    except OSError as error:
        raise UsageError(f"folder {folder}: cannot be read ({error.strerror}); change its rights") from None
    return [name for name in names if not is_left_aside(name)], [name for name in names if is_left_aside(name)]


def _parts_of(folder: Path, kind: Kind, what: str) -> dict[str, int] | None:
    """train/, val/ and test/ by name where the folder is laid out so: they hold folders and no samples.

    Raises:
        UsageError: it is laid out so by half.
    """
    names, _ = sub_folders(folder, kind.is_left_aside)
    found = {name: PART_NAMES[name.lower()] for name in names if name.lower() in PART_NAMES}

    def is_divided(part: Path) -> bool:
        return bool(sub_folders(part, kind.is_left_aside)[0]) and not any(
            kind.is_sample(str(part), name) for name in os.listdir(part)
        )

    divided = [name for name in found if is_divided(folder / name)]
    if not divided:
        return None  # no parts, or classes that happen to be called so
    if set(divided) != set(names) or 0 not in found.values() or len(set(found.values())) < len(found):
        raise UsageError(
            f"{what}: holds {', '.join(names)}; to bring parts along it must hold train/, perhaps val/ and "
            "test/, nothing else, and each of them one sub-folder a class"
        )
    return found


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
    layout = _parts_of(folder, kind, what)
    paths: list[str] = []
    labels: list[str] = []
    parts: list[int] = []
    left = LeftAside(folders=sub_folders(folder, kind.is_left_aside)[1] if layout else [])
    for part_name, part in (layout or {"": 0}).items():
        part_folder = folder / part_name
        class_names, aside = sub_folders(part_folder, kind.is_left_aside)
        left.folders += aside
        for class_name in class_names:
            files, others = files_below(part_folder / class_name, kind)
            left.files += others.files
            left.folders += others.folders
            left.by_content += others.by_content
            if not files:
                found = "; ".join(["", *([f"it holds {others.text}"] if others.text else []), *others.notes])
                raise UsageError(
                    f"{what}: class folder {os.path.join(part_name, class_name)!r} holds no {kind.noun}s "
                    f"({kind.suffixes}){found}; fill or remove it"
                )
            prefix = f"{part_name}/{class_name}/" if layout else f"{class_name}/"
            paths += [prefix + file for file in files]
            labels += [class_name] * len(files)
            parts += [part] * len(files)
    left.nested = _nested(paths, labels, 2 if layout else 1)
    if not allow_outside:
        check_inside(folder, paths, what, kind.noun)
    return Listing(paths, labels, parts if layout else None, left)


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
            f"{what}: no such folder; give 'digits', a folder with one sub-folder of images a class, "
            "or a .csv, .tsv or .jsonl file"
        )
    kind = IMAGES if reading.by_content else before(IMAGES)
    found = list_folder(folder, kind, what, allow_outside)
    source = make_file_source(folder, found.paths, found.labels, found.parts, classes, what, reading)
    groups, of_groups = groups_of(found.paths, [], "", reading.group_by, "image")
    notes = (*found.left.notes, *source.notes, *of_groups)
    return dataclasses.replace(
        source, left=found.left.text, notes=notes, groups=groups, fingerprint=with_groups(source.fingerprint, groups)
    )
