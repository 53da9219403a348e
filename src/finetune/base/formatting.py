"""Names that others gave to files and classes, and numbers, as a person reads them in a terminal."""

import json
import sys
import unicodedata
from typing import Any


def printable(text: str) -> str:
    """Text for a terminal: what would move its cursor, colour it or break the line (a file may be called so) is spelt
    out instead."""
    return "".join(one if is_printable(one) else one.encode("unicode_escape").decode() for one in text)


def is_printable(one: str) -> bool:
    """Of a character; spaces of every width are."""
    return one.isprintable() or unicodedata.category(one) == "Zs"


def number_text(value: float, decimals: int = 4) -> str:
    """A loss or a metric: 0.9861, 12.3400; of very small and large ones about as many digits: 3.1e-05, 12,345.7."""
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.1f}"
    return f"{value:.{decimals}f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.{decimals}g}"


def best_text(best: dict[str, Any]) -> str:
    """The best validation of a run.

    Args:
        best: {"metric", "value", "step", "epoch"}, or {}.
    """
    if not best:
        return "nothing was validated yet"
    return f"best validation {best['metric']} {number_text(best['value'])} in epoch {best['epoch']}"


def json_line(value: Any) -> str:
    """A value as one line of JSON for standard output: nothing in it moves a cursor, names stay readable."""
    # Another encoding could not show every name, and what it shows instead would be no JSON.
    text = json.dumps(value, ensure_ascii=(sys.stdout.encoding or "").lower().replace("-", "") != "utf8")
    # JSON leaves some characters as they are that a terminal obeys.
    return "".join(one if is_printable(one) else json.dumps(one)[1:-1] for one in text)
