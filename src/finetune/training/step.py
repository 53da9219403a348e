"""One optimizer step."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from finetune.base.device import to_device
from finetune.errors import RunError, is_out_of_memory
from finetune.tasks.losses import Outputs, Task, training_loss

# What torch says where a normalisation layer learns from one number.
ONE_VALUE_WORDS = "Expected more than 1 value per channel"


def gradients(
    forward: Callable[[Tensor], Outputs],
    task: Task,
    inputs: Tensor,
    targets: Tensor,
    accumulate: int,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    arithmetic: AbstractContextManager[object],
    in_twos: bool,
    halvings: int = 0,
) -> Tensor:
    """Leave the gradient of a batch's mean loss in the parameters.

    Args:
        inputs: of the batch; each part of it goes to the device when it is its turn.
        targets: of the batch, on the device.
        accumulate: forward and backward passes, each over its share of the batch.
        arithmetic: as of `autocast`; entered anew for each.
        in_twos: no share is one sample.
        halvings: each doubles the number of passes. The gradient stays the same but for rounding, and for BatchNorm
            that learns: it does so from each share by itself.

    Returns:
        () the mean loss, on the device.

    Raises:
        RunError: a layer learns statistics, and there is one sample to learn from.
    """
    batch_weight, parts = task.weight(targets), accumulate << halvings
    # Tensors are cut only where there is something to cut: that is a hundredth of a small step.
    pairs = cut_batch(inputs, targets, parts, in_twos) if parts > 1 else [(inputs, targets)]
    part_losses = []
    try:
        # The parts of a batch are weighed by the whole batch, so any number of parts gives the same mean.
        for part_inputs, part_targets in pairs:
            with arithmetic:
                outputs = forward(to_device(part_inputs, targets.device))
            loss = training_loss(task, outputs, part_targets)
            # The mean's gradient, without a node of the graph for the division.
            loss.backward(scaler.scale(_share(batch_weight, loss)))
            part_losses.append(loss.detach() / batch_weight)
    except BaseException as error:
        optimizer.zero_grad(set_to_none=True)  # of some parts only
        if isinstance(error, ValueError) and ONE_VALUE_WORDS in str(error):
            raise RunError(
                "BatchNorm learns here, and a batch, or a part of one by --accumulate, has one sample, of which there "
                "are no statistics; a new run goes on from these weights and leaves none alone: --init-from RUN:latest"
            ) from None
        raise
    return sum(part_losses[1:], start=part_losses[0])


def _share(batch_weight: Tensor | int, loss: Tensor) -> Tensor:
    """() what one sample's loss counts for in the mean."""
    if isinstance(batch_weight, Tensor):
        return torch.ones_like(loss) / batch_weight
    return _share_of_count(batch_weight, loss.device, loss.dtype)


# To make the number anew is a hundredth of a small step.
@functools.lru_cache(maxsize=16)
def _share_of_count(samples: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.ones((), device=device, dtype=dtype) / samples


def count_parts(samples: int, parts: int, in_twos: bool) -> int:
    """Into how many parts a batch is cut, at most.

    Args:
        in_twos: each has two samples or more.
    """
    return min(parts, max(samples // 2, 1)) if in_twos else parts


def cut_batch(inputs: Tensor, targets: Tensor, parts: int, in_twos: bool) -> list[tuple[Tensor, Tensor]]:
    """The parts of a batch."""
    parts = count_parts(len(targets), parts, in_twos)
    if in_twos:
        return list(zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True))
    return list(zip(inputs.chunk(parts), targets.chunk(parts), strict=True))


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
