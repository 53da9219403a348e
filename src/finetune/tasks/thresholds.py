"""Of several classes a sample: from which output on each class applies, for the best F1.

A half is the best threshold for the fewest mistakes. For F1 it is half of the best F1 that can be had, so a lower one
where a class is rare or hard (Lipton, Elkan and Narayanaswamy, "Optimal thresholding of classifiers to maximize F1
measure", ECML PKDD 2014). Here it is found on samples, by their labels and by their probabilities.
"""

import torch
from torch import Tensor

from finetune.recipe.spec import MultiLabel, Task

# Few labels tell less than probabilities that are honest, many tell more: from so many samples of a class on they count
# for half.
EVEN_SAMPLES = 100
# A class that fewer samples have keeps one half; where the probabilities are not honest, labels alone must do.
LEAST_SAMPLES, LEAST_BY_LABELS = 5, 20
# Parts of the samples: for each the thresholds are found on the others.
PARTS = 5


def best_cuts(outputs: Tensor, targets: Tensor, *, honest: bool) -> Tensor:
    """(classes,) float32: a class applies where its output is larger.

    Args:
        outputs: (samples, classes); 0 = a probability of one half.
        targets: (samples, classes), not 0 where a class applies.
        honest: whether the probabilities say how frequent a class is, as those do not that were trained with weights.
    """
    cuts = torch.zeros(outputs.shape[1])
    for number, (column, is_true) in enumerate(zip(outputs.double().T, (targets != 0).T, strict=True)):
        count = int(is_true.sum())
        if count < (LEAST_SAMPLES if honest else LEAST_BY_LABELS):
            continue
        share = count / (count + EVEN_SAMPLES) if honest else 1.0
        cuts[number] = _best_cut(column, share * is_true + (1 - share) * column.sigmoid())
    return cuts


def _best_cut(outputs: Tensor, truth: Tensor) -> float:
    """In the middle between two neighbours; of those that are equally good the nearest to 0.

    Args:
        truth: (samples,) float64, 0 to 1: how far the class applies.
    """
    values, order = outputs.sort(descending=True)
    hits, taken = truth[order].cumsum(0), torch.arange(1, len(values) + 1)
    f1 = 2 * hits / (taken + truth.sum())
    below = torch.cat([values[1:], values[-1:] - 1])
    f1 = torch.where(below < values, f1, -1.0)  # between two equal outputs there is no cut
    # The cut at 0 takes as many as lie above it: it stands for its whole gap.
    middles = torch.where((below < 0) & (values > 0), 0.0, (values + below) / 2)
    best = (f1 >= f1.max() - 1e-12).nonzero().flatten()
    return float(middles[best[middles[best].abs().argmin()]])


def cross_fitted_cuts(outputs: Tensor, targets: Tensor, *, honest: bool) -> Tensor:
    """(samples, classes): for each sample the cuts that are best on the other parts. With them figures are honest; with
    the best cuts on the very samples they would look better than they are."""
    part = torch.arange(len(outputs)) % PARTS
    cuts = torch.zeros(outputs.shape)
    for number in range(PARTS):
        others = part != number
        cuts[~others] = best_cuts(outputs[others], targets[others], honest=honest)
    return cuts


def thresholds_of(spec: Task, outputs: Tensor, targets: Tensor) -> list[float]:
    """The best probabilities from which on each class applies; [] where one half is meant, or there is one class a
    sample.

    Args:
        outputs, targets: as of `best_cuts`.
    """
    if not has_thresholds(spec):
        return []
    return best_cuts(outputs, targets, honest=is_honest(spec)).sigmoid().tolist()


def cross_fitted_of(spec: Task, outputs: Tensor, targets: Tensor) -> Tensor | None:
    """`cross_fitted_cuts` where `thresholds_of` gives some; else None."""
    return cross_fitted_cuts(outputs, targets, honest=is_honest(spec)) if has_thresholds(spec) else None


def has_thresholds(spec: Task) -> bool:
    return isinstance(spec, MultiLabel) and spec.thresholds == "f1"


def is_honest(spec: Task) -> bool:
    """See `best_cuts`."""
    return isinstance(spec, MultiLabel) and spec.class_weights == "none"
