"""A recipe describes a training as one plain value; nothing is loaded, read or built until a run begins.

No import of torch here: help, summaries and search workers make recipes freely.
"""

import dataclasses
import re
from dataclasses import dataclass, field

from finetune.errors import UsageError
from finetune.recipe.data_spec import AUGMENTATIONS as AUGMENTATIONS
from finetune.recipe.data_spec import DATA as DATA
from finetune.recipe.data_spec import Data as Data
from finetune.recipe.data_spec import Images as Images
from finetune.recipe.data_spec import Texts as Texts
from finetune.recipe.data_spec import data_rules
from finetune.recipe.named import named

# How mean and deviation are computed: see `Model` and `Regression`.
BY_ROWS, CENTRED, PLAIN = "by rows", "centred", "plain"


# Heads whose first new layer can divide features by their norm.
UNIT_ROWS_HEADS = ("linear", "mlp", "append")


@dataclass(frozen=True)
class Model:
    """The network.

    Attributes:
        backbone: architecture: "bundled/vgg", a classification model of torchvision by name, "timm:NAME", "hf:ID" or a
            folder with an encoder of transformers or timm.
        weights: "default" (the backbone's own), "none" (random), a member of torchvision's weights enum; a file, a
            folder, or FILE:KEY.
        head: "linear", "mlp", "append", "keep" (the architecture's own last layer, newly initialised), or "none" (the
            network gives what a head would read).
        dropout: probability that a feature is zeroed before each new linear layer.
        head_width: hidden features of an "mlp" head.
        revision: of a text encoder on the hub; "" = its newest.
        pooling: how a text encoder's tokens become one feature vector: "auto", "stock", "mean" or "cls".
        standardisation: how the head's features are measured: "by rows" = as "centred", but where there are few rows
            a feature, one deviation is measured for all of them together. "centred" = in the arithmetic of the run,
            about their mean; one counts as constant where rounding hides how it deviates. "plain" = in float32 where
            features are not kept, by their squares; one counts as constant that deviates by less than a thousandth of
            its mean.
        unit_rows: whether the head divides the features of each sample by their norm before it standardises them.
        one_logit: of two classes: the head gives one number, whose sigmoid is the probability of the second class; an
            "append" head alone can.
    """

    backbone: str
    weights: str = "default"
    head: str = "linear"
    dropout: float = 0.0
    head_width: int = 256
    revision: str = ""
    pooling: str = "auto"
    standardisation: str = named(BY_ROWS, before=PLAIN)
    unit_rows: bool = False
    one_logit: bool = named(False, before=False)

    @property
    def full_name(self) -> str:
        """The backbone with its revision."""
        return f"{self.backbone}@{self.revision}" if self.revision else self.backbone


@dataclass(frozen=True)
class Classification:
    """One class a sample, softmax cross-entropy.

    Attributes:
        label_smoothing: share of the target that is spread over all classes.
        class_weights: "none"; "balanced" = each class weighs the same, however many samples it has; "prior" = the loss
            takes the log of each class's share off the logits, which then do without it.
    """

    kind: str = field(default="classification", init=False)
    label_smoothing: float = 0.0
    class_weights: str = "none"


@dataclass(frozen=True)
class MultiLabel:
    """Any number of classes a sample, binary cross-entropy for each.

    Attributes:
        label_smoothing: a yes becomes 1 - half of it, a no the other half.
        class_weights: "none"; "balanced" = within each class, yes and no weigh the same; "prior", as of
            `Classification`.
        thresholds: from which probability on a class applies in what ships: "f1" = for each class that with the best
            F1; "half" = one half.
    """

    kind: str = field(default="multi-label", init=False)
    label_smoothing: float = 0.0
    class_weights: str = "none"
    thresholds: str = named("f1", before="half")


