"""What is predicted of a sample."""

import dataclasses
from dataclasses import dataclass, field
from typing import NamedTuple


class Ranked(NamedTuple):
    """A class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True, repr=False)
class Prediction:
    """What is predicted of an image or a text.

    Attributes:
        label, probability: the most probable class; None where a number is predicted, or the sample is not known well
            enough for `unsure_below`.
        top: the most probable classes, the first of them first.
        labels: of several labels a sample those that apply; else None.
        value: the number, in the unit of the training data; None where classes are predicted.
        level: the step of the scale that is nearest to it, where the training data is such, as stars are; else None.
        low, high: the true number lies between them with 90 % probability; None where nothing is known of that.
        distance_percentile: how many of 100 training samples lie nearer to another one than this sample does to any:
            from 99 on it is like nothing that the model was trained on. None where the export does not know.
        unsure: why nobody should rely on it; "" = nothing speaks against it.
        error: what is wrong with the sample, of which then nothing is predicted; else "".
        where: "file", "line", "text" of the sample, what there is of them.
    """

    label: str | None = None
    probability: float | None = None
    top: list[Ranked] = field(default_factory=list)
    labels: list[str] | None = None
    value: float | None = None
    level: float | None = None
    low: float | None = None
    high: float | None = None
    distance_percentile: float | None = None
    unsure: str = ""
    error: str = ""
    where: dict[str, object] = field(default_factory=dict)

    def __repr__(self) -> str:
        """What there is to say."""
        said = {
            one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name not in ("top", "where")
        }
        words = [f"{name}={value!r}" for name, value in said.items() if value not in (None, "")]
        return f"Prediction({', '.join(words)})"

    def to_plain(self) -> dict[str, object]:
        """As a line of JSON holds it."""
        if self.error:
            return self.where | {"error": self.error}
        row: dict[str, object] = dict(self.where)
        if self.value is not None:
            row["value"] = self.value
            row |= {"level": self.level} if self.level is not None else {}
            row |= {"low": self.low, "high": self.high} if self.low is not None else {}
        else:
            if self.labels is not None:
                row["labels"] = self.labels
            else:
                chance = None if self.probability is None else round(self.probability, 6)
                row |= {"label": self.label, "probability": chance}
            row["top"] = [{"label": one.label, "probability": round(one.probability, 6)} for one in self.top]
        if self.distance_percentile is not None:
            row["distance_percentile"] = round(self.distance_percentile, 2)
        return row | ({"unsure": self.unsure} if self.unsure else {})
