"""The pipe to the process that talks to the outside: what goes through it, and what must never come back out of it."""

import base64
import json
import re
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import unquote

from finetune.base.events import Begun, Ended, Example, Validated

QUEUE_ROOM = 10_000
# Shorter parts of an URL ("json", "8080", "true") are no secrets, and would be found everywhere.
SECRET_CHARACTERS = 6
HIDDEN = "***"


# ---- What is told, as a line of JSON ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Logged:
    """What metrics.jsonl gets at a step."""

    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class Closed:
    """The run failed before it was one: there is nothing to say."""


Told = Begun | Logged | Validated | Ended | Closed
_KINDS: dict[str, type] = {kind.__name__.lower(): kind for kind in (Begun, Logged, Validated, Ended, Closed)}


def encode(told: Told) -> bytes:
    """One line. What belongs to the terminal alone (a run's facts) stays behind."""
    if isinstance(told, Begun):
        told = replace(told, folder=told.folder.resolve() if told.folder else None, facts={})
    return to_line({"told": type(told).__name__.lower()} | vars(told))


def to_line(value: Mapping[str, object]) -> bytes:
    # What is no text in UTF-8 (a file may be called so) would be refused by whoever gets it.
    return json.dumps(value, ensure_ascii=False, default=_plain).encode(errors="replace") + b"\n"


def _plain(value: object) -> object:
    if isinstance(value, Example):
        return vars(value)
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def decode(line: bytes) -> Told:
    """What `encode` made a line of.

    Raises:
        ValueError, KeyError, TypeError: it made no such line, or only a part of it is there.
    """
    fields = json.loads(line)
    kind = _KINDS[fields.pop("told")]
    if kind is Begun:
        fields["folder"] = Path(fields["folder"])
    if kind is Ended:
        fields["worst"] = tuple(_example(one) for one in fields["worst"])
    return kind(**fields)


def _example(fields: dict[str, Any]) -> Example:
    fields["picture"] = base64.b64decode(fields["picture"])
    fields["probabilities"] = tuple((name, probability) for name, probability in fields["probabilities"])
    return Example(**fields)


# ---- The queue -------------------------------------------------------------------------------------------------------

Thing = TypeVar("Thing")


class Queue(Generic[Thing]):
    """Whoever puts something in never waits: when there is no room, the oldest of what can be spared goes.

    Attributes:
        dropped: how many went.
    """

    def __init__(self, room: int = QUEUE_ROOM):
        self.dropped = 0
        self._room = room
        self._things: deque[tuple[Thing, bool]] = deque()
        self._is_closed = False
        self._changed = threading.Condition()

    def put(self, thing: Thing, *, can_be_spared: bool = False) -> None:
        """Nothing happens once the queue is closed."""
        with self._changed:
            if self._is_closed:
                return
            if len(self._things) >= self._room:
                place = next((place for place, (_, spared) in enumerate(self._things) if spared), 0)
                del self._things[place]
                self.dropped += 1
            self._things.append((thing, can_be_spared))
            self._changed.notify()

    def take(self) -> list[Thing]:
        """Everything that is there, the oldest first; waits for something. [] once the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._things or self._is_closed)
            things = [thing for thing, _ in self._things]
            self._things.clear()
            return things

    def close(self) -> None:
        """No more will come."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


# ---- Secrets ---------------------------------------------------------------------------------------------------------


def scheme_of(url: str) -> str:
    """Of an URL that may hold secrets, what can be shown: "slack://"."""
    found = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,20}://", url)
    return found.group() if found else "one without a scheme"


def secrets_of(urls: Iterable[str]) -> list[str]:
    """Whatever in URLs could be a password or a token: each of their parts, as it stands there and unquoted."""
    found: set[str] = set()
    for url in urls:
        rest = url[len(scheme_of(url)) :] if "://" in url else url
        parts = [url, rest, *re.split(r"[/?&#@]", rest), *re.split(r"[/?&#@:=,+;\s]", rest)]
        found.update(parts, [unquote(part) for part in parts])
    return sorted((part for part in found if len(part) >= SECRET_CHARACTERS), key=len, reverse=True)


def scrub(text: str, secrets: Iterable[str]) -> str:
    """The text with every secret hidden; the longest ones come first."""
    for secret in secrets:
        text = re.sub(re.escape(secret), HIDDEN, text, flags=re.IGNORECASE)
    return text
