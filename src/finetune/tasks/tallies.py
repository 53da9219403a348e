"""Figures of a validation, added up batch by batch without making a device wait."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from finetune.base.moments import Moments, widened
from finetune.tasks.metrics import ClassCounts, Confusion

# The losses of a batch's samples, added up: plain ones, without class weights or smoothing.
LossSum = Callable[[Tensor, Tensor], Tensor]


class ConfusionTally:
    """Figures of single-label classification."""

    def __init__(self, loss_sum: LossSum, class_count: int, device: torch.device):
        self._loss_sum_of = loss_sum
        self.loss_sum = torch.zeros((), device=device)
        self.confusion = Confusion(class_count, device)
        self.sample_count = 0

    def add(self, logits: Tensor, targets: Tensor) -> None:
        self.loss_sum += self._loss_sum_of(logits, targets)
        self.confusion.add(logits.argmax(1), targets)
        self.sample_count += len(targets)

    def counts(self) -> ClassCounts:
        return self.confusion.counts()

    def samples(self) -> int:
        return self.sample_count

    def figures(self) -> dict[str, float]:
        """loss (plain: no class weights, no smoothing), accuracy, macro F1."""
        counts = self.counts()
        return {
            "loss": self.loss_sum.item() / self.sample_count,
            "accuracy": counts.accuracy(),
            "f1": counts.macro_f1(),
        }


class MultiLabelTally:
    """Figures of multi-label classification."""

    def __init__(self, loss_sum: LossSum, class_count: int, device: torch.device):
        self._loss_sum_of = loss_sum
        self.loss_sum = torch.zeros((), device=device)
        # Rows: hits, predicted, actual.
        self.sums = torch.zeros(3, class_count, dtype=torch.int64, device=device)
        self.exact = torch.zeros((), dtype=torch.int64, device=device)
        self.sample_count = 0

    def add(self, logits: Tensor, targets: Tensor, predicted: Tensor | None = None) -> None:
        """Args: predicted: (batch, classes) bool; None = where the probability is above one half."""
        self.loss_sum += self._loss_sum_of(logits, targets)
        predicted, actual = logits > 0 if predicted is None else predicted, targets != 0
        self.sums += torch.stack([(predicted & actual).sum(0), predicted.sum(0), actual.sum(0)])
        self.exact += (predicted == actual).all(1).sum()
        self.sample_count += len(targets)

    def counts(self) -> ClassCounts:
        return ClassCounts(*self.sums.cpu())

    def samples(self) -> int:
        return self.sample_count

    def figures(self) -> dict[str, float]:
        """loss (plain), accuracy (share of samples with every class right), macro F1."""
        return {
            "loss": self.loss_sum.item() / self.sample_count,
            "accuracy": self.exact.item() / self.sample_count,
            "f1": self.counts().macro_f1(),
        }


class RegressionTally:
    """Figures of regression, in float64, and about the mean: the numbers may lie far from those of the training."""

    def __init__(self, deviation: float, device: torch.device):
        self._deviation = deviation
        # Of standardised numbers: squared errors, absolute errors.
        self.sums = widened(torch.zeros(2, device=device))
        self.targets = Moments(device)
        self._first: Tensor | None = None
        self._differ = torch.zeros((), dtype=torch.bool, device=device)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        errors = widened(outputs.float().squeeze(1) - targets)
        self.sums += torch.stack([errors.square().sum(), errors.abs().sum()])
        self.targets.add(targets)
        self._first = targets[:1] if self._first is None else self._first
        self._differ |= (targets != self._first).any()

    def samples(self) -> int:
        return self.targets.count

    def figures(self) -> dict[str, float]:
        """loss (mean squared error of standardised numbers), mean absolute error in the targets' unit, and r2: the
        share of their variance that is explained; no r2 where they are all the same, for there is no variance."""
        squared, absolute = self.sums.tolist()
        count = self.targets.count
        figures = {"loss": squared / count, "mae": absolute / count * self._deviation}
        return figures | ({"r2": 1 - squared / self.targets.squares.item()} if self._differ.item() else {})


class PlainRegressionTally:
    """Figures of regression as runs have them whose record does not name another way: float32's digits are spent on how
    far the numbers lie from zero, and r2 is what is left of them."""

    def __init__(self, deviation: float, device: torch.device):
        self._deviation = deviation
        # Of standardised numbers: squared errors, absolute errors, targets, squared targets.
        self.sums = torch.zeros(4, device=device)
        self.sample_count = 0

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        errors = outputs.float().squeeze(1) - targets
        self.sums += torch.stack([errors.square().sum(), errors.abs().sum(), targets.sum(), targets.square().sum()])
        self.sample_count += len(targets)

    def samples(self) -> int:
        return self.sample_count

    def figures(self) -> dict[str, float]:
        """loss (mean squared error of standardised numbers), mean absolute error in the targets' unit, and r2: the
        share of their variance that is explained."""
        squared, absolute, total, squares = (value / self.sample_count for value in self.sums.tolist())
        variance = squares - total**2
        return {
            "loss": squared,
            "mae": absolute * self._deviation,
            "r2": 1 - squared / variance if variance > 0 else 0.0,
        }


class DistillationTally:
    """Figures of distillation."""

    def __init__(self, loss_sum: LossSum, device: torch.device):
        self._loss_sum_of = loss_sum
        self.sums = torch.zeros(2, device=device)
        self.sample_count = 0

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        likeness = functional.cosine_similarity(outputs.float(), targets).sum()
        self.sums += torch.stack([self._loss_sum_of(outputs, targets), likeness])
        self.sample_count += len(targets)

    def samples(self) -> int:
        return self.sample_count

    def figures(self) -> dict[str, float]:
        """loss, and the mean cosine between the network's embeddings and the teacher's."""
        loss, cosine = (self.sums / self.sample_count).tolist()
        return {"loss": loss, "cosine": cosine}
