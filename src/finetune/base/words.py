"""What somebody typed, with other options. Values stand in the same word (--a=b) or in the next."""

import os
import shlex
import subprocess
from collections.abc import Collection, Sequence


def typed(words: Sequence[str]) -> str:
    """Words as a shell takes them."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def with_option(words: Sequence[str], option: str, value: str) -> list[str]:
    """What was typed, with another value of an option; that is added where it was not given."""
    found, is_value, is_there = [], False, False
    for word in words:
        name, equals, _ = word.partition("=")
        if is_value:
            word = value
        elif name == option and equals:
            word = f"{option}={value}"
        is_value, is_there = word == option, is_there or name == option
        found.append(word)
    return found if is_there else [*found, option, value]


def without_option(words: Sequence[str], *options: str, switches: Collection[str] = ()) -> list[str]:
    """What was typed, without some options.

    Args:
        options: that have a value, in the same word or the next.
        switches: that have none.
    """
    found, is_value = [], False
    for word in words:
        if not is_value and word.partition("=")[0] not in (*options, *switches):
            found.append(word)
        is_value = word in options
    return found
