"""What a recipe says of its data: which, how split, how prepared. No import of torch."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from finetune.errors import UsageError
from finetune.recipe.named import named

SCALED, EXACT = DECODINGS = ("scaled", "exact")


@dataclass(frozen=True)
class Images:
    """Image data: which, how split, how prepared.

    Attributes:
        images: "digits", "glyphs", a folder, or a csv, tsv or jsonl file.
        image_column, label_column: of a table; "" = found by their names.
        split_column: of a table: says train, val or test; "" = none.
        separator: between the several labels of a row; "" = one label a row.
        allow_outside: images may lie outside the folder, or that of the file: behind a link, "..", or a path from the
            root.
        listing: "content" = files are known by their content, folders of services are left aside, names of classes are
            compared by what they mean; "suffix" = by names alone, each spelling a class of its own.
        quotes: of a csv or tsv: "auto", "none" or "standard"; see `table.read_rows`.
        missing_labels: what is done with rows whose label is spelled like a missing value: "refuse", "leave-out" or
            "class".
        encoding: of a table or a file of text that does not say it itself, by Python's name for it.
        tables: "whole" = as "tolerant", and of a data set in several parquet files all are read where one is named;
            "tolerant" = paths of other machines are looked for below the table's folder, printed lists are lists,
            and --label-column A,B names a column a label; "strict" = nothing of that.
        group_column: of a table: says what samples have in common that stay on one side of a split; "" = none.
        group_by: a regular expression that finds in the names of files what samples have in common that stay on one
            side of a split; "" = none.
        drop_duplicates: leave out samples whose content is that of another one.
        without: a labels.csv, in which somebody marked samples to leave out; "" = none.
        image_size: edge in pixels; 0 = the size that the backbone was trained at.
        augment: "none", "light", "standard" or "glyphs".
        mixup, cutmix: alpha of the blending of two images; 0 = off.
        views: so many augmented views of each image are made once, epoch e sees view e mod views; 0 = a new one in
            every epoch.
        validation_fraction: share of each class that validates, where the data has no validation part of its own.
        train_samples: train on so many only, each class in its share; 0 = all.
        fonts: folder of fonts for "glyphs"; "" = those that matplotlib ships.
        pixel_range: which values of pictures of more than 8 bits become black and white: "LOW,HIGH"; "auto" = those
            that the data set uses; "full" = the ends of their type's range, after which 8 bits are left.
        decode: "scaled" = large image files are reduced while they are decoded; "exact" = every pixel is decoded.
        samples: take so many only of each part of the data (of all, where it has none), each class among them; 0 = all.
    """

    kind: str = field(default="images", init=False)
    images: str
    image_column: str = ""
    label_column: str = ""
    split_column: str = ""
    separator: str = ""
    allow_outside: bool = False
    listing: str = named("content", before="suffix")
    quotes: str = named("auto", before="standard")
    missing_labels: str = named("refuse", before="class")
    encoding: str = named("utf-8", before="utf-8")
    tables: str = named("whole", before="strict")
    group_column: str = named("", before="")
    group_by: str = named("", before="")
    drop_duplicates: bool = named(False, before=False)
    without: str = named("", before="")
    image_size: int = 0
    augment: str = "none"
    mixup: float = 0.0
    cutmix: float = 0.0
    views: int = 0
    validation_fraction: float = 0.2
    train_samples: int = 0
    fonts: str = ""
    pixel_range: str = named("auto", before="full")
    decode: str = named(SCALED, before=EXACT)
    samples: int = named(0, before=0)

    @property
    def place(self) -> str:
        """What was given, by `option`, to find the data."""
        return self.images

    option: ClassVar[str] = "--images"


@dataclass(frozen=True)
class Texts:
    """Text data: which, how split, how long.

    Attributes:
        texts: "messages", a csv, tsv, jsonl or parquet file, or a folder of class/*.txt.
        text_column, label_column: of a table; "" = found by their names.
        split_column, separator, allow_outside, listing, quotes, missing_labels, encoding, tables, group_column,
            group_by, drop_duplicates, without, validation_fraction, train_samples, samples: as of images.
        max_length: tokens of a text, what is longer is cut off; 0 = what the backbone takes, 512 at most.
    """

    kind: str = field(default="texts", init=False)
    texts: str
    text_column: str = ""
    label_column: str = ""
    split_column: str = ""
    separator: str = ""
    allow_outside: bool = False
    listing: str = named("content", before="suffix")
    quotes: str = named("auto", before="standard")
    missing_labels: str = named("refuse", before="class")
    encoding: str = named("utf-8", before="utf-8")
    tables: str = named("whole", before="strict")
    group_column: str = named("", before="")
    group_by: str = named("", before="")
    drop_duplicates: bool = named(False, before=False)
    without: str = named("", before="")
    max_length: int = 0
    validation_fraction: float = 0.2
    train_samples: int = 0
    samples: int = named(0, before=0)
    # Texts are never changed at random.
    augment: ClassVar[str] = "none"
    mixup: ClassVar[float] = 0.0
    cutmix: ClassVar[float] = 0.0
    views: ClassVar[int] = 0

    @property
    def place(self) -> str:
        return self.texts

    option: ClassVar[str] = "--texts"


Data = Images | Texts
DATA: dict[str, type[Data]] = {"images": Images, "texts": Texts}


LISTINGS = ("content", "suffix")
TABLES = ("whole", "tolerant", "strict")
QUOTES = ("auto", "none", "standard")
MISSING_LABELS = ("refuse", "leave-out", "class")
KNOWN_ENCODINGS = "utf-8, windows-1252, latin-1, utf-16, shift_jis or another of Python's"
AUGMENTATIONS = ("none", "light", "standard", "glyphs")


def pixel_limits(pixel_range: str) -> tuple[float, float] | tuple[()]:
    """The two numbers of an image's `pixel_range`; () = it gives none.

    Raises:
        UsageError: it is none of those that are allowed.
    """
    if pixel_range in ("auto", "full"):
        return ()
    try:
        low, high = map(float, pixel_range.split(","))
        if -math.inf < low < high < math.inf:
            return low, high
    except ValueError:
        pass
    raise UsageError(f"--pixel-range {pixel_range}: not allowed; give auto, full, or LOW,HIGH as in 0,4095")


def is_encoding(name: str) -> bool:
    """Whether Python knows an encoding of texts of that name."""
    try:
        "a".encode(name)
    except (LookupError, UnicodeError, TypeError, ValueError):
        return False
    return True


def check_encoding(name: str) -> None:
    """Raises: UsageError: Python knows no encoding of texts of that name."""
    if not is_encoding(name):
        raise UsageError(f"--encoding {name}: not allowed; give {KNOWN_ENCODINGS}")


def data_rules(data: Data, has_several: bool) -> list[tuple[str, float | str, bool, str]]:
    """(option, value, whether it is allowed, what is) of the values that data can have.

    Args:
        has_several: the task is one of several labels.

    Raises:
        UsageError: see `pixel_limits`.
    """
    rules: list[tuple[str, float | str, bool, str]] = [
        ("train-samples", data.train_samples, data.train_samples >= 0, "0 (all) or more"),
        ("samples", data.samples, data.samples >= 0, "0 (all) or more"),
        ("validation-fraction", data.validation_fraction, 0 < data.validation_fraction < 1, "between 0 and 1"),
    ]
    for name, choices in (
        ("listing", LISTINGS), ("quotes", QUOTES), ("missing-labels", MISSING_LABELS), ("tables", TABLES),
    ):  # fmt: skip
        chosen = getattr(data, name.replace("-", "_"))
        rules.append((name, chosen, chosen in choices, f"one of {', '.join(choices)}"))
    rules.append(("encoding", data.encoding, is_encoding(data.encoding), KNOWN_ENCODINGS))
    if isinstance(data, Images):
        pixel_limits(data.pixel_range)
        size = data.image_size
        return [
            *rules,
            ("image-size", size, size == 0 or 8 <= size <= 4096, "0 (the backbone's) or 8 to 4096"),
            ("augment", data.augment, data.augment in AUGMENTATIONS, f"one of {', '.join(AUGMENTATIONS)}"),
            ("mixup", data.mixup, data.mixup >= 0, "0 (off) or more"),
            ("cutmix", data.cutmix, data.cutmix >= 0, "0 (off) or more"),
            ("decode", data.decode, data.decode in DECODINGS, f"one of {', '.join(DECODINGS)}"),
            ("views", data.views, data.views >= 0, "0 (a new one in every epoch) or more"),
        ]
    return [
        *rules,
        ("max-length", data.max_length, data.max_length >= 0, "0 (the backbone's) or more"),
        ("separator", data.separator, has_several or not data.separator, "one only to a task of several labels"),
    ]
