"""Memory that grows from step to step and does not stop: said once, long before the machine is full."""

from itertools import pairwise
from statistics import median

from finetune.base.memory import MB, limits

# Nothing is said of fewer points, or steps: a run warms up.
LEAST_POINTS, LEAST_STEPS = 80, 500
# When so many are kept, every second one goes, and from then on only every second one comes in.
MOST_POINTS = 512
PARTS = 6
# A look at all points costs half a millisecond: only when so much more has come in. Two looks in a row must agree, the
# second with so much more than the first.
GROWTH_BETWEEN_LOOKS, GROWTH_TO_CONFIRM = 1.05, 1.25
# What is less is no harm, or is noise.
LEAST_RISE_MB, LEAST_MB_PER_STEP = 25.0, 0.02
# The rise between two parts, as a share of the mean one.
LEAST_PART = 0.4
# By so much of the earlier rise the later one may be smaller, the more the less exactly it can be seen.
LEAST_SLOWING, MOST_SLOWING = 0.05, 0.2

Point = tuple[int, float]


class LeakWatch:
    """Tells steady growth from all else that memory does.

    Only the second half of the points counts, so whatever a run fills in its first steps leaves the view as it goes
    on. That half is cut into six parts. Of each the lowest point is taken: what the process really keeps, below the
    teeth of a saw. It is a leak when those six rise

    - each time, by a good part of the mean rise: noise and a saw do not, nor does one jump;
    - as fast in the end as in the beginning: what levels off does not;
    - by 25 MB in all.

    Points are thinned out as they grow many, so a longer run is looked at in longer parts, and slower leaks show. What
    rises evenly for a thousand steps and then falls is taken for a leak: it looks like one until it falls.
    """

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._stride, self._skipped = 1, 0
        self._next_look_steps = LEAST_STEPS
        self._is_suspected = self._is_said = False

    def add(self, step: int, megabytes: float) -> str:
        """Take what the process holds after a step.

        Returns:
            Once, when it is clear that memory leaks, a sentence for a person; else "".
        """
        if self._is_said:
            return ""
        self._skipped += 1
        if self._skipped < self._stride:
            return ""
        self._skipped = 0
        self._points.append((step, megabytes))
        if len(self._points) == MOST_POINTS:
            self._points = self._points[::2]
            self._stride *= 2
        steps = step - self._points[0][0]
        if len(self._points) < LEAST_POINTS or steps < self._next_look_steps:
            return ""
        recent = self._points[len(self._points) // 2 :]
        rate = leak_mb_per_step(recent)
        self._is_said = bool(rate) and self._is_suspected
        self._is_suspected = bool(rate)
        self._next_look_steps = int(steps * (GROWTH_TO_CONFIRM if rate else GROWTH_BETWEEN_LOOKS))
        return _sentence(rate, recent[0], recent[-1]) if self._is_said else ""


def leak_mb_per_step(points: list[Point]) -> float:
    """By how much memory leaks over (step, megabytes) points, as `LeakWatch` explains; 0 = it does not."""
    size = len(points) // PARTS
    parts = [points[-size * (PARTS - number) :][:size] for number in range(PARTS)]
    lows = [min(part, key=lambda point: point[1]) for part in parts]
    rate = _slope(lows)
    rises = [later[1] - earlier[1] for earlier, later in pairwise(_at_ends(lows, parts, rate))]
    spread, total = median(_spread(part, rate) for part in parts), sum(rises)
    if rate < LEAST_MB_PER_STEP or total < LEAST_RISE_MB or min(rises) < LEAST_PART * total / len(rises):
        return 0.0
    half = len(rises) // 2
    early, late = sum(rises[:half]), sum(rises[-half:])
    slowing = min(max(spread, LEAST_SLOWING * early), MOST_SLOWING * early)
    return rate if late >= early - slowing else 0.0


def _at_ends(lows: list[Point], parts: list[list[Point]], rate: float) -> list[Point]:
    """The lows as they would be at the end of their parts, wherever in them they lie: equally far from each other."""
    return [(part[-1][0], value + rate * (part[-1][0] - step)) for (step, value), part in zip(lows, parts, strict=True)]


def _spread(part: list[Point], rate: float) -> float:
    """How far memory goes up and down within a part, its growth taken away."""
    values = [value - rate * step for step, value in part]
    return max(values) - min(values)


def _slope(points: list[Point]) -> float:
    """Megabytes a step: the median of the slopes between any two points (Theil and Sen)."""
    slopes = [
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for number, earlier in enumerate(points)
        for later in points[number + 1 :]
        if later[0] > earlier[0]
    ]
    return median(slopes) if slopes else 0.0


def _sentence(rate: float, since: Point, now: Point) -> str:
    tightest = min(limits(), key=lambda limit: limit.free_bytes)
    steps_left = int(tightest.free_bytes / MB / rate)
    return (
        f"memory grows by {rate:.2g} MB a step since step {since[0]:,} (from {since[1]:,.0f} to {now[1]:,.0f} MB at "
        f"step {now[0]:,}): a leak? about {steps_left:,} steps until {tightest.what} is full"
    )
