"""Recipes as plain values, and back: what recipe.json and checkpoints hold. No import of torch."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar, cast

from finetune.errors import UsageError
from finetune.recipe.data_spec import DATA, Data
from finetune.recipe.named import BEFORE
from finetune.recipe.spec import TASKS, Recipe, Task

# By the annotation of a field.
UNIONS: dict[object, Mapping[str, type]] = {Task: TASKS, Data: DATA}
Spec = TypeVar("Spec")


def to_plain(recipe: Recipe) -> dict[str, object]:
    """Dicts, lists, strings and numbers only: equal to what JSON gives back."""
    return {field.name: _plain(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def from_plain(plain: Mapping[str, object]) -> Recipe:
    """The recipe that `to_plain` was given. A field that a newer kit added means what was done before there was one.

    Raises:
        UsageError: a field that this kit does not know.
    """
    return spec_from_plain(Recipe, plain)


def spec_from_plain(kind: type[Spec], plain: object) -> Spec:
    """A dataclass of plain values and such dataclasses."""
    if not isinstance(plain, Mapping):
        raise TypeError(f"{plain!r} is no {kind.__name__}")
    assert dataclasses.is_dataclass(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = [name for name in plain if name not in fields]
    if unknown:
        raise UsageError(
            f"the saved recipe has unknown fields {', '.join(unknown)}; a newer finetune wrote it: upgrade"
        )
    values = {name: field.metadata[BEFORE] for name, field in fields.items() if BEFORE in field.metadata}
    # A part that came later is made of what was done before.
    missing = [name for name, field in fields.items() if name not in plain and _is_part(field.type)]
    values |= {name: spec_from_plain(cast(type, fields[name].type), {}) for name in missing}
    for name, value in plain.items():
        field_type = fields[name].type
        if not fields[name].init:
            continue
        if field_type in UNIONS:
            value = spec_from_plain(UNIONS[field_type][value["kind"]], value)
        elif _is_part(field_type):
            value = spec_from_plain(cast(type, field_type), value)
        elif isinstance(value, list):
            value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        values[name] = value
    return kind(**values)


def _is_part(kind: object) -> bool:
    return kind not in UNIONS and dataclasses.is_dataclass(kind)


def asked(spec: object, plain: Mapping[str, object], record: Mapping[str, object]) -> dict[str, object]:
    """What of a recipe somebody asked for, to be held against an older record: without choices that the record does
    not name and that are the default now.

    Args:
        spec: the recipe, or a part of it.
        plain: its plain values.
        record: those of the run.
    """
    assert dataclasses.is_dataclass(spec)
    found = dict(plain)
    for field in dataclasses.fields(spec):
        value, inside = getattr(spec, field.name), record.get(field.name)
        if BEFORE in field.metadata and field.name not in record and value in (field.default, field.metadata[BEFORE]):
            found.pop(field.name, None)
        elif _is_part(field.type) and field.name not in record:
            if value in (field.default, spec_from_plain(type(value), {})):
                found.pop(field.name, None)
        elif dataclasses.is_dataclass(value) and isinstance(inside, Mapping):
            within = plain[field.name]
            assert isinstance(within, Mapping)
            found[field.name] = asked(value, within, inside)
    return found


def flatten(value: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """{"optimizer": {"lr": 1}} -> {"optimizer.lr": 1}."""
    found: dict[str, object] = {}
    for key, entry in value.items():
        if isinstance(entry, dict):
            found |= flatten(entry, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = entry
    return found


def differences(saved: Mapping[str, object], given: Mapping[str, object], prefix: str = "") -> list[str]:
    """What differs between two plain values, one line each: "name: saved, now given"."""
    lines = []
    for name in dict.fromkeys([*saved, *given]):
        old, new = saved.get(name), given.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {old!r} in the run, {new!r} now")
    return lines
