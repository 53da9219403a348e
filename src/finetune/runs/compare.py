"""Several backbones on the same data with the same head and seed: an ordinary run each, and a table."""

import dataclasses
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from finetune.base.formatting import number_text, parameters_text, printable, size_text
from finetune.base.intervals import share_text
from finetune.errors import FinetuneError, StoppedEarly, UsageError
from finetune.models.catalogue import count_parameters
from finetune.models.hub import weight_files
from finetune.models.pretrained import find_pretrained
from finetune.models.weights import Weights
from finetune.recipe.spec import LOWER_IS_BETTER, METRICS, Recipe
from finetune.report.curves import read_curves
from finetune.runs.evaluate import LABELS
from finetune.store.metrics_log import PASS_SECONDS
from finetune.store.run_folder import RunFolder, peek

COSTS = ("pass", "weights", "parameters")
WIDEST = 1_000  # than any table
# Of a backbone's name, what a folder's name cannot or should not hold.
NO_FOLDER_NAME = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Candidate:
    """One of the backbones.

    Attributes:
        folder: the name of its run's.
        parameters: without a head.
        weight_bytes: of its weights' file; 0 = random ones.
    """

    name: str
    recipe: Recipe
    folder: str
    parameters: int
    weight_bytes: int


@dataclass(frozen=True)
class Row:
    """What came of one.

    Attributes:
        figures: of what ships, on the samples that validate, without "val/"; {} where it failed.
        run: its folder.
        samples: that validated.
        pass_seconds: of the backbone, once over all samples; 0 = kept from before, None = it ran in every epoch.
        failed: there is nothing.
    """

    candidate: Candidate
    figures: dict[str, float]
    run: Path | None = None
    samples: int = 0
    pass_seconds: float | None = None
    failed: bool = False


def find_candidates(recipe: Recipe, names: Sequence[str]) -> list[Candidate]:
    """The backbones; all of them are at hand afterwards.

    Raises:
        FinetuneError: one is unknown, named twice, or cannot be had.
    """
    if "" in names or len(set(names)) < len(names):
        raise UsageError(
            f"--backbone {','.join(names)}: give each backbone once, with one comma between two, as in "
            "bundled/mobilenet,bundled/vgg"
        )
    found, folders = [], set[str]()
    for number, name in enumerate(names, 1):
        one = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, backbone=name))
        backbone, weights = find_pretrained(one)
        folder = NO_FOLDER_NAME.sub("-", name).strip("-.") or str(number)
        if folder in folders:
            folder = f"{folder}-{number}"
        folders.add(folder)
        found.append(Candidate(name, one, folder, count_parameters(backbone), _bytes_of(weights)))
    return found


def _bytes_of(weights: Weights | None) -> int:
    if weights is None:
        return 0
    files = weight_files(weights.path) if weights.path.is_dir() else [weights.path]
    return sum(path.stat().st_size for path in files)


def compare(
    candidates: Sequence[Candidate],
    train: Callable[[Candidate], Path],
    say: Callable[[str], None],
    complain: Callable[[str], None],
) -> list[Row]:
    """Train each in turn. One that fails does not keep the others from it.

    Args:
        complain: told why one failed.

    Raises:
        StoppedEarly: asked for; what was done is kept.
        UsageError: what was asked for is wrong, as the first of them finds out.
    """
    rows = []
    for number, candidate in enumerate(candidates, 1):
        say(f"\n{number} of {len(candidates)}: {candidate.name}")
        try:
            rows.append(_row(candidate, RunFolder(train(candidate))))
        except StoppedEarly:
            raise
        except FinetuneError as error:
            if not rows and isinstance(error, UsageError):
                raise
            complain(f"finetune: {candidate.name}: {error.args[0]}")
            rows.append(Row(candidate, {}, failed=True))
    metric = candidates[0].recipe.best_metric
    sign = 1 if metric in LOWER_IS_BETTER else -1

    def rank(row: Row) -> tuple[bool, float, float]:
        return not row.figures, sign * row.figures.get(metric, 0.0), row.figures.get("loss", 0.0)

    return sorted(rows, key=rank)


def _row(candidate: Candidate, run: RunFolder) -> Row:
    state = peek(run.latest)
    step, curves, finish = state.progress.best["step"], read_curves(run.metrics_file), state.progress.finish
    solved = finish.judged.get("figures", {}) if finish.ships == "final" else {}
    figures = solved or {
        name: value
        for name in METRICS[candidate.recipe.task.kind]
        if (curve := curves.get(f"val/{name}")) is not None and (value := curve.at(step)) is not None
    }
    seconds = curves.get(PASS_SECONDS)
    pass_seconds = None if seconds is None else float(seconds.values[0])
    samples = finish.judged["samples"] if solved else state.data.validation_samples
    return Row(candidate, figures, run.path, samples, pass_seconds)


# ---- For people -----------------------------------------------------------------------------------------------------


def show(rows: Sequence[Row], words: Sequence[str], console: Console) -> None:
    """Print the table, and what to type for the best; nothing where all failed.

    Args:
        words: what to type after `finetune` to train on the best.
    """
    if not rows[0].figures:
        return
    recipe = rows[0].candidate.recipe
    metrics = [name for name in METRICS[recipe.task.kind] if any(name in row.figures for row in rows)]
    headings = [LABELS.get(name, name) for name in metrics]
    figures = [[_figure_text(name, row) for name in metrics] if row.figures else ["failed"] for row in rows]
    costs = [_costs(row) for row in rows]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, heading in enumerate(("backbone", *headings, *COSTS)):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    names = [printable(row.candidate.name) for row in rows]
    for name, shown, cost in zip(names, figures, costs, strict=True):
        table.add_row(*map(Text, (name, *shown, *[""] * (len(metrics) - len(shown)), *cost)))
    console.print()
    if console.measure(table, options=console.options.update_width(WIDEST)).maximum <= console.width:
        console.print(table)
    else:
        for row, name, shown, cost in zip(rows, names, figures, costs, strict=True):
            console.print(Text(name, "bold"))
            for cells in (_named(headings, shown) if row.figures else shown, _named(COSTS, cost)):
                console.print(Padding(Text(", ".join(cells)), (0, 0, 0, 2)))
    line = shlex.join(["finetune", *words])
    console.print(Text(f"\nto train on the best: {printable(line)}\nit has done so in {rows[0].run}"))


def _named(headings: Sequence[str], cells: Sequence[str]) -> list[str]:
    return [f"{heading} {cell}" for heading, cell in zip(headings, cells, strict=True) if cell]


def _costs(row: Row) -> tuple[str, str, str]:
    """Seconds of the pass, size of the weights, parameters."""
    candidate, seconds = row.candidate, row.pass_seconds
    taken = "" if seconds is None else f"{seconds:.1f} s" if seconds else "kept"
    size = size_text(candidate.weight_bytes) if candidate.weight_bytes else "random"
    return taken, size, parameters_text(candidate.parameters)


def _figure_text(name: str, row: Row) -> str:
    if name not in row.figures:
        return ""
    value = row.figures[name]
    return f"{value:.3f} ({share_text(value, row.samples)})" if name == "accuracy" else number_text(value, 3)
