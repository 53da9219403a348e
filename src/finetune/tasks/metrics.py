"""Classification figures from counts: one confusion matrix, or hits and misses by class."""

from dataclasses import dataclass

import torch
from torch import Tensor

CALIBRATION_BINS = 15


def confusion_matrix(predicted: Tensor, targets: Tensor, class_count: int) -> Tensor:
    """(classes, classes) int64: rows are true classes, columns predicted ones.

    Args:
        predicted, targets: (batch,) int64.
    """
    return torch.bincount(targets * class_count + predicted, minlength=class_count**2).view(class_count, class_count)


def accuracy(confusion: Tensor) -> float:
    """Share of samples on the diagonal."""
    return confusion.diagonal().sum().item() / max(confusion.sum().item(), 1)


@dataclass(frozen=True)
class ClassCounts:
    """By class, (classes,) int64: how often it was predicted rightly, predicted at all, and true."""

    hits: Tensor
    predicted: Tensor
    actual: Tensor

    @classmethod
    def of_confusion(cls, confusion: Tensor) -> "ClassCounts":
        return cls(confusion.diagonal(), confusion.sum(0), confusion.sum(1))

    def precision(self) -> Tensor:
        """(classes,) float64; 0 for a class never predicted."""
        return self.hits.double() / self.predicted.clamp(min=1)

    def recall(self) -> Tensor:
        """(classes,) float64; 0 for a class never met."""
        return self.hits.double() / self.actual.clamp(min=1)

    def f1(self) -> Tensor:
        """(classes,) float64: harmonic mean of precision and recall; 0 for a class never met and never predicted."""
        return 2 * self.hits.double() / (self.predicted + self.actual).clamp(min=1)

    def macro_f1(self) -> float:
        """Mean of the F1 over the classes that occur among targets or predictions."""
        met = (self.predicted + self.actual) > 0
        return self.f1()[met].mean().item() if met.any() else 0.0


class Calibration:
    """Expected calibration error: how far confidence is from the share of hits, over bins of equal width.

    Guo et al., "On calibration of modern neural networks", ICML 2017, with its 15 bins.
    """

    def __init__(self, device: torch.device):
        # Whole numbers, confidence in millionths: a float32 sum stops growing at 16 million, and MPS has no float64.
        self.sums = torch.zeros(CALIBRATION_BINS, 3, dtype=torch.int64, device=device)

    def add(self, confidence: Tensor, correct: Tensor) -> None:
        """Take decisions.

        Args:
            confidence: (decisions,) probability of what was decided, 0..1.
            correct: (decisions,) whether it was right.
        """
        confidence = confidence.nan_to_num(0.0)  # of a network that has left the numbers: the loss says so
        bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
        rows = torch.stack([torch.ones_like(bins), (confidence * 1e6).round().long(), correct.long()], dim=1)
        self.sums.index_add_(0, bins, rows)

    def error(self) -> float:
        """Between 0 (perfect) and 1."""
        count, confidence, correct = self.sums.cpu().double().unbind(1)
        return ((confidence / 1e6 - correct).abs().sum() / count.sum().clamp(min=1)).item()

    def table(self) -> list[dict[str, float]]:
        """A row a bin that holds something: count, mean confidence, share of hits."""
        rows = []
        for count, confidence, correct in self.sums.tolist():
            if count:
                rows.append({"count": count, "confidence": confidence / 1e6 / count, "accuracy": correct / count})
        return rows
