"""Probabilities that are honest: one number by which everything that a network gives is divided."""

from typing import TypedDict

import torch
from torch import Tensor

from finetune.tasks.losses import Classifying
from finetune.tasks.metrics import Calibration

# Of Newton's method for a temperature.
TEMPERATURE_STEPS, WIDEST_STEP = 50, 2.0
# Where outputs say nothing of the targets, or the contrary, the least loss is at infinity.
LARGEST_TEMPERATURE = 100.0


def sample_losses(outputs: Tensor, targets: Tensor, kind: str, offset: Tensor | None = None) -> Tensor:
    """(samples,) float64: the loss of each, without weights; arguments as of `Loss`."""
    outputs, targets = outputs.double() + (0 if offset is None else offset), targets.double()
    if kind == "classification":
        return -(targets * outputs.log_softmax(1)).sum(1)
    if kind == "regression":
        return (outputs - targets).square().sum(1)
    return torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)


def temperature_of(
    outputs: Tensor, targets: Tensor, kind: str, shares: Tensor | None = None, offset: Tensor | None = None
) -> float:
    """What to divide outputs by for the least log loss (Guo et al., "On calibration of modern neural networks", ICML
    2017); 1 for numbers. By Newton's method for its inverse, in which the loss is convex.

    Where it is `LARGEST_TEMPERATURE`, outputs say nothing. Of each target one share in samples + 2 is spread over the
    classes (as in Platt, "Probabilistic outputs for support vector machines", 1999): else, where every sample is right,
    the least loss would be at zero.

    Args:
        shares: (samples,) float64: what each sample weighs; None = all the same.
        offset: (outputs,) added to the quotient; None = nothing.
    """
    if kind == "regression":
        return 1.0
    spread = 1 / (len(outputs) + 2)
    outputs = outputs.double()
    targets = targets.double() * (1 - spread) + spread / (targets.shape[1] if kind == "classification" else 2)
    weights = torch.ones(len(outputs), dtype=torch.float64) if shares is None else shares
    inverse = 1.0
    for _ in range(TEMPERATURE_STEPS):
        scaled = outputs * inverse + (0 if offset is None else offset)
        if kind == "classification":
            likely = scaled.softmax(1)
            mean = (likely * outputs).sum(1)
            slope = weights @ (mean - (targets * outputs).sum(1))
            curve = weights @ ((likely * outputs.square()).sum(1) - mean.square())
        else:
            likely = scaled.sigmoid()
            slope = weights @ ((likely - targets) * outputs).sum(1)
            curve = weights @ (likely * (1 - likely) * outputs.square()).sum(1)
        if not curve > 0:
            break
        step = (slope / curve).item()
        new = min(max(inverse - step, inverse / WIDEST_STEP), inverse * WIDEST_STEP)
        new = min(max(new, 1 / LARGEST_TEMPERATURE), LARGEST_TEMPERATURE)
        if abs(new - inverse) <= 1e-9 * inverse:
            break
        inverse = new
    return 1 / inverse


def temperature_that_helps(
    outputs: Tensor, targets: Tensor, kind: str, shares: Tensor | None = None, offset: Tensor | None = None
) -> float:
    """`temperature_of`, but 1 where that does not lower the loss on these very samples: they are those that chose the
    network, and may be too few to know better."""
    found = temperature_of(outputs, targets, kind, shares, offset)
    weights = torch.ones(len(outputs), dtype=torch.float64) if shares is None else shares
    before, after = (weights @ sample_losses(one, targets, kind, offset) for one in (outputs, outputs / found))
    return found if after < before else 1.0


class Calibrated(TypedDict):
    """What a temperature does.

    Attributes:
        temperature: that outputs are divided by.
        loss, calibration_error: before and after.
    """

    temperature: float
    loss: list[float]
    calibration_error: list[float]


def calibrated(
    task: Classifying, outputs: Tensor, targets: Tensor, temperature: float, *, is_divided: bool
) -> Calibrated:
    """What a temperature does to outputs.

    Args:
        is_divided: they are divided by it already.
    """
    before = outputs * temperature if is_divided else outputs
    found = Calibrated(temperature=temperature, loss=[], calibration_error=[])
    for one in (before, before / temperature):
        calibration = Calibration(torch.device("cpu"))
        calibration.add(*task.decisions(one, targets))
        found["loss"].append(task.sample_losses(one, targets).double().mean().item())
        found["calibration_error"].append(calibration.error())
    return found
