"""The first look at the data, before the first step: broken samples are found, the head's features are measured."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from finetune.base.device import PRECISIONS, autocast, to_device
from finetune.base.halves import freeing, in_halves
from finetune.base.signals import StopRequest
from finetune.base.terminal import Terminal
from finetune.data.batch import Batch, Request
from finetune.data.copies import digests_of_texts, find_copies, limits_of
from finetune.data.groups import straddling
from finetune.data.images import without
from finetune.data.order import batches_from, spread
from finetune.data.source import ArraySource, TextSource
from finetune.data.texts import TextPipeline
from finetune.errors import RunError
from finetune.features.kept import Features
from finetune.models.heads import standardised_layers
from finetune.models.standardisation import standardise
from finetune.recipe.spec import PLAIN
from finetune.training.advice import of_labels
from finetune.training.dataset import Data
from finetune.training.phase import Feed
from finetune.training.setup import CHECKED_FILES, Setup

# Enough samples for a mean and a deviation; more would only cost time.
MEASURED_SAMPLES = 2_048
BATCH_SAMPLES = 64
SHOWN_FILES = 10
# Samples of so nearly the same features are near copies: of different digits, letters or photos hardly any two are so
# near, of a picture that was saved again, or scaled, most are. Above the second they are copies outright.
NEAR_COSINE, SAME_COSINE = 0.98, 0.999_999
# So many are compared: a second or two.
NEAR_TRAIN, NEAR_VALIDATION = 20_000, 2_000
Result = TypeVar("Result")


@dataclass(frozen=True)
class BrokenSample:
    """An image or text that cannot be used, and why."""

    name: str
    reason: str


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
            in_parts(setup, terminal, partial(_measure_rows, setup, feed, without(measured, broken)))
        rest = spread_rest(data, torch.cat([data.split.train, data.split.validation]), all_files)
        unread = in_parts(setup, terminal, partial(_read, setup, feed, torch.zeros(0).long(), rest, terminal, stop))
        used = set(torch.cat(data.split).tolist())  # of those that somebody marked nobody wants to hear
        return [_why_broken(data, index) for index in broken if index in used] + unread
    rest = spread_rest(data, measured, all_files)
    return in_parts(setup, terminal, partial(_read, setup, feed, measured, rest, terminal, stop))


def in_parts(setup: Setup, terminal: Terminal, compute: Callable[[int], Result]) -> Result:
    """Look at `BATCH_SAMPLES` at once, or at fewer where memory runs out.

    Args:
        compute: samples at once -> result.
    """

    def attempt(halvings: int) -> Result:
        if halvings:
            setup.loaders.train.close()  # what it fetched ahead is not asked for again
        return compute(max(1, BATCH_SAMPLES >> halvings))

    note = "; the first look begins anew"
    return in_halves(attempt, BATCH_SAMPLES, 0, freeing(setup.device, terminal.say), note=note)[0]


def _measure_rows(setup: Setup, feed: Feed, measured: Tensor, at_once: int) -> None:
    """Measure the head's features on kept rows."""
    features = feed.features
    assert features is not None
    batches = batches_from(measured, at_once)
    rows = (features.read(batch, measured_view(setup)).to(setup.device) for batch in batches)
    _measure(setup, feed, rows)


def _measure(setup: Setup, feed: Feed, batches: Iterable[Tensor]) -> None:
    """Measure the head's features as training will see them: in the arithmetic of the run. The plain way does not."""
    module, numerics, way = setup.network.module, setup.numerics, setup.recipe.model.standardisation
    if way == PLAIN:
        standardise(module, batches, feed.forward if feed.is_kept else None, way=way)
        return

    def forward(inputs: Tensor) -> object:
        # Around this alone: samples are fetched in between, and worker processes would begin in such arithmetic.
        with autocast(setup.device, numerics.precision):
            return feed.forward(inputs)

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
    noun, name = data.source.noun, data.source.name(index)
    reason = f"{noun} {name} could not be read when its features were computed; to read it again: finetune cache clear"
    reason = broken[0][1] if broken else reason
    return BrokenSample(data.source.name(index), reason)


