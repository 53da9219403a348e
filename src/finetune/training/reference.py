"""At the end of the loop: what the head read of training samples is kept, so that whoever uses the model is told when a
sample is like none of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from finetune.base.device import autocast, to_device
from finetune.base.halves import freeing, in_halves
from finetune.data.batch import Request
from finetune.data.order import batches_from
from finetune.errors import RunError
from finetune.models.freeze import hash_tensors
from finetune.recipe.spec import Distillation
from finetune.tasks.novelty import reference_of, rows_to_keep, watched
from finetune.training.context import RunContext
from finetune.training.data_check import measured_view
from finetune.training.phase import Phase
from finetune.training.setup import Setup

BATCH_SAMPLES = 64


def wants_reference(setup: Setup, phase: Phase) -> bool:
    """Whether there is a head, and enough was seen: of a run of a few steps a pass over the samples would be most of
    its work."""
    is_short = bool(setup.recipe.max_steps) and not phase.feed.is_kept
    return bool(setup.network.head_paths) and not is_short and not isinstance(setup.recipe.task, Distillation)


def keep_reference(
    setup: Setup, phase: Phase, context: RunContext, best_model: dict[str, Tensor], *, is_best: bool
) -> None:
    """Write features of training samples, by the network of the loop's best; nothing where there are too few.

    Args:
        best_model: what trains, of the loop's best; {} = read it from the run's folder.
        is_best: the network is that now.

    Raises:
        StoppedEarly: asked for, while samples were read.
    """
    free = freeing(setup.device, context.watch.say)
    with _weights_of_best(setup, phase, context, best_model, is_best):
        read_by = hash_tensors(setup.network.changeable_before_head(setup.recipe.trainable))
        first, _ = in_halves(partial(_read, setup, phase, context, setup.data.split.train[:1]), 1, 0, free)
        samples = rows_to_keep(setup.data.split.train, first.shape[1])
        rows, _ = in_halves(partial(_read, setup, phase, context, samples), BATCH_SAMPLES, phase.feed.halvings, free)
    reference = reference_of(rows)
    context.save_novelty(b"" if reference is None else reference.to_file(read_by))


@torch.inference_mode()
def _read(setup: Setup, phase: Phase, context: RunContext, samples: Tensor, halvings: int = 0) -> Tensor:
    """(samples, features) float32: what the head reads, of samples as they are."""
    feed = phase.feed
    view, parts = measured_view(setup) if feed.is_kept else None, batches_from(samples, BATCH_SAMPLES >> halvings or 1)
    network = setup.network
    network.module.eval()
    with watched(network.module.get_submodule(network.first_layer_path)) as found:
        for batch in feed.train.batches(Request(part.tolist(), view) for part in parts):
            if context.stop.requested and not feed.is_kept:
                raise context.stop.stopped("in the pass that follows the last step; saved")
            with autocast(setup.device, setup.numerics.precision):
                feed.forward(to_device(batch.inputs, setup.device))
    phase.freeze.modes()
    return torch.cat(found)


@contextmanager
def _weights_of_best(
    setup: Setup, phase: Phase, context: RunContext, best_model: dict[str, Tensor], is_best: bool
) -> Iterator[None]:
    """The network as the loop's best within the block, where what trains lies before the head as well."""
    module, own = setup.network.module, setup.network.changeable_before_head(setup.recipe.trainable)
    if is_best or not own:
        yield
        return
    before = {name: value.detach().clone() for name, value in own.items()}
    try:
        best = best_model or context.read_best().model
    except (RunError, FileNotFoundError):  # where it is wanted, that is said
        best = {}
    module.load_state_dict({name: best.get(name, value) for name, value in before.items()}, strict=False)
    try:
        yield
    finally:
        module.load_state_dict(before, strict=False)
