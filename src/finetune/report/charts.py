"""The diagrams of a report, each with a sentence that says in numbers what it shows."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.base.formatting import number_text, printable
from finetune.report import plots
from finetune.report.curves import Curve
from finetune.report.data import RunData, Validation, lower_is_better
from finetune.report.plots import Line
from finetune.report.words import capitalised, metric_text

# Both between 0 and 1, and seldom far apart.
SHARES = ("accuracy", "f1")
# Of figures that somebody else's metrics.jsonl may hold.
MOST_METRIC_CHARTS = 6
# Curves over more than so many times their lowest value.
LINEAR_UP_TO = 30
# A larger confusion matrix is told by its most frequent mistakes.
LARGEST_MATRIX = 25


@dataclass(frozen=True)
class Chart:
    """A diagram.

    Attributes:
        svg: ready for HTML.
        caption: the same in words and numbers.
        key: (colour, meaning) of its lines.
        width: in units; 0 = as wide as there is room.
    """

    title: str
    svg: str
    caption: str
    key: tuple[tuple[str, str], ...] = ()
    width: int = 0


# ---- Curves ---------------------------------------------------------------------------------------------------------


def curve_charts(data: RunData) -> list[Chart]:
    """Loss, metrics, learning rate and gradient over the steps, as far as they were logged."""
    if not data.curves:
        return []
    charts = [chart for chart in (_loss_chart(data), *_metric_charts(data)) if chart is not None]
    for name, title in (("lr", "Learning rate"), ("train/gradient_norm", "Norm of the gradient")):
        curve = data.curves.get(name)
        if curve is not None:
            (low_at, low), (high_at, high) = curve.extreme(lowest=True), curve.extreme(lowest=False)
            caption = (
                f"{title}: at its highest {high:.4g} (step {high_at:,}), at its lowest {low:.4g} (step {low_at:,}); "
                f"{curve.values[-1]:.4g} in the end."
            )
            charts.append(_chart(data, len(charts), title, [Line(curve, "train")], caption, is_linear=name == "lr"))
    solved = strength_chart(data)
    return [*charts, solved] if solved is not None else charts


def _chart(
    data: RunData,
    number: int,
    title: str,
    lines: Sequence[Line],
    caption: str,
    key: Sequence[tuple[str, str]] = (),
    is_linear: bool = True,
) -> Chart:
    """Args: is_linear: else the axis is logarithmic where most of the curves would lie on the ground."""
    last = max(int(curve.steps[-1]) for curve in data.curves.values())
    low, high = (pick(float(pick(line.curve.values)) for line in lines) for pick in (min, max))
    logarithmic = not is_linear and 0 < LINEAR_UP_TO * low < high
    label = f"Line chart: {title} over the steps of the run"
    svg = plots.line_chart(f"curve{number}", label, lines, data.events, last, data.steps_per_epoch, logarithmic)
    return Chart(f"{title}, logarithmic scale" if logarithmic else title, svg, caption, tuple(key))


def _loss_chart(data: RunData) -> Chart | None:
    steps, mean, validation = (data.curves.get(name) for name in ("train/loss", "train/epoch_loss", "val/loss"))
    lines, key, sentences = [], [], []
    if steps is not None:
        lines.append(Line(steps, "train", is_faint=mean is not None))
        key.append(("faint" if mean is not None else "train", "training, single steps"))
    if mean is not None:
        lines.append(Line(mean, "train"))
        key.append(("train", "training, mean since the epoch began"))
    training = mean if mean is not None else steps
    if training is not None:
        sentences.append(f"Training loss went from {_point(training, 0)} to {_point(training, -1)}.")
    if validation is not None:
        lines.append(Line(validation, "val", best=validation.extreme(lowest=True)))
        key.append(("val", "validation"))
        sentences.append(_course("Validation loss", validation, lowest=True))
    return _chart(data, 0, "Loss", lines, " ".join(sentences), key, is_linear=False) if lines else None


def _point(curve: Curve, place: int) -> str:
    return f"{number_text(float(curve.values[place]))} (step {int(curve.steps[place]):,})"


def _course(what: str, curve: Curve, lowest: bool, preferred_step: int | None = None) -> str:
    step, value = curve.extreme(lowest, preferred_step)
    best, last = "lowest" if lowest else "highest", number_text(float(curve.values[-1]))
    if step == curve.steps[-1]:
        return f"{what} was {best} in the end, at step {step:,}: {last}."
    return f"{what} was {best} at step {step:,} with {number_text(value)}, and {last} in the end."


def _metric_charts(data: RunData) -> list[Chart]:
    """Accuracy and F1 share one; of the others each has its own."""
    names = data.metrics[:MOST_METRIC_CHARTS]
    together = [name for name in names if name in SHARES]
    groups = [together, *([name] for name in names if name not in SHARES)]
    return [_metric_chart(data, number, group) for number, group in enumerate(groups, start=1) if group]


def _metric_chart(data: RunData, number: int, names: Sequence[str]) -> Chart:
    lines, key, sentences = [], [], []
    for name, colour in zip(names, ("val", "other"), strict=False):
        curve, lowest = data.curves[f"val/{name}"], lower_is_better(name)
        best_step = data.best.get("step") if name == data.best.get("metric") else None
        lines.append(Line(curve, colour, best=curve.extreme(lowest, best_step) if colour == "val" else None))
        key.append((colour, metric_text(name)))
        sentences.append(_course(capitalised(metric_text(name)), curve, lowest, best_step))
    title = capitalised(" and ".join(map(metric_text, names)))
    return _chart(data, number, f"{title}, validation", lines, " ".join(sentences), key if len(key) > 1 else ())


def strength_chart(data: RunData) -> Chart | None:
    """How the loss of rows that were held out depends on the strength of the regularisation; None where no head was
    solved."""
    finish = data.checkpoint.progress.finish if data.checkpoint else None
    if finish is None or len(finish.tried) < 2:
        return None
    strengths, losses = ([one[name] for one in finish.tried] for name in ("strength", "log_loss"))
    best, judged = finish.best, finish.judged
    sentences = [
        f"{len(strengths)} strengths were tried in {len(best['fold_losses'])} fold(s); loss was lowest with lambda "
        f"{best['strength']:.2g}: {number_text(best['log_loss'])} out of fold."
    ]
    if judged:
        better = "the solved head ships" if finish.ships == "final" else "the loop's best ships"
        sentences.append(
            f"On the {judged['samples']:,} that validate its loss is {number_text(judged['solved'])}, that of the "
            f"loop's best {number_text(judged['loop'])}: {better}. As the strength was chosen by these losses, they "
            f"look better by about {number_text(judged['optimism'])} than they are."
        )
    place = losses.index(best["log_loss"])
    svg = plots.strength_chart("strength", "Line chart: loss over lambda", strengths, losses, place)
    return Chart("The solved head: loss over lambda", svg, " ".join(sentences))


# ---- What the best validation made of its samples -------------------------------------------------------------------


def confusion_chart(validation: Validation) -> Chart | None:
    """None where there is no matrix, or one that nobody could read."""
    matrix = validation.record.confusion
    if not matrix or len(matrix) > LARGEST_MATRIX:
        return None
    right, total = sum(row[number] for number, row in enumerate(matrix)), sum(map(sum, matrix))
    sentences = [f"{right:,} of {total:,} are on the diagonal, which is right."]
    if validation.mistakes:
        true, predicted, count = validation.mistakes[0]
        kinds = sum(number > 0 for row in matrix for number in row) - sum(row[n] > 0 for n, row in enumerate(matrix))
        times = "once" if count == 1 else f"{count:,} times"
        sentences.append(
            f"The most frequent mistake: “{printable(true)}” was taken for “{printable(predicted)}” {times}; "
            f"kinds of mistake that occur: {kinds:,} of {len(matrix) * (len(matrix) - 1):,}."
        )
    names = [printable(row.name) for row in validation.classes]
    label = f"Heat map: confusion matrix of {len(names)} classes"
    svg, width = plots.confusion_chart("confusion", label, matrix, names)
    caption = " ".join([*sentences, "The stronger the colour, the larger a count's share of its row."])
    return Chart("Confusion matrix", svg, caption, width=width)


def calibration_chart(validation: Validation) -> Chart | None:
    """None where there are no probabilities."""
    error, bins = validation.record.calibration_error, validation.record.calibration
    if error is None or not bins:
        return None
    decisions = int(sum(bin["count"] for bin in bins))
    confidence, share = (
        sum(bin["count"] * bin[name] for bin in bins) / decisions for name in ("confidence", "accuracy")
    )
    leaning = "more sure than it was right" if confidence > share else "no more sure than it was right"
    caption = (
        f"Expected calibration error {error:.4f}, over {decisions:,} decisions: on average the network was {leaning}, "
        f"confidence {confidence:.4f}, share right {share:.4f}. Dots on the dashed line are honest, below it too sure; "
        "the larger a dot, the more decisions."
    )
    svg = plots.calibration_chart("calibration", "Calibration diagram: share right over confidence", bins)
    return Chart("Calibration", svg, caption)
