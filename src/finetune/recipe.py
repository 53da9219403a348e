"""A recipe describes a training as one plain value; nothing is loaded, read or built until a run begins.

No import of torch here: help, summaries and search workers make recipes freely.
"""

from dataclasses import dataclass, field
from typing import Literal

from finetune.errors import UsageError


@dataclass(frozen=True)
class Model:
    """The network.

    Attributes:
        backbone: architecture: "bundled/vgg", a classification model of torchvision by name, "hf:ID" or a folder with
            an image encoder of transformers.
        weights: "default" (the backbone's own), "none" (random), a member of torchvision's weights enum, or a file.
        head: "linear", "mlp", "append", or "keep" (the architecture's own last layer, newly initialised).
        dropout: probability that a feature is zeroed before each new linear layer.
        head_width: hidden features of an "mlp" head.
    """

    backbone: str
    weights: str = "default"
    head: str = "linear"
    dropout: float = 0.0
    head_width: int = 256


@dataclass(frozen=True)
class Images:
    """Image data: which, how split, how prepared.

    Attributes:
        images: "digits", "glyphs", a folder, or a csv, tsv or jsonl file.
        image_column, label_column: of such a file; "" = found by their names.
        split_column: of such a file: says train, val or test; "" = none.
        separator: between the several labels of a row; "" = one label a row.
        allow_outside: images may lie outside the folder, or that of the file: behind a link, "..", or a path from the
            root.
        image_size: edge in pixels; 0 = the size that the backbone was trained at.
        augment: "none", "light", "standard" or "glyphs".
        mixup, cutmix: alpha of the blending of two images; 0 = off.
        views: so many augmented views of each image are made once, epoch e sees view e mod views; 0 = a new one in
            every epoch.
        validation_fraction: share of each class that validates, where the data has no validation part of its own.
        train_samples: train on so many only, each class in its share; 0 = all.
        fonts: folder of fonts for "glyphs"; "" = those that matplotlib ships.
    """

    images: str
    image_column: str = ""
    label_column: str = ""
    split_column: str = ""
    separator: str = ""
    allow_outside: bool = False
    image_size: int = 0
    augment: str = "none"
    mixup: float = 0.0
    cutmix: float = 0.0
    views: int = 0
    validation_fraction: float = 0.2
    train_samples: int = 0
    fonts: str = ""


@dataclass(frozen=True)
class Classification:
    """One class a sample, softmax cross-entropy.

    Attributes:
        label_smoothing: share of the target that is spread over all classes.
        class_weights: "none", or "balanced" = each class weighs the same, however many samples it has.
    """

    kind: str = field(default="classification", init=False)
    label_smoothing: float = 0.0
    class_weights: str = "none"


@dataclass(frozen=True)
class MultiLabel:
    """Any number of classes a sample, binary cross-entropy for each.

    Attributes:
        label_smoothing: a yes becomes 1 - half of it, a no the other half.
        class_weights: "none", or "balanced" = within each class, yes and no weigh the same.
    """

    kind: str = field(default="multi-label", init=False)
    label_smoothing: float = 0.0
    class_weights: str = "none"


Task = Classification | MultiLabel
TASKS: dict[str, type[Task]] = {kind.kind: kind for kind in (Classification, MultiLabel)}


@dataclass(frozen=True)
class Trainable:
    """The freeze map: (module pattern, "trainable" or "frozen", from epoch) rules; the first match wins.

    Attributes:
        rules: in order; a pattern is a module path or a shell pattern over paths, "head" stands for the new head,
            and what lies below a match is matched too.
        batchnorm: whether BatchNorm layers that train also go on learning their statistics.
    """

    rules: tuple[tuple[str, str, int], ...] = (("head", "trainable", 0), ("*", "frozen", 0))
    batchnorm: bool = False


