"""What a network is trained to do: the loss of a sample, what a target is, and the figures of a validation."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune import recipe as recipes
from finetune.metrics import ClassCounts, accuracy, confusion_matrix

# What each auxiliary head adds to the loss: Szegedy et al., "Going deeper with convolutions", CVPR 2015.
AUXILIARY_SHARE = 0.3


@dataclass(frozen=True)
class ClassificationTask:
    """One class a sample: softmax cross-entropy, natural logarithm.

    Attributes:
        class_weights: (classes,) float32 or None.
        label_smoothing: share of the target that is spread over all classes (Szegedy et al., "Rethinking the Inception
            architecture", CVPR 2016).
    """

    class_count: int
    class_weights: Tensor | None = None
    label_smoothing: float = 0.0

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The samples' weighted losses, added up. A batch's loss is that over the batch's `weight`.

        Args:
            logits: (batch, classes).
            targets: (batch,) int64, or (batch, classes) shares of mixed images.
        """
        return functional.cross_entropy(
            logits.float(), targets, self.class_weights, reduction="sum", label_smoothing=self.label_smoothing
        )

    def weight(self, targets: Tensor) -> Tensor | int:
        """What a batch's losses are divided by: the weights of its samples' classes, added up."""
        if self.class_weights is None:
            return len(targets)
        return (self.class_weights[targets] if targets.dim() == 1 else targets @ self.class_weights).sum()

    def probabilities(self, logits: Tensor) -> Tensor:
        """(batch, classes), adding up to 1."""
        return logits.float().softmax(1)

    def decisions(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Confidence of each decision, and whether it was right: (batch,) both."""
        confidence, predicted = self.probabilities(logits).max(1)
        return confidence, predicted == targets

    def tally(self, device: torch.device) -> "ConfusionTally":
        return ConfusionTally(ClassificationTask(self.class_count), device)


@dataclass(frozen=True)
class MultiLabelTask:
    """Any number of classes a sample: a yes or no for each, binary cross-entropy, averaged over the classes.

    Attributes:
        class_weights: (classes,) float32 or None: what a sample that has the class weighs in that class's loss.
        label_smoothing: targets become smoothing / 2 and 1 - smoothing / 2.
    """

    class_count: int
    class_weights: Tensor | None = None
    label_smoothing: float = 0.0

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The samples' losses, added up. Targets: (batch, classes), 0 to 1."""
        wanted = targets.float() * (1 - self.label_smoothing) + self.label_smoothing / 2
        total = functional.binary_cross_entropy_with_logits(
            logits.float(), wanted, pos_weight=self.class_weights, reduction="sum"
        )
        return total / self.class_count

    def weight(self, targets: Tensor) -> int:
        return len(targets)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(batch, classes), each on its own."""
        return logits.float().sigmoid()

    def decisions(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Confidence of each yes or no, and whether it was right: (batch * classes,) both."""
        probabilities = self.probabilities(logits)
        confidence = torch.where(logits > 0, probabilities, 1 - probabilities)
        return confidence.flatten(), ((logits > 0) == (targets != 0)).flatten()

    def tally(self, device: torch.device) -> "MultiLabelTally":
        return MultiLabelTally(MultiLabelTask(self.class_count), device)


Task = ClassificationTask | MultiLabelTask


def make_task(spec: recipes.Classification | recipes.MultiLabel, counts: Tensor, samples: int) -> Task:
    """The recipe's task.

    Args:
        counts: (classes,) int64 training samples of each class.
        samples: training samples in all.
    """
    balanced = spec.class_weights == "balanced"
    if isinstance(spec, recipes.MultiLabel):
        weights = (samples - counts).clamp(min=1) / counts.clamp(min=1) if balanced else None
        return MultiLabelTask(len(counts), weights, spec.label_smoothing)
    # Each class's samples together weigh the same; the mean over samples is 1.
    weights = samples / (len(counts) * counts.clamp(min=1)).float() if balanced else None
    return ClassificationTask(len(counts), weights, spec.label_smoothing)


def to_device(task: Task, device: torch.device) -> Task:
    """The task with its weights on `device`."""
    weights = task.class_weights
    return task if weights is None else dataclasses.replace(task, class_weights=weights.to(device))


def training_loss(task: Task, outputs: Any, targets: Tensor) -> Tensor:
    """Losses, added up, of what a network returns while it trains: logits, or logits and those of auxiliary heads."""
    if isinstance(outputs, Tensor):
        return task.loss_sum(outputs, targets)
    logits, *auxiliary = outputs
    loss = task.loss_sum(logits, targets)
    for extra in auxiliary:
        if extra is not None:
            loss = loss + AUXILIARY_SHARE * task.loss_sum(extra, targets)
    return loss


# ---- Figures, added up batch by batch without making a device wait --------------------------------------------------


class ConfusionTally:
    """Figures of single-label classification."""

    def __init__(self, task: ClassificationTask, device: torch.device):
        self.task = task
        self.loss_sum = torch.zeros((), device=device)
        self.confusion = torch.zeros(task.class_count, task.class_count, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        self.loss_sum += self.task.loss_sum(logits, targets)
        self.confusion += confusion_matrix(logits.argmax(1), targets, self.task.class_count)

    def counts(self) -> ClassCounts:
        return ClassCounts.of_confusion(self.confusion.cpu())

    def samples(self) -> int:
        return int(self.confusion.sum())

    def figures(self) -> dict[str, float]:
        """loss (plain: no class weights, no smoothing), accuracy, macro F1."""
        return {
            "loss": self.loss_sum.item() / self.samples(),
            "accuracy": accuracy(self.confusion),
            "f1": self.counts().macro_f1(),
        }


class MultiLabelTally:
    """Figures of multi-label classification; a class is predicted where its probability is above one half."""

    def __init__(self, task: MultiLabelTask, device: torch.device):
        self.task = task
        self.loss_sum = torch.zeros((), device=device)
        # Rows: hits, predicted, actual.
        self.sums = torch.zeros(3, task.class_count, dtype=torch.int64, device=device)
        self.exact = torch.zeros((), dtype=torch.int64, device=device)
        self.sample_count = 0

    def add(self, logits: Tensor, targets: Tensor) -> None:
        self.loss_sum += self.task.loss_sum(logits, targets)
        predicted, actual = logits > 0, targets != 0
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
