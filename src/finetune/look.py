"""The first look at the data, before the first step: broken images are found, the head's features are measured."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.build import Data
from finetune.data.images import Batch, Request
from finetune.data.loader import Loader
from finetune.data.order import batches_from
from finetune.data.source import FileSource
from finetune.device import to_device
from finetune.errors import RunError
from finetune.models.heads import standardise, standardised_layers
from finetune.watch.progress import Terminal

# Enough samples for a mean and a deviation; more would only cost time.
MEASURED_SAMPLES = 2_048
# So many files are decoded before the first step; of a larger data set the rest in its first epoch.
CHECKED_FILES = 20_000
BATCH_SAMPLES = 64
SHOWN_FILES = 10


@dataclass(frozen=True)
class BrokenFile:
    """An image that cannot be used, and why."""

    name: str
    reason: str


def spread(indices: Tensor, count: int) -> Tensor:
    """At most `count` of `indices`, evenly spread over them."""
    if len(indices) <= count:
        return indices
    return indices[torch.arange(count) * len(indices) // count]


def look(
    data: Data,
    loader: Loader,
    module: nn.Module,
    device: torch.device,
    *,
    measure: bool,
    all_files: bool,
    terminal: Terminal,
) -> list[BrokenFile]:
    """Read images once, without augmentation: those that the head's features are measured on, then the others.

    Args:
        module: on `device`.
        measure: measure what enters the standardised layers of `module`.
        all_files: read every file, however many there are.

    Returns:
        The broken ones.
    """
    measure &= any(True for _ in standardised_layers(module))
    measured = spread(data.split.train, MEASURED_SAMPLES if measure else 0)
    others = torch.zeros(0, dtype=torch.int64)
    if isinstance(data.source, FileSource):
        everything = torch.cat(data.split)
        others = everything[~torch.isin(everything, measured)]
        if not all_files:
            others = spread(others, max(CHECKED_FILES - len(measured), 0))
    first, second = (list(batches_from(part, BATCH_SAMPLES)) for part in (measured, others))
    batches = loader.batches(Request(batch.tolist(), tolerant=True) for batch in [*first, *second])
    broken: list[BrokenFile] = []

    def take(batch: Batch) -> None:
        broken.extend(BrokenFile(data.source.name(index), reason) for index, reason in batch.broken)
        advance(len(batch.indices) + len(batch.broken))

    def inputs() -> Iterator[Tensor]:
        for batch in itertools.islice(batches, len(first)):
            take(batch)
            if len(batch.indices):
                yield to_device(batch.images, device)

    with terminal.track("first look at the images", len(measured) + len(others)) as advance:
        if measure:
            standardise(module, inputs())
        for batch in batches:
            take(batch)
    return broken


def leave_out_broken(data: Data, broken: list[BrokenFile], skip_broken: bool, terminal: Terminal) -> Data:
    """The data without its broken images, if that is wanted.

    Raises:
        RunError: it is not; names them.
    """
    if not broken:
        return data
    shown = [f"  {file.reason}" for file in broken[:SHOWN_FILES]]
    if len(broken) > SHOWN_FILES:
        shown.append(f"  ... and {len(broken) - SHOWN_FILES} more")
    if not skip_broken:
        lines = "\n".join(shown)
        raise RunError(
            f"{len(broken)} broken image(s): repair or remove them, or leave them out with --skip-broken\n{lines}"
        )
    terminal.say("\n".join([f"left out, {len(broken)} broken image(s):", *shown]))
    return data.leave_out([file.name for file in broken])
