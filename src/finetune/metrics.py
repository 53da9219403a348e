"""Classification figures from one confusion matrix."""

import torch
from torch import Tensor


def confusion_matrix(predicted: Tensor, targets: Tensor, class_count: int) -> Tensor:
    """(classes, classes) int64: rows are true classes, columns predicted ones.

    Args:
        predicted, targets: (batch,) int64.
    """
    return torch.bincount(targets * class_count + predicted, minlength=class_count**2).view(class_count, class_count)


def accuracy(confusion: Tensor) -> float:
    """Share of samples on the diagonal."""
    return confusion.diagonal().sum().item() / max(confusion.sum().item(), 1)


def per_class_f1(confusion: Tensor) -> Tensor:
    """(classes,) float64: harmonic mean of precision and recall; 0 for a class never met and never predicted."""
    hits = confusion.diagonal().double()
    return 2 * hits / (confusion.sum(0) + confusion.sum(1)).clamp(min=1)


def macro_f1(confusion: Tensor) -> float:
    """Mean of the per-class F1 over the classes that occur among targets or predictions."""
    met = (confusion.sum(0) + confusion.sum(1)) > 0
    return per_class_f1(confusion)[met].mean().item()
