"""What lies in folders: which files are samples, which folders are classes, and what is left aside."""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.data.decode import PACKAGES, SUFFIXES_BEFORE, is_image
from finetune.data.names import is_service_folder
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
    for place, aside, files in walked(folder, kind):
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


def walked(folder: Path, kind: Kind) -> Iterator[tuple[str, list[str], list[str]]]:
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
