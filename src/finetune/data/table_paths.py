"""Images by the paths that a table has for them, which are seldom those of this machine."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from finetune.data.decode import formats_by_suffix
from finetune.data.walk import IMAGES, files_below

# Where none of so many leads to a file, all of them are meant otherwise.
TRIED = 50


def found_below(folder: Path, names: Sequence[str]) -> tuple[list[str], str]:
    """The files that names mean: as they are; with fewer folders before them, as of a path of another machine; with a
    suffix that they lack; with zeros before a number, as spreadsheets drop them; or by the name of the file alone, in
    whatever folder it lies, and whatever its suffix.

    Args:
        names: with "/".

    Returns:
        The paths, and a sentence where they are others; what leads nowhere stays as it is.
    """
    tried = names[:TRIED]
    if not tried or any(_is_there(folder, name) for name in tried):
        return list(names), ""
    suffixes, filled = _spellings_beside(folder, tried)
    for dropped in range(max(len(PurePosixPath(name).parts) for name in tried)):

        def tail_of(name: str, dropped: int = dropped) -> str:
            tail = _tail(name, dropped)
            plain = next((tail + one for one in ["", *suffixes] if _is_there(folder, tail + one)), "")
            zeros = {_filled(tail, digits) + suffix for digits, suffix in filled if _number(_stem(tail))}
            found = [one for one in zeros if _is_there(folder, one)] if not plain else []
            return plain or (found[0] if len(found) == 1 else name)  # of several nobody knows which is meant

        if any(tail_of(name) != name for name in tried):
            return _told(names, list(map(tail_of, names)), folder)
    files, _ = files_below(folder, IMAGES)
    by_name = _unique({file: PurePosixPath(file).name for file in files})
    by_stem = _unique({file: PurePosixPath(file).stem for file in files})
    by_number = _unique({file: _number(stem) for stem, file in by_stem.items() if _number(stem)})

    def file_of(name: str) -> str:
        end = PurePosixPath(name)
        stem = end.stem if end.suffix.lower() in formats_by_suffix() else end.name
        return by_name.get(end.name) or by_stem.get(stem) or by_number.get(_number(stem)) or name

    return _told(names, list(map(file_of, names)), folder)


def _told(names: Sequence[str], found: list[str], folder: Path) -> tuple[list[str], str]:
    others = [(name, path) for name, path in zip(names, found, strict=True) if name != path]
    if not others:
        return found, ""
    name, path = others[0]
    return found, f"{len(others):,} image(s) found below {folder} by other paths: {name} as {path}"


def _is_there(folder: Path, name: str) -> bool:
    try:
        return os.path.isfile(os.path.join(folder, name))
    except ValueError:
        return False


def _tail(name: str, dropped: int) -> str:
    """The path without so many of its first folders; the name of the file stays."""
    parts = PurePosixPath(name).parts
    return "/".join(parts[min(dropped, len(parts) - 1) :]) if dropped else name


def _number(stem: str) -> str:
    """A number without the zeros before it; "" = it is none."""
    return (stem.lstrip("0") or "0") if stem.isdecimal() and stem.isascii() else ""


def _stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]


def _filled(name: str, digits: int) -> str:
    """A name that is a number, perhaps with a suffix, with zeros before it."""
    head, slash, end = name.rpartition("/")
    return f"{head}{slash}{'0' * (digits - len(_stem(name)))}{end}"


def _spellings_beside(folder: Path, names: Sequence[str]) -> tuple[list[str], set[tuple[int, str]]]:
    """Suffixes of files that are called like these but for that, the most frequent first; and of those that have zeros
    before such a number how many digits, and which suffix a name lacks."""
    suffixes, filled = Counter[str](), set[tuple[int, str]]()
    for place in {folder, *((folder / name).parent for name in names)}:
        try:
            files = os.listdir(place)
        except (OSError, ValueError):
            continue
        ends = {name.rpartition("/")[2] for name in names}
        for stem, suffix in map(os.path.splitext, files):
            if suffix.lower() not in formats_by_suffix():
                continue
            if stem in ends:
                suffixes[suffix] += 1
            elif _number(stem) and _number(stem) in ends:
                filled.add((len(stem), suffix))
            elif _number(stem) and f"{_number(stem)}{suffix}" in ends:
                filled.add((len(stem), ""))
    return [suffix for suffix, _ in suffixes.most_common()], filled


def _unique(names: dict[str, str]) -> dict[str, str]:
    """File by name, of names that only one file has."""
    counts = Counter(names.values())
    return {name: file for file, name in names.items() if counts[name] == 1}
