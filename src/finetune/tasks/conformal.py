"""Intervals for numbers that are predicted, out of residuals on samples that were not trained on."""

import math

from torch import Tensor

# Share of true numbers that an interval is to hold.
COVERAGE = 0.9


def half_width_of(residuals: Tensor) -> float:
    """Half the width of an interval that holds a new sample's number with probability `COVERAGE`, by split conformal
    prediction: Lei et al., "Distribution-free predictive inference for regression", JASA 113, 2018.

    Args:
        residuals: (samples,) of samples like the new one, which the model was not trained on.

    Returns:
        0 where they are too few to promise that.
    """
    place = math.ceil((len(residuals) + 1) * COVERAGE)
    if place > len(residuals):
        return 0.0
    return residuals.abs().sort().values[place - 1].item()
