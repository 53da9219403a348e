"""`finetune backbones`: what there is to begin from, in families, each with a sentence."""

import dataclasses
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.base.formatting import size_text
from finetune.models.catalogue import Known

HEADINGS = ("name", "parameters", "edge", "ImageNet", "to fetch")


def to_plain(one: Known) -> dict[str, object]:
    """For `--json`."""
    return dataclasses.asdict(one)


def show(known: Sequence[Known], console: Console) -> None:
    """Print a table, a sentence above each family."""
    rows = [HEADINGS, *map(_cells, known)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    heading = "  ".join(
        f"{text:>{width}}" if 0 < number < len(widths) - 1 else f"{text:<{width}}"
        for number, (text, width) in enumerate(zip(HEADINGS, widths, strict=True))
    )
    console.print(Text(heading, "dim"))
    for family, members in groupby(known, lambda one: one.family):
        console.print(Text(family, "bold"))
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for number, width in enumerate(widths):
            table.add_column(justify="right" if 0 < number < len(widths) - 1 else "left", min_width=width, no_wrap=True)
        for one in members:
            table.add_row(*_cells(one))
        console.print(table)
    if any(one.licence for one in known):
        console.print(Text("* under terms of their own: see torchvision's page of the weights", "dim"))


def _cells(one: Known) -> tuple[str, ...]:
    size = "" if one.size is None else f"{one.size} px"
    accuracy = "" if one.accuracy is None else f"{one.accuracy:.1f} %"
    where = "at hand" if one.is_at_hand else "" if one.fetch_bytes is None else size_text(one.fetch_bytes)
    return one.name + "*" * bool(one.licence), f"{one.parameters / 1e6:.1f} M", size, accuracy, where
