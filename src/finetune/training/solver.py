"""A linear head on kept rows, solved: the minimum of mean loss + lambda / 2 * |weight|^2.

L-BFGS (J. Nocedal, "Updating quasi-Newton matrices with limited storage", Mathematics of Computation 35, 1980) in the
eigenbasis of the rows' covariance, each coordinate divided by the root of its curvature: there the valley is nearly
round, and some tens of steps do. Rows are float32, everything that is added up float64. All of it runs on the thread
that calls: sums in another order would be other bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

MEMORY = 10
MOST_STEPS = 500
# Of the step's promise, which must be kept at least (Armijo); shorter steps are tried until it is.
KEPT_SHARE, SHORTER, MOST_TRIALS = 1e-4, 0.5, 12
# By this share of a value its rounding may hide what a step gains: there the slope must tell (the approximate Wolfe
# condition of Hager and Zhang, "A new conjugate gradient method with guaranteed descent and an efficient line search",
# SIAM Journal on Optimization 16, 2005).
HIDDEN_SHARE = 1e-7
# Rows that are turned at once; rows x directions x outputs that are computed at once: much beside what a call costs,
# and few enough to stay near the core.
TURNED_ROWS, BLOCK_WORK = 8_192, 50_000_000


class Span(NamedTuple):
    """Rows that lie side by side: from `start` up to, without, `stop`."""

    start: int
    stop: int

    def of(self, rows: Tensor) -> Tensor:
        """Those of `rows`, which are not copied."""
        return rows[self.start : self.stop]

    def blocks(self, count: int) -> "list[Span]":
        """It, in parts of at most `count` rows."""
        return [Span(first, min(first + count, self.stop)) for first in range(self.start, self.stop, count)]


@dataclass(frozen=True)
class Rows:
    """Rows in the eigenbasis of their covariance.

    Attributes:
        rows: (samples, directions) float32.
        directions: (features, directions) float64: their eigenvectors.
        variances: (directions,) float64: their eigenvalues, the largest first.
        mean: (features,) float64.
        deviation: one for all features: the root of their mean variance.
    """

    rows: Tensor
    directions: Tensor
    variances: Tensor
    mean: Tensor
    deviation: float

    def head(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (outputs, features) and bias (outputs,) on rows less `mean`, over `deviation`; float64.

        Args:
            weight: (outputs, directions + 1) as `solve` gives it.
        """
        return weight[:, :-1] @ self.directions.T, weight[:, -1]

    def outputs(self, weight: Tensor, part: Span) -> Tensor:
        """(samples, outputs) float32: what a head gives of a part of the rows.

        Args:
            weight: as of `head`.
        """
        weight = weight.float()
        return torch.addmm(weight[:, -1], part.of(self.rows), weight[:, :-1].T)


def prepared(rows: Tensor) -> Rows:
    """Centre and turn rows; what does not vary is left out.

    Args:
        rows: (samples, features) float32; overwritten: what comes back lies in their memory.
    """
    samples, features = rows.shape
    mean = torch.zeros(features, dtype=torch.float64)
    for block in rows.split(TURNED_ROWS):
        mean += block.sum(0, dtype=torch.float64) / samples
    for block in rows.split(TURNED_ROWS):
        block -= mean.float()
    if samples < features:
        # Fewer directions than features: those of the rows among themselves tell the same.
        inner = torch.zeros(samples, samples, dtype=torch.float64)
        for start in range(0, features, TURNED_ROWS):
            part = rows[:, start : start + TURNED_ROWS]
            inner += part @ part.T
    else:
        inner = torch.zeros(features, features, dtype=torch.float64)
        for block in rows.split(TURNED_ROWS):
            inner += block.T @ block
    # float32 will do, and takes a third of the time: any basis gives the same minimum, this one gives it soon.
    values, vectors = (found.double() for found in torch.linalg.eigh((inner / samples).float()))
    values, vectors = values.flip(0), vectors.flip(1)
    kept = values > values[0].clamp(min=torch.finfo(torch.float32).tiny) * torch.finfo(torch.float32).eps
    values, vectors = values[kept], vectors[:, kept]
    if samples < features:
        vectors = torch.linalg.qr(rows.T @ vectors.float())[0].double()
    deviation = max((values.sum() / features).sqrt().item(), torch.finfo(torch.float32).tiny)
    turn = (vectors / deviation).float()
    for block in rows.split(TURNED_ROWS):
        block[:, : len(values)] = block @ turn
    return Rows(rows[:, : len(values)], vectors, values / deviation**2, mean, deviation)


# ---- Losses: the sum over samples, and how it changes with what the head gives ---------------------------------------


