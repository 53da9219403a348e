"""The data of a run as a person sees it before training: samples as the network sees them, classes, sizes."""

import io
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from finetune.base.formatting import number_text
from finetune.base.memory import usable_cores
from finetune.data.batch import Request, Split
from finetune.data.decode import formats_of
from finetune.data.images import ImagePipeline
from finetune.data.order import spread
from finetune.data.preprocess import Preprocessing
from finetune.data.sample import spread_over_classes
from finetune.data.source import ArraySource, FileSource, Source, TextSource, class_counts
from finetune.recipe.spec import Recipe
from finetune.report.examples import TEXT_CHARACTERS, enlarged
from finetune.tasks.evaluation import class_names

SHOWN_SAMPLES = 24
PICTURE_PIXELS, JPEG_QUALITY = 168, 82
# Headers of so many files are read to know how large pictures are.
MEASURED_FILES = 1_000


@dataclass(frozen=True)
class ShownSample:
    """A sample to train on.

    Attributes:
        label: its class; of several, names with commas between; or the number.
        picture: as the network sees it, a PNG or JPEG; nothing of a text.
        augmented: the same changed at random, as in the first epoch; nothing where nothing is changed.
        text: the beginning of a text.
    """

    name: str
    label: str
    picture: bytes = b""
    augmented: bytes = b""
    text: str = ""


@dataclass(frozen=True)
class ClassSize:
    """How many samples a class has, by part."""

    name: str
    train: int
    validation: int
    test: int

    @property
    def all(self) -> int:
        return self.train + self.validation + self.test


@dataclass(frozen=True)
class Overview:
    """What a data set looks like.

    Attributes:
        noun: "image" or "text".
        parts: samples by part; those without any are left out.
        facts: label and text: sizes or lengths, numbers to predict.
        prepared: what is done to each sample, in words.
    """

    noun: str
    parts: dict[str, int]
    samples: list[ShownSample]
    classes: list[ClassSize]
    facts: list[tuple[str, str]] = field(default_factory=list)
    prepared: str = ""

    @property
    def are_augmented(self) -> bool:
        return any(one.augmented for one in self.samples)

    @property
    def has_test(self) -> bool:
        return "test" in self.parts

    @property
    def most(self) -> int:
        """Samples of the largest class."""
        return max((one.all for one in self.classes), default=0)


def overview_of(
    source: Source,
    split: Split,
    recipe: Recipe,
    preprocessing: Preprocessing | None,
    scale: Sequence[float] = (),
    lengths: Tensor | None = None,
    cut: Tensor | None = None,
) -> Overview:
    """Look at a data set that is split.

    Args:
        preprocessing: of images; None of texts.
        scale: mean and deviation by which numbers to predict are standardised; () = they are as they were.
        lengths: (samples,) of texts in tokens; None = not known.
        cut: (samples,) bool: whether a text is cut off at the end.
    """
    chosen = _to_show(source, split.train)
    if isinstance(source, TextSource):
        samples = [
            ShownSample(source.name(one), label_of(source, one, scale), text=source.texts[one][:TEXT_CHARACTERS])
            for one in chosen
        ]
        facts, prepared = _lengths(source, torch.cat(list(split)), lengths, cut), ""
    else:
        assert preprocessing is not None
        samples = _pictures(source, chosen, recipe, preprocessing, scale)
        facts, prepared = _sizes(source, torch.cat(list(split)), preprocessing), preprocessing.text
    counts = [class_counts(source.targets[part], len(source.classes)).tolist() for part in split]
    classes = [ClassSize(name, *numbers) for name, *numbers in zip(source.classes, *counts, strict=False)]
    named = zip(("to train on", "to validate", "test"), split, strict=True)
    parts = {name: len(part) for name, part in named if len(part)}
    return Overview(source.noun, parts, samples, classes, [*facts, *_numbers(source, split, scale)], prepared)


def _to_show(source: Source, train: Tensor) -> list[int]:
    """Samples to train on, the classes in turn."""
    if source.targets.is_floating_point() and source.targets.dim() == 2:  # of a teacher
        return spread(train, SHOWN_SAMPLES).tolist()
    places = spread_over_classes(source.targets[train], SHOWN_SAMPLES)
    chosen = train[places]
    if source.targets.dim() == 1 and not source.targets.is_floating_point():
        chosen = chosen[source.targets[chosen].argsort(stable=True)]
    return chosen.tolist()


def unit_text(value: float, scale: Sequence[float]) -> str:
    """A number to predict in its own unit; of one that was standardised in float32 only the digits that it still has.

    Args:
        scale: see `overview_of`.
    """
    if not scale:
        return f"{value:.6g}"
    decimals = 5 - math.floor(math.log10(scale[1]))
    return f"{round(value * scale[1] + scale[0], decimals) + 0.0:.12g}"


