"""Recipes for a new head: what comes of their options. No import of torch."""

import dataclasses
import os

from finetune.base.table_names import IMAGE_COLUMNS
from finetune.errors import UsageError
from finetune.recipe.frames import Frame, column_of_paths, is_frame, place_of
from finetune.recipe.head_options import ImageTable, ImageTraining, TextTable, Training, TrainingTable
from finetune.recipe.spec import (
    Classification,
    Data,
    Finish,
    Images,
    Model,
    MultiLabel,
    Optimizer,
    Recipe,
    Regression,
    Schedule,
    Stop,
    Task,
    Texts,
    Trainable,
)
from finetune.recipe.thaws import Rules, rules_of, trains_backbone

# Passes over the data, unless somebody asks for others: but at least so many steps, which few samples need too.
IMAGE_EPOCHS, TEXT_EPOCHS, LEAST_STEPS = 15, 30, 300


def image_head(
    *,
    images: str | os.PathLike[str] | Frame,
    backbone: str,
    weights: str = "default",
    image_size: int = 0,
    augment: str = "none",
    head: str = "linear",
    dropout: float = 0.0,
    epochs: int = 0,
    batch_size: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    table: ImageTable = ImageTable(),
    training: ImageTraining = ImageTraining(),
) -> Recipe:
    """A new head on a frozen, pretrained image backbone.

    Args:
        images: "digits"; a folder with one sub-folder of images a class, or with train/, val/ and test/, each so; or a
            csv, tsv or jsonl file with a path and a label in each row. In Python also a DataFrame of such rows.
        backbone: the pretrained network: bundled/mobilenet (for photos), bundled/vgg, bundled/resnet; any
            classification model of torchvision (resnet50, vit_b_16, ...); timm:NAME, with timm installed; hf:ID or a
            folder: an image encoder of transformers or timm. Several with commas between are compared. `finetune
            backbones` lists them.
        weights: "default" (the backbone's own), "none" (random), a name of torchvision's (IMAGENET1K_V1); a file as
            training scripts write them, FILE:KEY for a part of it, or a folder.
        image_size: edge in pixels of what the backbone sees; 0 = what it was trained at.
        augment: random changes of each training image: "light" = affine, crop, colour; "standard", for photos = crop,
            flip, RandAugment.
        head: one linear layer; a small mlp; or a linear layer behind the old head.
        dropout: probability that a feature is zeroed while training.
        epochs: passes over the training data; 0 = 15, or as many as 300 steps take, whichever is more.
        batch_size: samples an optimizer step.
        lr: learning rate at its peak.
        seed: of the split, the order, the head's first weights, dropout and augmentation.
        table: the options of images that a file lists.
        training: the options that every recipe for a new head shares.
    """
    column = ""
    if not isinstance(images, str | os.PathLike) and is_frame(images):
        column = column_of_paths(images, table.image_column, IMAGE_COLUMNS)
        # Whoever has it in a program knows which files it names, wherever they lie.
        table = dataclasses.replace(table, allow_outside=True)
    return _head_recipe(
        Model(backbone=backbone, weights=weights, head=head, dropout=dropout),
        Images(
            images=place_of(images, "images", column),
            **dataclasses.asdict(table),
            image_size=image_size,
            augment=augment,
            mixup=training.mixup,
            cutmix=training.cutmix,
            views=training.views,
            pixel_range=training.pixel_range,
            decode=training.decode,
            validation_fraction=training.validation_fraction,
            train_samples=training.train_samples,
            group_column=training.group_column,
            group_by=training.group_by,
            drop_duplicates=training.drop_duplicates,
            without=training.without,
        ),
        _classes(table, training),
        training,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        usual_epochs=IMAGE_EPOCHS,
    )


