"""Image files to tensors."""

import functools
import importlib.util
import io
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from finetune.base.formatting import with_article
from finetune.base.stand_ins import what_stands_in
from finetune.data.wide import EXIF_ORIENTATION, is_wide, scaled, values_of
from finetune.errors import RunError, one_line

# For these PIL starts another program, needs a handler that nobody has, or reads no picture.
NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# These begin with bytes that nothing else begins with: a file is known by them, whatever its name.
KNOWN_BY_CONTENT = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")
# What a run reads that was begun when files were known by their names.
SUFFIXES_BEFORE = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
# What takes a package of its own: the package by suffix.
PACKAGES = {".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif"}
LARGEST_FILE_BYTES = 1 << 30
# From so many on it shows who decodes them.
LARGE_PIXELS = 2_000_000
# A file, or a picture that a program has in memory.
Picture = Path | Image.Image | NDArray[Any] | Tensor


class BrokenImage(RunError):
    """One file that is missing or cannot be decoded."""


@dataclass(frozen=True)
class Decoding:
    """How a picture becomes pixels.

    Attributes:
        pixel_range: which values of more than 8 bits become black and white; () = the ends of their type's range.
        least_edge: a picture whose shorter edge has at least twice as many pixels is reduced while it is decoded, by a
            whole factor, and keeps at least so many; 0 = every pixel is decoded. Those that the range is of keep all.
    """

    pixel_range: tuple[float, ...] = ()
    least_edge: int = 0


EVERY_PIXEL = Decoding()


@functools.cache
def formats_by_suffix() -> Mapping[str, str]:
    """The format of each suffix that PIL knows, of those that it decodes by itself; also HEIF where its package is
    there."""
    if importlib.util.find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()
    suffixes = Image.registered_extensions()
    return {suffix: name for suffix, name in suffixes.items() if name in Image.OPEN and name not in NOT_DECODED}


def formats_of(suffix: str) -> list[str]:
    """What a file of that suffix may be: a format known by its content, or the one that its name says."""
    named = formats_by_suffix().get(suffix.lower(), "")
    return [name for name in (*KNOWN_BY_CONTENT, named) if name in Image.OPEN]


