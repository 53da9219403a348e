"""What the files of a run say, gathered for its report; nothing is drawn here, and nothing is trusted."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.base.events import Best
from finetune.base.files import BadFile, read_json
from finetune.base.plain import Fields, Plain
from finetune.data.order import count_batches
from finetune.errors import FinetuneError, RunError
from finetune.models.folding import layers_apart, scale_beside
from finetune.recipe.execution import split_config
from finetune.recipe.spec import LOWER_IS_BETTER
from finetune.report.curves import Curve, read_curves
from finetune.store.checkpoint import LATEST, newest_good
from finetune.store.run_folder import RunFolder, RunRecord, peek
from finetune.store.state import CheckpointState, Progress
from finetune.tasks.calibration import Calibrated
from finetune.tasks.evaluation import ClassRow, EvaluationRecord

EVENTS = ("resume", "extend", "patience", "thaw")
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
        progress: how far the run is.
        frozen_tensors, trained_tensors: how many parameters of the network.
        trained_parameters: numbers in the latter.
        outputs: numbers that the network gives for a sample.
        scale, apart: what an export of it could not fold into its weights; see `models.folding`.
        target_scale: mean and deviation of the numbers to predict; [] where there are none.
        skipped: names of samples that were left out.
        backbone: as `Backbone.to_plain` gives it.
    """

    progress: Progress
    events: list[Event]
    classes: list[str]
    outputs: int
    scale: list[float]
    apart: list[str]
    target_scale: list[float]
    skipped: list[str]
    fingerprint: str
    train_samples: int
    validation_samples: int
    frozen_tensors: int
    trained_tensors: int
    trained_parameters: int
    backbone: Plain
    versions: dict[str, str]


def _checkpoint_of(state: CheckpointState, run_id: str) -> Checkpoint:
    """Raises one of `NOT_AS_WRITTEN` for what is no checkpoint of that run."""
    if state.run_id != run_id:
        raise ValueError("of another run")
    progress, data = state.progress, state.data
    trained = state.frozen.trainable
    return Checkpoint(
        progress,
        _events(progress.history),
        data.classes,
        data.outputs,
        scale_beside(data.scale),
        layers_apart(state.model, has_unit_rows(state.config)),
        list(data.scale),
        list(data.skipped),
        data.fingerprint,
        data.train_samples,
        data.validation_samples,
        len(state.frozen.parameters),
        len(trained),
        sum(state.model[name].numel() for name in trained),
        state.network.backbone,
        {name: str(value) for name, value in state.versions.items() if value != ""},
    )


def has_unit_rows(config: Plain) -> bool:
    """Whether the head divides features by their norm."""
    model = config.get("model")
    return isinstance(model, dict) and model.get("unit_rows") is True


def _events(history: Sequence[Plain]) -> list[Event]:
    """All but the start."""
    found = [Fields(one, "history") for one in history if one["event"] in EVENTS]
    return [
        Event(number, one.text("event"), one.integer("step"), one.integer("epoch") + 1, _event_text(one))
        for number, one in enumerate(found, start=1)
    ]


def _event_text(event: Fields) -> str:
    if event.text("event") == "thaw":
        return "thawed: more of the network trains from here on"
    if event.text("event") == "patience":
        return "gone on with after an early stop: the patience began anew"
    if event.text("event") == "extend":
        lr = event.number("lr") if "lr" in event else 0.0
        return f"extended to {event.integer('epochs')} epochs{f', lr {lr:g}' if lr else ''}"
    return "resumed from the checkpoint of this step"


def _newest_checkpoint(run: RunFolder, run_id: str) -> tuple[Checkpoint | None, list[str]]:
    """It, or None where there is none that can be read; and what a reader should know of that.

    Mapped, and not held against its checksum, for that would read all of it at the end of each run. Only where it is
    not as it was written, others are looked at.
    """
    try:
        return _checkpoint_of(peek(run.checkpoints / LATEST), run_id), []
    except FileNotFoundError:
        if not run.has_checkpoint():
            return None, ["There is no checkpoint yet: of this run only its recipe and its log are known."]
    except (RunError, *NOT_AS_WRITTEN):
        pass
    try:
        found = newest_good(run.checkpoints, run_id)
        if found is not None:
            newest = _checkpoint_of(found[1], run_id)
            return newest, [f"checkpoints/{LATEST} is missing or damaged; this is as of {found[0].name}."]
    except (RunError, *NOT_AS_WRITTEN):
        pass
    return None, ["No checkpoint of this run can be read: only its recipe and its log are known."]


