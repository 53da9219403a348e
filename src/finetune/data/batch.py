"""What is asked of a pipeline and what comes of it: a batch; and the parts of a data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Sorted int64 sample indices; `test` is empty unless the data brings a test part along."""

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True)
class Request:
    """One batch to fetch.

    Attributes:
        augment_epoch: the epoch whose random draws apply, or None for no augmentation.
        tolerant: report broken images instead of raising.
    """

    indices: list[int]
    augment_epoch: int | None = None
    tolerant: bool = False


class Batch(NamedTuple):
    """What comes of a request.

    Attributes:
        inputs: (batch, 3, image_size, image_size) float32 images; (batch, length) int64 tokens; or (batch, width) rows
            of kept features.
        targets: (batch,) int64; (batch, classes) uint8 of several labels, float32 of mixed images; as in `TextSource`.
        indices: (batch,) int64: the samples, without broken ones.
        digests: (batch,) int64 of the files' contents; 0 = no file.
        broken: (index, what is wrong with it).
    """

    inputs: Tensor
    targets: Tensor
    indices: Tensor
    digests: Tensor
    broken: list[tuple[int, str]]


def batch_of_rows(rows: Tensor, indices: Tensor, targets: Tensor) -> Batch:
    """Rows (n, width) in the place of samples (n,), whose files were compared before.

    Args:
        targets: of all samples.
    """
    return Batch(rows, targets[indices], indices, torch.zeros_like(indices), [])


def joined(parts: Sequence[Batch], pin_memory: bool = False) -> Batch:
    """One batch of its parts, in their order.

    Args:
        pin_memory: put the inputs into page-locked memory.
    """
    if len(parts) == 1:
        return parts[0]
    inputs = torch.cat([part.inputs for part in parts])
    return Batch(
        inputs.pin_memory() if pin_memory else inputs,
        torch.cat([part.targets for part in parts]),
        torch.cat([part.indices for part in parts]),
        torch.cat([part.digests for part in parts]),
        [one for part in parts for one in part.broken],
    )
