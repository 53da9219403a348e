"""Names as people mean them: of classes, of folders that are no classes, of values that are missing."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

# Folders that systems and programs leave beside a person's files; so is every folder whose name begins with a dot.
SERVICE_FOLDERS = frozenset(
    name.lower()
    for name in (
        "__MACOSX", "__pycache__", "@eaDir", "@Recycle", "@tmp", "#recycle", "#snapshot", "$RECYCLE.BIN",
        "System Volume Information", "FOUND.000", "lost+found", "Network Trash Folder", "Temporary Items",
    )
)  # fmt: skip
# Zero width space, word joiner, byte order mark, soft hyphen. Joiners that change how letters are drawn are none.
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u00ad"))
# Whole numbers as a table gives them once a value in their column is missing.
WHOLE_NUMBER = re.compile(r"([+-]?(?:0|[1-9][0-9]*))\.0+")
# How pandas, R, numpy, databases and spreadsheets write that there is no value (the list that pandas reads as such).
MISSING = frozenset((
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null", "NaT",
))  # fmt: skip
SHOWN_NAMES = 5
# Between the labels of a row that has several, as people write them.
SEPARATORS = ("|", ";", ",", "+", "/", " ")


def is_service_folder(name: str) -> bool:
    """Whether a folder of that name holds what a system or a program put there."""
    return name.startswith(".") or name.lower() in SERVICE_FOLDERS


def normal(name: str) -> str:
    """A name as it prints: composed letters (Unicode's form C), every blank a plain one, nothing invisible, no blanks
    at its ends."""
    composed = unicodedata.normalize("NFC", name).translate(INVISIBLE)
    return "".join(" " if unicodedata.category(letter) == "Zs" else letter for letter in composed).strip() or name


def meaning(name: str) -> str:
    """What two names have in common that mean the same: 1 and 1.0, True and true, and those that print alike. 007 is a
    name of its own, and so is Cat beside cat."""
    name = normal(name)
    if whole := WHOLE_NUMBER.fullmatch(name):
        return whole[1]
    return name.lower() if name.lower() in ("true", "false") else name


def classes_of(names: Iterable[str]) -> dict[str, str]:
    """Class by meaning, from the names that occur: of several spellings the most frequent one, as it prints."""
    spellings: dict[str, Counter[str]] = {}
    for name, count in Counter(names).items():
        spellings.setdefault(meaning(name), Counter())[normal(name)] += count
    return {
        key: min(found, key=lambda spelling: (-found[spelling], spelling))
        for key, found in sorted(spellings.items())
    }  # fmt: skip


def by_meaning(classes: Sequence[str]) -> dict[str, int]:
    """Numbers of classes by what they mean; without those of which two mean the same."""
    counts = Counter(map(meaning, classes))
    return {meaning(name): number for number, name in enumerate(classes) if counts[meaning(name)] == 1}


def order_of(ours: Sequence[str], theirs: Sequence[str]) -> list[int] | None:
    """The place among theirs of each of our classes; None where those are not the same."""
    if list(ours) == list(theirs):
        return list(range(len(ours)))
    places = by_meaning(theirs)
    order = [places.get(meaning(name), -1) for name in ours]
    return order if sorted(order) == list(range(len(theirs))) else None


def notes_on_names(counts: Mapping[str, int], noun: str) -> list[str]:
    """What a person should know of the labels of a data set, a sentence each.

    Args:
        counts: how often each name occurs, as it is written.
        noun: of what has the labels.
    """
    spellings: dict[str, list[str]] = {}
    for name in sorted(counts):
        spellings.setdefault(meaning(name), []).append(name)
    notes = []
    for names in spellings.values():
        if len(names) > 1:
            # Names that print alike are told apart by their codes.
            show = repr if len({normal(name) for name in names}) == len(names) else ascii
            shown = " and ".join(f"{show(name)} ({counts[name]:,} {noun}s)" for name in names[:SHOWN_NAMES])
            notes.append(f"one class in {len(names)} spellings: {shown}; rename one of them if they are not the same")
    folded: dict[str, set[str]] = {}
    for name in counts:
        folded.setdefault(normal(name).casefold(), set()).add(normal(name))
    for names in map(sorted, folded.values()):
        if len({meaning(name) for name in names}) > 1:
            shown = " and ".join(map(repr, names[:SHOWN_NAMES]))
            notes.append(f"classes that differ in case only: {shown}; rename one of them if they are the same")
    return notes


def notes_on_separators(names: Collection[str]) -> list[str]:
    """What to say of labels that are made of others: perhaps a row has several, and they are separated so."""
    known = set(map(normal, names))
    for separator in SEPARATORS:
        made = sorted(name for name in known if separator in name and set(_parts(name, separator)) <= known)
        if made:
            parts = " and ".join(map(repr, _parts(made[0], separator)))
            return [
                f"{len(made):,} label(s) are made of others, like {made[0]!r} of {parts}: if a row has several labels, "
                f"give --separator {separator!r}"
            ]
    return []


def _parts(name: str, separator: str) -> list[str]:
    return [part.strip() for part in name.split(separator)]
