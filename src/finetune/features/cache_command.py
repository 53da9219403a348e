"""`finetune cache`: what is kept, and how to be rid of it. Imports no torch."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from finetune.base.cache_folders import features_folder, unpacked_folder
from finetune.base.formatting import printable, size_text
from finetune.base.terminal import make_console
from finetune.errors import UsageError
from finetune.features.cache import Entry, entries

SHOWN_KEY_LETTERS = 12


def list_or_clear(action: str, names: Sequence[str]) -> int:
    """Show or delete entries.

    Args:
        names: beginnings of their names; none = all.

    Raises:
        UsageError: a name that no entry begins with.
    """
    found = entries()
    for name in names:
        if not any(entry.key.startswith(name) for entry in found):
            raise UsageError(
                f"finetune cache: no entry begins with {name!r} in {features_folder()}; see: finetune cache"
            )
    chosen = [entry for entry in found if not names or entry.key.startswith(tuple(names))]
    unpacked = [] if names else sorted(unpacked_folder().glob("*/"))
    if action == "clear":
        return _clear(chosen, unpacked)
    console = make_console()
    if chosen:
        console.print(_table(chosen))
    total = size_text(sum(entry.stored_bytes() for entry in chosen))
    console.print(Text(f"{len(chosen)} entries, {total} in {features_folder()}"))
    if unpacked:
        total = size_text(sum(map(_size_of, unpacked)))
        console.print(Text(f"images of {len(unpacked)} table(s), unpacked, {total} in {unpacked_folder()}"))
    return 0


def _table(chosen: list[Entry]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("entry", "features of", "rows", "on disk", "last used"):
        table.add_column(name, justify="right" if name in ("rows", "on disk") else "left", overflow="fold")
    for entry in chosen:
        about, rows = entry.describe()
        used = "in use" if entry.users() else time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_seconds()))
        table.add_row(
            entry.key[:SHOWN_KEY_LETTERS], Text(printable(about)), rows, size_text(entry.stored_bytes()), used
        )
    return table


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _clear(chosen: list[Entry], unpacked: Sequence[Path]) -> int:
    """Args: unpacked: folders of images, which are unpacked again when they are wanted."""
    freed_bytes = sum(map(_size_of, unpacked))
    for folder in unpacked:
        shutil.rmtree(folder, ignore_errors=True)
    for entry in chosen:
        size_bytes = entry.stored_bytes()
        if entry.clear():
            freed_bytes += size_bytes
        else:
            print(f"{entry.key[:SHOWN_KEY_LETTERS]} is in use by a run: kept")
    print(f"{size_text(freed_bytes)} freed")
    return 0