@dataclass(frozen=True)
class Regression:
    """A number a sample, mean squared error.

    Attributes:
        moments: how the scale of the numbers and the figures of a validation are added up: "centred" = about the mean,
            in float64; "plain" = in float32, R2 by mean squares less squared mean.
    """

    kind: str = field(default="regression", init=False)
    moments: str = named(CENTRED, before=PLAIN)


@dataclass(frozen=True)
class Distillation:
    """The embedding that a teacher gives of each text. The student begins as a part of the teacher.

    Attributes:
        teacher: a text encoder: folder or name.
        layers: of the teacher that the student begins with, evenly spread, its first among them; 0 = all.
        vocabulary_size: tokens that the student knows: those that are most frequent in the texts; 0 = all.
    """

    kind: str = field(default="distillation", init=False)
    teacher: str = ""
    layers: int = 0
    vocabulary_size: int = 0


Task = Classification | MultiLabel | Regression | Distillation
TASKS: dict[str, type[Task]] = {
    kind.kind: kind for kind in (Classification, MultiLabel, Regression, Distillation)
}  # fmt: skip
# What "accuracy" would mean is nothing of numbers: which figures a validation gives, the default for the best first.
METRICS = {
    "classification": ("accuracy", "f1", "loss"),
    "multi-label": ("accuracy", "f1", "loss"),
    "regression": ("loss", "mae", "r2"),
    "distillation": ("loss", "cosine"),
}
LOWER_IS_BETTER = ("loss", "mae")


# States of a freeze rule, and what a pattern of one may be besides a path.
TRAINABLE, FROZEN, AT_PLATEAU = "trainable", "frozen", "at plateau"
HEAD, ALL = "head", "all"
LAST = re.compile(r"last(?::(\d+))?")


def count_of_last(pattern: str) -> int:
    """How many blocks a pattern like "last" or "last:2" stands for; 0 = it is none such."""
    found = LAST.fullmatch(pattern)
    return int(found[1] or 1) if found else 0


@dataclass(frozen=True)
class Trainable:
    """The freeze map: (module pattern, state, number) rules; the first match wins.

    Attributes:
        rules: in order; a pattern is a module path or a shell pattern over paths, and what lies below a match is
            matched too; "head" stands for the new head, "last:2" for the last two blocks of the backbone, "all" for
            everything that the outputs depend on. Of the states, "trainable" holds from the epoch `number` on, the
            first being 0, "at plateau" from the epoch behind plateau `number` on, the first being 1; "frozen" always.
        batchnorm: whether BatchNorm layers that train also go on learning their statistics.
        checked: whether it is an error where a tensor that is to train gets no gradient.
    """

    rules: tuple[tuple[str, str, int], ...] = (("head", "trainable", 0), ("*", "frozen", 0))
    batchnorm: bool = False
    checked: bool = named(True, before=False)


