"""The first look at the data, before the first step: broken samples are found, the head's features are measured."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.base.device import PRECISIONS, autocast, to_device
from finetune.base.signals import StopRequest
from finetune.base.terminal import Terminal
from finetune.data.batch import Batch, Request
from finetune.data.images import without
from finetune.data.order import batches_from
from finetune.data.source import ArraySource
from finetune.data.texts import TextPipeline
from finetune.errors import RunError
from finetune.models.heads import standardise, standardised_layers
from finetune.recipe.spec import PLAIN
from finetune.training.dataset import Data
from finetune.training.phase import Feed
from finetune.training.setup import CHECKED_FILES, Setup

# Enough samples for a mean and a deviation; more would only cost time.
MEASURED_SAMPLES = 2_048
BATCH_SAMPLES = 64
SHOWN_FILES = 10


@dataclass(frozen=True)
class BrokenSample:
    """An image or text that cannot be used, and why."""

    name: str
    reason: str


def spread(indices: Tensor, count: int) -> Tensor:
    """At most `count` of `indices`, evenly spread over them."""
    if len(indices) <= count:
        return indices
    return indices[torch.arange(count) * len(indices) // count]


def look(
    setup: Setup, feed: Feed, *, measure: bool, all_files: bool, terminal: Terminal, stop: StopRequest
) -> list[BrokenSample]:
    """Measure the head's features, and find broken samples. What is kept of both is not read again.

    No augmentation, but where the views of an image are fixed: then the head is measured on the first.

    Args:
        measure: measure what enters the standardised layers of the network.
        all_files: read every file, however many there are.

    Returns:
        The broken ones.

    Raises:
        StoppedEarly: somebody asked for it.
    """
    data, module = setup.data, setup.network.module
    measure &= any(True for _ in standardised_layers(module))
    measured = spread(data.split.train, MEASURED_SAMPLES if measure else 0)
    if feed.features is not None:
        broken = feed.features.broken
        if measure:
            batches = batches_from(without(measured, broken), BATCH_SAMPLES)
            rows = (feed.features.read(batch, measured_view(setup)).to(setup.device) for batch in batches)
            _measure(setup, feed, rows)
        rest = spread_rest(data, torch.cat([data.split.train, data.split.validation]), all_files)
        unread = _read(setup, feed, torch.zeros(0).long(), rest, terminal, stop)
        return [_why_broken(data, index) for index in broken] + unread
    return _read(setup, feed, measured, spread_rest(data, measured, all_files), terminal, stop)


def _measure(setup: Setup, feed: Feed, batches: Iterable[Tensor]) -> None:
    """Measure the head's features as training will see them: in the arithmetic of the run. The plain way does not."""
    module, numerics, way = setup.network.module, setup.numerics, setup.recipe.model.standardisation
    if way == PLAIN:
        standardise(module, batches, feed.forward if feed.is_kept else None, way=way)
        return

    def forward(batch: Tensor) -> object:
        # Around the network only: worker processes that begin while samples are fetched would inherit it.
        with autocast(setup.device, numerics.precision):
            return feed.forward(batch)

    standardise(module, batches, forward, way=way, dtype=PRECISIONS[numerics.of_backbone])


def measured_view(setup: Setup) -> int | None:
    """The view of an image that the head's features are measured on; None = the image as it is."""
    return 0 if setup.recipe.data.views else None


def spread_rest(data: Data, looked_at: Tensor, all_files: bool) -> Tensor:
    """Which samples to look at besides."""
    if isinstance(data.source, ArraySource):
        return torch.zeros(0, dtype=torch.int64)
    everything = torch.cat(data.split)
    rest = everything[~torch.isin(everything, looked_at)]
    if isinstance(data.pipeline, TextPipeline):
        return rest[data.pipeline.is_broken(rest)]
    return rest if all_files else spread(rest, max(CHECKED_FILES - len(looked_at), 0))


def _why_broken(data: Data, index: int) -> BrokenSample:
    """What is wrong with a sample that could not be read when its features were computed."""
    broken = data.pipeline.fetch(Request([index], tolerant=True)).broken
    reason = broken[0][1] if broken else f"{data.source.noun} {data.source.name(index)} could not be read before"
    return BrokenSample(data.source.name(index), reason)


def _read(
    setup: Setup, feed: Feed, measured: Tensor, others: Tensor, terminal: Terminal, stop: StopRequest
) -> list[BrokenSample]:
    """Read samples: those that the head's features are measured on, then others; return the broken ones."""
    data, loader = setup.data, setup.loaders.train
    first, second = (list(batches_from(part, BATCH_SAMPLES)) for part in (measured, others))
    requests = [Request(batch.tolist(), measured_view(setup), tolerant=True) for batch in first]
    requests += [Request(batch.tolist(), tolerant=True) for batch in second]
    if not requests:
        return []
    batches = loader.batches(requests)
    broken: list[BrokenSample] = []

    def take(batch: Batch) -> None:
        if stop.requested:
            raise stop.stopped(f"in the first look at the {data.source.noun}s")
        broken.extend(BrokenSample(data.source.name(index), reason) for index, reason in batch.broken)
        advance(len(batch.indices) + len(batch.broken))

    def inputs() -> Iterator[Tensor]:
        for batch in itertools.islice(batches, len(first)):
            take(batch)
            if len(batch.indices):
                yield to_device(batch.inputs, setup.device)

    with terminal.track(f"first look at the {data.source.noun}s", len(measured) + len(others)) as advance:
        if first:
            _measure(setup, feed, inputs())
        for batch in batches:
            take(batch)
    return broken


def check_unbroken(data: Data, feed: Feed) -> None:
    """Features that were computed again must be of the same samples.

    Raises:
        RunError: a sample that could be read when the run began cannot be read now.
    """
    if feed.features is None:
        return
    broken = torch.tensor(feed.features.broken, dtype=torch.int64)
    for index in broken[torch.isin(broken, torch.cat([data.split.train, data.split.validation]))].tolist():
        raise RunError(f"{_why_broken(data, index).reason}, though it could be read when the run began")


def leave_out_broken(data: Data, broken: list[BrokenSample], skip_broken: bool, terminal: Terminal) -> Data:
    """The data without its broken samples, if that is wanted.

    Raises:
        RunError: it is not; names them.
    """
    if not broken:
        return data
    noun = data.source.noun
    shown = [f"  {file.reason}" for file in broken[:SHOWN_FILES]]
    if len(broken) > SHOWN_FILES:
        shown.append(f"  ... and {len(broken) - SHOWN_FILES} more")
    if not skip_broken:
        first = broken[0].reason.rpartition("; ")[0]
        more = "" if len(broken) == 1 else f", and {len(broken) - 1} more"
        raise RunError(
            f"{len(broken)} broken {noun}(s): {first}{more}; repair or remove them, or leave them out: --skip-broken",
            shown if more else (),
        )
    terminal.say("\n".join([f"left out, {len(broken)} broken {noun}(s):", *shown]))
    return data.leave_out([file.name for file in broken])
