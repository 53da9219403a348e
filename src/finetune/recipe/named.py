"""Choices that change numbers and came after the first runs: each is named in recipe.json. No import of torch."""

from dataclasses import field
from typing import TypeVar

Value = TypeVar("Value")
# In a field's metadata: what a record without that field means.
BEFORE = "before"


def named(default: Value, *, before: Value) -> Value:
    """Declare a choice that changes numbers and came after the first runs.

    Args:
        default: of new recipes.
        before: what was done when records did not name it; an older run goes on so.
    """
    chosen: Value = field(default=default, metadata={BEFORE: before})
    return chosen
