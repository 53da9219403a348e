"""Which folders of a folder are its parts: train/, val/ and test/, with a folder a class in each."""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.base.words import typed
from finetune.data.names import meaning
from finetune.data.source import PART_NAMES
from finetune.data.walk import Kind, sub_folders, walked
from finetune.errors import UsageError


def samples_in(folder: Path, kind: Kind) -> int:
    """How many samples lie in a folder itself."""
    return sum(kind.is_sample(str(folder), name) for name in os.listdir(folder) if not name.startswith("."))


def _has_samples(folder: Path, kind: Kind) -> bool:
    """Whether there is a sample in a folder, or anywhere below it."""
    return any(kind.is_sample(place, name) for place, _, files in walked(folder, kind) for name in files)


def class_folders(folder: Path, kind: Kind) -> list[str]:
    """Names of the folders in a part that hold samples."""
    return [name for name in sub_folders(folder, kind.is_left_aside)[0] if _has_samples(folder / name, kind)]


def _has_more(part: Path, classes: Sequence[str], kind: Kind, loose: int) -> bool:
    """Whether more samples lie in the class folders of a part than beside them."""
    below = (
        True
        for name in classes
        for place, _, files in walked(part / name, kind)
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
    classes = {name: class_folders(folder / name, kind) for name in parts}
    loose = {name: samples_in(folder / name, kind) for name in parts}
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


def layout_before(folder: Path, kind: Kind, what: str) -> Layout:
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