@dataclass(frozen=True)
class Optimizer:
    """How weights move.

    Attributes:
        name: "adamw", "sgd" or any class of torch.optim.
        lr: learning rate at the schedule's peak, of what is new.
        lr_backbone: that of the backbone's last block, as a share of it.
        lr_decay: what it is multiplied with for each block further from the head.
        weight_decay: for weight matrices; biases and normalisation layers get none.
        momentum: where the optimizer has one.
        clip_norm: the gradient's largest norm; 0 = no clipping.
        accumulate: a batch is computed in so many parts; the result is that of the whole batch, but where BatchNorm
            learns, which it does from each part by itself.
    """

    name: str = "adamw"
    lr: float = 3e-3
    weight_decay: float = 1e-2
    momentum: float = 0.9
    clip_norm: float = 0.0
    accumulate: int = 1
    lr_backbone: float = named(1.0, before=1.0)
    lr_decay: float = named(1.0, before=1.0)


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes from step to step.

    Attributes:
        name: "cosine", "step", "plateau" or "constant".
        warmup_fraction: share of all steps over which the rate rises linearly from zero.
        final_fraction: where "cosine" ends, as a share of the peak.
        step_epochs, factor: "step" multiplies by `factor` every `step_epochs`; "plateau" by `factor` when the
            stop metric has not improved in `patience` validations.
        warms_thawed: whether the rate of what is thawed rises from zero, over as many steps as that of the whole did.
    """

    name: str = "cosine"
    warmup_fraction: float = 0.05
    final_fraction: float = 0.01
    step_epochs: int = 10
    factor: float = 0.1
    patience: int = 3
    warms_thawed: bool = named(True, before=False)


@dataclass(frozen=True)
class Stop:
    """Which metric is "best", and when to stop early.

    Attributes:
        metric: one of the task's `METRICS`, of the validation set; "auto" = the first.
        patience: stop after so many validations without a new best; 0 = never.
        ties: which of the validations that are equally good is best: "loss" = that with the lowest loss; "first" = the
            first.
        anew: whether the validations without a new best are counted anew from a thaw on.
    """

    metric: str = "auto"
    patience: int = 0
    anew: bool = named(True, before=False)
    ties: str = named("loss", before="first")


@dataclass(frozen=True)
class Finish:
    """The last stage: after the loop a linear head on kept features is solved, and the better of the two ships.

    Attributes:
        way: "auto" = where it can be; "none" = never.
        rows: what the head that ships has seen in the end: "all" = every label but those of a validation or test part
            that the data brings along; "train" = those that the loop was trained on.
        calibrate: whether what ships is divided by the temperature that fits the samples that validate best.
    """

    way: str = named("auto", before="none")
    rows: str = "all"
    calibrate: bool = named(True, before=False)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training's result, as plain values.

    Attributes:
        epochs: passes over the training data; 0 = as many as `max_steps` need.
        least_steps: more epochs where these are fewer optimizer steps than so many.
        max_steps: end after so many optimizer steps even within an epoch; 0 = no limit.
        validate_every_steps: validate also every so many steps; 0 = at the end of each epoch only.
        last_batch: of an epoch, where one sample is left over and BatchNorm may learn, which needs two: "fold" = it
            joins the batch before it, and no part of a batch is one sample; "alone" = nothing of that.
    """

    model: Model
    data: Data
    task: Task = Classification()
    trainable: Trainable = Trainable()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    stop: Stop = Stop()
    finish: Finish = Finish()
    epochs: int = 15
    least_steps: int = 0
    max_steps: int = 0
    batch_size: int = 64
    validate_every_steps: int = 0
    seed: int = 0
    last_batch: str = named("fold", before="alone")

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def folds(self) -> bool:
        """Whether no sample is left alone in its batch."""
        return self.trainable.batchnorm and self.last_batch == "fold"

    @property
    def best_metric(self) -> str:
        """That decides which checkpoint is best."""
        return METRICS[self.task.kind][0] if self.stop.metric == "auto" else self.stop.metric