def text_head(
    *,
    texts: str | os.PathLike[str] | Frame,
    backbone: str,
    revision: str = "",
    weights: str = "default",
    pooling: str = "auto",
    max_length: int = 0,
    task: str = "classification",
    head: str = "linear",
    dropout: float = 0.2,
    epochs: int = 0,
    batch_size: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    table: TextTable = TextTable(),
    training: Training = Training(),
) -> Recipe:
    """A new head on a frozen, pretrained text encoder.

    Args:
        texts: "messages"; a csv, tsv, jsonl or parquet file with a text and a label in each row; or a folder with one
            sub-folder of .txt files a class, or with train/, val/ and test/, each so.
        backbone: the pretrained network: bundled/bert; a folder or a name on the hub (google-bert/bert-base-uncased,
            sentence-transformers/all-MiniLM-L6-v2, ...) of any encoder that transformers classifies texts with.
        revision: of a model on the hub: branch, tag or commit; default: the newest.
        weights: "default" (the backbone's own), "none" (random); a folder as transformers saves it, a file, or FILE:KEY
            for a part of it.
        pooling: how the tokens of a text become one feature vector: mean = their mean; cls = the first one; stock = as
            transformers' own class does, which then loads the export; auto = as the backbone's folder says, else mean
            where the stock class would have to train a pooler from nothing, else stock.
        max_length: tokens of a text; what is longer is cut off, and counted; 0 = what the backbone takes, 512 at most.
        task: classification (of several labels with --separator), or regression: the label column holds numbers.
        head: one linear layer; a small mlp; or a linear layer behind the old head.
        dropout: probability that a feature is zeroed while training.
        epochs: passes over the training data; 0 = 30, or as many as 300 steps take, whichever is more.
        batch_size: samples an optimizer step.
        lr: learning rate at its peak.
        seed: of the split, the order, the head's first weights and dropout.
        table: the options of texts that a file lists.
        training: the options that every recipe for a new head shares.
    """
    model = Model(backbone, weights, head, dropout, revision=revision, pooling=pooling)
    data = Texts(
        place_of(texts, "texts"),
        **dataclasses.asdict(table),
        max_length=max_length,
        validation_fraction=training.validation_fraction,
        train_samples=training.train_samples,
        group_column=training.group_column,
        group_by=training.group_by,
        drop_duplicates=training.drop_duplicates,
        without=training.without,
    )
    goal = _text_task(task, table, training)
    return _head_recipe(
        model, data, goal, training, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, usual_epochs=TEXT_EPOCHS
    )


def _text_task(task: str, table: TextTable, training: Training) -> Task:
    """What the labels are, as a task.

    Raises:
        UsageError: options of classes where there are none.
    """
    if task == "regression":
        _check_thresholds(training, False)
        if training.label_smoothing or training.class_weights != "none":
            raise UsageError("--task regression: has no classes; leave --label-smoothing and --class-weights out")
        if table.missing_labels == "class":
            raise UsageError(
                "--missing-labels class: --task regression has no classes; give leave-out, or leave it out"
            )
        return Regression()
    return _classes(table, training)


def _classes(table: TrainingTable, training: Training) -> Classification | MultiLabel:
    # With a separator between the labels of a row, or with a column for each label.
    has_several = bool(table.separator) or "," in table.label_column
    _check_thresholds(training, has_several)
    smoothing, weights = training.label_smoothing, training.class_weights
    if has_several:
        return MultiLabel(label_smoothing=smoothing, class_weights=weights, thresholds=training.thresholds)
    return Classification(label_smoothing=smoothing, class_weights=weights)


def _check_thresholds(training: Training, has_several: bool) -> None:
    if training.thresholds != "f1" and not has_several:
        raise UsageError(
            f"--thresholds {training.thresholds}: has no effect, each sample has one label; leave it out, or give "
            "--separator"
        )


def _head_recipe(
    model: Model,
    data: Data,
    task: Task,
    training: Training,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    usual_epochs: int,
) -> Recipe:
    """What recipes for images and for texts share.

    Raises:
        UsageError: what is to be thawed cannot be read; a rate of what never trains.
    """
    rules = rules_of(training.train, training.thaw, training.thaw_last, training.thaw_every)
    _check_rates(training, rules)
    is_thawed = trains_backbone(rules)
    return Recipe(
        model=dataclasses.replace(model, unit_rows=training.unit_rows, one_logit=training.one_logit),
        data=data,
        task=task,
        trainable=Trainable(rules=rules),
        optimizer=Optimizer(
            name=training.optimizer,
            lr=lr,
            lr_backbone=training.lr_backbone if is_thawed else 1.0,
            lr_decay=training.lr_decay,
            weight_decay=training.weight_decay,
            clip_norm=training.clip_norm,
            accumulate=training.accumulate,
        ),
        schedule=Schedule(name=training.schedule),
        stop=Stop(metric=training.stop_metric, patience=training.patience),
        finish=Finish(way=training.finish, rows=training.final, calibrate=training.calibrate),
        epochs=epochs or usual_epochs,
        least_steps=0 if epochs else LEAST_STEPS,
        batch_size=batch_size,
        validate_every_steps=training.validate_every_steps,
        seed=seed,
    )


def _check_rates(training: Training, rules: Rules) -> None:
    usual = Training()
    for name in ("lr_backbone", "lr_decay"):
        if getattr(training, name) != getattr(usual, name) and not trains_backbone(rules):
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(training, name):g}: has no effect, only the head trains; leave "
                "it out, or give --train last, or --thaw"
            )
    if training.thaw_every != usual.thaw_every and not training.thaw_last:
        raise UsageError(
            f"--thaw-every {training.thaw_every}: has no effect without --thaw-last; give that, or leave it out"
        )
