"""What a network is trained to do: the loss of a sample, and what a target is."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from finetune.data.source import class_counts
from finetune.recipe import spec as recipes
from finetune.tasks.tallies import (
    ConfusionTally,
    DistillationTally,
    MultiLabelTally,
    PlainRegressionTally,
    RegressionTally,
)

# What each auxiliary head adds to the loss: Szegedy et al., "Going deeper with convolutions", CVPR 2015.
AUXILIARY_SHARE = 0.3


@dataclass(frozen=True)
class ClassificationTask:
    """One class a sample: softmax cross-entropy, natural logarithm.

    Attributes:
        class_weights: (classes,) float32 or None.
        label_smoothing: share of the target that is spread over all classes (Szegedy et al., "Rethinking the Inception
            architecture", CVPR 2016).
        log_prior: (classes,) float32 or None: added to the logits in the loss alone, so that they learn to do without
            how frequent a class is (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021).
    """

    class_count: int
    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    log_prior: Tensor | None = None

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The samples' weighted losses, added up. A batch's loss is that over the batch's `weight`.

        Args:
            logits: (batch, classes).
            targets: (batch,) int64, or (batch, classes) shares of mixed images.
        """
        logits = logits.float() if self.log_prior is None else logits.float() + self.log_prior
        return functional.cross_entropy(
            logits, targets, self.class_weights, reduction="sum", label_smoothing=self.label_smoothing
        )

    def sample_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(batch,) plain: no class weights, no smoothing."""
        return functional.cross_entropy(logits.float(), targets, reduction="none")

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

    def tally(self, device: torch.device) -> ConfusionTally:
        return ConfusionTally(ClassificationTask(self.class_count).loss_sum, self.class_count, device)


@dataclass(frozen=True)
class MultiLabelTask:
    """Any number of classes a sample: a yes or no for each, binary cross-entropy, averaged over the classes.

    Attributes:
        class_weights: (classes,) float32 or None: what a sample that has the class weighs in that class's loss.
        label_smoothing: targets become smoothing / 2 and 1 - smoothing / 2.
        log_prior: (classes,) float32 or None: log odds of each class, as of `ClassificationTask`.
        cuts: (classes,) or (batch, classes) float32: a class applies where its logit is larger; None = than 0.
    """

    class_count: int
    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    log_prior: Tensor | None = None
    cuts: Tensor | None = None

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The samples' losses, added up. Targets: (batch, classes), 0 to 1."""
        wanted = targets.float() * (1 - self.label_smoothing) + self.label_smoothing / 2
        logits = logits.float() if self.log_prior is None else logits.float() + self.log_prior
        total = functional.binary_cross_entropy_with_logits(
            logits, wanted, pos_weight=self.class_weights, reduction="sum"
        )
        return total / self.class_count

    def sample_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(batch,) plain: no class weights, no smoothing."""
        return functional.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean(1)

    def weight(self, targets: Tensor) -> int:
        return len(targets)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(batch, classes), each on its own."""
        return logits.float().sigmoid()

    def decided(self, logits: Tensor) -> Tensor:
        """(batch, classes) bool: which classes apply."""
        return logits > (0.0 if self.cuts is None else self.cuts.to(logits.device))

    def decisions(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Confidence of each likelier yes or no, whatever the cuts, and whether it was right: (batch * classes,)
        both."""
        probabilities = self.probabilities(logits)
        confidence = torch.where(logits > 0, probabilities, 1 - probabilities)
        return confidence.flatten(), ((logits > 0) == (targets != 0)).flatten()

    def tally(self, device: torch.device) -> MultiLabelTally:
        return MultiLabelTally(MultiLabelTask(self.class_count).loss_sum, self.class_count, device)


@dataclass(frozen=True)
class RegressionTask:
    """A number a sample. Targets are standardised, as features are, and so is what the network gives: mean squared
    error then has one scale, whatever the unit.

    Attributes:
        mean, deviation: of the training targets, in their own unit.
        moments: how the figures of a validation are added up; see `recipes.Regression`.
    """

    mean: float = 0.0
    deviation: float = 1.0
    moments: str = recipes.CENTRED

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Squared errors of standardised numbers, added up.

        Args:
            outputs: (batch, 1).
            targets: (batch,).
        """
        return self.sample_losses(outputs, targets).sum()

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(batch,)"""
        return (outputs.float().squeeze(1) - targets).square()

    def weight(self, targets: Tensor) -> int:
        return len(targets)

    def in_unit(self, numbers: Tensor) -> Tensor:
        """Standardised numbers in the unit of the targets: float64, on the CPU. float32 holds seven digits, and those
        may all be the mean's."""
        return numbers.cpu().double() * self.deviation + self.mean

    def values(self, outputs: Tensor) -> Tensor:
        """(batch,) numbers in the unit of the targets, as `in_unit` gives them."""
        return self.in_unit(outputs.float().squeeze(1))

    def tally(self, device: torch.device) -> RegressionTally | PlainRegressionTally:
        return (PlainRegressionTally if self.moments == recipes.PLAIN else RegressionTally)(self.deviation, device)


@dataclass(frozen=True)
class DistillationTask:
    """The embedding that a teacher gives: mean squared error over the width, in units of what the teacher's embeddings
    are long (Reimers and Gurevych, "Making monolingual sentence embeddings multilingual using knowledge distillation",
    EMNLP 2020)."""

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of each sample the squared distance over the teacher's squared length, added up. Both: (batch, width)."""
        return self.sample_losses(outputs, targets).sum()

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(batch,)"""
        distance = (outputs.float() - targets).square().sum(1)
        return distance / targets.square().sum(1).clamp(min=1e-12)

    def weight(self, targets: Tensor) -> int:
        return len(targets)

    def tally(self, device: torch.device) -> DistillationTally:
        return DistillationTally(self.loss_sum, device)


Classifying = ClassificationTask | MultiLabelTask
Task = Classifying | RegressionTask | DistillationTask


def make_task(spec: recipes.Task, outputs: int, scale: Sequence[float] = (), targets: Tensor | None = None) -> Task:
    """The recipe's task.

    Args:
        outputs: numbers that the network gives for a sample.
        scale: mean and deviation of the training targets, of a regression.
        targets: of the training samples, for the weights of classes; None = none are needed.
    """
    if isinstance(spec, recipes.Regression):
        mean, deviation = scale or (0.0, 1.0)
        return RegressionTask(mean, deviation, spec.moments)
    if isinstance(spec, recipes.Distillation):
        return DistillationTask()
    weights = None
    if spec.class_weights == "balanced" and targets is not None:
        counts, samples = class_counts(targets, outputs), len(targets)
        if isinstance(spec, recipes.MultiLabel):
            weights = (samples - counts).clamp(min=1) / counts.clamp(min=1)
        else:  # each class's samples together weigh the same; the mean over samples is 1
            weights = samples / (outputs * counts.clamp(min=1)).float()
    prior = None
    if spec.class_weights == "prior" and targets is not None:
        share = class_counts(targets, outputs).clamp(min=1).float() / max(len(targets), 1)
        prior = torch.logit(share, eps=1e-6) if isinstance(spec, recipes.MultiLabel) else share.log()
    kind = MultiLabelTask if isinstance(spec, recipes.MultiLabel) else ClassificationTask
    return kind(outputs, weights, spec.label_smoothing, prior)


def scale_of(targets: Tensor, moments: str = recipes.CENTRED) -> list[float]:
    """Mean and deviation of numbers to predict; deviation 1 where they are all the same.

    numpy's sums do not depend on the number of threads, and a resume compares them.

    Args:
        moments: see `recipes.Regression`.
    """
    numbers = targets.numpy().astype(np.float64)
    if moments == recipes.PLAIN:
        return [float(numbers.mean()), float(numbers.std()) or 1.0]
    if all_same(targets):  # the mean of many 0.1 is not quite 0.1
        return [float(numbers[0]), 1.0]
    # By a power of two, which costs no digit: the square of what is as large as 1e200 would be infinite.
    _, exponent = math.frexp(float(np.abs(numbers).max()))
    numbers = np.ldexp(numbers, -exponent)
    return [math.ldexp(float(numbers.mean()), exponent), math.ldexp(float(numbers.std()), exponent)]


def all_same(targets: Tensor) -> bool:
    """Whether there is nothing that sets numbers apart."""
    return bool((targets == targets[:1]).all())


def standardised(targets: Tensor, scale: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """(samples,) of numbers to predict; other targets as they are.

    Args:
        dtype: float32 holds what the scale is of; other numbers may lie so far from it that they need float64.
    """
    return ((targets.double() - scale[0]) / scale[1]).to(dtype) if scale else targets


def to_device(task: Task, device: torch.device) -> Task:
    """The task with its weights on `device`."""
    if not isinstance(task, Classifying):
        return task
    weights, prior = (None if one is None else one.to(device) for one in (task.class_weights, task.log_prior))
    return dataclasses.replace(task, class_weights=weights, log_prior=prior)


# What a network returns while it trains: logits, or logits and those of auxiliary heads.
Outputs = Tensor | tuple[Tensor, *tuple[Tensor | None, ...]]


def training_loss(task: Task, outputs: Outputs, targets: Tensor) -> Tensor:
    """Losses of all heads, added up."""
    if isinstance(outputs, Tensor):
        return task.loss_sum(outputs, targets)
    logits, *auxiliary = outputs
    loss = task.loss_sum(logits, targets)
    for extra in auxiliary:
        if extra is not None:
            loss = loss + AUXILIARY_SHARE * task.loss_sum(extra, targets)
    return loss
