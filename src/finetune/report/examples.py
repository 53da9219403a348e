"""Samples of a validation as a person sees them: small pictures, beginnings of texts, names of classes."""

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from finetune.base.events import Example
from finetune.data.source import Source, TextSource
from finetune.tasks.evaluation import class_names

PICTURE_PIXELS = 160
# Smaller pictures are shown larger, by a whole factor, with their pixels as squares.
SMALL_PIXELS = 112
TEXT_CHARACTERS = 400


def examples_of(samples: Sequence[dict[str, Any]], classes: Sequence[str], source: Source | None) -> list[Example]:
    """Make samples of validation.json ready to be shown.

    Args:
        samples: its "worst" or "best".
        classes: names by number; [] where numbers are predicted.
        source: the data, to fetch pictures and texts from; None = it is not there any more, names must do.
    """
    return [_example(sample, classes, source) for sample in samples]


def _example(sample: dict[str, Any], classes: Sequence[str], source: Source | None) -> Example:
    def words(value: Any) -> str:
        if value is None:
            return ""
        return class_names(value, classes) if isinstance(value, list) else f"{value:.6g}"

    return Example(
        sample["name"],
        sample["loss"],
        words(sample["true"]),
        words(sample["predicted"]),
        tuple((classes[number], probability) for number, probability in sample["probabilities"]),
        b"" if source is None or isinstance(source, TextSource) else picture_of(source, sample["index"]),
        source.texts[sample["index"]][:TEXT_CHARACTERS] if isinstance(source, TextSource) else "",
    )


def picture_of(source: Source, index: int) -> bytes:
    """A PNG, at most 160 pixels wide and high; nothing where the file cannot be read any more."""
    try:
        image = Image.fromarray(source.read(index)[0].permute(1, 2, 0).numpy())
    except Exception:  # a missing picture is no reason to show nothing at all
        return b""
    image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    factor = SMALL_PIXELS // max(image.size)
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
