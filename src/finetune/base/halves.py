"""What to do when something does not fit into memory: less at once."""

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from finetune.base.allocator import give_back
from finetune.errors import RunError, is_out_of_memory, one_line

Result = TypeVar("Result")


def free_memory(device: torch.device) -> None:
    """Give back what nothing uses any more, and what the device's allocator holds in reserve."""
    gc.collect()
    give_back()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def freeing(device: torch.device, say: Callable[[str], None]) -> Callable[[str], None]:
    """What `in_halves` is to call: let go of what can be, and say what follows."""

    def free_and_say(text: str) -> None:
        free_memory(device)
        say(text)

    return free_and_say


def _generators() -> tuple[Tensor, list[Tensor]]:
    """The state of those that a forward pass draws from: the CPU's, and those of all CUDA devices if any is used."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def in_halves(
    compute: Callable[[int], Result],
    samples: int,
    halvings: int,
    say: Callable[[str], None],
    changed: Sequence[Tensor] = (),
    least: int = 1,
    note: str = "",
) -> tuple[Result, int]:
    """Compute over `samples` samples, halving what is held in memory at once until it fits.

    Args:
        compute: halvings -> result; called again after it ran out of memory, with torch's generators as they were.
        halvings: to begin with.
        changed: tensors that it changes as it goes (statistics of BatchNorm); put back before it is called again.
        least: samples that it needs at once.
        note: what else a person should know of a halving.

    Returns:
        (result, halvings that it took).

    Raises:
        RunError: not even one sample at a time fits, or so few as it needs.
    """
    generators, before = _generators(), [tensor.clone() for tensor in changed]
    while True:
        try:
            return compute(halvings), halvings
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason, words = type(error).__name__, one_line(error)
        # Behind the handler: as long as it runs, the error holds on to everything that the failed attempt had made.
        size = max(least, samples >> halvings)
        if size == least:
            few = "one sample" if least == 1 else f"{least} samples, and BatchNorm learns from no fewer,"
            raise RunError(
                f"out of memory ({reason}) with {few} at a time; give a smaller --image-size or --max-length, "
                "another --backbone, --precision bf16, or a device with more memory",
                [words],
            )
        halvings += 1
        # How far the failed attempt came must not show in what dropout draws.
        torch.set_rng_state(generators[0])
        if generators[1]:
            torch.cuda.set_rng_state_all(generators[1])
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        say(f"out of memory ({reason}) at {size} samples at once: {max(least, samples >> halvings)} from here on{note}")
