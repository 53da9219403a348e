"""How far a figure can be trusted that few samples gave."""

import math
from collections.abc import Mapping, Sequence

# Of the normal distribution, for 95 of 100.
Z_95 = 1.959963984540054
# So few samples say little of anything.
FEW = 30
# From here on numbers are written with an exponent.
LONG = 1e5


def wilson(hits: int, samples: int) -> tuple[float, float]:
    """The interval that holds the true share with 95 % confidence, after `hits` of `samples`.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.

    Raises:
        ValueError: there are no samples, or more hits than samples.
    """
    if not 0 <= hits <= samples or not samples:
        raise ValueError(f"{hits} of {samples} is no share")
    share, weight = hits / samples, Z_95**2 / samples
    centre = (share + weight / 2) / (1 + weight)
    half = Z_95 * math.sqrt(share * (1 - share) / samples + weight / (4 * samples)) / (1 + weight)
    # Rounding must not leave a share of all or none outside.
    return (0.0 if not hits else max(centre - half, 0.0), 1.0 if hits == samples else min(centre + half, 1.0))


def share_text(share: float, samples: int) -> str:
    """A share of samples with what it is worth, as in "61 of 63, 0.89 to 0.99"."""
    hits = round(share * samples)
    return f"{hits:,} of {samples:,}, {interval_text(*wilson(hits, samples))}"


def worth_text(name: str, value: float, samples: int, intervals: Mapping[str, Sequence[float]]) -> str:
    """What a figure is worth: of accuracy as a share of samples, of others their interval; "" = it has none.

    Args:
        intervals: figure -> (low, high).
    """
    if name not in intervals:
        return ""
    return share_text(value, samples) if name == "accuracy" else interval_text(*intervals[name])


def interval_text(low: float, high: float) -> str:
    """As in "0.89 to 0.99"; with as many decimals as tell the ends apart."""
    if max(abs(low), abs(high)) >= LONG:
        return f"{low:.3g} to {high:.3g}"
    width, decimals = high - low, 2
    while width and width < 10**-decimals and decimals < 6:
        decimals += 1
    return f"{low:.{decimals}f} to {high:.{decimals}f}"
