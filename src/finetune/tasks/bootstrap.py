"""What figures of few samples are worth: intervals of 95 %, by drawing the samples again and again.

B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979; ends are percentiles.
"""

import numpy as np
from numpy.typing import NDArray

from finetune.tasks.metrics import macro_f1_of

Interval = tuple[float, float]
ENDS = (2.5, 97.5)
MOST_DRAWS, LEAST_DRAWS = 1_000, 50
# Numbers that may be drawn in all (some 30 ms), and at once.
NUMBERS, AT_ONCE = 4_000_000, 1_000_000
SEED = 0


def _draws(numbers: int) -> int:
    return max(LEAST_DRAWS, min(MOST_DRAWS, NUMBERS // max(numbers, 1)))


def _interval(values: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(values, ENDS).tolist()
    return low, high


def of_mean(values: NDArray[np.float32]) -> Interval:
    """Of the mean of a figure that each sample has, as a loss.

    Args:
        values: (samples,) finite numbers.
    """
    generator, count = np.random.default_rng(SEED), len(values)
    left, means = _draws(count), list[NDArray[np.float64]]()
    while left > 0:
        rows = min(left, max(AT_ONCE // count, 1))
        means.append(values[generator.integers(0, count, (rows, count))].mean(1, dtype=np.float64))
        left -= rows
    return _interval(np.concatenate(means))


def of_macro_f1(matrix: NDArray[np.int64]) -> Interval:
    """Of the macro F1 of one class a sample.

    Args:
        matrix: (classes, classes): how often a true class (row) was taken for another (column).
    """
    true, predicted = matrix.nonzero()
    counts, right = matrix[true, predicted], true == predicted
    # How often a pair is drawn takes some four times as long as which sample is.
    draws = _draws(4 * len(counts))
    drawn = np.random.default_rng(SEED).multinomial(counts.sum(), counts / counts.sum(), size=draws)

    def by_class(classes: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.stack([np.bincount(classes, weights=row, minlength=len(matrix)) for row in columns])

    hits = by_class(true[right], drawn[:, right])
    return _interval(macro_f1_of(hits, by_class(predicted, drawn), by_class(true, drawn)))


def of_macro_f1_of_several(predicted: NDArray[np.bool_], actual: NDArray[np.bool_]) -> Interval:
    """Of the macro F1 of several classes a sample.

    Args:
        predicted, actual: (samples, classes).
    """
    count = len(predicted)
    parts = [part.astype(np.float32) for part in (predicted & actual, predicted, actual)]
    drawn = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=_draws(predicted.size))
    weights = drawn.astype(np.float32)
    return _interval(macro_f1_of(*(weights @ part for part in parts)))
