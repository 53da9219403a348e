"""How strongly a solved head is held back: by cross-validation, from strong to weak, until that no longer helps."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.store.finish_state import Finish, Tried
from finetune.training.solver import Loss, Rows, solve

# From strong to weak, in half powers of ten. It ends where the loss has risen so often in a row: the minimum is behind.
STRONGEST, WEAKEST, STEP = 10.0, 1e-8, math.sqrt(10)
RISES = 2
# How far above its minimum an objective may end: of a fold, of the last head.
FOLD_TOLERANCE, LAST_TOLERANCE = 1e-6, 1e-9
# Of Newton's method for a temperature.
TEMPERATURE_STEPS, WIDEST_STEP = 50, 2.0


def next_strength(finish: Finish) -> float | None:
    """The one to try; None = enough were."""
    if not finish.tried:
        return STRONGEST
    rises = len(finish.tried) - 1 - finish.tried.index(finish.best)
    strength = finish.tried[-1]["strength"] / STEP
    return None if rises >= RISES or strength < WEAKEST else strength


@dataclass(frozen=True)
class Held:
    """Rows, what they are to give, and which are held out when.

    Attributes:
        loss: over all rows alike.
        targets: (samples, outputs) as they are; those of `loss` may be smoothed.
        folds: (samples,) int64: the fold that holds a row out; -1 = none does.
        numbers: of the folds.
    """

    rows: Rows
    loss: Loss
    targets: Tensor
    folds: Tensor
    numbers: tuple[int, ...]

    def loss_without(self, fold: int) -> Loss:
        """The loss over all rows but those of a fold."""
        kept = (self.folds != fold).float().unsqueeze(1)
        return dataclasses.replace(self.loss, weights=self.loss.weights * kept)

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


def _on_one_core_each(work: Callable[[int], Tensor], items: Sequence[int], workers: int) -> list[Tensor]:
    """Work in threads of their own: the bits are the same for any number of them."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)  # some libraries count threads for the whole process


def try_next(finish: Finish, held: Held, workers: int) -> Tried:
    """Solve every fold at the next strength, from where the one before ended."""
    strength = next_strength(finish)
    assert strength is not None
    shape = len(held.numbers), held.loss.targets.shape[1], held.rows.rows.shape[1]
    before = finish.weights if len(finish.weights) else torch.zeros(shape, dtype=torch.float64)

    def solve_fold(place: int) -> Tensor:
        return solve(held.rows, held.loss_without(held.numbers[place]), strength, before[place], FOLD_TOLERANCE)

    weights = torch.stack(_on_one_core_each(solve_fold, range(len(held.numbers)), workers))
    places, outputs = held.held_out(weights)
    targets, folds, kind = held.targets[places], held.folds[places], held.loss.kind
    shares = held.loss.weights[places].flatten().double()
    temperature = temperature_of(outputs, targets, kind, shares, held.loss.offset)
    losses = sample_losses(outputs / temperature, targets, kind, held.loss.offset) * shares

    def mean(chosen: Tensor) -> float:
        return (losses[chosen].sum() / shares[chosen].sum()).item()

    found = Tried(
        strength=strength,
        log_loss=mean(places >= 0),
        temperature=temperature,
        fold_losses=[mean(folds == number) for number in held.numbers],
    )
    finish.tried.append(found)
    finish.weights = weights
    if finish.best is found:
        finish.best_weights = weights
    return found


def solve_all(held: Held, finish: Finish) -> Tensor:
    """(outputs, directions + 1): the head of all rows, at the best strength."""
    start, strength = finish.best_weights.mean(0), finish.best["strength"]
    (weight,) = _on_one_core_each(lambda _: solve(held.rows, held.loss, strength, start, LAST_TOLERANCE), [0], 1)
    return weight


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

    Of each target one share in samples + 2 is spread over the classes (as in Platt, "Probabilistic outputs for support
    vector machines", 1999): else, where every sample is right, the least loss would be at zero.

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
        if abs(new - inverse) <= 1e-9 * inverse:
            break
        inverse = new
    return 1 / inverse
