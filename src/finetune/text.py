"""Names that others gave to files and classes, as a terminal shows them."""

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


def json_line(value: Any) -> str:
    """A value as one line of JSON for standard output: nothing in it moves a cursor, names stay readable."""
    # Another encoding could not show every name, and what it shows instead would be no JSON.
    text = json.dumps(value, ensure_ascii=(sys.stdout.encoding or "").lower().replace("-", "") != "utf8")
    # JSON leaves some characters as they are that a terminal obeys.
    return "".join(one if is_printable(one) else json.dumps(one)[1:-1] for one in text)
