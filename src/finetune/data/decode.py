"""Image files to tensors."""

import io
import os
import stat
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional

from finetune.errors import RunError, one_line

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
# By content, whatever the name. PIL knows many more, and starts other programs for some of them.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
LARGEST_FILE_BYTES = 1 << 30


class BrokenImage(RunError):
    """One file that is missing or cannot be decoded."""


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


def decode(content: bytes, path: Path) -> Tensor:
    """An image file as a person sees it: upright (EXIF), red-green-blue, transparency on white, a film's first frame.

    Args:
        content: of the file.
        path: named in the error.

    Returns:
        (3, height, width) uint8.

    Raises:
        BrokenImage: not an image that can be decoded.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return to_rgb_tensor(image)
    except UnidentifiedImageError:
        kind = "empty" if not content else "of no known image format"
        raise BrokenImage(f"image {path} cannot be decoded ({kind}); repair or remove it") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make a decoder fail in any way
        raise BrokenImage(f"image {path} cannot be decoded ({one_line(error)}); repair or remove it") from None


def read_image(path: Path) -> Tensor:
    """`decode` of the file at `path`."""
    return decode(read_bytes(path), path)


def to_rgb_tensor(image: Image.Image) -> Tensor:
    """(3, height, width) uint8 of a PIL image of any mode."""
    image.load()  # whatever is wrong with the picture itself shows here
    with suppress(Exception):  # what a camera wrote beside the picture is damaged: it stays as it is
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit grey (and 32-bit grey that holds 16-bit values, as some PNGs give it): PIL's own conversion clips.
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return functional.pil_to_tensor(image.convert("RGB"))
