"""Names that others gave to files and classes, and numbers, as a person reads them in a terminal."""

import json
import math
import re
import sys
import unicodedata
from collections.abc import Iterable

from finetune.base.events import Best
from finetune.base.intervals import share_text
from finetune.errors import UsageError


def printable(text: str) -> str:
    """Text for a terminal: what would move its cursor, colour it or break the line (a file may be called so) is spelt
    out instead."""
    return "".join(one if is_printable(one) else one.encode("unicode_escape").decode() for one in text)


def is_printable(one: str) -> bool:
    """Of a character; spaces of every width are."""
    return one.isprintable() or unicodedata.category(one) == "Zs"


def with_article(noun: str) -> str:
    """As in "an image", "a text"."""
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


def counted(count: int, noun: str) -> str:
    """As in "1 sample", "1,200 samples"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def number_text(value: float, decimals: int = 4) -> str:
    """A loss or a metric: 0.9861, 12.3400; of very small and large ones about as many digits: 3.1e-05, 12,345.7."""
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.1f}"
    return f"{value:.{decimals}f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.{decimals}g}"


def digits_to_tell_apart(values: Iterable[float]) -> int:
    """How many significant digits show what sets numbers apart, to a thousandth of it: six; more of large numbers that
    lie close together."""
    values = [value for value in values if math.isfinite(value)]
    spread = max(values, default=0.0) - min(values, default=0.0)
    largest = max(map(abs, values), default=0.0)
    return min(max(4 + math.ceil(math.log10(largest / spread)), 6), 17) if 0 < spread < math.inf else 6


def parameters_text(count: int) -> str:
    """In millions, as in "2.2 M"."""
    return f"{count / 1e6:.1f} M"


def best_text(best: Best) -> str:
    """The best validation of a run.

    Args:
        best: with metric, value, step and epoch at least, or {}.
    """
    if not best:
        return "nothing was validated yet"
    return "best " + validation_text(best, f" in epoch {best['epoch']}")


def validation_text(best: Best, where: str = "") -> str:
    """The metric of a validation, and what it is worth.

    Args:
        where: what stands behind the value.
    """
    worth = ""
    if best["metric"] == "accuracy" and "samples" in best and math.isfinite(best["value"]):
        worth = f" ({share_text(best['value'], best['samples'])})"
    return f"validation {best['metric']} {number_text(best['value'])}{where}{worth}"


def finite(value: object) -> object:
    """A value with null in the place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_line(value: object) -> str:
    """A value as one line of JSON for standard output: nothing in it moves a cursor, names stay readable."""
    # Another encoding could not show every name, and what it shows instead would be no JSON.
    text = json.dumps(finite(value), ensure_ascii=(sys.stdout.encoding or "").lower().replace("-", "") != "utf8")
    # JSON leaves some characters as they are that a terminal obeys.
    return "".join(one if is_printable(one) else json.dumps(one)[1:-1] for one in text)


UNITS = {"": 10**9, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes of "20GB", "500MB" or "20" (GB).

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip().upper())
    if not match:
        raise UsageError(f"--cache-limit {text}: is no size; give one like 20GB or 500MB")
    return int(float(match[1]) * UNITS[match[2] or ""])


def size_text(size_bytes: float) -> str:
    """Bytes for people: 3.7 MB."""
    for unit in ("KB", "MB"):
        size_bytes /= 1_000
        if size_bytes < 1_000:
            return f"{size_bytes:.1f} {unit}"
    return f"{size_bytes / 1_000:,.1f} GB"


def seconds_text(seconds: float) -> str:
    """A duration as a person says it: 8 s, 3:05, 1:02:03, 2 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def megabytes_text(megabytes: float) -> str:
    return f"{megabytes:,.0f} MB" if megabytes < 10_000 else f"{megabytes / 1000:,.1f} GB"


# A longer value of an option ends in dots; --json has all of it.
LONGEST_VALUE = 40


def duration_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 10 else seconds_text(seconds)


def value_text(value: object) -> str:
    """An option's value, as it would be typed."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    text = printable(str(value)) or '""'
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
