"""What a validation made of its samples: counts by class, calibration, the best and the worst ones, some features."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune.base.events import Features
from finetune.data.source import Source
from finetune.tasks.losses import Classifying, ConfusionTally, DistillationTask, MultiLabelTally, RegressionTask, Task
from finetune.tasks.metrics import Calibration

KEPT_WORST, KEPT_BEST = 48, 12
KEPT_PROBABILITIES = 5
# Points in a cloud: more would hide each other.
KEPT_FEATURES = 500
# A larger confusion matrix is kept as its most frequent mistakes.
MATRIX_CLASSES = 100
KEPT_MISTAKES = 100


class Outcomes:
    """Figures of a validation, added up batch by batch without making a device wait.

    Args:
        samples: how many will come.
    """

    def __init__(self, task: Task, device: torch.device, samples: int):
        self.task = task
        self._stride = max(1, -(-samples // KEPT_FEATURES))
        self._seen = 0
        self._heard: Tensor | None = None
        self._features: list[tuple[Tensor, Tensor, Tensor]] = []
        self.tally = task.tally(device)
        self.calibration = Calibration(device)
        # Of the samples with the largest loss so far, and of those with the smallest.
        self._worst: tuple[Tensor, ...] = ()
        self._best: tuple[Tensor, ...] = ()

    @contextmanager
    def listening(self, layer: nn.Module | None) -> Iterator[None]:
        """Note what `layer` is given of each batch that is added within the block."""
        if layer is None:
            yield
            return

        def hear(_layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            first = inputs[0] if inputs else None  # a model of one's own may give it by name
            self._heard = first if isinstance(first, Tensor) else None

        handle = layer.register_forward_pre_hook(hear)
        try:
            yield
        finally:
            handle.remove()

    def add(self, indices: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Take a batch.

        Args:
            indices: (batch,) int64: the samples.
            outputs: (batch, outputs) of the network.
            targets: as the task's `loss_sum` takes them.
        """
        self.tally.add(outputs, targets)
        if isinstance(self.task, Classifying):
            self.calibration.add(*self.task.decisions(outputs, targets))
        losses = self.task.sample_losses(outputs, targets)
        rows = losses, indices.to(losses.device, non_blocking=True), outputs.float(), targets
        self._worst = _extreme(self._worst, rows, KEPT_WORST, largest=True)
        self._best = _extreme(self._best, rows, KEPT_BEST, largest=False)
        if self._heard is not None and len(self._heard) == len(indices):
            chosen = slice(-self._seen % self._stride, None, self._stride)
            row = self._heard[chosen].detach().flatten(1).float()
            self._features.append((row, indices[chosen], targets[chosen]))
        self._heard, self._seen = None, self._seen + len(indices)

    def features(self) -> Features | None:
        """Of some samples, evenly spread; on the CPU."""
        if not self._features:
            return None
        return Features(*(torch.cat([part.cpu() for part in parts]) for parts in zip(*self._features, strict=True)))

    def figures(self) -> dict[str, float]:
        """As they are logged: val/loss, val/accuracy, ..."""
        return {f"val/{name}": value for name, value in self.tally.figures().items()}

    def to_plain(self, source: Source) -> dict[str, Any]:
        """validation.json, but for what belongs to the run.

        Returns:
            samples: how many.
            figures: loss, accuracy, ...
            classes: {"hits", "predicted", "actual"}: lists by class; or None where there are no classes.
            confusion: rows of true classes, columns of predicted ones; None where it would be too large, or is none.
            mistakes: [true class, predicted class, count], the most frequent first.
            calibration, calibration_error: as `metrics.Calibration` gives them; [] and None without classes.
            worst, best: {"index", "name", "loss", "true", "predicted", "probabilities"} each: the worst first, the
                best first; of classes numbers: "true" and "predicted" lists, "probabilities" [[class, probability]].
        """
        tally, plain = self.tally, {"samples": self.tally.samples(), "figures": self.tally.figures()}
        plain |= {"classes": None, "confusion": None, "mistakes": [], "calibration": [], "calibration_error": None}
        if isinstance(tally, ConfusionTally | MultiLabelTally):
            counts = tally.counts()
            plain["classes"] = {name: getattr(counts, name).tolist() for name in ("hits", "predicted", "actual")}
            plain |= {"calibration": self.calibration.table(), "calibration_error": self.calibration.error()}
        if isinstance(tally, ConfusionTally):
            matrix = tally.confusion.cpu()
            plain["confusion"] = matrix.tolist() if len(matrix) <= MATRIX_CLASSES else None
            plain["mistakes"] = _mistakes(matrix)
        return plain | {"worst": self._samples(self._worst, source), "best": self._samples(self._best, source)}

    def _samples(self, rows: tuple[Tensor, ...], source: Source) -> list[dict[str, Any]]:
        if not rows:
            return []
        losses, indices, outputs, targets = (part.cpu() for part in rows)
        described = _describe(self.task, outputs, targets)
        return [
            {"index": index, "name": source.name(index), "loss": loss} | one
            for index, loss, one in zip(indices.tolist(), losses.tolist(), described, strict=True)
        ]


def _extreme(kept: tuple[Tensor, ...], rows: tuple[Tensor, ...], count: int, largest: bool) -> tuple[Tensor, ...]:
    """Of both, the rows whose first number is the largest, or the smallest; in that order."""
    both = tuple(torch.cat(parts) for parts in zip(kept, rows, strict=True)) if kept else rows
    chosen = both[0].sort(descending=largest, stable=True).indices[:count]
    return tuple(part[chosen] for part in both)


def _mistakes(matrix: Tensor) -> list[list[int]]:
    wrong = matrix.clone()
    wrong.fill_diagonal_(0)
    places = wrong.nonzero()
    counts = wrong[places[:, 0], places[:, 1]]
    order = counts.sort(descending=True, stable=True).indices[:KEPT_MISTAKES]
    return torch.cat([places, counts[:, None]], dim=1)[order].tolist()


def _describe(task: Task, outputs: Tensor, targets: Tensor) -> list[dict[str, Any]]:
    """What is true of each sample, and what was predicted, as plain values."""
    if isinstance(task, Classifying):
        probabilities = task.probabilities(outputs)
        top = probabilities.topk(min(KEPT_PROBABILITIES, task.class_count), dim=1)
        several = targets.dim() == 2
        true = [row.nonzero().flatten().tolist() for row in targets] if several else targets[:, None].tolist()
        decided = outputs > 0 if several else torch.zeros_like(outputs).scatter(1, outputs.argmax(1, keepdim=True), 1)
        return [
            {"true": one, "predicted": row.nonzero().flatten().tolist(), "probabilities": _pairs(classes, values)}
            for one, row, classes, values in zip(true, decided, top.indices, top.values, strict=True)
        ]
    if isinstance(task, RegressionTask):
        true = (targets * task.deviation + task.mean).tolist()
        return [
            {"true": t, "predicted": p, "probabilities": []}
            for t, p in zip(true, task.values(outputs).tolist(), strict=True)
        ]
    assert isinstance(task, DistillationTask)
    return [{"true": None, "predicted": None, "probabilities": []} for _ in outputs]


def _pairs(classes: Tensor, values: Tensor) -> list[list[Any]]:
    return [[number, value] for number, value in zip(classes.tolist(), values.tolist(), strict=True)]


def class_names(numbers: Sequence[int], classes: Sequence[str]) -> str:
    """As a person reads them."""
    return ", ".join(classes[number] for number in numbers)