@dataclass(frozen=True)
class Loss:
    """What is minimised.

    Attributes:
        targets: (samples, outputs) float32: shares of classes, yes and no, or numbers.
        weights: (samples, 1) float32: of each sample.
        kind: "classification", "multilabel" or "regression".
        class_weights: (outputs,) of the yes of a multi-label class, or None.
        offset: (outputs,) added to what the head gives, or None.
    """

    targets: Tensor
    weights: Tensor
    kind: str
    class_weights: Tensor | None = None
    offset: Tensor | None = None

    @property
    def curvature(self) -> float:
        """About the mean second derivative with respect to an output."""
        outputs = self.targets.shape[1]
        return {"classification": 1 / outputs, "multilabel": 0.25 / outputs, "regression": 2.0}[self.kind]

    def at(self, outputs: Tensor, part: Span) -> tuple[float, Tensor]:
        """The weighted sum over a part of the samples, and its derivative (samples, outputs).

        Args:
            outputs: (samples, outputs) float32 of that part.
        """
        outputs = outputs if self.offset is None else outputs + self.offset
        targets, weights = part.of(self.targets), part.of(self.weights)
        if self.kind == "classification":
            logs = outputs.log_softmax(1)
            value = -(targets * logs * weights).sum(dtype=torch.float64)
            slope = logs.exp_().mul_(targets.sum(1, keepdim=True)).sub_(targets)
        elif self.kind == "multilabel":
            count = targets.shape[1]
            raw = functional.binary_cross_entropy_with_logits(
                outputs, targets, pos_weight=self.class_weights, reduction="none"
            )
            value = (raw * weights).sum(dtype=torch.float64) / count
            likely, yes = outputs.sigmoid(), targets
            up = yes if self.class_weights is None else yes * self.class_weights
            slope = (likely * (1 - yes + up) - up) / count
        else:
            gap = outputs - targets
            value = (gap.square() * weights).sum(dtype=torch.float64)
            slope = 2 * gap
        return value.item(), slope.mul_(weights)


# ---- The minimum ----------------------------------------------------------------------------------------------------


def solve(rows: Rows, loss: Loss, parts: Sequence[Span], strength: float, start: Tensor, tolerance: float) -> Tensor:
    """(outputs, directions + 1) float64: the weight at the minimum; bias last.

    Args:
        parts: of the rows: those that count.
        strength: lambda.
        start: weight to begin from.
        tolerance: how far above the minimum the objective may end, about.
    """
    directions = rows.rows.shape[1]
    count = max(1, BLOCK_WORK // max(directions * len(start), 1))
    blocks = [block for part in parts for block in part.blocks(count)]
    total = sum(part.of(loss.weights).sum(dtype=torch.float64).item() for part in parts)
    penalty = torch.full((directions + 1,), strength, dtype=torch.float64)
    penalty[-1] = 0.0
    curvature = torch.cat([rows.variances, torch.ones(1, dtype=torch.float64)]) * loss.curvature + penalty
    scale = curvature.rsqrt()

    def objective(point: Tensor) -> tuple[float, Tensor]:
        weight = point * scale
        value, gradient = 0.0, torch.zeros_like(weight)
        for block in blocks:
            block_value, slope = loss.at(rows.outputs(weight, block), block)
            value += block_value
            gradient[:, :-1] += slope.T @ block.of(rows.rows)
            gradient[:, -1] += slope.sum(0)
        gradient = gradient / total + penalty * weight
        return value / total + 0.5 * (penalty * weight.square()).sum().item(), gradient * scale

    return _minimise(objective, start / scale, tolerance) * scale


def _minimise(objective: Callable[[Tensor], tuple[float, Tensor]], point: Tensor, tolerance: float) -> Tensor:
    """L-BFGS. In coordinates of curvature one the squared gradient is twice what is left to gain."""
    value, gradient = objective(point)
    steps, changes = list[Tensor](), list[Tensor]()
    for _ in range(MOST_STEPS):
        if gradient.square().sum().item() <= 2 * tolerance:
            break
        direction = -_times_inverse_curvature(gradient, steps, changes)
        promise = (direction * gradient).sum().item()
        length = 1.0
        for _trial in range(MOST_TRIALS):
            there = point + length * direction
            new_value, new_gradient = objective(there)
            if new_value <= value + KEPT_SHARE * length * promise:
                break
            is_hidden = new_value <= value + HIDDEN_SHARE * abs(value)
            if is_hidden and (direction * new_gradient).sum().item() <= (2 * KEPT_SHARE - 1) * promise:
                break
            length *= SHORTER
        else:  # rounding hides what is left
            break
        step, change = there - point, new_gradient - gradient
        if (step * change).sum().item() > 0:
            steps, changes = [*steps, step][-MEMORY:], [*changes, change][-MEMORY:]
        point, value, gradient = there, new_value, new_gradient
    return point


def _times_inverse_curvature(gradient: Tensor, steps: list[Tensor], changes: list[Tensor]) -> Tensor:
    """The two loops of L-BFGS."""
    found, shares = gradient.clone(), list[float]()
    for step, change in zip(reversed(steps), reversed(changes), strict=True):
        share = ((step * found).sum() / (step * change).sum()).item()
        found -= share * change
        shares.append(share)
    if steps:
        found *= ((steps[-1] * changes[-1]).sum() / changes[-1].square().sum()).item()
    for step, change, share in zip(steps, changes, reversed(shares), strict=True):
        found += (share - ((change * found).sum() / (step * change).sum()).item()) * step
    return found
