"""A folder of images, or of texts: one sub-folder a class; or train/, val/ and test/, each so."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.decode import IMAGE_SUFFIXES
from finetune.data.source import PART_NAMES, FileSource, check_inside, make_file_source
from finetune.errors import UsageError

# What other programs leave behind; never a class. Any other name may be one, with a leading dot or not.
LEFT_BEHIND = (".ipynb_checkpoints", "__MACOSX", ".git")


def files_below(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> tuple[list[str], int]:
    """Files of a kind in a folder and all below it: paths relative to it, with "/", in the order of their names; and
    how many other files there are. Hidden files and folders are passed over.

    Raises:
        UsageError: a folder cannot be read.
    """
    found: list[str] = []
    others = 0
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back to where we came from
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(place, folder).replace(os.sep, "/")
        prefix = "" if relative == "." else f"{relative}/"
        visible = sorted(name for name in files if not name.startswith("."))
        wanted = [name for name in visible if name.lower().endswith(suffixes)]
        found += [prefix + name for name in wanted]
        others += len(visible) - len(wanted)
    return found, others


def _refuse(error: OSError) -> None:
    raise UsageError(f"folder {error.filename}: cannot be read ({error.strerror}); change its rights or remove it")


def sub_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted."""
    try:
        return sorted(name for name in os.listdir(folder) if name not in LEFT_BEHIND and (folder / name).is_dir())
    except OSError as error:
        raise UsageError(f"folder {folder}: cannot be read ({error.strerror}); change its rights") from None


def _holds(folder: Path, suffixes: tuple[str, ...]) -> bool:
    return any(name.lower().endswith(suffixes) for name in os.listdir(folder))


def _parts_of(folder: Path, suffixes: tuple[str, ...], what: str) -> dict[str, int] | None:
    """train/, val/ and test/ by name where the folder is laid out so: they hold folders and no samples.

    Raises:
        UsageError: it is laid out so by half.
    """
    names = sub_folders(folder)
    found = {name: PART_NAMES[name.lower()] for name in names if name.lower() in PART_NAMES}
    divided = [name for name in found if sub_folders(folder / name) and not _holds(folder / name, suffixes)]
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
    """The samples of a folder: paths relative to it, the class of each, its place in `PARTS` (None: no parts), and how
    many other files lie between them."""

    paths: list[str]
    labels: list[str]
    parts: list[int] | None
    ignored: int


def list_folder(folder: Path, suffixes: tuple[str, ...], what: str, noun: str, allow_outside: bool) -> Listing:
    """Files by class folder, in the order of their names.

    Args:
        suffixes: of the files that count.
        what: names the data in an error.
        allow_outside: follow links that lead out of the folder.

    Raises:
        UsageError: a class without samples, or a link that leads out of the folder.
    """
    layout = _parts_of(folder, suffixes, what)
    paths: list[str] = []
    labels: list[str] = []
    parts: list[int] = []
    ignored = 0
    for part_name, part in (layout or {"": 0}).items():
        part_folder = folder / part_name
        for class_name in sub_folders(part_folder):
            files, others = files_below(part_folder / class_name, suffixes)
            ignored += others
            if not files:
                raise UsageError(
                    f"{what}: class folder {os.path.join(part_name, class_name)!r} holds no {noun}s "
                    f"({', '.join(suffixes)}); fill or remove it"
                )
            prefix = f"{part_name}/{class_name}/" if layout else f"{class_name}/"
            paths += [prefix + file for file in files]
            labels += [class_name] * len(files)
            parts += [part] * len(files)
    if not allow_outside:
        check_inside(folder, paths, what, noun)
    return Listing(paths, labels, parts if layout else None, ignored)


def open_folder(folder: Path, classes: Sequence[str] | None = None, allow_outside: bool = False) -> FileSource:
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
    found = list_folder(folder, IMAGE_SUFFIXES, what, "image", allow_outside)
    source = make_file_source(folder, found.paths, found.labels, found.parts, classes, what)
    return dataclasses.replace(source, ignored=found.ignored)
