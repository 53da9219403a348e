"""What makes a resume exact: the order of the samples and every random draw are pure functions of where we are.

Nothing here has state. To go to the middle of an epoch is to slice; no batch is replayed.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

# From so many samples on the order jumps about within a window only, so that rows on a disk are read front to back.
LARGE_SAMPLES = 65_536
BLOCK_SAMPLES = 4_096
WINDOW_SAMPLES = 8 * BLOCK_SAMPLES
# So many batches are sorted by length at once: few enough that an epoch stays shuffled.
SORTED_BATCHES = 32


def key(*parts: str | int) -> int:
    """A 63-bit number from words and numbers: equal parts give equal keys, on every machine; others do not meet."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order of epoch `epoch`: a permutation of `count` positions in `reading_order`, int64.

    Many samples are shuffled in blocks: the blocks among each other, then the samples within each window of blocks.
    """
    generator = torch.Generator().manual_seed(key("order", seed, epoch))
    if not shuffles_in_blocks(count):
        return torch.randperm(count, generator=generator)
    blocks = torch.arange(count).split(BLOCK_SAMPLES)
    order = torch.cat([blocks[block] for block in torch.randperm(len(blocks), generator=generator).tolist()])
    windows = order.split(WINDOW_SAMPLES)
    return torch.cat([window[torch.randperm(len(window), generator=generator)] for window in windows])


def shuffles_in_blocks(count: int) -> bool:
    """Whether `epoch_order` stays within windows."""
    return count > LARGE_SAMPLES


def reading_order(indices: Tensor, train_samples: int) -> Tensor:
    """Samples as they lie side by side: sorted; where training stays within windows, scattered by a hash, for data sets
    come sorted by class, and a window would hold a few classes only.

    Of any two sets, those in both come in the same order (splitmix64: Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014).

    Args:
        indices: (samples,) sorted int64: those that train, that validate, or both.
        train_samples: how many train.
    """
    if not shuffles_in_blocks(train_samples):
        return indices
    mixed = indices.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return indices[torch.from_numpy(np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable"))]


def spread(indices: Tensor, count: int) -> Tensor:
    """At most `count` of `indices`, evenly spread over them."""
    if len(indices) <= count:
        return indices
    return indices[torch.arange(count) * len(indices) // count]


def side_by_side(order: Tensor, lengths: Tensor, batch_size: int) -> Tensor:
    """An order in which the samples of a batch are about equally long, so that little is padded.

    The order is cut into blocks of batches; in each the samples are sorted by length, and whole batches change places
    among each other, so that long ones do not come last. A batch that is not full stays at the end. Pure: no generator.

    Args:
        order: (samples,) int64, shuffled.
        lengths: by sample.
    """
    blocks = []
    for block in order.split(SORTED_BATCHES * batch_size):
        places = lengths[block].argsort(stable=True)
        full = len(block) // batch_size * batch_size
        batches = places[:full].view(-1, batch_size)
        # Where a batch's first sample stood in the shuffled block is as good as a draw of its own.
        batches = batches[batches[:, 0].argsort()]
        blocks += [block[batches.flatten()], block[places[full:]]]
    return torch.cat(blocks) if blocks else order


def batches_from(order: Tensor, batch_size: int, position_samples: int = 0, folds: bool = False) -> Iterator[Tensor]:
    """The index batches of an epoch from `position_samples` on; the last one may be smaller.

    Args:
        folds: a last batch of one sample joins the one before it.
    """
    for start in range(position_samples, len(order), batch_size):
        if folds and batch_size > 1 and start + batch_size + 1 == len(order):
            yield order[start:]
            return
        yield order[start : start + batch_size]


def count_batches(samples: int, batch_size: int, folds: bool = False) -> int:
    """How many batches an epoch has."""
    has_left_over = folds and samples > batch_size > 1 and samples % batch_size == 1
    return -(-samples // batch_size) - has_left_over


@contextmanager
def keyed_generator(*parts: str | int) -> Iterator[torch.Generator]:
    """Within the block the CPU's default generator is seeded by `parts`; afterwards it is as it was.

    Only the CPU's: `torch.manual_seed` would reseed the device's too, and with it the dropout in the head.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(key(*parts))
    try:
        yield generator
    finally:
        generator.set_state(state)


def stratified_split(
    targets: Tensor, validation_fraction: float, seed: int, train_samples: int = 0
) -> tuple[Tensor, Tensor]:
    """Split indices so that each class keeps its share.

    Args:
        targets: (samples,) int64 class numbers; or (samples, classes), not 0 where a class applies; or float numbers.
        validation_fraction: share of each class that validates; each class keeps at least one sample to train on,
            and gives one to validate with as soon as it has two. 0 = nothing validates.
        seed: the same seed gives the same split.
        train_samples: keep only so many training samples, each class in its share (0 = all).

    Returns:
        (train, validation) sorted int64 indices.
    """
    train, validation = [], []
    for label, members in _strata(targets):
        generator = torch.Generator().manual_seed(key("split", seed, label))
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(round(len(members) * validation_fraction), 1), len(members) - 1) if validation_fraction else 0
        validation.append(members[:count])
        train.append(members[count:])
    if targets.dim() == 2 and not targets.is_floating_point() and validation_fraction:
        train, validation = _give_back(targets, torch.cat(train), torch.cat(validation))
    if train_samples:
        # Deal the classes out in turn until there are enough: shares as equal as the classes' sizes allow.
        rounds = [(turn, n, int(index)) for n, group in enumerate(train) for turn, index in enumerate(group)]
        chosen = [index for _, _, index in sorted(rounds)[:train_samples]]
        train = [torch.tensor(chosen, dtype=torch.int64)]
    return torch.cat(train).sort().values, torch.cat(validation).sort().values


