"""A folder of images: one sub-folder a class; or train/, val/ and test/, each so."""

import os
from collections.abc import Sequence
from pathlib import Path

from finetune.data.decode import IMAGE_SUFFIXES
from finetune.data.source import PART_NAMES, FileSource, make_file_source
from finetune.errors import UsageError


def image_files_below(folder: Path) -> list[str]:
    """Image files in a folder and all below it: paths relative to it, with "/", in the order of their names."""
    found = []
    for place, folders, files in os.walk(folder):
        folders.sort()
        relative = os.path.relpath(place, folder).replace(os.sep, "/")
        prefix = "" if relative == "." else f"{relative}/"
        found += [prefix + name for name in sorted(files) if name.lower().endswith(IMAGE_SUFFIXES)]
    return found


def sub_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _parts_of(folder: Path) -> dict[str, int] | None:
    """train/, val/ and test/ by name where the folder is laid out so: each holds folders, and train/ no images."""
    names = sub_folders(folder)
    found = {name: PART_NAMES[name.lower()] for name in names if name.lower() in PART_NAMES}
    training = [name for name, part in found.items() if part == 0]
    if not training:
        return None
    for name in training:
        own_images = any(entry.lower().endswith(IMAGE_SUFFIXES) for entry in os.listdir(folder / name))
        if own_images or not sub_folders(folder / name):
            return None  # a class that happens to be called "train"
    others = [name for name in names if name not in found]
    if others or len(set(found.values())) < len(found):
        raise UsageError(
            f"--images {folder}: holds {', '.join(names)}; allowed beside train/ are one val/ and one test/, each with "
            "one sub-folder a class; move the others out"
        )
    return found


def open_folder(folder: Path, classes: Sequence[str] | None = None) -> FileSource:
    """Image files by class folder; classes in the order of their names.

    Args:
        classes: the only classes allowed, in order; None = those found.

    Raises:
        UsageError: no such folder, a class without images, or fewer than two classes.
    """
    if not folder.is_dir():
        raise UsageError(
            f"--images {folder}: no such folder; give 'digits', a folder with one sub-folder of images a class, "
            "or a .csv, .tsv or .jsonl file"
        )
    layout = _parts_of(folder)
    paths: list[str] = []
    labels: list[str] = []
    parts: list[int] = []
    for part_name, part in (layout or {"": 0}).items():
        part_folder = folder / part_name
        for class_name in sub_folders(part_folder):
            files = image_files_below(part_folder / class_name)
            if not files:
                raise UsageError(
                    f"--images {folder}: class folder {os.path.join(part_name, class_name)!r} holds no images "
                    f"({', '.join(IMAGE_SUFFIXES)}); fill or remove it"
                )
            prefix = f"{part_name}/{class_name}/" if layout else f"{class_name}/"
            paths += [prefix + file for file in files]
            labels += [class_name] * len(files)
            parts += [part] * len(files)
    return make_file_source(folder, paths, labels, parts if layout else None, classes, f"--images {folder}")