@dataclass(frozen=True)
class Optimizer:
    """How weights move.

    Attributes:
        name: "adamw", "sgd" or any class of torch.optim.
        lr: learning rate at the schedule's peak.
        weight_decay: for weight matrices; biases and normalisation layers get none.
        momentum: where the optimizer has one.
        clip_norm: the gradient's largest norm; 0 = no clipping.
        accumulate: a batch is computed in so many parts; the result is that of the whole batch.
    """

    name: str = "adamw"
    lr: float = 3e-3
    weight_decay: float = 1e-2
    momentum: float = 0.9
    clip_norm: float = 0.0
    accumulate: int = 1


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes from step to step.

    Attributes:
        name: "cosine", "step", "plateau" or "constant".
        warmup_fraction: share of all steps over which the rate rises linearly from zero.
        final_fraction: where "cosine" ends, as a share of the peak.
        step_epochs, factor: "step" multiplies by `factor` every `step_epochs`; "plateau" by `factor` when the
            stop metric has not improved in `patience` validations.
    """

    name: str = "cosine"
    warmup_fraction: float = 0.05
    final_fraction: float = 0.01
    step_epochs: int = 10
    factor: float = 0.1
    patience: int = 3


@dataclass(frozen=True)
class Stop:
    """Which metric is "best", and when to stop early.

    Attributes:
        metric: "accuracy", "f1" or "loss" of the validation set.
        patience: stop after so many validations without a new best; 0 = never.
    """

    metric: str = "accuracy"
    patience: int = 0


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training's result, as plain values.

    Attributes:
        epochs: passes over the training data; 0 = as many as `max_steps` need.
        max_steps: end after so many optimizer steps even within an epoch; 0 = no limit.
        validate_every_steps: validate also every so many steps; 0 = at the end of each epoch only.
    """

    model: Model
    data: Images
    task: Task = Classification()
    trainable: Trainable = Trainable()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    stop: Stop = Stop()
    epochs: int = 15
    max_steps: int = 0
    batch_size: int = 64
    validate_every_steps: int = 0
    seed: int = 0

    def __post_init__(self):
        check_ranges(self)


AUGMENTATIONS = ("none", "light", "standard", "glyphs")


def check_ranges(recipe: Recipe) -> None:
    """Refuse values that no training can have.

    Raises:
        UsageError: the first of them.
    """
    data, optimizer, schedule = recipe.data, recipe.optimizer, recipe.schedule
    rules: list[tuple[str, float | str, bool, str]] = [
        ("epochs", recipe.epochs, recipe.epochs >= (0 if recipe.max_steps else 1), "1 or more"),
        ("max-steps", recipe.max_steps, recipe.max_steps >= 0, "0 (no limit) or more"),
        ("batch-size", recipe.batch_size, recipe.batch_size >= 1, "1 or more"),
        ("validate-every-steps", recipe.validate_every_steps, recipe.validate_every_steps >= 0, "0 or more"),
        ("seed", recipe.seed, recipe.seed >= 0, "0 or more"),
        (
            "image-size",
            data.image_size,
            data.image_size == 0 or 8 <= data.image_size <= 4096,
            "0 (the backbone's) or 8 to 4096",
        ),
        ("train-samples", data.train_samples, data.train_samples >= 0, "0 (all) or more"),
        ("augment", data.augment, data.augment in AUGMENTATIONS, f"one of {', '.join(AUGMENTATIONS)}"),
        ("mixup", data.mixup, data.mixup >= 0, "0 (off) or more"),
        ("cutmix", data.cutmix, data.cutmix >= 0, "0 (off) or more"),
        ("views", data.views, data.views >= 0, "0 (a new one in every epoch) or more"),
        ("validation-fraction", data.validation_fraction, 0 < data.validation_fraction < 1, "between 0 and 1"),
        ("dropout", recipe.model.dropout, 0 <= recipe.model.dropout < 1, "0 up to, not including, 1"),
        ("head-width", recipe.model.head_width, recipe.model.head_width >= 1, "1 or more"),
        (
            "label-smoothing",
            recipe.task.label_smoothing,
            0 <= recipe.task.label_smoothing < 1,
            "0 up to, not including, 1",
        ),
        ("lr", optimizer.lr, 0 < optimizer.lr < float("inf"), "more than 0"),
        ("weight-decay", optimizer.weight_decay, optimizer.weight_decay >= 0, "0 or more"),
        ("clip-norm", optimizer.clip_norm, optimizer.clip_norm >= 0, "0 (off) or more"),
        ("accumulate", optimizer.accumulate, 1 <= optimizer.accumulate <= recipe.batch_size, "1 up to the batch size"),
        ("warmup-fraction", schedule.warmup_fraction, 0 <= schedule.warmup_fraction < 1, "0 up to, not including, 1"),
        ("patience", recipe.stop.patience, recipe.stop.patience >= 0, "0 (never) or more"),
    ]
    for name, value, allowed, range_text in rules:
        if not allowed:
            raise UsageError(f"--{name} {value}: not allowed; give {range_text}")
    if data.views and data.augment == "none":
        raise UsageError(f"--views {data.views}: without --augment they would all be the same; give --augment light")
    if data.views and (data.mixup or data.cutmix):
        raise UsageError(
            f"--views {data.views}: not together with --mixup or --cutmix, which make other images in every epoch"
        )


