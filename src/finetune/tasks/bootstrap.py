"""What figures of few samples are worth: intervals of 95 %, by weighing the samples anew again and again.

- Of a mean: the bootstrap-t (B. Efron and R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 12.5), which
  holds for the skewed losses of a good network where plain percentiles are too narrow.
- Of macro F1: the Bayesian bootstrap (D. B. Rubin, Annals of Statistics 9, 1981) with one mistake more than was seen,
  spread over all classes: else no figure without a mistake would have an interval.
"""

import numpy as np
from numpy.typing import NDArray

from finetune.base.intervals import FEW
from finetune.tasks.metrics import macro_f1_of

Interval = tuple[float, float]
ENDS = (2.5, 97.5)
MOST_DRAWS, LEAST_DRAWS = 1_000, 100
# Numbers that may be drawn in all, and at once.
NUMBERS, AT_ONCE = 4_000_000, 1_000_000
SEED = 0


def _blocks(numbers: int) -> list[int]:
    """How many draws to make at once, again and again.

    Args:
        numbers: that one draw takes.
    """
    draws = max(LEAST_DRAWS, min(MOST_DRAWS, NUMBERS // max(numbers, 1)))
    at_once = max(AT_ONCE // max(numbers, 1), 1)
    return [min(at_once, draws - done) for done in range(0, draws, at_once)]


def of_mean(values: NDArray[np.float32]) -> Interval | None:
    """Of the mean of a figure that each sample has, as a loss; None where few samples cannot tell.

    Args:
        values: (samples,) finite numbers.
    """
    generator, count = np.random.default_rng(SEED), len(values)
    values = values.astype(np.float64)
    mean, error = values.mean(), values.std() / np.sqrt(max(count, 1))
    if count < FEW or not error:
        return None
    parts = []
    for rows in _blocks(count):
        drawn = values[generator.integers(0, count, (rows, count))]
        errors = drawn.std(1) / np.sqrt(count)
        parts.append(((drawn.mean(1) - mean) / np.where(errors > 0, errors, np.nan))[errors > 0])
    low, high = np.percentile(np.concatenate(parts), ENDS)
    return float(mean - high * error), float(mean - low * error)


def of_macro_f1(matrix: NDArray[np.int64]) -> Interval:
    """Of the macro F1 of one class a sample.

    Args:
        matrix: (classes, classes): how often a true class (row) was taken for another (column).
    """
    classes = len(matrix)
    true, predicted = matrix.nonzero()
    met = matrix.sum(0) + matrix.sum(1) > 0
    is_right, counts = true == predicted, matrix[true, predicted]
    generator, found = np.random.default_rng(SEED), list[NDArray[np.float64]]()

    def by_class(places: NDArray[np.int64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([np.bincount(places, row, classes) for row in weights])

    for draws in _blocks(2 * len(counts)):
        weights = generator.gamma(counts, size=(draws, len(counts)))
        hits = by_class(true[is_right], weights[:, is_right])
        missed, added = _one_mistake_more(met, draws, generator)
        found.append(macro_f1_of(hits, by_class(predicted, weights) + added, by_class(true, weights) + missed))
    figure = macro_f1_of(*(row[None].astype(np.float64) for row in (matrix.diagonal(), matrix.sum(0), matrix.sum(1))))
    return _interval(found, float(figure[0]))


def of_macro_f1_of_several(predicted: NDArray[np.bool_], actual: NDArray[np.bool_]) -> Interval:
    """Of the macro F1 of several classes a sample.

    Args:
        predicted, actual: (samples, classes).
    """
    parts = [part.astype(np.float32) for part in (predicted & actual, predicted, actual)]
    met = np.logical_or(predicted, actual).max(axis=0)
    generator, found = np.random.default_rng(SEED), list[NDArray[np.float64]]()
    for draws in _blocks(predicted.size):
        weights = generator.standard_exponential((draws, len(predicted)), dtype=np.float32)
        hits, given, true = (weights @ part for part in parts)
        missed, added = _one_mistake_more(met, draws, generator)
        found.append(macro_f1_of(hits, given + added, true + missed))
    figure = macro_f1_of(*(part.sum(0, keepdims=True) for part in parts))
    return _interval(found, float(figure[0]))


def _one_mistake_more(
    met: NDArray[np.bool_], draws: int, generator: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One mistake, spread over the classes that were met.

    Returns:
        (draws, classes) twice: how much of it each class missed, and how much each was given in another's place.
    """
    share, others = 1 / met.sum(), max(met.sum() - 1, 1)
    missed = generator.gamma(share, size=(draws, len(met))) * met
    return missed, (missed.sum(1, keepdims=True) - missed) / others * met


def _interval(parts: list[NDArray[np.float64]], figure: float) -> Interval:
    """The mistake that was added must not leave the figure itself outside."""
    low, high = np.percentile(np.concatenate(parts), ENDS).tolist()
    return min(low, figure), max(high, figure)
