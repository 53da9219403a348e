"""metrics.jsonl as curves over the steps of a run, thinned to what a screen can show."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

# More points than that no screen shows.
MOST_POINTS = 2000
# Larger is no count of steps: whatever wrote it.
# Of figures that a plot can still draw.
LARGEST_STEP, LARGEST_VALUE = 1 << 40, 1e300


@dataclass(frozen=True)
class Curve:
    """A figure over the steps of a run.

    Attributes:
        steps: (points,) int64, strictly increasing.
        values: (points,) float64, finite.
    """

    steps: np.ndarray
    values: np.ndarray

    def at(self, step: int) -> float | None:
        """The value of a step; None where there is none."""
        place = int(np.searchsorted(self.steps, step))
        return float(self.values[place]) if place < len(self.steps) and self.steps[place] == step else None

    def extreme(self, lowest: bool, preferred_step: int | None = None) -> tuple[int, float]:
        """(step, value) of the lowest or the highest point; of equal ones the preferred, else the first."""
        place = int(self.values.argmin() if lowest else self.values.argmax())
        value = float(self.values[place])
        if preferred_step is not None and self.at(preferred_step) == value:
            return preferred_step, value
        return int(self.steps[place]), value

    def thinned(self, most_points: int = MOST_POINTS) -> "Curve":
        """At most so many points. The first, the last, and every stretch's lowest and highest stay."""
        count = len(self.steps)
        if count <= most_points:
            return self
        kept = {0, count - 1}
        for start, end in pairwise(np.linspace(0, count, most_points // 2, dtype=np.int64).tolist()):
            part = self.values[start:end]
            kept |= {start + int(part.argmin()), start + int(part.argmax())}
        chosen = np.array(sorted(kept))
        return Curve(self.steps[chosen], self.values[chosen])


def read_curves(path: Path) -> dict[str, Curve]:
    """The figures of a metrics.jsonl by name; {} where there is no such file.

    Lines that cannot be read are passed over, as are values that are no finite numbers. Where steps go back, as in a
    file that two processes wrote, the later lines hold.
    """
    points: dict[str, tuple[list[int], list[float]]] = {}
    try:
        with open(path, "rb") as stream:
            for line in stream:
                _take_line(line, points)
    except OSError:
        return {}
    return {
        name: Curve(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))
        for name, (steps, values) in points.items()
    }


def _take_line(line: bytes, points: dict[str, tuple[list[int], list[float]]]) -> None:
    try:
        found = json.loads(line)
        step = found["step"]
        if not isinstance(step, int) or not 0 <= step < LARGEST_STEP:
            return
        numbers = {name: float(value) for name, value in found.items() if type(value) in (int, float)}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return  # a line that a kill has torn
    for name, value in numbers.items():
        if name == "step" or not abs(value) < LARGEST_VALUE:
            continue
        steps, values = points.setdefault(name, ([], []))
        while steps and steps[-1] >= step:
            steps.pop(), values.pop()
        steps.append(step)
        values.append(value)
