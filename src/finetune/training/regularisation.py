"""How strongly a solved head is held back: by cross-validation, from strong to weak, until that no longer helps."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.store.finish_state import Finish, Tried
from finetune.tasks.calibration import sample_losses, temperature_of
from finetune.training.solver import Loss, Rows, solve

# From strong to weak, in half powers of ten. It ends where the loss has risen so often in a row: the minimum is behind.
STRONGEST, WEAKEST, STEP = 10.0, 1e-8, math.sqrt(10)
RISES = 2
# How far above its minimum an objective may end: of a fold, of the last head.
FOLD_TOLERANCE, LAST_TOLERANCE = 1e-6, 1e-9


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
