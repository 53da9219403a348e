"""Samples that belong together, as all pictures of a patient do: they stay on one side of a split."""

import hashlib
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from finetune.data.batch import Split
from finetune.data.names import normal
from finetune.errors import UsageError


def groups_by_name(names: Sequence[str], pattern: str) -> list[str]:
    """What a regular expression finds in each name: its first group, or, where it has none, all that matches.

    Raises:
        UsageError: it is none, or finds nothing in a name.
    """
    try:
        find = re.compile(pattern).search
    except re.error as error:
        raise UsageError(f"--group-by {pattern}: is no regular expression ({error}); mend it") from None
    found = [match[match.re.groups and 1] if (match := find(name)) else None for name in names]
    missing = [name for name, group in zip(names, found, strict=True) if group is None]
    if missing:
        raise UsageError(
            f"--group-by {pattern}: finds nothing in {len(missing):,} of {len(names):,} names, like {missing[0]!r}; "
            "mend it"
        )
    return [group or "" for group in found]


def group_numbers(groups: Sequence[str], option: str, noun: str) -> tuple[Tensor, str]:
    """(samples,) int64, equal where samples belong together; and a sentence that says how many there are.

    Raises:
        UsageError: every sample is a group of its own, or all are one.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(map(normal, groups)))}
    if len(numbers) in (1, len(groups)):
        what = f"all {noun}s are one group" if len(numbers) == 1 else f"each {noun} is a group of its own"
        raise UsageError(f"{option}: {what}; mend it, or leave it out")
    example = next(iter(numbers))
    sentence = (
        f"{len(groups):,} {noun}s in {len(numbers):,} groups by {option}, like {example!r}: each stays on one side"
    )
    return torch.tensor([numbers[normal(name)] for name in groups]), sentence


def groups_of(
    names: Sequence[str], rows: Sequence[str], column: str, pattern: str, noun: str
) -> tuple[Tensor | None, list[str]]:
    """Groups of samples, (samples,) int64, and what to say of them; None where samples stand alone.

    Args:
        names: of the samples' files; [] = they have none.
        rows: what the group column holds of each.
        column, pattern: as --group-column and --group-by have them; "" = not given.

    Raises:
        UsageError: see `groups_by_name` and `group_numbers`; or both are given.
    """
    if column and pattern:
        raise UsageError("--group-column and --group-by: only one of both; leave the other one out")
    if column:
        numbers, sentence = group_numbers(rows, f"--group-column {column}", noun)
    elif pattern:
        if not names:
            raise UsageError(f"--group-by {pattern}: is for names of files; give --group-column")
        numbers, sentence = group_numbers(groups_by_name(names, pattern), f"--group-by {pattern}", noun)
    else:
        return None, []
    return numbers, [sentence]


def with_groups(fingerprint: str, groups: Tensor | None) -> str:
    """The fingerprint of samples that are grouped so."""
    if groups is None:
        return fingerprint
    return f"{fingerprint}, groups {hashlib.sha256(groups.numpy().astype('<i8').tobytes()).hexdigest()}"


def straddling(groups: Tensor, split: Split) -> int:
    """How many groups have samples in more than one part of a split."""
    parts = torch.zeros(int(groups.max()) + 1, len(split), dtype=torch.bool)
    for number, part in enumerate(split):
        parts[groups[part], number] = True
    return int((parts.sum(1) > 1).sum())