def _read(
    setup: Setup,
    feed: Feed,
    measured: Tensor,
    others: Tensor,
    terminal: Terminal,
    stop: StopRequest,
    at_once: int,
) -> list[BrokenSample]:
    """Read samples: those that the head's features are measured on, then others; return the broken ones."""
    data, loader = setup.data, setup.loaders.train
    first, second = (list(batches_from(part, at_once)) for part in (measured, others))
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
        raise RunError(
            f"{_why_broken(data, index).reason}, though it could be read when the run began; bring it back as it was"
        )


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


# ---- Samples that are not what they seem: copies, and what belongs together on two sides ---------------------------


def check_copies(setup: Setup, feed: Feed) -> Data:
    """Look for copies among the samples whose content is known, and for groups on both sides of the split.

    Returns:
        The data with a note of what was found; without the copies, if that is wanted.
    """
    data, source = setup.data, setup.data.source
    if isinstance(source, ArraySource):  # ships with the kit, and is known
        return data
    digests = known_digests(setup)
    copies = find_copies(digests, source.targets, data.split)
    notes = copies.notes(source, limits_of(digests, data.split))
    if setup.recipe.data.drop_duplicates and copies.dropped:
        names = [source.name(index) for index in copies.dropped]
        data = data.leave_out(names)
        # What was advised has been done.
        notes = [note.rpartition(":")[0] for note in notes]
        notes.append(f"{len(names):,} {source.noun}(s) left out as copies (--drop-duplicates), like {names[0]}")
    notes += [*notes_on_groups(data), *of_labels(data, setup.recipe)]
    if feed.features is not None:
        notes += near_copies(feed.features, data, measured_view(setup))
    return data.with_source(dataclasses.replace(source, notes=(*source.notes, *notes))) if notes else data


def known_digests(setup: Setup) -> Tensor:
    """(samples,) int64 by content, as far as samples were read; 0 = not known."""
    source = setup.data.source
    return digests_of_texts(source) if isinstance(source, TextSource) else setup.loaders.train.contents.digests


def notes_on_groups(data: Data) -> list[str]:
    """What to say of groups on both sides of the split."""
    groups, noun = data.source.groups, data.source.noun
    count = 0 if groups is None else straddling(groups, data.split)
    if not count:
        return []
    return [
        f"{count:,} group(s) have {noun}s in more than one part that the data brings along: figures will be better "
        "than the model is; divide the data anew, or leave the parts to be drawn"
    ]


def near_copies(features: Features, data: Data, view: int | None) -> list[str]:
    """What to say of samples that validate whose features nearly equal those of one that is trained on."""
    pairs = near_pairs(features, data, view)
    if not pairs:
        return []
    (judged, known, likeness), name, source = pairs[0], data.source.name, data.source
    advice = "if they belong together, --group-column or --group-by keeps them on one side"
    if source.parts is not None:
        advice = "if they belong together, figures will be better than the model is"
    looked_at = min(len(data.split.validation), NEAR_VALIDATION)
    return [
        f"{len(pairs):,} of {looked_at:,} {source.noun}s that validate are near to one that is trained on, like "
        f"{name(judged)} and {name(known)} (cosine of features {likeness:.3f}): {advice}"
    ]


def near_pairs(features: Features, data: Data, view: int | None) -> list[tuple[int, int, float]]:
    """(sample that validates, the nearest that is trained on, cosine) of those that are near copies, nearest first.

    Features are centred first: what all samples have in common says nothing of two of them.
    """
    train, validation = spread(data.split.train, NEAR_TRAIN), spread(data.split.validation, NEAR_VALIDATION)
    if not len(train) or not len(validation):
        return []
    known, judged = features.read(train, view).float(), features.read(validation, None).float()
    centre = known.mean(0)
    known, judged = (functional.normalize(rows - centre, dim=1) for rows in (known, judged))
    best = [part.max(1) for part in (judged_rows @ known.T for judged_rows in judged.split(BATCH_SAMPLES))]
    likeness, places = (torch.cat(parts) for parts in zip(*best, strict=True))
    near = ((likeness >= NEAR_COSINE) & (likeness < SAME_COSINE)).nonzero().squeeze(1)
    order = near[likeness[near].argsort(descending=True, stable=True)].tolist()
    return [(int(validation[one]), int(train[places[one]]), likeness[one].item()) for one in order]