def label_of(source: Source, index: int, scale: Sequence[float]) -> str:
    """The class of a sample; of several, names with commas between; the number in its unit; "" = it has none.

    Args:
        scale: see `overview_of`.
    """
    target = source.targets[index]
    if target.is_floating_point():
        return "" if target.dim() else unit_text(target.item(), scale)
    numbers = target.nonzero().flatten().tolist() if target.dim() else [int(target)]
    return class_names(numbers, source.classes)


# ---- Pictures -------------------------------------------------------------------------------------------------------


def _pictures(
    source: FileSource | ArraySource,
    chosen: list[int],
    recipe: Recipe,
    preprocessing: Preprocessing,
    scale: Sequence[float],
) -> list[ShownSample]:
    """Those of them that can be read."""
    spec, found = recipe.data, list[ShownSample]()
    pipeline = ImagePipeline(source, preprocessing, spec.augment, 0.0, 0.0, recipe.seed)

    def seen(index: int) -> bytes:
        with suppress(Exception):  # what is wrong with it is said elsewhere
            return _encoded(pipeline.fetch(Request([index])).inputs[0], preprocessing)
        return b""

    with ThreadPoolExecutor(usable_cores()) as pool:
        pictures = zip(chosen, pool.map(seen, chosen), strict=True)
    for index, plain in pictures:
        with suppress(Exception):
            if not plain:
                continue
            augmented = b""
            if spec.augment != "none":
                augmented = _encoded(pipeline.fetch(Request([index], 0)).inputs[0], preprocessing)
            found.append(ShownSample(source.name(index), label_of(source, index, scale), plain, augmented))
    return found


def _encoded(prepared: Tensor, preprocessing: Preprocessing) -> bytes:
    """A picture that was normalised, for the eye."""
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.std, preprocessing.mean))
    pixels = ((prepared * std + mean) * 255).round().clamp(0, 255).byte()
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    stream = io.BytesIO()
    shown = enlarged(image)
    if shown is not image:
        shown.save(stream, "PNG", optimize=True)
    else:
        image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
        image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def _sizes(source: FileSource | ArraySource, used: Tensor, preprocessing: Preprocessing) -> list[tuple[str, str]]:
    """How large pictures are before they are prepared."""
    if isinstance(source, ArraySource):
        height, width = source.images.shape[-2:]
        return [("size", f"all {width} x {height} px")]
    sizes, formats = [], formats_of("")
    looked_at = spread(used, MEASURED_FILES).tolist()
    for index in looked_at:
        with suppress(Exception), Image.open(source.folder / source.paths[index], formats=formats) as image:
            sizes.append(image.size)
    if not sizes:
        return []
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    small, middle, large = (ordered[place] for place in (0, len(ordered) // 2, -1))
    text = f"{small[0]} x {small[1]} to {large[0]} x {large[1]} px, half of them below {middle[0]} x {middle[1]}"
    if small == large:
        text = f"all {small[0]} x {small[1]} px"
    of = f" (of {len(sizes):,} looked at)" if len(sizes) < len(used) else ""
    facts = [("size", text + of)]
    edge = preprocessing.resize_size
    if enlarged := sum(min(size) < edge for size in sizes):
        share = f"{enlarged:,} of {len(sizes):,} are smaller than the {edge} px that they are resized to"
        facts.append(("enlarged", f"{share}: they gain no detail"))
    if preprocessing.keep_proportions:
        lost = sum(max(size) > 1.5 * min(size) for size in sizes)
        if lost:
            facts.append(
                ("cropped", f"{lost:,} of {len(sizes):,} are longish, and lose a third or more of their longer side")
            )
    return facts


# ---- Texts and numbers ----------------------------------------------------------------------------------------------


def _lengths(source: TextSource, used: Tensor, lengths: Tensor | None, cut: Tensor | None) -> list[tuple[str, str]]:
    letters = torch.tensor([len(source.texts[index]) for index in used.tolist()])
    facts = [("length", f"{_range(letters)} characters")]
    if lengths is not None and len(used):
        facts.append(("tokens", _range(lengths[used])))
    if cut is not None and (count := int(cut[used].sum())):
        facts.append(("cut off", f"{count:,} of {len(used):,} are longer than the network reads"))
    return facts


def _range(numbers: Tensor) -> str:
    """As in "5 to 29, half of them below 16"."""
    if not len(numbers):
        return "none"
    return f"{int(numbers.min()):,} to {int(numbers.max()):,}, half of them below {int(numbers.median()):,}"


def _numbers(source: Source, split: Split, scale: Sequence[float]) -> list[tuple[str, str]]:
    """Of numbers to predict where they lie."""
    if not source.targets.is_floating_point() or source.targets.dim() != 1:
        return []
    numbers = source.targets[split.train].double()
    low, middle, high = (unit_text(one.item(), scale) for one in (numbers.min(), numbers.median(), numbers.max()))
    deviation = numbers.std(correction=0).item() * (scale[1] if scale else 1.0)
    return [
        (
            "numbers",
            f"{low} to {high}, half of them below {middle}; deviation {number_text(deviation)}",
        )
    ]
