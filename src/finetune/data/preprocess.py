"""What is done to every image before the network sees it: resize, crop, normalise. As plain values, so that a run, an
export and a prediction do the same."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from finetune.data.decode import Decoding
from finetune.data.order import keyed_generator
from finetune.recipe.data_spec import DECODINGS, EXACT, SCALED

# Beyond this a picture is a strip; keeping its proportions would cost memory without end.
MAX_ASPECT = 20
LARGEST_IMAGE = 4096
# A picture keeps at least so many times the edge that it is resized to, where it is reduced while it is decoded: its
# features' cosine to those of every pixel is 0.9991 then at the least, and 0.995 at once (benchmarks/decoding.py).
DECODED_TIMES = 2


@dataclass(frozen=True)
class Preprocessing:
    """How images become the network's input.

    Attributes:
        image_size: edge in pixels of what the network sees: the centre of the resized image.
        resize_size: what the image is resized to first: its shorter edge, or both.
        keep_proportions: resize the shorter edge; else both edges, whatever the proportions.
        interpolation: "bilinear", "bicubic", ...: torchvision's names. Always antialiased.
        mean, std: per channel, for values in 0..1.
        pixel_range: [low, high]: which values of pictures of more than 8 bits become black and white; [] = the ends of
            their type's range, after which 8 bits are left.
        decode: "scaled" = large pictures are reduced while they are decoded, see `Decoding`; "exact" = every pixel is.
    """

    image_size: int
    resize_size: int
    keep_proportions: bool
    interpolation: str
    mean: list[float]
    std: list[float]
    pixel_range: list[float] = dataclasses.field(default_factory=list)
    decode: str = EXACT

    def __post_init__(self) -> None:
        """Refuse what no picture can be prepared with: it may come from a file that somebody else wrote."""
        sizes, triples = (self.image_size, self.resize_size), (self.mean, self.std)
        if not all(type(size) is int and 1 <= size <= LARGEST_IMAGE for size in sizes) or sizes[1] < sizes[0]:
            raise ValueError(f"image_size {self.image_size} and resize_size {self.resize_size} are no sizes in pixels")
        if self.interpolation not in [mode.value for mode in InterpolationMode]:
            raise ValueError(f"interpolation {self.interpolation!r} is unknown")
        if not all(isinstance(values, list) and len(values) == 3 for values in triples):
            raise ValueError("mean and std must be lists of 3 numbers")
        if not all(_is_finite(value) for values in triples for value in values):
            raise ValueError("mean and std must be numbers")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be above 0")
        limits = self.pixel_range
        if limits and not (len(limits) == 2 and all(map(_is_finite, limits)) and limits[0] < limits[1]):
            raise ValueError(f"pixel_range {limits} must be two numbers, the lower one first")
        if self.decode not in DECODINGS:
            raise ValueError(f"decode {self.decode!r} is unknown")

    @property
    def decoding(self) -> Decoding:
        """How files become the pixels that `resize` takes."""
        least_edge = DECODED_TIMES * self.resize_size if self.decode == SCALED else 0
        return Decoding(tuple(self.pixel_range), least_edge)

    def at(self, image_size: int) -> "Preprocessing":
        """The same for another edge, in the same proportion of crop and resized image."""
        resize_size = max(round(self.resize_size * image_size / self.image_size), image_size)
        return dataclasses.replace(self, image_size=image_size, resize_size=resize_size)

    def resize(self, image: Tensor) -> Tensor:
        """(..., 3, height, width) to (..., 3, image_size, image_size), uint8 or float32 in 0..255 both."""
        mode = InterpolationMode(self.interpolation)
        height, width = image.shape[-2:]
        if self.keep_proportions and max(height, width) <= MAX_ASPECT * min(height, width):
            size = [self.resize_size]
        else:
            size = [self.resize_size, self.resize_size]
        image = functional.resize(image, size, interpolation=mode, antialias=True)
        if image.shape[-1] == image.shape[-2] == self.image_size:
            return image
        return functional.center_crop(image, [self.image_size, self.image_size])

    def normalise(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in 0..255 to float32, scaled to 0..1, then (value - mean) / std per channel."""
        scale = torch.tensor(self.std).view(3, 1, 1) * 255
        shift = torch.tensor(self.mean).view(3, 1, 1) * 255
        return images.float().sub_(shift).div_(scale)

    def example(self, count: int) -> Tensor:
        """Network inputs of no meaning, (count, 3, image_size, image_size) float32; always the same."""
        with keyed_generator("split"):
            return torch.randn(count, 3, self.image_size, self.image_size)

    def check_same(self, prepare: Callable[[Image.Image], Tensor]) -> None:
        """Hold it against what else prepares a picture, as (3, height, width).

        Raises:
            ValueError: they differ by more than rounding.
        """
        edge = self.resize_size
        # A picture without detail, whose edges stay whole numbers: where a crop is rounded to must not matter.
        patches = torch.randint(0, 256, (3, 4, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        picture = functional.resize(patches, [2 * edge, 4 * edge])
        theirs = prepare(functional.to_pil_image(picture))
        found = self.normalise(self.resize(picture)[None])[0]
        allowed_levels = 3 + 255 / (edge / 2) * 1.5  # a pixel and a half of it, and rounded bytes
        if found.shape != theirs.shape or (found - theirs).abs().max() > allowed_levels / 255 / min(self.std):
            raise ValueError("what it makes of a picture differs")

    def to_plain(self) -> dict[str, object]:
        plain = dataclasses.asdict(self)
        if not self.pixel_range:
            del plain["pixel_range"]  # as it was written before there was one: kept features go by it
        if self.decode == EXACT:
            del plain["decode"]  # likewise
        return plain

    @property
    def text(self) -> str:
        how = "shorter edge" if self.keep_proportions else "both edges"
        resized = f"{how} to {self.resize_size}, " if self.resize_size != self.image_size else ""
        levels = f"pixels {self.pixel_range[0]:g} to {self.pixel_range[1]:g}, " if self.pixel_range else ""
        reduced = ", scaled decoding" if self.decode == SCALED else ""
        return f"{levels}{resized}{self.image_size} x {self.image_size} px, {self.interpolation}{reduced}"


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def squash(image_size: int, mean: list[float], std: list[float]) -> Preprocessing:
    """Resize both edges at once, bilinear: nothing is cropped away."""
    return Preprocessing(image_size, image_size, False, "bilinear", mean, std)
