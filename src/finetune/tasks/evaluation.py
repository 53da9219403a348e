"""What a network makes of samples: figures, counts by class, calibration, the best and the worst, some features."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypedDict, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from finetune.base.device import autocast, to_device
from finetune.base.events import Features
from finetune.base.intervals import wilson
from finetune.base.plain import Fields, Plain
from finetune.data.batch import Batch
from finetune.data.source import Source
from finetune.tasks import bootstrap
from finetune.tasks.calibration import temperature_that_helps
from finetune.tasks.losses import Classifying, DistillationTask, MultiLabelTask, Outputs, RegressionTask, Task
from finetune.tasks.metrics import Calibration, ClassCounts
from finetune.tasks.tallies import ConfusionTally, MultiLabelTally

KEPT_WORST, KEPT_BEST = 48, 12
KEPT_PROBABILITIES = 5
# Points in a cloud: more would hide each other.
KEPT_FEATURES = 500
# A larger confusion matrix is written as its most frequent mistakes.
MATRIX_CLASSES = 100
KEPT_MISTAKES = 100
# Larger ones are sure enough: the interval of an F1 is worked out for so many samples times classes, where a sample has
# several; where it has one, for so many different pairs of a true class and a predicted one.
INTERVAL_CELLS, INTERVAL_KINDS = 2_000_000, 20_000
# One number is known well enough from so many.
TEMPERATURE_NUMBERS = 2_000_000
# Of each class: how often it was met in both, in a prediction, in truth.
COUNTS = ("hits", "predicted", "actual")


class Decision(TypedDict):
    """What is true of a sample and what was predicted: classes by number, the number itself, or nothing."""

    true: list[int] | float | None
    predicted: list[int] | float | None
    probabilities: list[list[float]]


class Sample(Decision):
    """A sample of validation.json."""

    index: int
    name: str
    loss: float


class ClassRow(NamedTuple):
    """Figures of a class."""

    name: str
    precision: float
    recall: float
    f1: float
    samples: int


@dataclass(frozen=True)
class EvaluationRecord:
    """What a network made of samples that it did not train on, as plain values; shown in many ways, computed in one.

    Attributes:
        samples: how many.
        figures: loss, accuracy, ...
        intervals: figure -> [low, high], which hold the true value with 95 % confidence; those that have one.
        classes: {"hits", "predicted", "actual"}: lists by class; None where there are no classes.
        confusion: rows of true classes, columns of predicted ones; None where it is none, or was too large to keep.
        mistakes: [true class, predicted class, count], the most frequent first.
        calibration, calibration_error: as `metrics.Calibration` gives them; [] and None without classes.
        worst, best: samples with the largest loss and with the smallest, the worst first, the best first.
    """

    samples: int
    figures: dict[str, float]
    classes: dict[str, list[int]] | None
    confusion: list[list[int]] | None
    mistakes: list[list[int]]
    calibration: list[dict[str, float]]
    calibration_error: float | None
    worst: list[Sample]
    best: list[Sample]
    intervals: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def to_plain(self) -> Plain:
        """As validation.json holds it: a matrix of very many classes is left out, its mistakes must do."""
        plain = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        too_large = self.confusion is not None and len(self.confusion) > MATRIX_CLASSES
        return plain | {"confusion": None} if too_large else plain

    @classmethod
    def from_plain(cls, plain: Plain) -> "EvaluationRecord":
        """Raises: BadFile, TypeError, ValueError, KeyError: it is not what `to_plain` gave."""
        fields = Fields(plain, "validation")
        # A file of before has none.
        intervals = fields.fields("intervals") if "intervals" in plain else Fields({}, "intervals")
        counts = None if plain["classes"] is None else fields.mapping("classes")
        matrix = None if plain["confusion"] is None else fields.items("confusion", list)
        return cls(
            samples=fields.integer("samples"),
            figures=fields.values("figures", float),
            classes=None if counts is None else {
                name: [int(count) for count in fields.fields("classes").items(name, int)] for name in COUNTS
            },
            confusion=None if matrix is None else [[int(count) for count in row] for row in matrix],
            mistakes=[[int(number) for number in row] for row in fields.items("mistakes", list)],
            calibration=[
                {name: float(one[name]) for name in ("count", "confidence", "accuracy")}
                for one in fields.items("calibration", dict)
            ],
            calibration_error=None if plain["calibration_error"] is None else fields.number("calibration_error"),
            worst=cast(list[Sample], fields.items("worst", dict)),
            best=cast(list[Sample], fields.items("best", dict)),
            intervals={name: intervals.items(name, float) for name in intervals.plain},
        )  # fmt: skip

    def class_rows(self, names: Sequence[str] | None) -> list[ClassRow]:
        """Figures by class; [] where there are no classes.

        Args:
            names: of the classes; None = not known, numbers must do.
        """
        if self.classes is None:
            return []
        counts = ClassCounts(*(torch.tensor(self.classes[name], dtype=torch.int64) for name in COUNTS))
        names = [f"class {number}" for number in range(len(counts.hits))] if names is None else names
        columns = (column.tolist() for column in (counts.precision(), counts.recall(), counts.f1(), counts.actual))
        return [ClassRow(*row) for row in zip(names, *columns, strict=True)]


class Evaluation:
    """What a network makes of samples, added up batch by batch without making a device wait.

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
        self._losses: list[Tensor] = []
        # What was given and wanted, as far as a temperature needs it.
        self._given: list[tuple[Tensor, Tensor]] = []
        # Of several classes a sample: those decided, and those that are true; how many decisions these are.
        self._several: list[tuple[Tensor, Tensor]] = []
        self._cells = 0
        self.broken: list[str] = []

    @property
    def samples(self) -> int:
        """How many have come."""
        return self._seen

    @contextmanager
    def listening(self, layer: nn.Module | None) -> Iterator[None]:
        """Note what `layer` is given of each batch that is added within the block."""
        if layer is None:
            yield
            return

        def hear(_layer: nn.Module, inputs: tuple[object, ...]) -> None:
            first = inputs[0] if inputs else None  # a model of one's own may give it by name
            self._heard = first if isinstance(first, Tensor) else None

        handle = layer.register_forward_pre_hook(hear)
        try:
            yield
        finally:
            handle.remove()

    def add(self, indices: Tensor, outputs: Tensor, targets: Tensor, cuts: Tensor | None = None) -> None:
        """Take a batch.

        Args:
            indices: (batch,) int64: the samples.
            outputs: (batch, outputs) of the network.
            targets: as the task's `loss_sum` takes them.
            cuts: (batch, classes) of these samples, in place of the task's; see `MultiLabelTask`.
        """
        task, losses = self.task, self.task.sample_losses(outputs, targets)
        decided = torch.zeros_like(losses)
        if isinstance(task, MultiLabelTask) and isinstance(self.tally, MultiLabelTally):
            task = task if cuts is None else dataclasses.replace(task, cuts=cuts)
            decided = task.decided(outputs)
            self.tally.add(outputs, targets, decided)
        else:
            self.tally.add(outputs, targets)
        if isinstance(self.task, Classifying):
            self.calibration.add(*self.task.decisions(outputs, targets))
        self._losses.append(losses)
        if targets.dim() == 2 and isinstance(self.task, Classifying) and self._cells <= INTERVAL_CELLS:
            self._cells += targets.numel()
            self._several.append((decided, targets != 0))
        has_use = isinstance(self.task, Classifying | RegressionTask)
        if has_use and self._seen * outputs.shape[1] <= TEMPERATURE_NUMBERS:
            self._given.append((outputs.float(), targets))
        rows = losses, indices.to(losses.device, non_blocking=True), outputs.float(), targets, decided
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

    def given(self) -> tuple[Tensor, Tensor]:
        """What the network gave of some samples, and what is true of them; on the CPU."""
        outputs, targets = (torch.cat(parts).cpu() for parts in zip(*self._given, strict=True))
        return outputs, targets

    def temperature(self) -> float:
        """What the outputs are best divided by, in the loss that the task trains with; 1 where there are no classes,
        or where it does not help. Waits for the device."""
        task = self.task
        if not self._given or not isinstance(task, Classifying):
            return 1.0
        outputs, targets = self.given()
        weights, offset = (None if one is None else one.cpu() for one in (task.class_weights, task.log_prior))
        if targets.dim() == 2:
            return temperature_that_helps(outputs, targets, "multilabel", None, offset)
        shares = None if weights is None else weights[targets].double()
        wanted = one_hot(targets, outputs.shape[1])
        return temperature_that_helps(outputs, wanted, "classification", shares, offset)

    def record(self, source: Source) -> EvaluationRecord:
        """All that is known, as plain values. Waits for the device.

        Args:
            source: of the samples, for their names.
        """
        tally = self.tally
        counts = tally.counts() if isinstance(tally, ConfusionTally | MultiLabelTally) else None
        confusion = tally.confusion if isinstance(tally, ConfusionTally) else None
        matrix = confusion.matrix if confusion is not None else None
        return EvaluationRecord(
            samples=tally.samples(),
            figures=tally.figures(),
            classes=None if counts is None else {name: getattr(counts, name).tolist() for name in COUNTS},
            confusion=None if matrix is None else matrix.tolist(),
            mistakes=[] if confusion is None else confusion.mistakes(KEPT_MISTAKES),
            calibration=[] if counts is None else self.calibration.table(),
            calibration_error=None if counts is None else self.calibration.error(),
            worst=self._samples(self._worst, source),
            best=self._samples(self._best, source),
            intervals={name: list(ends) for name, ends in self.intervals.items()},
        )

    @functools.cached_property  # a record is made for validation.json, and another one for pictures
    def intervals(self) -> dict[str, tuple[float, float]]:
        """What the figures are worth, once all samples have come: of a share by Wilson, of others by weighing samples
        anew. Waits for the device."""
        found, figures = dict[str, tuple[float, float]](), self.tally.figures()
        losses = torch.cat(self._losses).float().cpu().numpy()
        if np.isfinite(losses).all() and (ends := bootstrap.of_mean(losses)) is not None:
            found["loss"] = ends
        if "accuracy" in figures:
            found["accuracy"] = wilson(round(figures["accuracy"] * len(losses)), len(losses))
        if 0 < self._cells <= INTERVAL_CELLS:
            decided, true = (torch.cat(parts).cpu().numpy() for parts in zip(*self._several, strict=True))
            found["f1"] = bootstrap.of_macro_f1_of_several(decided, true)
        elif isinstance(self.tally, ConfusionTally) and self.tally.confusion.matrix is not None:
            matrix = self.tally.confusion.matrix.cpu().numpy()
            if np.count_nonzero(matrix) <= INTERVAL_KINDS:
                found["f1"] = bootstrap.of_macro_f1(matrix)
        return found

    def _samples(self, rows: tuple[Tensor, ...], source: Source) -> list[Sample]:
        if not rows:
            return []
        losses, indices, outputs, targets, decided = (part.cpu() for part in rows)
        described = _describe(self.task, outputs, targets, decided)
        return [
            {"index": index, "name": source.name(index), "loss": loss, **one}
            for index, loss, one in zip(indices.tolist(), losses.tolist(), described, strict=True)
        ]


