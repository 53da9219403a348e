"""Plain values in a file: dataclasses put into them, and taken out by kind. No file is trusted, whoever wrote it."""

import dataclasses
import typing
from typing import TypeVar, cast

from finetune.base.files import BadFile

# What JSON and a checkpoint hold: dicts, lists, strings, numbers, None; in a checkpoint tensors too.
Plain = dict[str, object]
Kind = TypeVar("Kind")
Part = TypeVar("Part")


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
        self.what = what

    def __contains__(self, name: str) -> bool:
        return name in self.plain

    def take(self, name: str, kind: type[Kind]) -> Kind:
        """An entry that must be of a kind.

        Raises:
            BadFile: it is missing, or of another; so do all methods below.
        """
        return self._of_kind(name, [self.plain.get(name)], kind)[0]

    def _wrong(self, name: str) -> BadFile:
        return BadFile(f"{self.what}: {name!r} is missing or of a wrong kind; restore it from a copy")

    def text(self, name: str) -> str:
        return self.take(name, str)

    def integer(self, name: str) -> int:
        return self.take(name, int)

    def number(self, name: str) -> float:
        """A float, or an integer in its place."""
        return self._numbers(name, [self.plain.get(name)])[0]

    def mapping(self, name: str) -> Plain:
        return self.fields(name).plain

    def fields(self, name: str) -> "Fields":
        """A dict within the dict."""
        if name not in self.plain:
            raise self._wrong(name)
        return Fields(self.plain[name], f"{self.what}: {name!r}")

    def items(self, name: str, kind: type[Kind]) -> list[Kind]:
        """A list whose items are all of a kind; where that is float, integers may stand in it."""
        return self._of_kind(name, self.take(name, list), kind)

    def values(self, name: str, kind: type[Kind]) -> dict[str, Kind]:
        """A dict whose values are all of a kind; where that is float, integers may stand in it."""
        found = self.mapping(name)
        return dict(zip(found, self._of_kind(name, list(found.values()), kind), strict=True))

    def _of_kind(self, name: str, values: list[object], kind: type[Kind]) -> list[Kind]:
        if kind is float:
            return cast(list[Kind], self._numbers(name, values))
        is_bool = kind in (bool, object)  # bool is an int to Python, and to nobody else
        if not all(isinstance(value, kind) and (is_bool or not isinstance(value, bool)) for value in values):
            raise self._wrong(name)
        return cast(list[Kind], values)

    def _numbers(self, name: str, values: list[object]) -> list[float]:
        found = []
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise self._wrong(name)
            try:
                found.append(float(value))
            except OverflowError:  # JSON has integers of any length
                raise self._wrong(name) from None
        return found


# ---- Dataclasses ----------------------------------------------------------------------------------------------------


def stored(key: str, *, writer: str, reader: str, may_lack: bool = False) -> dict[str, object]:
    """Describe how a field is kept, as its metadata.

    Args:
        key: in the plain dict; "a.b" = within the dict "a".
        writer, reader: who writes it, and who reads it; for people.
        may_lack: a file may lack it, as one written before the field was added; the field's default holds then.
    """
    return {"key": key, "writer": writer, "reader": reader, "may_lack": may_lack}


def part_to_plain(part: object) -> Plain:
    """A dataclass as a plain dict. One within it that has no key of its own puts its keys beside the others."""
    assert dataclasses.is_dataclass(part)
    plain: Plain = {}
    for one in dataclasses.fields(part):
        value = getattr(part, one.name)
        if dataclasses.is_dataclass(value):
            inside = part_to_plain(value)
            plain |= {one.metadata["key"]: inside} if "key" in one.metadata else inside
            continue
        outer, _, inner = one.metadata.get("key", one.name).partition(".")
        if inner:
            within = plain.setdefault(outer, {})
            assert isinstance(within, dict), outer
            within[inner] = value
        else:
            plain[outer] = value
    return plain


def part_from_plain(kind: type[Part], fields: Fields) -> Part:
    """The dataclass that `part_to_plain` was given. Keys of no field are left aside.

    A key may be missing where its metadata says so; of a field without metadata, where it has a default.

    Raises:
        BadFile: a key is missing, or holds something else; names it.
    """
    assert dataclasses.is_dataclass(kind)
    values: dict[str, object] = {}
    for one in dataclasses.fields(kind):
        outer, _, inner = one.metadata.get("key", one.name).partition(".")
        has_default = one.default is not dataclasses.MISSING or one.default_factory is not dataclasses.MISSING
        may_lack = one.metadata.get("may_lack", has_default)
        if dataclasses.is_dataclass(one.type):
            if "key" in one.metadata and may_lack and outer not in fields:
                continue
            inside = fields.fields(outer) if "key" in one.metadata else fields
            values[one.name] = part_from_plain(cast(type, one.type), inside)
        elif inner:
            within = fields.fields(outer) if outer in fields or not may_lack else Fields({}, outer)
            if inner in within or not may_lack:
                values[one.name] = _take(one.type, within, inner)
        elif outer in fields or not may_lack:
            values[one.name] = _take(one.type, fields, outer)
    return kind(**values)


def _take(kind: object, fields: Fields, name: str) -> object:
    """An entry as the annotation of its field says."""
    if typing.is_typeddict(kind):
        return _entries(cast(type, kind), fields.fields(name))
    if kind is float:
        return fields.number(name)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list and typing.is_typeddict(arguments[0]):
        return [_entries(arguments[0], Fields(one, f"{fields.what}: {name!r}")) for one in fields.take(name, list)]
    if origin is list:
        return fields.items(name, typing.get_origin(arguments[0]) or arguments[0])
    if origin is dict:
        return fields.values(name, arguments[1])
    return fields.take(name, cast(type, kind))


def _entries(kind: type, fields: Fields) -> Plain:
    """The entries of a TypedDict: all but those marked as not required, or none where it may be empty."""
    kinds, marked = typing.get_type_hints(kind), typing.get_type_hints(kind, include_extras=True)
    if not fields.plain and not getattr(kind, "__required_keys__", ()):
        return {}
    may_lack = {key for key, one in marked.items() if typing.get_origin(one) is typing.NotRequired}
    return {key: _take(one, fields, key) for key, one in kinds.items() if key in fields or key not in may_lack}
