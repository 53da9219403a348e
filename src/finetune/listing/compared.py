"""Two runs side by side: what was different, and what came of it."""

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.base.formatting import duration_text, finite, number_text, printable, size_text, value_text
from finetune.listing.cells import STATE_STYLES, ago_text, best_cell, epochs_text, to_plain
from finetune.listing.found import FoundRun, differing, is_plain_file
from finetune.recipe.spec import LOWER_IS_BETTER
from finetune.report.curves import read_curves
from finetune.store.run_folder import RunFolder

# Behind the better of two figures.
BETTER = "*"
LARGEST_WIDTH = 10_000


def validations(run: FoundRun) -> dict[int, dict[str, float]]:
    """epoch -> figure -> value, of the last validation in each epoch."""
    log = RunFolder(run.path).metrics_file
    curves = read_curves(log) if is_plain_file(log) else {}
    epochs = curves.get("epoch")
    found: dict[int, dict[str, float]] = {}
    for name, curve in curves.items():
        if epochs is None or not name.startswith("val/"):
            continue
        for step, value in zip(curve.steps.tolist(), curve.values.tolist(), strict=True):
            epoch = epochs.at(step)
            if epoch is not None:
                found.setdefault(int(epoch), {})[name.removeprefix("val/")] = value
    return dict(sorted(found.items()))


def better(metric: str, first: float | None, second: float | None) -> int | None:
    """0 or 1, of two values of a metric; None = neither."""
    if first is None or second is None or first == second:
        return None
    return int((second < first) == (metric in LOWER_IS_BETTER))


@dataclass(frozen=True)
class Comparison:
    """Two runs.

    Attributes:
        options: those that differ.
        same_data, same_frozen: None = not known, as one of them has no checkpoint.
        epochs: epoch -> figure -> the values of both, None where there is none.
    """

    runs: tuple[FoundRun, FoundRun]
    options: dict[str, tuple[object, object]]
    same_data: bool | None
    same_frozen: bool | None
    epochs: dict[int, dict[str, tuple[float | None, float | None]]]

    @classmethod
    def of(cls, one: FoundRun, other: FoundRun) -> "Comparison":
        def same(first: str, second: str) -> bool | None:
            return first == second if first and second else None

        first, second = validations(one), validations(other)
        metrics = {name: None for found in (first, second) for values in found.values() for name in values}
        epochs = {
            epoch: {name: (first.get(epoch, {}).get(name), second.get(epoch, {}).get(name)) for name in metrics}
            for epoch in sorted(first.keys() | second.keys())
        }
        options = {name: (one.options.get(name), other.options.get(name)) for name in differing([one, other])}
        frozen = same(one.frozen_sha256, other.frozen_sha256)
        return cls((one, other), options, same(one.fingerprint, other.fingerprint), frozen, epochs)

    def to_plain(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "runs": [to_plain(run) for run in self.runs],
            "options": {name: finite(list(values)) for name, values in self.options.items()},
            "same_data": self.same_data,
            "same_frozen": self.same_frozen,
            "epochs": [
                {"epoch": epoch} | {name: list(values) for name, values in figures.items()}
                for epoch, figures in self.epochs.items()
            ],
        }

    def show(self, console: Console) -> None:
        """Facts and options first, then the validations."""
        console.print(self._facts())
        for letter, run in zip("AB", self.runs, strict=True):
            if run.note:
                console.print(Text(f"{letter}: {printable(run.note)}", STATE_STYLES.get(run.state, "")))
        if self.epochs:
            self._show_validations(console, list(next(iter(self.epochs.values()))))
            console.print(Text(f"{BETTER} the better of the two"))

    def _facts(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", style="dim", overflow="fold")
        for letter, run in zip("AB", self.runs, strict=True):
            table.add_column(Text(f"{letter}: {printable(str(run.path))}"), overflow="fold")
        states = [Text(run.state, STATE_STYLES.get(run.state, "")) for run in self.runs]
        table.add_row("state", *states)
        table.add_row("epochs", *map(epochs_text, self.runs))
        table.add_row("best", *self._best())
        table.add_row("time", *(duration_text(run.seconds) for run in self.runs))
        table.add_row("size", *(size_text(run.size_bytes) for run in self.runs))
        table.add_row("changed", *(ago_text(run.changed) for run in self.runs), end_section=True)
        for label, same in (("data", self.same_data), ("frozen weights", self.same_frozen)):
            words = {True: ("the same", "the same"), False: ("other", "other"), None: ("not known", "not known")}
            table.add_row(label, *words[same])
        if not self.options:
            table.add_row("options", "the same", "the same")
        for name, values in self.options.items():
            if name == "epochs":  # see above
                continue
            table.add_row(Text(printable(name)), *(Text(value_text(value)) for value in values))
        return table

    def _best(self) -> list[Text]:
        one, other = (run.best for run in self.runs)
        winner = None
        if one and other and one["metric"] == other["metric"]:
            winner = better(one["metric"], one["value"], other["value"])
        return [_marked(best_cell(run), number == winner) for number, run in enumerate(self.runs)]

    def _show_validations(self, console: Console, metrics: list[str]) -> None:
        """In one table, or where that is too wide in several."""
        table = self._validations(metrics)
        needed = console.measure(table, options=console.options.update(max_width=LARGEST_WIDTH)).maximum
        if len(metrics) > 1 and needed > console.width:
            half = len(metrics) // 2
            self._show_validations(console, metrics[:half])
            self._show_validations(console, metrics[half:])
        else:
            console.print(table)

    def _validations(self, metrics: list[str]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("epoch", justify="right")
        for metric in metrics:
            for letter in "AB":
                table.add_column(Text(f"{printable(metric)} {letter}"), justify="right")
        for epoch, figures in self.epochs.items():
            cells = []
            for metric in metrics:
                winner = better(metric, *figures[metric])
                texts = ["-" if value is None else number_text(value) for value in figures[metric]]
                # What is not marked keeps its digits below those of the others.
                cells += [_marked(text, number == winner, " ") for number, text in enumerate(texts)]
            table.add_row(str(epoch), *cells)
        return table


def _marked(text: str, is_better: bool, otherwise: str = "") -> Text:
    return Text(f"{text}{BETTER}", "bold") if is_better else Text(f"{text}{otherwise}")
