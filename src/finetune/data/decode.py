"""Image files to tensors."""

from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional

from finetune.errors import RunError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


def read_image(path: Path) -> Tensor:
    """Decode an image file as a person sees it: upright (EXIF), red-green-blue, transparency on white.

    Returns:
        (3, height, width) uint8.

    Raises:
        RunError: the file is missing or not an image that can be decoded.
    """
    try:
        with Image.open(path) as image:
            return to_rgb_tensor(image)
    except FileNotFoundError:
        raise RunError(f"image {path} does not exist; check the path") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), path.name)
        raise RunError(f"image {path} cannot be decoded ({reason}); repair or remove it") from None


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


def resize(image: Tensor, size: int) -> Tensor:
    """Resize (..., height, width) uint8 to (..., size, size): bilinear with antialiasing, proportions not kept."""
    return functional.resize(image, [size, size], antialias=True)


def normalise(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """uint8 (batch, 3, height, width) to float32, scaled to 0..1, then (value - mean) / std per channel."""
    scale = torch.tensor(std).view(3, 1, 1) * 255
    shift = torch.tensor(mean).view(3, 1, 1) * 255
    return images.float().sub_(shift).div_(scale)
