"""`finetune runs`: the runs of a folder as a table, or two side by side. Imports torch only for their checkpoints."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from finetune.base.formatting import (
    duration_text,
    printable,
    size_text,
    value_text,
)
from finetune.listing.cells import STATE_STYLES, ago_text, best_cell, epochs_text
from finetune.listing.found import STATES, FoundRun, differing
from finetune.recipe.spec import LOWER_IS_BETTER

if TYPE_CHECKING:
    from _typeshed import SupportsRichComparison

GAP = "  "
INDENT = 4
# A longer name is shortened, the more the narrower the terminal is.
LEAST_NAME, LONGEST_NAME = 20, 1_000


# ---- Order ----------------------------------------------------------------------------------------------------------


def _natural(text: str) -> list[tuple[int, int, str]]:
    """run-2 comes before run-10."""
    parts = re.split(r"(\d{1,18})", text)
    return [(0, int(part), "") if number % 2 else (1, 0, part) for number, part in enumerate(parts)]


def _best_first(run: FoundRun) -> tuple[object, ...]:
    """Runs without a best come last; of several metrics, each has its own stretch."""
    if not run.best:
        return (1,)
    value = run.best["value"]
    if math.isnan(value):
        value = math.inf
    elif run.best["metric"] not in LOWER_IS_BETTER:
        value = -value
    return 0, run.best["metric"], value, _natural(run.name)


SORT_KEYS: "dict[str, Callable[[FoundRun], SupportsRichComparison]]" = {
    "name": lambda run: _natural(run.name),
    "state": lambda run: (STATES.index(run.state), -run.changed),
    "best": _best_first,
    "time": lambda run: -(run.seconds or 0),
    "size": lambda run: -run.size_bytes,
    "changed": lambda run: -run.changed,
    "epochs": lambda run: -(run.epochs_done or 0),
}


# ---- Plain values ---------------------------------------------------------------------------------------------------


# ---- For people -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        label: above it; and before its values where they stand below their run instead.
        on_right: numbers, their last digits below each other.
    """

    label: str
    cells: list[Text]
    on_right: bool = False

    @property
    def width(self) -> int:
        return max(cell_len(self.label), *(cell.cell_len for cell in self.cells))

    def padded(self, cell: Text) -> Text:
        padding = Text(" " * (self.width - cell.cell_len))
        return padding + cell if self.on_right else cell + padding


def _columns(runs: list[FoundRun], longest_name: int) -> list[list[Column]]:
    """Groups of columns, the most important first. A group is shown as a whole, or below each run."""
    options = [name for name in differing(runs) if name != "epochs"]  # those have a column already
    tops = {run.best["metric"]: run.best["value"] for run in reversed(sorted(runs, key=_best_first)) if run.best}
    rivals = {metric: sum(run.best.get("metric") == metric for run in runs) for metric in tops}

    def best(run: FoundRun) -> Text:
        is_top = bool(run.best) and rivals[run.best["metric"]] > 1 and run.best["value"] == tops[run.best["metric"]]
        return Text(best_cell(run, with_metric=len(tops) > 1), "bold" if is_top else "")

    def option(name: str) -> Callable[[FoundRun], str]:
        return lambda run: value_text(run.options.get(name))

    def column(label: str, text: Callable[[FoundRun], str], on_right: bool = True) -> Column:
        return Column(label, [Text(text(run)) for run in runs], on_right)

    return [
        [
            column("run", lambda run: shortened(printable(run.name), longest_name), on_right=False),
            Column("state", [Text(run.state, STATE_STYLES.get(run.state, "")) for run in runs]),
        ],
        [column("epochs", epochs_text)],
        [Column(f"best {printable(next(iter(tops)))}" if len(tops) == 1 else "best", [best(run) for run in runs])],
        [column("time", lambda run: duration_text(run.seconds))],
        [column("size", lambda run: size_text(run.size_bytes))],
        [column("changed", lambda run: ago_text(run.changed))],
        [column(printable(name), option(name)) for name in options],
    ]


def shortened(name: str, longest: int) -> str:
    """Names of a series differ at their ends, so what is left out is in the middle."""
    if cell_len(name) <= longest:
        return name
    half = (longest - 2) // 2
    return f"{set_cell_size(name, half)}..{set_cell_size(name[::-1], half)[::-1]}"


def _width(groups: list[list[Column]]) -> int:
    columns = [column for group in groups for column in group]
    return sum(column.width for column in columns) + len(GAP) * (len(columns) - 1)


def show(runs: list[FoundRun], folders: Sequence[str], console: Console) -> None:
    """A line a run, and what does not fit into it below; where no terminal reads it, everything in that line."""
    wide = console.soft_wrap
    groups = _columns(runs, LONGEST_NAME if wide else max(LEAST_NAME, console.width // 4))
    shown = len(groups)
    while not wide and shown > 1 and _width(groups[:shown]) > console.width:
        shown -= 1
    columns = [column for group in groups[:shown] for column in group]
    below = [column for group in groups[shown:] for column in group]
    console.print(_line([column.padded(Text(column.label, "dim")) for column in columns]))
    for number, run in enumerate(runs):
        cells = [column.padded(column.cells[number]) for column in columns]
        if wide:
            console.print(_line([*cells, Text(printable(run.note))]))
            continue
        console.print(_line(cells))
        if run.note:
            style = STATE_STYLES.get(run.state, "").removeprefix("bold ")
            console.print(Padding(Text(printable(run.note), style), (0, 0, 0, INDENT)))
        more = [f"{column.label} {column.cells[number].plain}" for column in below if column.cells[number].plain != "-"]
        for line in _filled(more, console.width - INDENT):
            console.print(Padding(Text(line, "dim"), (0, 0, 0, INDENT)))
    # A file that is linked into several runs takes its room once.
    total_bytes = sum({key: size for run in runs for key, size in run.files.items()}.values())
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    where = ", ".join(printable(folder) for folder in folders)
    console.print(Text(f"\n{count} in {where}, {size_text(total_bytes)} on the disk"))


def _line(cells: list[Text]) -> Text:
    line = Text(GAP).join(cells)
    line.rstrip()
    return line


def _filled(items: list[str], width: int) -> list[str]:
    """Items with commas between, none of them broken where it would fit into a line."""
    lines: list[str] = []
    for number, item in enumerate(items):
        text = item if number == len(items) - 1 else f"{item},"
        if lines and cell_len(lines[-1]) + 1 + cell_len(text) <= width:
            lines[-1] += f" {text}"
        else:
            lines.append(text)
    return lines
