"""What figures of few samples are worth: intervals of 95 %, by drawing the samples again and again.

B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979; ends are percentiles.
"""

import numpy as np
from numpy.typing import NDArray

from finetune.tasks.metrics import macro_f1_of

Interval = tuple[float, float]
ENDS = (2.5, 97.5)
MOST_DRAWS, LEAST_DRAWS = 1_000, 50
# Numbers that may be drawn in all: a tenth of a second.
NUMBERS = 4_000_000
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
    means = [values[generator.integers(0, count, count)].mean(dtype=np.float64) for _ in range(_draws(count))]
    return _interval(np.array(means))


def of_macro_f1(matrix: NDArray[np.int64]) -> Interval:
    """Of the macro F1 of one class a sample.

    Args:
        matrix: (classes, classes): how often a true class (row) was taken for another (column).
    """
    true, predicted = matrix.nonzero()
    counts, right = matrix[true, predicted], true == predicted
    drawn = np.random.default_rng(SEED).multinomial(counts.sum(), counts / counts.sum(), size=_draws(len(counts)))

    def by_class(classes: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
        found = np.zeros((len(columns), len(matrix)))
        np.add.at(found.T, classes, columns.T)
        return found

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