# ---- validation.json ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Validation:
    """What the best validation made of its samples.

    Attributes:
        facts: label to text, as in the table at the start.
        classes: a row a class; [] where there are none.
        mistakes: (true class, predicted class, count), the most frequent first.
        is_solved: of the head that was solved after the loop; else of the loop's best.
        calibrated: what the temperature does by which outputs are divided where they ship; None = there is none.
    """

    step: int
    epoch: int
    facts: dict[str, str]
    record: EvaluationRecord
    classes: list[ClassRow]
    mistakes: list[tuple[str, str, int]]
    is_solved: bool = False
    calibrated: Calibrated | None = None


def _validation_from_plain(plain: Plain, names: Sequence[str] | None) -> Validation:
    """Raises one of `NOT_AS_WRITTEN`, or BadFile, for what is none.

    Args:
        names: of the classes; None = not known, numbers must do.
    """
    fields, record = Fields(plain, "validation"), EvaluationRecord.from_plain(plain)
    rows = record.class_rows(names)
    if record.confusion is not None and {len(rows)} != {len(record.confusion), *map(len, record.confusion)}:
        raise ValueError("a matrix of another size")
    return Validation(
        fields.integer("step"),
        fields.integer("epoch"),
        fields.values("facts", str),
        record,
        rows,
        [(rows[true].name, rows[predicted].name, count) for true, predicted, count in record.mistakes],
        fields.take("is_solved", bool) if "is_solved" in fields else False,
        _calibrated_from_plain(fields) if plain.get("calibrated") is not None else None,
    )


def _calibrated_from_plain(fields: Fields) -> Calibrated:
    found = fields.fields("calibrated")
    loss, error = (found.items(name, float) for name in ("loss", "calibration_error"))
    if len(loss) != 2 or len(error) != 2:
        raise ValueError("not before and after")
    return Calibrated(temperature=found.number("temperature"), loss=loss, calibration_error=error)


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
    except (BadFile, *NOT_AS_WRITTEN):
        raise BadFile(f"validation of the run {path} is not as finetune writes it; restore it, or delete it") from None
    best_step = checkpoint.progress.best.get("step") if checkpoint else None
    ships = checkpoint is not None and checkpoint.progress.finish.ships == "final"
    if checkpoint is not None and ships:
        best_step = checkpoint.progress.step
    if found.step == best_step and found.is_solved == ships:
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
    record: RunRecord
    checkpoint: Checkpoint | None
    curves: dict[str, Curve]
    validation: Validation | None
    notices: list[str]

    @property
    def config(self) -> Plain:
        return self.record.config

    @property
    def best(self) -> Best:
        """The best validation, if there was one."""
        return self.checkpoint.progress.best if self.checkpoint else Best()

    @property
    def shows_solved(self) -> bool:
        """Whether the head ships that was solved, and what it made of the samples that validate is known."""
        validation, checkpoint = self.validation, self.checkpoint
        if validation is None or checkpoint is None or checkpoint.progress.finish.ships != "final":
            return False
        return validation.is_solved and validation.step == checkpoint.progress.step

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
        try:
            recipe, _ = split_config(self.config)
        except FinetuneError:  # of another version, or edited
            return 0
        if self.checkpoint is None:
            return 0
        return count_batches(self.checkpoint.train_samples, recipe.batch_size, recipe.folds)

    def best_figures(self) -> dict[str, float]:
        """Of the best validation: the metric that decided, the others, the loss."""
        if not self.best:
            return {}
        if self.shows_solved:
            assert self.validation is not None
            record = self.validation.record.figures
            return {name: record[name] for name in [self.best["metric"], *self.metrics, "loss"] if name in record}
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
    checkpoint, notices = _newest_checkpoint(run, record.id)
    curves = read_curves(run.metrics_file)
    if not curves:
        notices.append(f"{run.metrics_file.name} is missing or empty, so there are no curves.")
    has_validated = bool(checkpoint.progress.best) if checkpoint else any(name.startswith("val/") for name in curves)
    validation, more = _best_validation(run, record.id, checkpoint, has_validated)
    return RunData(run, record, checkpoint, curves, validation, notices + more)
