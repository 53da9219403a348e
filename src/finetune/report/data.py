"""What the files of a run say, gathered for its report; nothing is drawn here, and nothing is trusted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune.base.files import BadFile, read_json
from finetune.base.safe_load import load_plain
from finetune.errors import RunError
from finetune.recipe.spec import LOWER_IS_BETTER
from finetune.report.curves import Curve, read_curves
from finetune.store.checkpoint import LATEST, newest_good
from finetune.store.run_folder import RunFolder
from finetune.tasks.metrics import ClassCounts

EVENTS = ("resume", "extend", "thaw")
NOT_AS_WRITTEN = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RuntimeError)


# ---- The newest checkpoint ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """Something that happened to a run between two of its steps.

    Attributes:
        number: from 1 on, as it stands beside its line in the curves.
        kind: one of `EVENTS`.
        epoch: the first of those that follow, from 1 on.
    """

    number: int
    kind: str
    step: int
    epoch: int
    text: str


@dataclass(frozen=True)
class Checkpoint:
    """Of the newest checkpoint, what a report says.

    Attributes:
        status: "running", "finished" or "stopped early".
        best: {"metric", "value", "step", "epoch"} of the best validation, or {}.
        frozen_tensors, trained_tensors: how many parameters of the network.
        trained_parameters: numbers in the latter.
        outputs: numbers that the network gives for a sample.
        backbone: as `Backbone.to_plain` gives it.
    """

    step: int
    epoch: int
    status: str
    best: dict[str, Any]
    events: list[Event]
    classes: list[str]
    outputs: int
    fingerprint: str
    train_samples: int
    validation_samples: int
    frozen_tensors: int
    trained_tensors: int
    trained_parameters: int
    backbone: dict[str, Any]
    versions: dict[str, str]


def _checkpoint_from_plain(state: dict[str, Any], run_id: str) -> Checkpoint:
    """Raises one of `NOT_AS_WRITTEN` for what is no checkpoint of that run."""
    if state["run_id"] != run_id:
        raise ValueError("of another run")
    data, best = state["data"], state["best_metric"]
    if best:
        best = {"metric": str(best["metric"]), "value": float(best["value"])} | {
            name: int(best[name]) for name in ("step", "epoch")
        }
    trained = state["frozen"]["trainable"]
    return Checkpoint(
        int(state["step"]),
        int(state["epoch"]),
        str(state["status"]),
        best,
        _events(state["history"]),
        [str(name) for name in data["classes"]],
        int(data["outputs"]),
        str(data["fingerprint"]),
        int(data["train_samples"]),
        int(data["validation_samples"]),
        len(state["frozen"]["parameters"]),
        len(trained),
        sum(state["model"][name].numel() for name in trained),
        state["network"]["backbone"],
        {str(name): str(value) for name, value in state["versions"].items() if value != ""},
    )


def _events(history: Sequence[dict[str, Any]]) -> list[Event]:
    """All but the start."""
    found = [one for one in history if one["event"] in EVENTS]
    return [
        Event(number, one["event"], int(one["step"]), int(one["epoch"]) + 1, _event_text(one))
        for number, one in enumerate(found, start=1)
    ]


def _event_text(event: dict[str, Any]) -> str:
    if event["event"] == "thaw":
        return "thawed: more of the network trains from here on"
    if event["event"] == "extend":
        rate = f", lr {event['lr']:g}" if event.get("lr") else ""
        return f"extended to {event['epochs']} epochs{rate}"
    return "resumed from the checkpoint of this step"


def _newest_checkpoint(run: RunFolder, run_id: str) -> tuple[Checkpoint | None, list[str]]:
    """It, or None where there is none that can be read; and what a reader should know of that.

    Mapped, and not held against its checksum, for that would read all of it at the end of each run. Only where it is
    not as it was written, others are looked at.
    """
    try:
        return _checkpoint_from_plain(load_plain(run.checkpoints / LATEST, mapped=True), run_id), []
    except FileNotFoundError:
        if not run.has_checkpoint():
            return None, ["There is no checkpoint yet: of this run only its recipe and its log are known."]
    except (BadFile, *NOT_AS_WRITTEN):
        pass
    try:
        found = newest_good(run.checkpoints, run_id)
        if found is not None:
            newest = _checkpoint_from_plain(found[1], run_id)
            return newest, [f"checkpoints/{LATEST} is missing or damaged; this is as of {found[0].name}."]
    except (RunError, *NOT_AS_WRITTEN):
        pass
    return None, ["No checkpoint of this run can be read: only its recipe and its log are known."]


# ---- validation.json ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassRow:
    """Figures of a class, as `finetune evaluate` has them."""

    name: str
    precision: float
    recall: float
    f1: float
    samples: int


@dataclass(frozen=True)
class Validation:
    """What the best validation made of its samples; see `finetune.tasks.evaluation.Outcomes.to_plain`.

    Attributes:
        facts: label to text.
        classes: a row a class; [] where there are none.
        mistakes: (true class, predicted class, count), the most frequent first.
        calibration: {"count", "confidence", "accuracy"} a bin.
        worst, best: samples as they stand in the file.
    """

    step: int
    epoch: int
    samples: int
    facts: dict[str, str]
    figures: dict[str, float]
    classes: list[ClassRow]
    confusion: list[list[int]] | None
    mistakes: list[tuple[str, str, int]]
    calibration: list[dict[str, float]]
    calibration_error: float | None
    worst: list[dict[str, Any]] = field(default_factory=list)
    best: list[dict[str, Any]] = field(default_factory=list)


def _validation_from_plain(plain: dict[str, Any], names: Sequence[str] | None) -> Validation:
    """Raises one of `NOT_AS_WRITTEN` for what is none.

    Args:
        names: of the classes; None = not known, numbers must do.
    """
    counts, rows = plain["classes"], []
    if counts is not None:
        tallied = ClassCounts(*(torch.tensor(counts[name]).long() for name in ("hits", "predicted", "actual")))
        names = [f"class {number}" for number in range(len(tallied.hits))] if names is None else names
        columns = [column.tolist() for column in (tallied.precision(), tallied.recall(), tallied.f1(), tallied.actual)]
        rows = [ClassRow(*row) for row in zip(names, *columns, strict=True)]
    confusion = plain["confusion"]
    if confusion is not None and {len(rows)} != {len(confusion), *map(len, confusion)}:
        raise ValueError("a matrix of another size")
    error = plain["calibration_error"]
    return Validation(
        int(plain["step"]),
        int(plain["epoch"]),
        int(plain["samples"]),
        {str(label): str(text) for label, text in plain["facts"].items()},
        {str(name): float(value) for name, value in plain["figures"].items()},
        rows,
        None if confusion is None else [[int(count) for count in row] for row in confusion],
        [(rows[true].name, rows[predicted].name, int(count)) for true, predicted, count in plain["mistakes"]],
        [{name: float(bin[name]) for name in ("count", "confidence", "accuracy")} for bin in plain["calibration"]],
        None if error is None else float(error),
        list(plain["worst"]),
        list(plain["best"]),
    )


def _best_validation(
    run: RunFolder, run_id: str, checkpoint: Checkpoint | None, has_validated: bool
) -> tuple[Validation | None, list[str]]:
    """It, or None; and what a reader should know of that.

    Raises:
        BadFile: validation.json is damaged.
    """
    path = run.validation_file
    if not path.exists():
        if has_validated:
            return None, [f"{path.name} is missing, so there is nothing by class or sample: finetune evaluate {run}"]
        return None, []
    plain = read_json(path, "validation of the run")
    if plain.get("run_id") != run_id:
        return None, [f"{path.name} is of another run, and left out."]
    try:
        found = _validation_from_plain(plain, checkpoint.classes if checkpoint else None)
    except NOT_AS_WRITTEN:
        raise BadFile(f"validation of the run {path} is not as finetune writes it; restore it, or delete it") from None
    best_step = checkpoint.best.get("step") if checkpoint else None
    if found.step == best_step:
        return found, []
    of_best = f"that of the best checkpoint was at step {best_step:,}" if best_step else "no checkpoint holds it"
    return found, [
        f"Figures by class and by sample are of the validation at step {found.step:,}, but {of_best}: the run was "
        "interrupted in between. Resuming it puts that right."
    ]


# ---- All of it ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunData:
    """What the files of a run say.

    Attributes:
        record: recipe.json.
        checkpoint, validation: None where there is none.
        notices: sentences about what is missing or does not go together.
    """

    run: RunFolder
    record: dict[str, Any]
    checkpoint: Checkpoint | None
    curves: dict[str, Curve]
    validation: Validation | None
    notices: list[str]

    @property
    def config(self) -> dict[str, Any]:
        return self.record["config"]

    @property
    def best(self) -> dict[str, Any]:
        """{"metric", "value", "step", "epoch"} of the best validation, or {}."""
        return self.checkpoint.best if self.checkpoint else {}

    @property
    def events(self) -> list[Event]:
        return self.checkpoint.events if self.checkpoint else []

    @property
    def metrics(self) -> list[str]:
        """What validations measured, but for the loss; the one that decides first."""
        names = [name.removeprefix("val/") for name in self.curves if name.startswith("val/") and name != "val/loss"]
        return sorted(names, key=lambda name: name != self.best.get("metric"))

    @property
    def steps_per_epoch(self) -> int:
        """0 = not known."""
        size = self.config.get("batch_size")
        if self.checkpoint is None or not isinstance(size, int) or size < 1:
            return 0
        return math.ceil(self.checkpoint.train_samples / size)

    def best_figures(self) -> dict[str, float]:
        """Of the best validation: the metric that decided, the others, the loss."""
        if not self.best:
            return {}
        found = {self.best["metric"]: self.best["value"]}
        for name in [*self.metrics, "loss"]:
            curve = self.curves.get(f"val/{name}")
            value = curve.at(self.best["step"]) if curve else None
            if value is not None:
                found.setdefault(name, value)
        return found


def lower_is_better(metric: str) -> bool:
    return metric in LOWER_IS_BETTER


def gather(run: RunFolder) -> RunData:
    """Read what a report is made of.

    Raises:
        RunError: there is no run, or recipe.json or validation.json is damaged.
    """
    record = run.read_recipe()
    checkpoint, notices = _newest_checkpoint(run, record["id"])
    curves = read_curves(run.metrics_file)
    if not curves:
        notices.append(f"{run.metrics_file.name} is missing or empty, so there are no curves.")
    has_validated = bool(checkpoint.best) if checkpoint else any(name.startswith("val/") for name in curves)
    validation, more = _best_validation(run, record["id"], checkpoint, has_validated)
    return RunData(run, record, checkpoint, curves, validation, notices + more)
