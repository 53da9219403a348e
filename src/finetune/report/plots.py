"""Diagrams of a report as SVG to be put into HTML: colours are names that its style sheet knows, text is text.

Drawn without pyplot, whose global figures and windows are no use to a run.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from finetune.report.curves import Curve
from finetune.report.data import Event

if TYPE_CHECKING:  # older versions have no such name
    from matplotlib.typing import RcKeyType

# Shares of a row at which the colour of a cell changes.
HEAT_STEPS = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
HEATS = tuple(f"{kind}-{step}" for kind in ("hit", "miss", "on-hit", "on-miss") for step in range(len(HEAT_STEPS) + 1))
# Variables of the page's style sheet, which follow light and dark. To matplotlib each is a colour, replaced in the end.
VARIABLES = ("ink", "muted", "rule", "paper", "train", "val", "other", *HEATS)
COLOURS = {name: f"#0a0b{number:02x}" for number, name in enumerate(VARIABLES)}
SETTINGS: "dict[RcKeyType, object]" = {
    "svg.fonttype": "none",
    "svg.hashsalt": "finetune",
    "path.simplify": False,
    "text.usetex": False,
    "text.parse_math": False,
    "text.color": COLOURS["ink"],
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.unicode_minus": False,
    "axes.axisbelow": True,
    "axes.autolimit_mode": "data",
    "axes.edgecolor": COLOURS["muted"],
    "axes.linewidth": 0.8,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.8,
    "grid.linestyle": "-",
}
POINTS_AN_INCH = 72
WIDTH, HEIGHT, CALIBRATION_HEIGHT = 340, 212, 300
# Around the axes of a chart: left, bottom, right, top; and where its tick labels stand.
MARGINS = 42, 24, 10, 26
TICKS_BELOW, ROW_BASELINE, ROW_HEIGHT = 14.5, 7, 13
ROUND_STEPS = (1, 2, 5, 10)
# Events that stand nearer to each other than this share of the width have one label.
LABEL_SHARE = 0.05
LONGEST_LABEL = 18
CELL, LETTER = 24, 5.8
# Of a cell in its place.
CORNERS = ((0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96))


# ---- Figures to SVG -------------------------------------------------------------------------------------------------


class _Drawing:
    """A figure of so many units, and the words in it: those of others are put in last, so that what a class is called
    is neither measured, nor looked for in a font, nor taken for a formula."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / POINTS_AN_INCH, height / POINTS_AN_INCH), dpi=POINTS_AN_INCH)
        self.figure.patch.set_visible(False)
        self.words: list[str] = []

    def axes(self, left: float, bottom: float, width: float, height: float) -> Axes:
        """Of a place in units, from the lower left corner."""
        place = left / self.width, bottom / self.height, width / self.width, height / self.height
        axes = self.figure.add_axes(place)
        axes.patch.set_visible(False)
        axes.spines[["left", "right", "top"]].set_visible(False)
        return axes

    def label(self, text: str, baseline: float) -> None:
        """What an axis counts, left of its numbers."""
        left = (MARGINS[0] - 6) / self.width
        self.figure.text(left, baseline / self.height, text, ha="right", color=COLOURS["muted"])

    def word(self, text: str) -> str:
        """What is drawn in its place."""
        self.words.append(text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…")
        return f"word{len(self.words) - 1}drow"

    def svg(self, name: str, label: str) -> str:
        """An <svg> element that stands alone in HTML.

        Args:
            name: of the drawing, unlike that of any other on the page.
            label: what a screen reader says.
        """
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(self.figure).print_svg(stream, metadata=nothing)
        return self._cleaned(stream.getvalue(), name, label)

    def _cleaned(self, text: str, name: str, label: str) -> str:
        body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
        body = re.sub(r"<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
        # The page's own font; older versions of matplotlib say size and family in one.
        body = re.sub(r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", body)
        body = re.sub(r" *font-family: [^;\"]*;?", "", body)
        body = re.sub(r"#0a0b([0-9a-f]{2})", lambda found: f"var(--{VARIABLES[int(found[1], 16)]})", body)
        # In tags, not in texts: a hundredth of a unit is more than enough.
        body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), body)
        body = body.replace("xlink:href", "href")
        used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", body))
        body = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
        body = re.sub(r'(url\(|href=")#', rf"\1#{name}-", body)
        body = re.sub(r"word(\d+)drow", lambda found: str(escape(self.words[int(found[1])])), body)
        body = re.sub(r"\n\s*", "\n", body)
        head = f'viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{escape(label)}"'
        return f'<svg id="{name}" {head}>{body}</svg>'


# ---- Curves ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Attributes:
        colour: "train", "val", or, dashed, "other".
        is_faint: for what is noisy, behind the others.
        best: (step, value) of a point to be ringed.
    """

    curve: Curve
    colour: str
    is_faint: bool = False
    best: tuple[int, float] | None = None


def line_chart(
    name: str,
    label: str,
    lines: Sequence[Line],
    events: Sequence[Event],
    last_step: int,
    steps_per_epoch: int,
    logarithmic: bool = False,
) -> str:
    """Curves over steps, with epochs above, and a dashed line for each event.

    Args:
        name, label: see `_Drawing.svg`.
        last_step: where the axis ends.
        steps_per_epoch: 0 = not known, no epochs are shown.
    """
    with matplotlib.rc_context(SETTINGS):
        drawing = _Drawing(WIDTH, HEIGHT)
        left, bottom, right, top = MARGINS
        # From the axes up: a row for events, where there are any, and a row for epochs.
        rows = [name for name, is_there in (("event", events), ("epoch", steps_per_epoch)) if is_there]
        height = HEIGHT - bottom - top - ROW_HEIGHT * (len(rows) - 1)
        above = {name: ROW_BASELINE + ROW_HEIGHT * place for place, name in enumerate(rows)}
        axes = drawing.axes(left, bottom, WIDTH - left - right, height)
        for line in lines:
            _draw_line(axes, line)
        end = max(last_step, 1)
        axes.set_xlim(-0.015 * end, 1.015 * end)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        drawing.label("step", bottom - TICKS_BELOW)
        _set_heights(axes, logarithmic)
        for row, baseline in above.items():
            drawing.label(row, bottom + height + baseline)
            if row == "epoch":
                _draw_epochs(axes, end, steps_per_epoch, baseline / height)
            else:
                _draw_events(axes, events, end, baseline / height)
        return drawing.svg(name, label)


def strength_chart(name: str, label: str, strengths: Sequence[float], losses: Sequence[float], best: int) -> str:
    """Loss over the strength of the regularisation, which is logarithmic.

    Args:
        name, label: see `_Drawing.svg`.
        best: place of the one that was chosen.
    """
    with matplotlib.rc_context(SETTINGS):
        drawing = _Drawing(WIDTH, HEIGHT)
        left, bottom, right, top = MARGINS
        axes = drawing.axes(left, bottom, WIDTH - left - right, HEIGHT - bottom - top)
        axes.plot(strengths, losses, color=COLOURS["val"], linewidth=1.7, marker="o", markersize=3)
        ring: dict[str, Any] = {"marker": "o", "markersize": 7, "markeredgewidth": 1.7}
        axes.plot(strengths[best], losses[best], color=COLOURS["val"], markerfacecolor=COLOURS["paper"], **ring)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _set_heights(axes, logarithmic=False)
        drawing.label("lambda", bottom - TICKS_BELOW)
        return drawing.svg(name, label)


def _set_heights(axes: Axes, logarithmic: bool) -> None:
    axes.grid(axis="y")
    if logarithmic:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [digit * 10.0**exponent for exponent in exponents for digit in ((1,) if len(exponents) > 3 else (1, 3))]
        axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.margins(y=0.1)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_line(axes: Axes, line: Line) -> None:
    curve, colour = line.curve.thinned(), COLOURS[line.colour]
    if line.is_faint:
        axes.plot(curve.steps, curve.values, color=colour, linewidth=1.0, alpha=0.45)
        return
    dashes: dict[str, Any] = {"dashes": (3, 1.5)} if line.colour == "other" else {}
    axes.plot(curve.steps, curve.values, color=colour, linewidth=1.7, solid_joinstyle="round", **dashes)
    if len(curve.steps) == 1:
        axes.plot(curve.steps, curve.values, "o", color=colour, markersize=5)
    if line.best:
        ring: dict[str, Any] = {"marker": "o", "markersize": 7, "markeredgewidth": 1.7}
        axes.plot(*([number] for number in line.best), color=colour, markerfacecolor=COLOURS["paper"], **ring)


def _draw_epochs(axes: Axes, end: int, steps_per_epoch: int, above: float) -> None:
    """Numbers of whole epochs above the axes, by that share of their height, each where it ends."""
    for epoch in MaxNLocator(6, steps=(1, 2, 3, 5, 10), integer=True).tick_values(0, end / steps_per_epoch):
        if 0 <= epoch <= end / steps_per_epoch * 1.001 and epoch == int(epoch):
            across, colour = axes.get_xaxis_transform(), COLOURS["muted"]
            text = f"{epoch:,.0f}"
            axes.text(epoch * steps_per_epoch, 1 + above, text, transform=across, ha="center", color=colour)


def _draw_events(axes: Axes, events: Sequence[Event], end: int, above: float) -> None:
    """A dashed line for each, its number above; of those that stand too near to each other the first and the last."""
    lines = [[(event.step, 0.0), (event.step, 1.0)] for event in events]
    across = axes.get_xaxis_transform()
    style: dict[str, Any] = {"colors": COLOURS["muted"], "linewidths": 1.0, "linestyles": [(0, (3, 3))]}
    axes.add_collection(LineCollection(lines, transform=across, **style), autolim=False)
    groups: list[list[Event]] = []
    for event in events:
        if groups and event.step < groups[-1][0].step + LABEL_SHARE * end:
            groups[-1].append(event)
        else:
            groups.append([event])
    for group in groups:
        numbers = sorted({group[0].number, group[-1].number})
        text = "\N{EN DASH}".join(map(str, numbers))
        axes.text(group[0].step, 1 + above, text, transform=across, ha="center", fontsize=9)


# ---- Confusion matrix and calibration -------------------------------------------------------------------------------


def heat_step(share: float) -> int:
    """Place on the scale of colours, 0 for nearly nothing."""
    return sum(share >= bound for bound in HEAT_STEPS)


def confusion_chart(name: str, label: str, matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> tuple[str, int]:
    """Counts in a grid, coloured by their share of the row; the diagonal, which is right, in another colour.

    Args:
        matrix: rows of true classes, columns of predicted ones.

    Returns:
        The SVG, and its width in units.
    """
    count = len(classes)
    digits = max(len(f"{number}") for row in matrix for number in row)
    cell = max(CELL, LETTER * (digits + 1.5))
    with matplotlib.rc_context(SETTINGS):
        longest = max(min(len(one), LONGEST_LABEL) for one in classes)
        is_upright = longest * LETTER > cell
        left, top = 30 + longest * LETTER, 30 + (longest * LETTER if is_upright else 10)
        width, height = left + count * cell + 6, top + count * cell + 6
        drawing = _Drawing(width, height)
        axes = drawing.axes(left, 6, count * cell, count * cell)
        axes.set(xlim=(0, count), ylim=(count, 0))
        axes.set_axis_off()
        corners, colours = [], []
        for row, numbers in enumerate(matrix):
            total = sum(numbers)
            for column, number in enumerate(numbers):
                kind, step = "hit" if row == column else "miss", heat_step(number / total if total else 0.0)
                corners.append([(column + x, row + y) for x, y in CORNERS])
                colours.append(COLOURS[f"{kind}-{step}"] if number else COLOURS["hit-0"])
                if number:
                    colour = COLOURS[f"on-{kind}-{step}"]
                    axes.text(column + 0.5, row + 0.64, f"{number}", ha="center", color=colour, fontsize=9.5)
        axes.add_collection(PolyCollection(corners, facecolors=colours, linewidths=0), autolim=False)
        for number, one in enumerate(classes):
            axes.text(-0.25, number + 0.64, drawing.word(one), ha="right")
            turned: dict[str, Any] = (
                {"rotation": 90, "rotation_mode": "anchor", "ha": "left"} if is_upright else {"ha": "center"}
            )
            axes.text(number + (0.64 if is_upright else 0.5), -0.25, drawing.word(one), **turned)
        words: dict[str, Any] = {"color": COLOURS["muted"], "ha": "center"}
        drawing.figure.text((left + count * cell / 2) / width, 1 - 11 / height, "predicted", **words)
        drawing.figure.text(
            11 / width, (6 + count * cell / 2) / height, "true", rotation=90, rotation_mode="anchor", **words
        )
        return drawing.svg(name, label), round(width)


def calibration_chart(name: str, label: str, bins: Sequence[dict[str, float]]) -> str:
    """Share that was right over confidence, a dot a bin, its area as large as the bin; on the diagonal is honest."""
    with matplotlib.rc_context(SETTINGS):
        drawing = _Drawing(WIDTH, CALIBRATION_HEIGHT)
        left, bottom, right, top = MARGINS
        axes = drawing.axes(left, bottom + 12, WIDTH - left - right, CALIBRATION_HEIGHT - bottom - 12 - top)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axes.grid(axis="y")
        axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=1.0, dashes=(3, 3))
        largest = max((bin["count"] for bin in bins), default=1)
        sizes = [math.sqrt(bin["count"] / largest) for bin in bins]
        points = [(bin["confidence"], bin["accuracy"]) for bin in bins]
        gaps = [[(confidence, confidence), (confidence, share)] for confidence, share in points]
        widths = [0.7 + 2.3 * size for size in sizes]
        axes.add_collection(LineCollection(gaps, colors=COLOURS["val"], linewidths=widths), autolim=False)
        for (confidence, share), size in zip(points, sizes, strict=True):
            axes.plot([confidence], [share], "o", color=COLOURS["val"], markersize=4 + 12 * size, markeredgewidth=0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        colour = COLOURS["muted"]
        drawing.figure.text(1 - right / WIDTH, 6 / CALIBRATION_HEIGHT, "confidence", ha="right", color=colour)
        drawing.figure.text(14 / WIDTH, 1 - 14 / CALIBRATION_HEIGHT, "share right", color=colour)
        return drawing.svg(name, label)
