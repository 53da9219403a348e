"""`finetune backbones`: what there is to begin from, in families, each with a sentence."""

import dataclasses
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from finetune.base.formatting import parameters_text, size_text
from finetune.models.catalogue import Known

HEADINGS = ("name", "parameters", "edge", "ImageNet", "to fetch")
INDENT = 2


def to_plain(one: Known) -> dict[str, object]:
    """For `--json`."""
    return dataclasses.asdict(one)


def show(known: Sequence[Known], console: Console) -> None:
    """Print a table, a sentence above each family; a column that none of them fills is left out."""
    rows = [HEADINGS, *map(_cells, known)]
    filled = [number for number, column in enumerate(zip(*rows[1:], strict=True)) if any(column)]
    widths = {number: max(len(row[number]) for row in rows) for number in filled}
    _print_rows([HEADINGS], widths, console, "dim")
    for family, members in groupby(known, lambda one: one.family):
        console.print(Text(family, "bold"))
        _print_rows([_cells(one) for one in members], widths, console)
    if any(one.licence for one in known):
        console.print(Text("* under terms of their own: see torchvision's page of the weights", "dim"))


def _print_rows(rows: Sequence[tuple[str, ...]], widths: dict[int, int], console: Console, style: str = "") -> None:
    """Print the columns that `widths` names: text to the left, numbers to the right."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for number, width in widths.items():
        is_text = number in (0, len(HEADINGS) - 1)
        table.add_column(justify="left" if is_text else "right", min_width=width, no_wrap=True, style=style)
    for row in rows:
        table.add_row(*(Text(row[number]) for number in widths))
    console.print(Padding(table, (0, 0, 0, INDENT), expand=False))


def _cells(one: Known) -> tuple[str, ...]:
    size = "" if one.size is None else f"{one.size} px"
    accuracy = "" if one.accuracy is None else f"{one.accuracy:.1f} %"
    where = "at hand" if one.is_at_hand else "" if one.fetch_bytes is None else size_text(one.fetch_bytes)
    return one.name + "*" * bool(one.licence), parameters_text(one.parameters), size, accuracy, where