def evaluate(
    forward: Callable[[Tensor], Outputs],
    batches: Iterable[Batch],
    task: Task,
    device: torch.device,
    precision: str,
    *,
    samples: int,
    watched: nn.Module | None = None,
) -> Evaluation:
    """What a network makes of samples. It must be in eval mode.

    Args:
        forward: what a batch holds, on the device -> (batch, outputs).
        batches: fetched within the block that computes; broken samples are noted by their reasons.
        precision: of the arithmetic.
        samples: how many will come.
        watched: the layer whose input some are to see.
    """
    evaluation = Evaluation(task, device, samples)
    with torch.inference_mode(), autocast(device, precision), evaluation.listening(watched):
        for batch in batches:
            evaluation.broken += [reason for _, reason in batch.broken]
            if len(batch.indices):
                outputs = forward(to_device(batch.inputs, device))
                assert isinstance(outputs, Tensor)  # auxiliary heads give theirs in training only
                evaluation.add(batch.indices, outputs, batch.targets.to(device))
    return evaluation


def _extreme(kept: tuple[Tensor, ...], rows: tuple[Tensor, ...], count: int, largest: bool) -> tuple[Tensor, ...]:
    """Of both, the rows whose first number is the largest, or the smallest; in that order."""
    both = tuple(torch.cat(parts) for parts in zip(kept, rows, strict=True)) if kept else rows
    chosen = both[0].sort(descending=largest, stable=True).indices[:count]
    return tuple(part[chosen] for part in both)


