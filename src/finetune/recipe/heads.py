"""What recipes for a new head share: their options, and the recipe that comes of them. No import of torch."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Literal

from finetune.base.table_names import IMAGE_COLUMNS
from finetune.errors import UsageError
from finetune.recipe.frames import Frame, column_of_paths, is_frame, place_of
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
)

# Passes over the data, unless somebody asks for others: but at least so many steps, which few samples need too.
IMAGE_EPOCHS, TEXT_EPOCHS, LEAST_STEPS = 15, 30, 300


@dataclass(frozen=True)
class Table:
    """The options of samples that a file lists.

    Attributes:
        label_column: holds the label, or the number to predict; default: label, class, category, ... A,B,C names a
            column for each of several labels, with 1 or 0 in each row.
        split_column: says train, val or test of each row; default: the split is drawn.
        separator: between the several labels of a row: then each class is a yes or no of its own.
        allow_outside: read files outside the folder too: behind links, paths with .. or from the root. Only where you
            trust whoever made the data.
    """

    label_column: str = ""
    split_column: str = ""
    separator: str = ""
    allow_outside: bool = False


@dataclass(frozen=True)
class TrainingTable(Table):
    """Those of samples to train on.

    Attributes:
        quotes: of a csv or tsv: standard = a value that begins with a quote ends with the next one, lines later if it
            must; none = a quote is a letter; auto = standard, but a quote that would swallow rows is refused, and
            between tabs it is a letter unless the value begins and ends with one.
        encoding: of a table or of .txt files that are not in UTF-8: windows-1252, utf-16, shift_jis, ...
        missing_labels: rows whose label is empty or spelled like a missing value (nan, NA, null, None, ...): refuse
            names the first; leave-out goes on without them; class takes the spelling for a class.
    """

    quotes: Literal["auto", "none", "standard"] = "auto"
    encoding: str = "utf-8"
    missing_labels: Literal["refuse", "leave-out", "class"] = "refuse"


@dataclass(frozen=True)
class ImageTable(TrainingTable):
    """The options of images that a csv, tsv, jsonl or parquet file lists.

    Attributes:
        image_column: holds the image's path; default: image, path, file, ...
    """

    image_column: str = ""


@dataclass(frozen=True)
class TextTable(TrainingTable):
    """The options of texts that a csv, tsv, jsonl or parquet file lists.

    Attributes:
        text_column: holds the text; default: text, sentence, message, ...
    """

    text_column: str = ""


@dataclass(frozen=True)
class Training:
    """The options that every recipe for a new head shares.

    Attributes:
        optimizer: adamw, sgd, or any class of torch.optim.
        weight_decay: for weight matrices; biases and normalisation layers get none.
        schedule: of the learning rate, after a short warm-up.
        label_smoothing: share of the target that is spread over all classes.
        class_weights: balanced = each class weighs the same, however many samples it has; prior = the head learns to do
            without how frequent a class is, which is often better.
        thresholds: of several labels a sample: from which probability on a label applies: for each the best for its F1,
            on samples that were not trained on; or one half.
        clip_norm: the gradient's largest norm; 0 = no clipping.
        accumulate: compute each batch in so many parts, to save memory; the step is the same (here BatchNorm does not
            learn).
        patience: stop after so many validations without a new best; 0 = never.
        stop_metric: of the validation set; decides which checkpoint is best: accuracy (auto), f1 or loss; of numbers
            loss (auto), mae or r2. Of equals the one with the lowest loss is.
        unit_rows: divide the features of each sample by their norm; often better with few labels. Stock libraries then
            do not load the export.
        one_logit: of two classes, with --head append: one number, whose sigmoid is the probability of the second class,
            as in the textbook's Linear(1000, 1) behind the old head; else one number a class.
        finish: after the epochs solve the head, where it is linear and reads kept features: the best regularisation by
            cross-validation; the better of the two heads ships (auto; where rows x features x classes are at most 6
            thousand million); none = the loop's best ships.
        calibrate: divide what the head gives by the temperature that makes its probabilities most honest on samples it
            was not trained on; decisions stay as they are.
        final: what the solved head has seen in the end: all labels, or those of the train part alone.
        validate_every_steps: validate also every so many steps; 0 = each epoch only.
        train_samples: train on so many samples only, each class in its share; 0 = all.
        validation_fraction: share of each class that validates, where the data comes without a validation part.
        group_column: of a table: says what a sample belongs to, as a patient or a camera; samples of one never stand on
            both sides of the split.
        group_by: the same from the names of files: a regular expression, as in "patient(\\d+)".
        drop_duplicates: leave out samples with the very content of another one; of those with different labels all.
        without: a labels.csv of a run before, in which an x in the column wrong marks samples to leave out.
    """

    optimizer: str = "adamw"
    weight_decay: float = 1e-2
    schedule: Literal["cosine", "step", "plateau", "constant"] = "cosine"
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced", "prior"] = "none"
    thresholds: Literal["f1", "half"] = "f1"
    clip_norm: float = 0.0
    accumulate: int = 1
    patience: int = 0
    stop_metric: Literal["auto", "accuracy", "f1", "loss", "mae", "r2"] = "auto"
    unit_rows: bool = False
    one_logit: bool = False
    finish: Literal["auto", "none"] = "auto"
    final: Literal["all", "train"] = "all"
    calibrate: bool = True
    validate_every_steps: int = 0
    train_samples: int = 0
    validation_fraction: float = 0.2
    group_column: str = ""
    group_by: str = ""
    drop_duplicates: bool = False
    without: str = ""


@dataclass(frozen=True)
class ImageTraining(Training):
    """Those that every recipe for images shares.

    Attributes:
        mixup: blend each image with another, by a share drawn from Beta(alpha, alpha); 0 = off.
        cutmix: paste a piece of another image into each; 0 = off; with mixup, each batch gets one of the two.
        views: with augment: keep so many augmented views of each image, so that a frozen backbone runs once over each;
            0 = a new view in every epoch, and the backbone runs in every epoch.
        pixel_range: LOW,HIGH: which values of pictures of more than 8 bits become black and white; auto = those that
            the data set uses; full = the ends of their type's range, after which 8 bits are left.
        decode: scaled = pictures much larger than the backbone sees are reduced while they are decoded, to at least
            twice that size: four times as fast on photos of 12 megapixels; exact = every pixel is decoded.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    views: int = 0
    pixel_range: str = "auto"
    decode: Literal["scaled", "exact"] = "scaled"


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
    """What recipes for images and for texts share."""
    return Recipe(
        model=dataclasses.replace(model, unit_rows=training.unit_rows, one_logit=training.one_logit),
        data=data,
        task=task,
        optimizer=Optimizer(
            name=training.optimizer,
            lr=lr,
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


@dataclass(frozen=True)
class AnyTable(Table):
    """The options of other data for a run: a file that lists images, or holds texts.

    Attributes:
        image_column: holds the image's path; default: image, path, file, ...
        text_column: holds the text; default: text, sentence, message, ...
        quotes: of a csv or tsv: what a quote means, as at the training; default: as in the run.
        encoding: of a table or of .txt files; default: as in the run.
        missing_labels: what to do with rows without a label, as at the training; default: as in the run.
    """

    image_column: str = ""
    text_column: str = ""
    quotes: Literal["", "auto", "none", "standard"] = ""
    encoding: str = ""
    missing_labels: Literal["", "refuse", "leave-out", "class"] = ""
