"""What is told to whoever watches a run: plain values, at a few moments."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, Protocol, TypedDict

if TYPE_CHECKING:  # some who watch are in a process of their own, without torch
    from torch import Tensor, nn


class Best(TypedDict, total=False):
    """The best validation so far; empty where nothing was validated yet.

    Attributes:
        value: of the metric that decides.
        step, epoch: where it was; the first epoch is 1.
        loss: of the same validation, where that decides between equals.
        samples: that validated; runs of before have neither.
        temperature: that what the network gave is best divided by, where that is done.
        thresholds: of several classes a sample: from which probability on, after that, each applies; where they are
            not one half.
        figures: loss, accuracy, ... of the same validation with both, as it ships.
        half_width: of numbers: what nine of ten lie within of what is predicted of them, standardised as targets are.
        is_solved: it is no epoch's, but the solved head's.
    """

    metric: str
    value: float
    step: int
    epoch: int
    loss: NotRequired[float]
    samples: NotRequired[int]
    temperature: NotRequired[float]
    thresholds: NotRequired[list[float]]
    figures: NotRequired[dict[str, float]]
    half_width: NotRequired[float]
    is_solved: NotRequired[bool]


@dataclass(frozen=True)
class Begun:
    """A run that begins, or goes on.

    Attributes:
        run_id: of the run; the same at each resume.
        run: the run as a person names it and types it: its folder or URL.
        folder: where its files lie; None = it has none.
        config: every resolved value, nested; as in recipe.json.
        facts: label to text, as in the table at the start.
        step: optimizer steps done; 0 at a fresh start.
        total_steps, epochs: where the run ends.
        is_resumed: it goes on.
        best_metric: the one that decides which checkpoint is best.
        best: {"metric", "value", "step", "epoch"} of the best validation so far, or {}.
    """

    run_id: str
    run: str
    folder: Path | None
    config: dict[str, object]
    facts: dict[str, str]
    step: int
    total_steps: int
    epochs: int
    is_resumed: bool
    best_metric: str
    best: Best = field(default_factory=Best)

    @property
    def name(self) -> str:
        return self.folder.name if self.folder else ""


@dataclass(frozen=True)
class Validated:
    """A validation.

    Attributes:
        values: "train/epoch_loss", "val/loss", "val/accuracy", ...
        best: {"metric", "value", "step", "epoch"} of the best one so far, this one included.
        is_best: it is this one.
    """

    step: int
    epoch: int
    epochs: int
    values: dict[str, float]
    best: Best
    is_best: bool


@dataclass(frozen=True)
class Example:
    """A sample that validated, to be shown.

    Attributes:
        name: where it comes from.
        loss: of the sample.
        true: its class; of several, names with commas between; or the number.
        predicted: likewise.
        probabilities: (class, probability), the most probable first, five at most; empty where a number is predicted.
        picture: a small PNG, or nothing.
        text: the beginning of a text, or nothing.
    """

    name: str
    loss: float
    true: str
    predicted: str
    probabilities: tuple[tuple[str, float], ...] = ()
    picture: bytes = b""
    text: str = ""

    @property
    def is_right(self) -> bool:
        return self.true == self.predicted


@dataclass(frozen=True)
class Ended:
    """A process has done its part of a run.

    Attributes:
        status: "finished", "stopped early" (nothing got better any more), "stopped" (asked to; worth resuming) or
            "failed".
        text: one line for a person.
        run: as in `Begun`; a run may end before it began.
        best: as in `Validated`; {} before the first validation.
        worst: samples of the best validation with the largest loss, the worst first.
        ships: which checkpoint does: "best", or "final" with the solved head.
    """

    status: str
    text: str
    run: str = ""
    best: Best = field(default_factory=Best)
    worst: tuple[Example, ...] = ()
    ships: str = "best"


@dataclass(frozen=True)
class Features:
    """What the head's last layer is given, of some of the samples that validate.

    Attributes:
        rows: (samples, width) float32.
        indices: (samples,) int64: which.
        targets: as the task has them.
    """

    rows: "Tensor"
    indices: "Tensor"
    targets: "Tensor"


@dataclass(frozen=True)
class Pictures:
    """What can be drawn of a validation.

    Attributes:
        worst: the samples with the largest loss, the worst first.
        confusion: rows of true classes, columns of predicted ones; None where there is no such thing.
        model: the network, and `example`: an input for one sample, on its device.
        at_end: there will be no more.
    """

    step: int
    worst: tuple[Example, ...]
    confusion: list[list[int]] | None
    classes: tuple[str, ...]
    features: Features | None
    model: "nn.Module"
    example: "Tensor"
    at_end: bool


class Tracker(Protocol):
    """Somebody who watches. Any method may fail: that is said once, and the tracker is told no more; of one that was
    handed in from Python it reaches the caller."""

    name: str

    def begin(self, begun: Begun) -> None: ...

    def logged(self, step: int, values: dict[str, float]) -> None:
        """Every so many steps: what metrics.jsonl gets, without `step`."""

    def validated(self, validated: Validated) -> None: ...

    def histograms(self, step: int, weights: "dict[str, Tensor]", gradients: "dict[str, Tensor]") -> None:
        """After a validation: of the head's last layer, by name; tensors are the run's own and must not be changed."""

    def draw(self, pictures: Pictures) -> None:
        """At the end, and before it as often as it takes next to no time of the run."""

    def flush(self) -> None:
        """A checkpoint is about to be written: what was told so far must not be lost."""

    def end(self, ended: Ended) -> None: ...

    def close(self) -> None:
        """Told no more: let go of what is held. May come before the end or after it."""
