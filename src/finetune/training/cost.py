"""What an epoch costs where the backbone runs in each: tried on inputs of no meaning, for people only."""

import math
import time
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from finetune.base.device import autocast, to_device
from finetune.base.formatting import seconds_text
from finetune.models.freeze import in_eval
from finetune.store.state import generators_put_back
from finetune.tasks.losses import Outputs
from finetune.training.setup import Setup

TRIED_SAMPLES, TRIALS = 4, 2
# What takes less is not worth a line.
LEAST_SECONDS = 2.0


def cost_text(setup: Setup, forward: Callable[[Tensor], Outputs]) -> str:
    """What an epoch's computing will take; "" = little, or it cannot be told."""
    seconds, count = 0.0, len(setup.data.split.train)
    with suppress(Exception):  # a forward that is not made for such inputs, or no memory: there is nothing to say
        seconds = _seconds_a_sample(setup, forward) * count
    if seconds < LEAST_SECONDS:
        return ""
    noun = setup.data.source.noun
    return (
        f"an epoch computes about {seconds_text(seconds)} ({count:,} {noun}s, forwards and backwards), beside reading"
    )


def _seconds_a_sample(setup: Setup, forward: Callable[[Tensor], Outputs]) -> float:
    module, device = setup.network.module, setup.device
    inputs = to_device(setup.backbone.preprocessing.example(TRIED_SAMPLES), device)
    trained = [value for value in module.parameters() if value.requires_grad]
    least = math.inf
    with generators_put_back(), in_eval(module):
        for _ in range(TRIALS):  # the first is the slowest
            started = time.perf_counter()
            with autocast(device, setup.numerics.precision):
                outputs = forward(inputs)
            assert isinstance(outputs, Tensor)
            found = torch.autograd.grad(outputs.float().sum(), trained, allow_unused=True)
            sum(one.flatten()[0].item() for one in found if one is not None)  # waits for the device
            least = min(least, time.perf_counter() - started)
    return least / TRIED_SAMPLES