def is_image(folder: str, name: str) -> bool:
    """Whether a file is an image: by its suffix, or, where it has none, by its content."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix:  # a copy that a program left as photo.jpg_original is no second photo
        return suffix in formats_by_suffix()
    path = os.path.join(folder, name)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would keep us waiting for ever
            return False
        with Image.open(path, formats=formats_of("")):
            return True
    except Exception:  # whatever a decoder stumbles over: it is no image
        return False


def read_bytes(path: Path) -> bytes:
    """All of a file.

    Raises:
        BrokenImage: it is missing or cannot be read.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would keep us waiting for ever
            raise BrokenImage(f"image {path} is no file; remove it")
        if status.st_size > LARGEST_FILE_BYTES:
            raise BrokenImage(f"image {path} has {status.st_size:,} bytes, more than {LARGEST_FILE_BYTES:,}; remove it")
        return path.read_bytes()
    except FileNotFoundError:
        raise BrokenImage(f"image {path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise BrokenImage(f"image {path} cannot be read ({one_line(error)}); repair or remove it") from None


def decode(content: bytes, path: Path, decoding: Decoding = EVERY_PIXEL) -> Tensor:
    """An image file as a person sees it: upright (EXIF), red-green-blue, transparency on white, a film's first frame.

    Args:
        content: of the file.
        path: named in the error.

    Returns:
        (3, height, width) uint8; with a range, of a picture of more than 8 bits, float32 in 0..255.

    Raises:
        BrokenImage: not an image that can be decoded.
    """
    try:
        with Image.open(io.BytesIO(content), formats=formats_of(path.suffix)) as image:
            if decoding.pixel_range and is_wide(image):
                return scaled(values_of(image, content), *decoding.pixel_range)
            size = image.size
            if decoding.least_edge and isinstance(image, JpegImageFile):
                # libjpeg leaves out the frequencies that nobody will see: a half, a quarter or an eighth of each edge.
                image.draft(None, (decoding.least_edge, decoding.least_edge))
            pixels = _whole_jpeg(image, content) if image.size == size else None
            return _to_rgb_tensor(image, decoding.least_edge) if pixels is None else pixels
    except UnidentifiedImageError:
        if instead := what_stands_in(content):
            raise BrokenImage(f"image {path} {instead}") from None
        package = PACKAGES.get(path.suffix.lower())
        kind = f"{path.suffix} needs a package: pip install {package}" if package else "of no known image format"
        kind = kind if content else "empty"
        raise BrokenImage(f"image {path} cannot be decoded ({kind}); repair or remove it") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make a decoder fail in any way
        raise BrokenImage(f"image {path} cannot be decoded ({one_line(error)}); repair or remove it") from None


def read_image(path: Path, decoding: Decoding = EVERY_PIXEL) -> Tensor:
    """`decode` of the file at `path`."""
    return decode(read_bytes(path), path, decoding)


def _whole_jpeg(image: Image.Image, content: bytes) -> Tensor | None:
    """A large, upright JPEG in colours, every pixel, by torchvision: the same bytes as by PIL in two thirds of the
    time, for they need not be put into another order. None = it is something else, or PIL shall say what is wrong with
    it; of small ones, too, for torchvision's libjpeg writes of stray bytes to stderr, and many old files have some."""
    is_large = image.width * image.height >= LARGE_PIXELS
    if is_large and image.format == "JPEG" and image.mode == "RGB" and _orientation(image) == 1:
        with suppress(Exception):
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return None


def _orientation(image: Image.Image) -> int:
    """As EXIF says it, 1 = upright; also where what a camera wrote beside the picture is damaged."""
    with suppress(Exception):
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    return 1


def _to_rgb_tensor(image: Image.Image, least_edge: int = 0) -> Tensor:
    """(3, height, width) uint8 of a PIL image of any mode, which stays as it is.

    Args:
        least_edge: see `Decoding`.
    """
    image.load()  # whatever is wrong with the picture itself shows here
    if _orientation(image) != 1:
        with suppress(Exception):
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit grey (and 32-bit grey that holds 16-bit values, as some PNGs give it): PIL's own conversion clips.
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        image = _reduced(image.convert("RGBA"), least_edge)
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return functional.pil_to_tensor(_reduced(image, least_edge))


def _reduced(image: Image.Image, least_edge: int) -> Image.Image:
    """A large picture by a whole factor smaller, each pixel the mean of those that it stands for."""
    factor = min(image.size) // least_edge if least_edge else 1
    return image.reduce(factor) if factor > 1 else image


def picture_tensor(picture: Picture, decoding: Decoding = EVERY_PIXEL) -> Tensor:
    """`decode` of a file, or the same of a picture in memory.

    Args:
        picture: a path; of PIL any picture; an array (height, width) or (height, width, 1, 3 or 4) of uint8, the fourth
            being transparency, with a range also of other numbers; a tensor (1 or 3, height, width) of uint8.

    Raises:
        BrokenImage: it is nothing of that.
    """
    if isinstance(picture, Path):
        return read_image(picture, decoding)
    pixel_range, least_edge = decoding.pixel_range, decoding.least_edge
    try:
        if isinstance(picture, Image.Image):
            if pixel_range and is_wide(picture):
                return scaled(values_of(picture, b""), *pixel_range)
            return _to_rgb_tensor(picture, least_edge)
        if isinstance(picture, Tensor) and picture.dim() == 3 and picture.dtype == torch.uint8 and picture.numel():
            if len(picture) in (1, 3):
                pixels = picture.cpu().expand(3, -1, -1)
                if least_edge and min(pixels.shape[1:]) >= 2 * least_edge:
                    return _to_rgb_tensor(functional.to_pil_image(pixels), least_edge)
                return pixels
        elif isinstance(picture, np.ndarray) and picture.size:
            values = picture[:, :, 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture
            if values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4)):
                if values.dtype == np.uint8:
                    return _to_rgb_tensor(Image.fromarray(np.ascontiguousarray(values)), least_edge)
                if pixel_range and values.dtype.kind in "uif":
                    return scaled(values.astype(np.float32), *pixel_range)
    except MemoryError:
        raise
    except Exception as error:  # of a picture that was opened, and is damaged
        raise BrokenImage(f"the picture cannot be decoded ({one_line(error)}); give another") from None
    what = type(picture).__name__
    if isinstance(picture, np.ndarray | Tensor):
        what = f"{'array' if isinstance(picture, np.ndarray) else 'tensor'} {tuple(picture.shape)} of {picture.dtype}"
    raise BrokenImage(
        f"a picture cannot be {with_article(what)}; give a path, a picture of PIL, an array (height, width, 3) of "
        "uint8, or a tensor (3, height, width) of uint8"
    )
