"""Plain values out of a file, each taken by its kind: whoever wrote the file, nothing in it is trusted."""

from typing import TypeVar, cast

from finetune.base.files import BadFile

# What JSON and a checkpoint hold: dicts, lists, strings, numbers, None; in a checkpoint tensors too.
Plain = dict[str, object]
Kind = TypeVar("Kind")


class Fields:
    """The entries of a plain dict.

    Args:
        plain: the dict.
        what: what to call it in an error: a file, and where in it.
    """

    def __init__(self, plain: object, what: str):
        if not isinstance(plain, dict) or not all(isinstance(key, str) for key in plain):
            raise BadFile(f"{what} is not as finetune writes it; restore it from a copy")
        self.plain: Plain = plain
        self._what = what

    def __contains__(self, name: str) -> bool:
        return name in self.plain

    def take(self, name: str, kind: type[Kind]) -> Kind:
        """An entry that must be of a kind.

        Raises:
            BadFile: it is missing, or of another; so do all methods below.
        """
        value = self.plain.get(name)
        # bool is an int to Python, and to nobody else.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self._wrong(name)
        return value

    def _wrong(self, name: str) -> BadFile:
        return BadFile(f"{self._what}: {name!r} is missing or of a wrong kind; restore it from a copy")

    def text(self, name: str) -> str:
        return self.take(name, str)

    def integer(self, name: str) -> int:
        return self.take(name, int)

    def flag(self, name: str) -> bool:
        return self.take(name, bool)

    def number(self, name: str) -> float:
        """A float, or an integer in its place."""
        value = self.plain.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name)
        return float(value)

    def mapping(self, name: str) -> Plain:
        return self.fields(name).plain

    def fields(self, name: str) -> "Fields":
        """A dict within the dict."""
        if name not in self.plain:
            raise self._wrong(name)
        return Fields(self.plain[name], f"{self._what}: {name!r}")

    def items(self, name: str, kind: type[Kind]) -> list[Kind]:
        """A list whose items are all of a kind; where that is float, integers may stand in it."""
        values = self.take(name, list)
        kinds = (int, float) if kind is float else (kind,)
        if not all(isinstance(value, kinds) for value in values):
            raise self._wrong(name)
        return cast(list[Kind], values)

    def values(self, name: str, kind: type[Kind]) -> dict[str, Kind]:
        """A dict whose values are all of a kind; where that is float, integers may stand in it."""
        found = self.mapping(name)
        kinds = (int, float) if kind is float else (kind,)
        if not all(isinstance(value, kinds) for value in found.values()):
            raise self._wrong(name)
        return cast(dict[str, Kind], found)
