"""Classification figures from counts: hits and misses by class, and which class was taken for which."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CALIBRATION_BINS = 15
# A confusion matrix of so many classes takes 8 MB; of ten times as many it would be 800, and most of it zeros.
WHOLE_MATRIX_CLASSES = 1_000
# Of more classes so many samples wait to be counted, and so many kinds of mistake are told apart: 16 MB.
WAITING_SAMPLES, MISTAKE_KINDS = 1_000_000, 1_000_000


@dataclass(frozen=True)
class ClassCounts:
    """By class, (classes,) int64: how often it was predicted rightly, predicted at all, and true."""

    hits: Tensor
    predicted: Tensor
    actual: Tensor

    def accuracy(self) -> float:
        """Share of samples that were predicted rightly, of one class each."""
        return self.hits.sum().item() / max(self.actual.sum().item(), 1)

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


def macro_f1_of(
    hits: NDArray[np.floating], predicted: NDArray[np.floating], actual: NDArray[np.floating]
) -> NDArray[np.float64]:
    """(draws,): the macro F1 of each row, as `ClassCounts.macro_f1` has it.

    Args:
        hits, predicted, actual: (draws, classes): see `ClassCounts`.
    """
    both = (predicted + actual).astype(np.float64)
    f1 = np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0)
    return np.asarray(f1.sum(1) / np.maximum((both > 0).sum(1), 1))


class Confusion:
    """Which class was taken for which, counted batch by batch without making a device wait.

    What a batch costs grows with its samples, and memory with the classes, never with their square: of more than
    `WHOLE_MATRIX_CLASSES` there is no matrix, and mistakes are counted one kind at a time.

    Attributes:
        sums: (3, classes) int64: how often each was predicted rightly, predicted at all, and true.
        matrix: (classes, classes) int64: rows are true classes, columns predicted ones; None = there are too many.
    """

    def __init__(self, class_count: int, device: torch.device):
        self._class_count = class_count
        self.sums = torch.zeros(3, class_count, dtype=torch.int64, device=device)
        self.matrix: Tensor | None = None
        if class_count <= WHOLE_MATRIX_CLASSES:
            self.matrix = torch.zeros(class_count, class_count, dtype=torch.int64, device=device)
        # Of samples, true * classes + predicted; of mistakes, in rising order, with how often each was made.
        self._waiting: list[Tensor] = []
        self._waiting_samples = 0
        self._kinds = self._counts = torch.zeros(0, dtype=torch.int64)

    def add(self, predicted: Tensor, targets: Tensor) -> None:
        """Take a batch.

        Args:
            predicted, targets: (batch,) int64.
        """
        ones, kinds = torch.ones_like(targets), targets * self._class_count + predicted
        self.sums[0].index_add_(0, targets, (predicted == targets).long())
        self.sums[1].index_add_(0, predicted, ones)
        self.sums[2].index_add_(0, targets, ones)
        if self.matrix is not None:
            self.matrix.view(-1).index_add_(0, kinds, ones)
            return
        self._waiting.append(kinds)
        self._waiting_samples += len(kinds)
        if self._waiting_samples >= WAITING_SAMPLES:
            self._count_waiting()

    def _count_waiting(self) -> None:
        """Add up mistakes that wait. Where there are more kinds than are told apart, the rarest are forgotten."""
        kinds = torch.cat([part.cpu() for part in self._waiting])
        kinds = kinds[kinds // self._class_count != kinds % self._class_count]
        found, places = torch.cat([self._kinds, kinds]).unique(return_inverse=True)
        counts = torch.cat([self._counts, torch.ones_like(kinds)])
        counts = torch.zeros_like(found).index_add_(0, places, counts)
        kept = counts.sort(descending=True, stable=True).indices[:MISTAKE_KINDS].sort().values
        self._kinds, self._counts = found[kept], counts[kept]
        self._waiting, self._waiting_samples = [], 0

    def counts(self) -> ClassCounts:
        """On the CPU."""
        return ClassCounts(*self.sums.cpu())

    def mistakes(self, most: int) -> list[list[int]]:
        """[true class, predicted class, how often], the most frequent first."""
        if self.matrix is not None:
            wrong = self.matrix.cpu().clone()
            wrong.fill_diagonal_(0)
            kinds = wrong.view(-1).nonzero().squeeze(1)
            counts = wrong.view(-1)[kinds]
        else:
            if self._waiting:
                self._count_waiting()
            kinds, counts = self._kinds, self._counts
        order = counts.sort(descending=True, stable=True).indices[:most]
        columns = kinds[order] // self._class_count, kinds[order] % self._class_count, counts[order]
        return torch.stack(columns, dim=1).tolist()


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
