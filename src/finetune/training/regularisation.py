"""How strongly a solved head is held back: by cross-validation, from strong to weak, until that no longer helps."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor

from finetune.training.solver import Loss, Rows, solve

# From strong to weak, in half powers of ten. It ends where the loss has risen so often in a row: the minimum is behind.
STRONGEST, WEAKEST, STEP = 100.0, 1e-8, math.sqrt(10)
RISES = 2
# How far above its minimum an objective may end: of a fold, of the last head.
FOLD_TOLERANCE, LAST_TOLERANCE = 1e-6, 1e-9
# Of Newton's method for a temperature.
TEMPERATURE_STEPS, WIDEST_STEP = 50, 2.0


class Tried(TypedDict):
    """What came of a strength.

    Attributes:
        strength: lambda, of mean loss + lambda / 2 * |weight|^2.
        log_loss: mean over the rows that were held out, after the temperature.
        temperature: that makes it least; 1 where there is none.
        fold_losses: the same by fold.
    """

    strength: float
    log_loss: float
    temperature: float
    fold_losses: list[float]


@dataclass
class Search:
    """How far the search for a strength is; all of it survives a restart.

    Attributes:
        tried: in order.
        weights: (folds, outputs, directions + 1) float64, at the strength that was tried last.
        best_weights: the same at the best so far.
    """

    tried: list[Tried] = field(default_factory=list)
    weights: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    best_weights: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @property
    def best(self) -> Tried:
        return min(self.tried, key=lambda one: one["log_loss"])

    @property
    def next_strength(self) -> float | None:
        """None = it is over."""
        if not self.tried:
            return STRONGEST
        rises = len(self.tried) - 1 - self.tried.index(self.best)
        strength = self.tried[-1]["strength"] / STEP
        return None if rises >= RISES or strength < WEAKEST else strength


@dataclass(frozen=True)
class Held:
    """Rows, what they are to give, and which are held out when.

    Attributes:
        folds: (samples,) int64: the fold that holds a row out; -1 = none does.
        numbers: of the folds.
        loss: over all rows alike.
    """

    rows: Rows
    loss: Loss
    folds: Tensor
    numbers: tuple[int, ...]

    def loss_without(self, fold: int) -> Loss:
        """The loss over all rows but those of a fold."""
        kept = (self.folds != fold).float().unsqueeze(1)
        return Loss(self.loss.targets, self.loss.weights * kept, self.loss.kind, self.loss.class_weights)

    def held_out(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows are held out by some fold, and what that fold's head gives of them.

        Args:
            weights: (folds, outputs, directions + 1).
        """
        places = (self.folds >= 0).nonzero().flatten()
        outputs = torch.zeros(len(places), weights.shape[1])
        for number, weight in zip(self.numbers, weights, strict=True):
            here = self.folds[places] == number
            outputs[here] = self.rows.rows[places[here]] @ weight.float().T
        return places, outputs


@contextmanager
def _folds_side_by_side(workers: int) -> Iterator[Callable[..., list[Tensor]]]:
    """Solve in threads of their own, one core each: the bits are the same for any number of them."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1)) as pool:
        yield lambda work, *items: list(pool.map(work, *items))
    torch.set_num_threads(threads)  # some libraries count threads for the whole process


def try_next(search: Search, held: Held, workers: int) -> Tried:
    """Solve every fold at the next strength, from where the one before ended; the search goes on by it."""
    strength = search.next_strength
    assert strength is not None
    shape = len(held.numbers), held.loss.targets.shape[1], held.rows.rows.shape[1]
    before = search.weights if len(search.weights) else torch.zeros(shape, dtype=torch.float64)

    def solve_fold(number: int, start: Tensor) -> Tensor:
        return solve(held.rows, held.loss_without(number), strength, start, FOLD_TOLERANCE)

    with _folds_side_by_side(workers) as run:
        weights = torch.stack(run(solve_fold, held.numbers, before))
    places, outputs = held.held_out(weights)
    targets, folds = held.loss.targets[places], held.folds[places]
    kind = held.loss.kind
    temperature = temperature_of(outputs, targets, kind)
    losses = sample_losses(outputs / temperature, targets, kind)
    found = Tried(
        strength=strength,
        log_loss=losses.mean().item(),
        temperature=temperature,
        fold_losses=[losses[folds == number].mean().item() for number in held.numbers],
    )
    search.tried.append(found)
    search.weights = weights
    if search.best is found:
        search.best_weights = weights
    return found


def solve_all(held: Held, search: Search) -> Tensor:
    """(outputs, directions + 1): the head of all rows, at the best strength."""
    start = search.best_weights.mean(0)
    with _folds_side_by_side(1) as run:
        (weight,) = run(lambda _: solve(held.rows, held.loss, search.best["strength"], start, LAST_TOLERANCE), [0])
    return weight


def sample_losses(outputs: Tensor, targets: Tensor, kind: str) -> Tensor:
    """(samples,) float64: the plain loss of each; targets as of `Loss`."""
    outputs, targets = outputs.double(), targets.double()
    if kind == "classification":
        return -(targets * outputs.log_softmax(1)).sum(1)
    if kind == "regression":
        return (outputs - targets).square().sum(1)
    return torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)


def temperature_of(outputs: Tensor, targets: Tensor, kind: str) -> float:
    """What to divide outputs by for the least log loss (Guo et al., "On calibration of modern neural networks", ICML
    2017); 1 for numbers. By Newton's method for its inverse, in which the loss is convex."""
    if kind == "regression":
        return 1.0
    outputs, targets = outputs.double(), targets.double()
    inverse = 1.0
    for _ in range(TEMPERATURE_STEPS):
        scaled = outputs * inverse
        if kind == "classification":
            likely = scaled.softmax(1)
            mean = (likely * outputs).sum(1)
            slope = (mean - (targets * outputs).sum(1)).sum()
            curve = ((likely * outputs.square()).sum(1) - mean.square()).sum()
        else:
            likely = scaled.sigmoid()
            slope = ((likely - targets) * outputs).sum()
            curve = (likely * (1 - likely) * outputs.square()).sum()
        if not curve > 0:
            break
        step = (slope / curve).item()
        new = min(max(inverse - step, inverse / WIDEST_STEP), inverse * WIDEST_STEP)
        if abs(new - inverse) <= 1e-9 * inverse:
            break
        inverse = new
    return 1 / inverse
