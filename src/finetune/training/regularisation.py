"""How strongly a solved head is held back: by cross-validation, from strong to weak, until that no longer helps."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.store.finish_state import Finish, Tried
from finetune.tasks.calibration import sample_losses, temperature_of
from finetune.training.solver import Loss, Rows, Span, solve

# From strong to weak, in half powers of ten. It ends where the loss has risen so often in a row: the minimum is behind.
STRONGEST, WEAKEST, STEP = 10.0, 1e-8, math.sqrt(10)
RISES = 2
# How far above its minimum an objective may end: of a fold, of the last head.
FOLD_TOLERANCE, LAST_TOLERANCE = 1e-5, 1e-10


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
        targets: (samples, outputs) as they are; those of `loss` may be smoothed.
        folds: rows that are held out together lie together.
        choosing: the rows that choose the strength; the others have a part in the last head alone.
    """

    rows: Rows
    loss: Loss
    targets: Tensor
    folds: Sequence[Span]
    choosing: Span

    @property
    def held_out(self) -> Span:
        """Rows that are held out by some fold."""
        return Span(self.folds[0].start, self.folds[-1].stop)

    def without(self, fold: int) -> list[Span]:
        """The rows that choose, but for those of a fold."""
        out = self.folds[fold]
        return [Span(self.choosing.start, out.start), Span(out.stop, self.choosing.stop)]

    def outputs_held_out(self, weights: Tensor) -> Tensor:
        """(samples, outputs) float32: of the rows of `held_out`, what the heads give that were solved without them.

        Args:
            weights: (folds, outputs, directions + 1).
        """
        return torch.cat([self.rows.outputs(one, fold) for one, fold in zip(weights, self.folds, strict=True)])


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
    shape = len(held.folds), held.loss.targets.shape[1], held.rows.rows.shape[1] + 1
    before = finish.weights if len(finish.weights) else torch.zeros(shape, dtype=torch.float64)

    def solve_fold(fold: int) -> Tensor:
        return solve(held.rows, held.loss, held.without(fold), strength, before[fold], FOLD_TOLERANCE)

    weights = torch.stack(_on_one_core_each(solve_fold, range(len(held.folds)), workers))
    outputs, targets, kind = held.outputs_held_out(weights), held.held_out.of(held.targets), held.loss.kind
    shares = held.held_out.of(held.loss.weights).flatten().double()
    temperature = temperature_of(outputs, targets, kind, shares, held.loss.offset)
    losses = sample_losses(outputs / temperature, targets, kind, held.loss.offset) * shares
    sizes = [fold.stop - fold.start for fold in held.folds]
    found = Tried(
        strength=strength,
        log_loss=(losses.sum() / shares.sum()).item(),
        temperature=temperature,
        fold_losses=[
            (loss.sum() / share.sum()).item()
            for loss, share in zip(losses.split(sizes), shares.split(sizes), strict=True)
        ],
    )
    finish.tried.append(found)
    finish.weights = weights
    if finish.best is found:
        finish.best_weights = weights
    return found


def solve_all(held: Held, finish: Finish) -> Tensor:
    """(outputs, directions + 1): the head of all rows, at the best strength."""
    start, strength, everything = finish.best_weights.mean(0), finish.best["strength"], Span(0, len(held.targets))

    def solve_last(_: int) -> Tensor:
        return solve(held.rows, held.loss, [everything], strength, start, LAST_TOLERANCE)

    (weight,) = _on_one_core_each(solve_last, [0], 1)
    return weight
