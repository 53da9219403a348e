"""The options that recipes for a new head share, as dataclasses: a field is an option. No import of torch."""

from dataclasses import dataclass
from typing import Literal


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
        train: what trains from the beginning: head = what is new alone; last or last:N = also the last blocks of the
            backbone; all; or module paths with commas between (`finetune summary` lists the blocks).
        thaw: what trains later: EPOCHS:PATTERN = after so many epochs, plateau:PATTERN = once the figure no longer
            improves; as in "3:layer4,6:layer3".
        thaw_last: so many blocks are thawed, the last one first.
        thaw_every: with thaw_last: one block after every so many epochs.
        lr_backbone: learning rate of the backbone's last block, as a share of lr.
        lr_decay: what the rate of each block further from the head is multiplied with.
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

    train: str = "head"
    thaw: str = ""
    thaw_last: int = 0
    thaw_every: int = 3
    lr_backbone: float = 0.1
    lr_decay: float = 1.0
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
