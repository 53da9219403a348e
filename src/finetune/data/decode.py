"""Image files to tensors."""

import io
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional

from finetune.errors import RunError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


class BrokenImage(RunError):
    """One file that is missing or cannot be decoded."""


def read_bytes(path: Path) -> bytes:
    """All of a file.

    Raises:
        BrokenImage: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BrokenImage(f"image {path} does not exist; check the path") from None
    except OSError as error:
        raise BrokenImage(f"image {path} cannot be read ({error.strerror}); repair or remove it") from None


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
        with Image.open(io.BytesIO(content)) as image:
            return to_rgb_tensor(image)
    except UnidentifiedImageError:
        kind = "empty" if not content else "of no known image format"
        raise BrokenImage(f"image {path} cannot be decoded ({kind}); repair or remove it") from None
    except (OSError, SyntaxError, ValueError, IndexError, OverflowError, Image.DecompressionBombError) as error:
        raise BrokenImage(f"image {path} cannot be decoded ({error}); repair or remove it") from None


def read_image(path: Path) -> Tensor:
    """`decode` of the file at `path`."""
    return decode(read_bytes(path), path)


def to_rgb_tensor(image: Image.Image) -> Tensor:
    """(3, height, width) uint8 of a PIL image of any mode."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey (and 32-bit grey that holds 16-bit values, as PNG gives it): PIL's own conversion clips.
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return functional.pil_to_tensor(image.convert("RGB"))