def check_ranges(recipe: Recipe) -> None:
    """Refuse values that no training can have.

    Raises:
        UsageError: the first of them.
    """
    data, optimizer, schedule = recipe.data, recipe.optimizer, recipe.schedule
    metrics = METRICS[recipe.task.kind]
    rules: list[tuple[str, float | str, bool, str]] = [
        ("epochs", recipe.epochs, recipe.epochs >= (0 if recipe.max_steps else 1), "1 or more"),
        ("least-steps", recipe.least_steps, recipe.least_steps >= 0, "0 or more"),
        ("max-steps", recipe.max_steps, recipe.max_steps >= 0, "0 (no limit) or more"),
        ("batch-size", recipe.batch_size, recipe.batch_size >= 1, "1 or more"),
        ("validate-every-steps", recipe.validate_every_steps, recipe.validate_every_steps >= 0, "0 or more"),
        ("seed", recipe.seed, recipe.seed >= 0, "0 or more"),
        ("last-batch", recipe.last_batch, recipe.last_batch in ("fold", "alone"), "fold or alone"),
        ("dropout", recipe.model.dropout, 0 <= recipe.model.dropout < 1, "0 up to, not including, 1"),
        ("head-width", recipe.model.head_width, recipe.model.head_width >= 1, "1 or more"),
        ("lr", optimizer.lr, 0 < optimizer.lr < float("inf"), "more than 0"),
        ("lr-backbone", optimizer.lr_backbone, 0 < optimizer.lr_backbone <= 1, "more than 0, up to 1"),
        ("lr-decay", optimizer.lr_decay, 0 < optimizer.lr_decay <= 1, "more than 0, up to 1"),
        ("weight-decay", optimizer.weight_decay, optimizer.weight_decay >= 0, "0 or more"),
        ("clip-norm", optimizer.clip_norm, optimizer.clip_norm >= 0, "0 (off) or more"),
        ("accumulate", optimizer.accumulate, 1 <= optimizer.accumulate <= recipe.batch_size, "1 up to the batch size"),
        ("warmup-fraction", schedule.warmup_fraction, 0 <= schedule.warmup_fraction < 1, "0 up to, not including, 1"),
        ("patience", recipe.stop.patience, recipe.stop.patience >= 0, "0 (never) or more"),
        ("ties", recipe.stop.ties, recipe.stop.ties in ("loss", "first"), "loss or first"),
        ("finish", recipe.finish.way, recipe.finish.way in ("auto", "none"), "auto or none"),
        ("final", recipe.finish.rows, recipe.finish.rows in ("all", "train"), "all or train"),
        ("stop-metric", recipe.stop.metric, recipe.stop.metric in ("auto", *metrics), f"auto, {', '.join(metrics)}"),
    ]
    if isinstance(recipe.task, Classification | MultiLabel):
        share = recipe.task.label_smoothing
        rules.append(("label-smoothing", share, 0 <= share < 1, "0 up to, not including, 1"))
    if isinstance(recipe.task, MultiLabel):
        way = recipe.task.thresholds
        rules.append(("thresholds", way, way in ("f1", "half"), "f1 or half"))
    standardisation, moments = recipe.model.standardisation, getattr(recipe.task, "moments", CENTRED)
    ways = (BY_ROWS, CENTRED, PLAIN)
    rules.append(("standardisation", standardisation, standardisation in ways, f"{', '.join(ways[:2])} or {PLAIN}"))
    rules.append(("moments", moments, moments in ways[1:], f"{CENTRED} or {PLAIN}"))
    unit_rows, head = recipe.model.unit_rows, recipe.model.head
    one_logit, kind = recipe.model.one_logit, recipe.task.kind
    rules.append(("one-logit", f"with --head {head}", not one_logit or head == "append", "--head append"))
    is_single = not one_logit or kind == "classification"
    rules.append(("one-logit", f"on {kind}", is_single, "a task with one of two classes a sample"))
    rules.append(("unit-rows", f"with --head {head}", not unit_rows or head in UNIT_ROWS_HEADS, "another --head"))
    rules += data_rules(data, isinstance(recipe.task, MultiLabel))
    for name, value, allowed, range_text in rules:
        if not allowed:
            raise UsageError(f"--{name} {value}: not allowed; give {range_text}")
    if data.views and data.augment == "none":
        raise UsageError(f"--views {data.views}: without --augment they would all be the same; give --augment light")
    if data.views and (data.mixup or data.cutmix):
        raise UsageError(
            f"--views {data.views}: not together with --mixup or --cutmix, which make other images in every epoch"
        )


def located(recipe: Recipe, place: str) -> Recipe:
    """The recipe with its data where that lies now; "" = where it says."""
    if not place:
        return recipe
    data = recipe.data
    if isinstance(data, Texts):
        return dataclasses.replace(recipe, data=dataclasses.replace(data, texts=place))
    return dataclasses.replace(recipe, data=dataclasses.replace(data, images=place))