def grouped_split(targets: Tensor, groups: Tensor, validation_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split so that the samples of a group stay on one side, and each class keeps its share as well as groups allow.

    Groups are shuffled and taken from the largest to the smallest; one validates if that brings the classes nearer to
    their shares and leaves each class something to train on.

    Args:
        targets, validation_fraction, seed: as of `stratified_split`.
        groups: (samples,) int64.

    Returns:
        (train, validation) sorted int64 indices.
    """
    stratum, members_of = _groups_by_size(targets, groups, "split", seed)
    left = stratum.bincount().double()
    wanted, taken = left * validation_fraction, torch.zeros_like(left)
    validation = []
    for members in members_of:
        here, counts = stratum[members].unique(return_counts=True)
        before, after = taken[here] - wanted[here], taken[here] + counts - wanted[here]
        gain = ((before.square() - after.square()) / wanted[here]).sum()
        if gain > 0 and (left[here] > counts).all():
            left[here] -= counts
            taken[here] += counts
            validation.append(members)
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    held_out[torch.cat([*validation, torch.zeros(0, dtype=torch.int64)])] = True
    return (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)


def fold_numbers(targets: Tensor, groups: Tensor | None, count: int, seed: int) -> Tensor:
    """Deal samples out to folds, each class in its share, as well as whole groups allow.

    Args:
        targets, seed: as of `stratified_split`.
        groups: (samples,) int64, or None.

    Returns:
        (samples,) int64: the fold of each.
    """
    numbers = torch.zeros(len(targets), dtype=torch.int64)
    if groups is None:
        dealt = 0  # on from where the stratum before ended: else all that is over would lie in the first folds
        for label, members in _strata(targets):
            generator = torch.Generator().manual_seed(key("folds", seed, label))
            members = members[torch.randperm(len(members), generator=generator)]
            numbers[members] = (torch.arange(len(members)) + dealt) % count
            dealt += len(members)
        return numbers
    stratum, members_of = _groups_by_size(targets, groups, "folds", seed)
    wanted = stratum.bincount().double() / count
    taken = torch.zeros(count, len(wanted), dtype=torch.float64)
    for members in members_of:
        here, counts = stratum[members].unique(return_counts=True)
        before, after = taken[:, here] - wanted[here], taken[:, here] + counts - wanted[here]
        fold = int(((after.square() - before.square()) / wanted[here]).sum(1).argmin())
        taken[fold, here] += counts
        numbers[members] = fold
    return numbers


def _groups_by_size(targets: Tensor, groups: Tensor, purpose: str, seed: int) -> tuple[Tensor, list[Tensor]]:
    """(samples,) the number of each one's stratum; the members of each group, from the largest to the smallest."""
    stratum = torch.zeros(len(targets), dtype=torch.int64)
    for number, (_, members) in enumerate(_strata(targets)):
        stratum[members] = number
    order = groups.argsort(stable=True)
    members_of = order.split(groups[order].unique_consecutive(return_counts=True)[1].tolist())
    generator = torch.Generator().manual_seed(key(purpose, seed, "groups"))
    shuffled = [members_of[place] for place in torch.randperm(len(members_of), generator=generator).tolist()]
    return stratum, sorted(shuffled, key=len, reverse=True)


def _give_back(targets: Tensor, train: Tensor, validation: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Move samples back until every class has one to train on: a common class may have gone with rare ones."""
    for label in range(targets.shape[1]):
        members = validation[targets[validation, label] != 0]
        if len(members) and not (targets[train, label] != 0).any():
            train, validation = torch.cat([train, members[:1]]), validation[validation != members[0]]
    return [train], [validation]


def _strata(targets: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(number, members) of groups that are split one by one; every sample is in exactly one.

    Of several labels a sample belongs to its rarest, so that rare ones are shared out before common ones take all (the
    idea of Sechidis, Tsoumakas and Vlahavas, "On the stratification of multi-label data", ECML PKDD 2011); samples
    without any label are a group of their own.
    """
    if targets.is_floating_point():
        # Numbers by their size, in tenths, if that many are five each; of embeddings one is like another.
        strata = min(10, max(len(targets) // 5, 1)) if targets.dim() == 1 else 1
        ranks = targets.argsort(stable=True).argsort(stable=True) if targets.dim() == 1 else torch.arange(len(targets))
        targets = ranks * strata // max(len(targets), 1)
    if targets.dim() == 2:
        applies = targets != 0
        rarity = applies.sum(0).argsort(stable=True)  # the rarest class first
        first = applies[:, rarity].to(torch.uint8).argmax(1)
        targets = torch.where(applies.any(1), rarity[first], targets.shape[1])
    order = targets.argsort(stable=True)
    labels, sizes = targets[order].unique_consecutive(return_counts=True)
    yield from zip(labels.tolist(), order.split(sizes.tolist()), strict=True)
