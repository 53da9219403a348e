"""Samples of a validation as a person sees them: small pictures, beginnings of texts, names of classes."""

import io
from collections.abc import Mapping, Sequence

from PIL import Image

from finetune.base.events import Example
from finetune.base.formatting import digits_to_tell_apart
from finetune.base.plain import Fields
from finetune.data.source import ImageSource, Source, TextSource
from finetune.tasks.evaluation import class_names

PICTURE_PIXELS = 160
# Smaller pictures are shown larger, by a whole factor, with their pixels as squares.
SMALL_PIXELS = 112
TEXT_CHARACTERS = 400


def examples_of(
    samples: Sequence[Mapping[str, object]], classes: Sequence[str], source: Source | None
) -> list[Example]:
    """Make samples of validation.json ready to be shown.

    Args:
        samples: its "worst" or "best".
        classes: names by number; [] where numbers are predicted.
        source: the data, to fetch pictures and texts from; None = it is not there any more, names must do.

    Raises:
        BadFile: one is not as it is written.
    """
    values = (sample.get(name) for sample in samples for name in ("true", "predicted"))
    digits = digits_to_tell_apart(value for value in values if isinstance(value, int | float))
    return [_example(Fields(sample, "a sample"), classes, source, digits) for sample in samples]


def _example(sample: Fields, classes: Sequence[str], source: Source | None, digits: int) -> Example:
    def words(name: str) -> str:
        if sample.plain[name] is None:
            return ""
        if isinstance(sample.plain[name], list):
            return class_names(sample.items(name, int), classes)
        return f"{sample.number(name):.{digits}g}"

    index = sample.integer("index")
    return Example(
        sample.text("name"),
        sample.number("loss"),
        words("true"),
        words("predicted"),
        tuple((classes[number], probability) for number, probability in sample.items("probabilities", list)),
        b"" if source is None or isinstance(source, TextSource) else picture_of(source, index),
        source.texts[index][:TEXT_CHARACTERS] if isinstance(source, TextSource) else "",
    )


def picture_of(source: ImageSource, index: int) -> bytes:
    """A PNG, at most 160 pixels wide and high; nothing where the file cannot be read any more."""
    try:
        pixels = source.read(index)[0].round().clamp(0, 255).byte()
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    except Exception:  # a missing picture is no reason to show nothing at all
        return b""
    image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    stream = io.BytesIO()
    enlarged(image).save(stream, "PNG")
    return stream.getvalue()


def enlarged(image: Image.Image) -> Image.Image:
    """A small picture larger, by a whole factor, its pixels as squares; any other one is returned itself."""
    factor = SMALL_PIXELS // max(image.size)
    if factor <= 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
