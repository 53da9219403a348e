"""One optimizer step, and what to do when it does not fit into memory."""

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from finetune.base.device import autocast
from finetune.errors import RunError, is_out_of_memory
from finetune.tasks.losses import Outputs, Task, training_loss

Result = TypeVar("Result")


def gradients(
    forward: Callable[[Tensor], Outputs],
    task: Task,
    inputs: Tensor,
    targets: Tensor,
    accumulate: int,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: str,
    halvings: int = 0,
) -> Tensor:
    """Leave the gradient of a batch's mean loss in the parameters.

    Args:
        inputs, targets: of the batch, on the device.
        accumulate: forward and backward passes, each over its share of the batch.
        halvings: each doubles that number; the gradient stays the same but for rounding.

    Returns:
        () the mean loss, on the device.
    """
    batch_weight, parts = task.weight(targets), accumulate << halvings
    # Tensors are cut only where there is something to cut: that is a hundredth of a small step.
    pairs = zip(inputs.chunk(parts), targets.chunk(parts), strict=True) if parts > 1 else [(inputs, targets)]
    part_losses = []
    try:
        # The parts of a batch are weighed by the whole batch, so any number of parts gives the same mean.
        for part_inputs, part_targets in pairs:
            with autocast(inputs.device, precision):
                outputs = forward(part_inputs)
            loss = training_loss(task, outputs, part_targets)
            # The mean's gradient, without a node of the graph for the division.
            loss.backward(scaler.scale(torch.ones_like(loss) / batch_weight))
            part_losses.append(loss.detach() / batch_weight)
    except BaseException:
        optimizer.zero_grad(set_to_none=True)  # of some parts only
        raise
    return sum(part_losses[1:], start=part_losses[0])


def gradient_norm(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> Tensor:
    """() the length of the whole gradient, before it is clipped."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm / scaler.get_scale() if scaler.is_enabled() else norm


def optimizer_step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_norm: float) -> bool:
    """Move the weights along their gradients.

    Args:
        clip_norm: largest norm of the whole gradient; 0 = any.

    Returns:
        False where fp16 skipped the step: the gradient was too large for its numbers, and will be scaled less.

    Raises:
        RunError: out of memory; some weights have moved already, so there is no second attempt.
    """
    scale = scaler.get_scale()
    try:
        if clip_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_norm)
        scaler.step(optimizer)
        scaler.update()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            "out of memory in the optimizer's own step, where fewer samples do not help; the last checkpoint is good: "
            "train fewer layers, give --optimizer sgd, or a device with more memory"
        ) from None
    optimizer.zero_grad(set_to_none=True)
    return scaler.get_scale() >= scale


def free_memory(device: torch.device) -> None:
    """Give back what nothing uses any more, and what the device's allocator holds in reserve."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _generators() -> list[Tensor]:
    """The state of those that a forward pass draws from: the CPU's, and the current CUDA device's if it is used."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def in_halves(
    compute: Callable[[int], Result],
    samples: int,
    halvings: int,
    say: Callable[[str], None],
    changed: Sequence[Tensor] = (),
) -> tuple[Result, int]:
    """Compute over `samples` samples, halving what is held in memory at once until it fits.

    Args:
        compute: halvings -> result; called again after it ran out of memory, with torch's generators as they were.
        halvings: to begin with.
        changed: tensors that it changes as it goes (statistics of BatchNorm); put back before it is called again.

    Returns:
        (result, halvings that it took).

    Raises:
        RunError: not even one sample at a time fits.
    """
    generators, before = _generators(), [tensor.clone() for tensor in changed]
    while True:
        try:
            return compute(halvings), halvings
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = type(error).__name__
        # Behind the handler: as long as it runs, the error holds on to everything that the failed attempt had made.
        size = max(1, samples >> halvings)
        if size == 1:
            raise RunError(
                f"out of memory ({reason}) with one sample at a time; give a smaller --image-size or --max-length, "
                "another --backbone, --precision bf16, or a device with more memory"
            )
        halvings += 1
        # How far the failed attempt came must not show in what dropout draws.
        torch.set_rng_state(generators[0])
        if len(generators) > 1:
            torch.cuda.set_rng_state(generators[1])
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        say(f"out of memory ({reason}) at {size} samples at once: {max(1, samples >> halvings)} from here on")