def _describe(task: Task, outputs: Tensor, targets: Tensor, decided: Tensor) -> list[Decision]:
    """What is true of each sample, and what was predicted, as plain values.

    Args:
        decided: of several classes a sample: which apply.
    """
    if isinstance(task, Classifying):
        probabilities = task.probabilities(outputs)
        top = probabilities.topk(min(KEPT_PROBABILITIES, task.class_count), dim=1)
        several = targets.dim() == 2
        true = [row.nonzero().flatten().tolist() for row in targets] if several else targets[:, None].tolist()
        if not several:
            decided = torch.zeros_like(outputs).scatter(1, outputs.argmax(1, keepdim=True), 1)
        return [
            {"true": one, "predicted": row.nonzero().flatten().tolist(), "probabilities": _pairs(classes, values)}
            for one, row, classes, values in zip(true, decided, top.indices, top.values, strict=True)
        ]
    if isinstance(task, RegressionTask):
        numbers = zip(task.in_unit(targets).tolist(), task.values(outputs).tolist(), strict=True)
        return [{"true": true, "predicted": predicted, "probabilities": []} for true, predicted in numbers]
    assert isinstance(task, DistillationTask)
    return [{"true": None, "predicted": None, "probabilities": []} for _ in outputs]


def _pairs(classes: Tensor, values: Tensor) -> list[list[float]]:
    return [[number, value] for number, value in zip(classes.tolist(), values.tolist(), strict=True)]


def class_names(numbers: Sequence[int], classes: Sequence[str]) -> str:
    """As a person reads them."""
    return ", ".join(classes[number] for number in numbers)
