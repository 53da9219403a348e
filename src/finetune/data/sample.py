"""A sample of a data set: few of its images or texts, every class among them."""

import dataclasses

import torch
from torch import Tensor

from finetune.data.order import key
from finetune.data.source import ArraySource, FileSource, Source


def sampled(source: Source, count: int) -> Source:
    """A data set with at most `count` samples of each part that the data brings along; of all, where it brings none.

    A function of the data and the count alone, so that a resume finds the same.

    Args:
        count: of samples; 0 = the data as it is.
    """
    if not count:
        return source
    everything = torch.arange(len(source.targets))
    parts = [everything] if source.parts is None else [everything[source.parts == part] for part in range(3)]
    chosen = torch.cat([part[spread_over_classes(source.targets[part], count)] for part in parts]).sort().values
    indices = chosen.tolist()
    few = dataclasses.replace(
        source,
        targets=source.targets[chosen],
        fingerprint=f"{source.fingerprint}, {count} of it",
        groups=None if source.groups is None else source.groups[chosen],
        parts=None if source.parts is None else source.parts[chosen],
    )
    if isinstance(few, ArraySource):
        return dataclasses.replace(few, images=few.images[chosen])
    if isinstance(few, FileSource):
        return dataclasses.replace(few, paths=[few.paths[index] for index in indices])
    names, texts = ([values[index] for index in indices] for values in (few.names, few.texts))
    return dataclasses.replace(few, names=names, texts=texts)


def spread_over_classes(targets: Tensor, count: int) -> Tensor:
    """(chosen,) int64: which samples, the classes in turn, until there are enough."""
    classes = [_shuffled(members, number)[:count].tolist() for number, members in enumerate(_members(targets))]
    chosen: dict[int, None] = {}
    turn = 0
    while classes and len(chosen) < count:
        for members in classes:
            if len(chosen) < count:
                chosen[members[turn]] = None
        turn += 1
        classes = [members for members in classes if turn < len(members)]
    return torch.tensor(list(chosen), dtype=torch.int64)


def _members(targets: Tensor) -> list[Tensor]:
    """The samples of each class; of several labels a sample belongs to each, and those without any stand together.
    Numbers have no classes."""
    if targets.is_floating_point():
        groups = [torch.arange(len(targets))]
    elif targets.dim() == 2:
        groups = [column.nonzero().squeeze(1) for column in targets.T] + [(targets.sum(1) == 0).nonzero().squeeze(1)]
    else:
        groups = [(targets == number).nonzero().squeeze(1) for number in targets.unique().tolist()]
    return [members for members in groups if len(members)]


def _shuffled(members: Tensor, number: int) -> Tensor:
    return members[torch.randperm(len(members), generator=torch.Generator().manual_seed(key("sample", number)))]
