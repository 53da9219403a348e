"""Samples of a validation as a person sees them: small pictures, beginnings of texts, names of classes."""

import functools
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from finetune.base.events import Example
from finetune.base.formatting import digits_to_tell_apart
from finetune.base.memory import usable_cores
from finetune.base.plain import Fields
from finetune.data.decode import Decoding
from finetune.data.source import FileSource, ImageSource, Source, TextSource
from finetune.tasks.evaluation import class_names

PICTURE_PIXELS = 160
# A process remembers so many, of some 30 kB each.
CACHED_PICTURES = 256
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
    fields = [Fields(sample, "a sample") for sample in samples]
    pictures = pictures_of(source, [one.integer("index") for one in fields])
    return [_example(one, classes, source, picture, digits) for one, picture in zip(fields, pictures, strict=True)]


def _example(sample: Fields, classes: Sequence[str], source: Source | None, picture: bytes, digits: int) -> Example:
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
        picture,
        source.texts[index][:TEXT_CHARACTERS] if isinstance(source, TextSource) else "",
    )


def pictures_of(source: Source | None, indices: Sequence[int | None]) -> list[bytes]:
    """Of each sample a PNG, at most 160 pixels wide and high; nothing of a text, of what is no sample, and of a file
    that cannot be read any more."""

    def one(index: int | None) -> bytes:
        if index is None or source is None or isinstance(source, TextSource):
            return b""
        if isinstance(source, FileSource):
            decoding = Decoding(source.decoding.pixel_range, PICTURE_PIXELS)
            return _picture_of_file(str(source.folder), source.name(index), decoding, source.changed_ns(index))
        return _picture_of(source, index)

    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(one, indices))


@functools.lru_cache(CACHED_PICTURES)
def _picture_of_file(folder: str, name: str, decoding: Decoding, _changed_ns: int) -> bytes:
    """A run shows the same samples in several places."""
    return _picture_of(FileSource(Path(folder), [name], torch.zeros(1), [], "", decoding=decoding), 0)


def _picture_of(source: ImageSource, index: int) -> bytes:
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