@dataclass(frozen=True)
class ImageTable:
    """The options of images that a csv, tsv or jsonl file lists.

    Attributes:
        image_column: holds the image's path; default: image, path, file, ...
        label_column: holds the label; default: label, class, category, ...
        split_column: says train, val or test of each row; default: the split is drawn.
        separator: between the several labels of a row: then each class is a yes or no of its own.
        allow_outside: read images outside the folder too: behind links, paths with .. or from the root. Only where you
            trust whoever made the data.
    """

    image_column: str = ""
    label_column: str = ""
    split_column: str = ""
    separator: str = ""
    allow_outside: bool = False


@dataclass(frozen=True)
class Training:
    """The options that every recipe for a new head shares.

    Attributes:
        optimizer: adamw, sgd, or any class of torch.optim.
        weight_decay: for weight matrices; biases and normalisation layers get none.
        schedule: of the learning rate, after a short warm-up.
        label_smoothing: share of the target that is spread over all classes.
        class_weights: "balanced" = each class weighs the same, however many samples it has.
        clip_norm: the gradient's largest norm; 0 = no clipping.
        accumulate: compute each batch in so many parts, to save memory; the step is the same.
        patience: stop after so many validations without a new best; 0 = never.
        stop_metric: of the validation set; decides which checkpoint is best.
        validate_every_steps: validate also every so many steps; 0 = each epoch only.
        train_samples: train on so many samples only, each class in its share; 0 = all.
        validation_fraction: share of each class that validates, where the images come without a validation part.
        mixup: blend each image with another, by a share drawn from Beta(alpha, alpha); 0 = off.
        cutmix: paste a piece of another image into each; 0 = off; with mixup, each batch gets one of the two.
        views: with augment: keep so many augmented views of each image, so that a frozen backbone runs once over each;
            0 = a new view in every epoch, and the backbone runs in every epoch.
    """

    optimizer: str = "adamw"
    weight_decay: float = 1e-2
    schedule: Literal["cosine", "step", "plateau", "constant"] = "cosine"
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    clip_norm: float = 0.0
    accumulate: int = 1
    patience: int = 0
    stop_metric: Literal["accuracy", "f1", "loss"] = "accuracy"
    validate_every_steps: int = 0
    train_samples: int = 0
    validation_fraction: float = 0.2
    mixup: float = 0.0
    cutmix: float = 0.0
    views: int = 0


def image_head(
    *,
    images: str,
    backbone: str,
    weights: str,
    image_size: int,
    augment: str,
    head: str,
    dropout: float,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    table: ImageTable,
    training: Training,
) -> Recipe:
    """A new head on a frozen, pretrained image backbone.

    Args:
        images: "digits"; a folder with one sub-folder of images a class, or with train/, val/ and test/, each so; or a
            csv, tsv or jsonl file with a path and a label in each row.
        backbone: the pretrained network: bundled/vgg, bundled/resnet; any classification model of torchvision
            (mobilenet_v2, resnet50, vit_b_16, ...); hf:ID or a folder: an image encoder of transformers.
        weights: "default" (the backbone's own), "none" (random), a name of torchvision's (IMAGENET1K_V1), or a
            .safetensors, .pt or .pth file.
        image_size: edge in pixels of what the backbone sees; 0 = what it was trained at.
        augment: random changes of each training image: "light" = affine, crop, colour; "standard", for photos = crop,
            flip, RandAugment.
        head: one linear layer; a small mlp; or a linear layer behind the old head.
        dropout: probability that a feature is zeroed while training.
        epochs: passes over the training data.
        batch_size: samples an optimizer step.
        lr: learning rate at its peak.
        seed: of the split, the order, the head's first weights, dropout and augmentation.
        table: the options of images that a file lists.
        training: the options that every recipe for a new head shares.
    """
    task = MultiLabel if table.separator else Classification
    return Recipe(
        model=Model(backbone=backbone, weights=weights, head=head, dropout=dropout),
        data=Images(
            images=images,
            image_column=table.image_column,
            label_column=table.label_column,
            split_column=table.split_column,
            separator=table.separator,
            allow_outside=table.allow_outside,
            image_size=image_size,
            augment=augment,
            mixup=training.mixup,
            cutmix=training.cutmix,
            views=training.views,
            validation_fraction=training.validation_fraction,
            train_samples=training.train_samples,
        ),
        task=task(label_smoothing=training.label_smoothing, class_weights=training.class_weights),
        optimizer=Optimizer(
            name=training.optimizer,
            lr=lr,
            weight_decay=training.weight_decay,
            clip_norm=training.clip_norm,
            accumulate=training.accumulate,
        ),
        schedule=Schedule(name=training.schedule),
        stop=Stop(metric=training.stop_metric, patience=training.patience),
        epochs=epochs,
        batch_size=batch_size,
        validate_every_steps=training.validate_every_steps,
        seed=seed,
    )
