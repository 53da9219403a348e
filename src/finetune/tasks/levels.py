"""Numbers that are steps of a scale, as stars, grades and scores are: 1, 2, 3, 4, 5."""

import torch
from torch import Tensor

MOST_LEVELS, FEWEST_LEVELS, SAMPLES_A_LEVEL = 21, 3, 2


def levels_of(numbers: Tensor) -> list[float]:
    """The steps that numbers to predict are, the lowest first; [] where they are none: too many, or not evenly apart.

    Args:
        numbers: (samples,) of the training part, in their own unit.
    """
    # By the shortest decimals that tell them apart: a 0.1 of float32 is no 0.10000000149.
    levels = torch.tensor([float(str(one)) for one in numbers.unique().numpy()], dtype=torch.float64)
    if not FEWEST_LEVELS <= len(levels) <= MOST_LEVELS or len(numbers) < SAMPLES_A_LEVEL * len(levels):
        return []
    steps = levels.diff()
    is_even = bool((steps - steps[0]).abs().max() <= 1e-6 * steps[0].abs())
    return [float(one) for one in levels.tolist()] if is_even else []


def nearest_level(numbers: Tensor, levels: list[float]) -> Tensor:
    """(samples,) float64: for each number the level that it is nearest to."""
    steps = torch.tensor(levels, dtype=torch.float64)
    return steps[(numbers.double().unsqueeze(1) - steps).abs().argmin(1)]
