"""The page and the csv of `finetune look`: a data set before any training, and what is wrong with it."""

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from finetune import __version__
from finetune.base.files import make_folders, write_atomically
from finetune.base.words import typed, without_option
from finetune.errors import RunError, UsageError
from finetune.report.html import render_page
from finetune.report.overview import Overview
from finetune.tasks.doubts import MARK, TEXT_LETTERS, plain_name

SHOWN_FINDINGS = 12
# Of look.csv; `--without` reads the first two.
COLUMNS = ("wrong", "name", "label", "part", "finding", "beside", "detail", "text")


class Kind(NamedTuple):
    """A kind of finding.

    Attributes:
        title: of its section.
        text: what to do about it.
    """

    title: str
    text: str


KINDS = {
    "broken": Kind("Broken", "They cannot be used: repair or remove them, or leave them out with --skip-broken."),
    "copy across parts": Kind(
        "On both sides of the split",
        "The same sample is trained on and judged by, so figures will be better than the model is: --drop-duplicates "
        "leaves copies out.",
    ),
    "copy with another label": Kind(
        "The same, labelled otherwise", "At most one label is right: mend them, or mark those that are wrong."
    ),
    "copy": Kind("Copies within a class", "They count more than others: --drop-duplicates leaves copies out."),
    "near copy across parts": Kind(
        "Nearly the same on both sides of the split",
        "If they belong together, --group-column or --group-by keeps them on one side.",
    ),
    "label looks wrong": Kind(
        "Labels that look wrong",
        "Heads that were solved without them find another class likelier. Some will be right, and only hard.",
    ),
}


@dataclass(frozen=True)
class Finding:
    """Something about a sample.

    Attributes:
        kind: one of `KINDS`.
        beside: name of the other sample that it is about; "" = none.
        detail: in words.
        pictures: of the sample, and of the other one.
    """

    kind: str
    name: str
    label: str = ""
    part: str = ""
    beside: str = ""
    detail: str = ""
    text: str = ""
    pictures: tuple[bytes, ...] = ()

    @property
    def words(self) -> str:
        """For a person, below its picture."""
        return ": ".join(one for one in (self.label, self.detail) if one)


@dataclass(frozen=True)
class Look:
    """What was found.

    Attributes:
        name: of the data.
        view: what it looks like.
        facts: label and text.
        notes: sentences about what a person should know first.
        findings: by kind, in the order of `KINDS`.
        augment: of the recipe.
        train: words to type to train on it.
        left_out: names of samples that were marked before, by --without.
        all_clear: what to say where there is no note.
    """

    name: str
    view: Overview
    facts: list[tuple[str, str]]
    notes: list[str]
    findings: list[Finding]
    augment: str
    train: list[str]
    left_out: list[str]
    all_clear: str


class _Group(NamedTuple):
    anchor: str
    title: str
    text: str
    total: int
    shown: list[Finding]


def write_look(look: Look, page: Path) -> Path:
    """Write the page, and the csv beside it.

    Returns:
        Where the csv lies.

    Raises:
        RunError: they cannot be written.
        UsageError: in the csv's place lies something else.
    """
    table = page.with_suffix(".csv")
    marked = _marks_in(table) | set(map(plain_name, look.left_out))
    try:
        make_folders(page.parent)
        content = csv_of(look.findings, marked).encode()
        write_atomically(table, lambda stream: stream.write(content))
        html = _page(look, table, bool(marked)).encode()
        write_atomically(page, lambda stream: stream.write(html))
    except OSError as error:
        raise RunError(f"--output {page}: cannot be written ({error.strerror}); name another file") from None
    return table


def _marks_in(table: Path) -> set[str]:
    """Names that somebody marked in an earlier csv of that name.

    Raises:
        UsageError: the file is something else, and would be lost.
    """
    if not table.exists():
        return set()
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:  # Excel begins a file with a byte order mark
            reader = csv.DictReader(stream)
            rows = list(reader)
        # An empty file has no header; what a row has beyond it stands under None.
        is_ours = tuple(reader.fieldnames or COLUMNS) == COLUMNS and not any(None in row for row in rows)
    except (OSError, UnicodeDecodeError, csv.Error):
        is_ours = False
    if not is_ours:
        raise UsageError(f"--output {table.with_suffix('.html')}: {table} is no look.csv; give another name")
    return {row["name"] for row in rows if (row["wrong"] or "").strip()}


def csv_of(findings: Sequence[Finding], marked: Collection[str] = ()) -> str:
    """A row a finding; an x in the first column marks a sample that `--without` is to leave out.

    Args:
        marked: names that somebody marked before: they stay marked, also where nothing is found of them now.
    """
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(COLUMNS)
    for one in findings:
        words = (one.name, one.label, one.part, one.kind, one.beside, one.detail, one.text[:TEXT_LETTERS])
        rows.writerow([MARK if plain_name(one.name) in marked else "", *map(plain_name, words)])
    gone = sorted(set(marked) - {plain_name(one.name) for one in findings})
    rows.writerows([MARK, name] + [""] * (len(COLUMNS) - 2) for name in gone)
    return stream.getvalue()


def _page(look: Look, table: Path, has_marks: bool) -> str:
    view, groups = look.view, []
    for number, (kind, about) in enumerate(KINDS.items()):
        found = [one for one in look.findings if one.kind == kind]
        if found:
            groups.append(_Group(f"group{number}", about.title, about.text, len(found), found[:SHOWN_FINDINGS]))
    figures = [(name, f"{count:,}") for name, count in view.parts.items()]
    if view.classes:
        figures.append(("classes", f"{len(view.classes):,}"))
    figures.append(("findings", f"{len(look.findings):,}"))
    commands = [(typed(look.train), "train on it")]
    if look.findings or has_marks:
        words = [*without_option(look.train, "--without"), "--without", str(table)]
        commands.append((typed(words), f"the same without what you marked with an x in {table}"))
    return render_page(
        "look.html.j2",
        version=__version__,
        look=look,
        view=view,
        figures=figures,
        groups=groups,
        csv=str(table),
        commands=commands,
    )
