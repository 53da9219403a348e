"""Printed characters, rendered from fonts: what the bundled backbones learnt to see with.

62 classes (0-9, A-Z, a-z), one image a font and character, distorted anew each time one is trained on.
"""

import hashlib
import importlib.util
import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from finetune.data.order import key
from finetune.data.source import ArraySource
from finetune.errors import UsageError

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
CANVAS_PIXELS = 40
GLYPH_PIXELS = 28  # the longer side of a character on its canvas
FONT_SUFFIXES = (".otf", ".pfb", ".ttf")


def matplotlib_fonts() -> str:
    """The folder of fonts that matplotlib ships; matplotlib itself is not imported."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("--fonts: matplotlib's fonts are not installed; give a folder that holds .ttf or .otf files")
    return str(Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts")


def render_glyphs(fonts: str) -> ArraySource:
    """Every character of every usable font below the folder `fonts` ("" = matplotlib's), strokes bright on black.

    A font is left out when it lacks a character, draws two of our characters alike in a way letters never are (a
    symbol font), or draws the very same shapes as a font before it.

    Raises:
        UsageError: fewer than two usable fonts.
    """
    folder = Path(fonts or matplotlib_fonts())
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in FONT_SUFFIXES)
    seen: set[str] = set()
    images = []
    for path in files:
        glyphs = _render_font(path)
        if glyphs is None:
            continue
        digest = hashlib.sha256(glyphs.tobytes()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            images.append(glyphs)
    if len(images) < 2:
        raise UsageError(
            f"--fonts {folder}: {len(images)} usable fonts among {len(files)} files, at least 2 are needed; give a "
            "folder with .ttf or .otf files that have 0-9, A-Z and a-z"
        )
    pixels = torch.from_numpy(np.concatenate(images))[:, None]
    targets = torch.arange(len(CHARACTERS)).repeat(len(images))
    groups = torch.arange(len(images)).repeat_interleave(len(CHARACTERS))
    fingerprint = f"glyphs {hashlib.sha256(''.join(sorted(seen)).encode()).hexdigest()}"
    return ArraySource(pixels, targets, list(CHARACTERS), fingerprint, groups)


def _render_font(path: Path) -> np.ndarray | None:
    """(62, CANVAS_PIXELS, CANVAS_PIXELS) uint8, or None for a font that cannot be used."""
    try:
        font = ImageFont.truetype(str(path), 64)
        missing = font.getmask("\U0010fffd").getbbox(), bytes(font.getmask("\U0010fffd"))
        glyphs = []
        for character in CHARACTERS:
            mask = font.getmask(character)
            if mask.getbbox() is None or (mask.getbbox(), bytes(mask)) == missing:
                return None
            glyphs.append(_on_canvas(font, character))
    except (OSError, ValueError, SystemError):
        return None
    distinct = {glyph.tobytes() for glyph in glyphs}
    # Small capitals draw 26 pairs alike; anything below that is not an alphabet.
    return np.stack(glyphs) if len(distinct) >= len(CHARACTERS) - 26 else None


def _on_canvas(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    left, top, right, bottom = font.getbbox(character)
    width, height = max(right - left, 1), max(bottom - top, 1)
    image = Image.new("L", (int(width), int(height)))
    ImageDraw.Draw(image).text((-left, -top), character, font=font, fill=255)
    scale = GLYPH_PIXELS / max(width, height)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    image = image.resize(size, Image.Resampling.BOX)
    canvas = Image.new("L", (CANVAS_PIXELS, CANVAS_PIXELS))
    canvas.paste(image, ((CANVAS_PIXELS - size[0]) // 2, (CANVAS_PIXELS - size[1]) // 2))
    return np.asarray(canvas)


# ---- Distortion -----------------------------------------------------------------------------------------------
# Batched, because torchvision's transforms draw one set of numbers for a whole batch, and one image at a time they
# cost more than the small networks that train on them. Each image's numbers come from a counter-based generator
# (Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by seed, epoch and index.

ELASTIC_GRID = 5
AFFINE_NUMBERS = 16


def _random_numbers(seed: int, epoch: int, indices: list[int], count: int) -> Tensor:
    """(len(indices), count) float32, uniform in [0, 1)."""
    rows = np.empty((len(indices), count), dtype=np.float32)
    for row, index in zip(rows, indices, strict=True):
        philox = np.random.Philox(key=key("glyphs", seed, epoch, index))
        np.random.Generator(philox).random(out=row, dtype=np.float32)
    return torch.from_numpy(rows)


def distort(images: Tensor, size: int, seed: int, epoch: int, indices: list[int]) -> Tensor:
    """Strong random affine and elastic distortion, stroke weight, blur, contrast, polarity and noise.

    The elastic part is Simard, Steinkraus and Platt's ("Best practices for convolutional neural networks applied to
    visual document analysis", ICDAR 2003), with the displacement field drawn on a coarse grid. The blur is wide on
    purpose, for low-resolution scans: up to the point where a 32-pixel image holds what an 8-pixel one would.

    Args:
        images: (batch, 3, CANVAS_PIXELS, CANVAS_PIXELS) uint8, all channels equal.
        size: edge of the result in pixels.
        indices: the samples' indices, which key the random numbers with `seed` and `epoch`.

    Returns:
        (batch, 3, size, size) uint8.
    """
    batch = len(images)
    elastic_numbers = 2 * ELASTIC_GRID**2
    numbers = _random_numbers(seed, epoch, indices, AFFINE_NUMBERS + elastic_numbers + size * size)
    affine, elastic, noise = numbers.split([AFFINE_NUMBERS, elastic_numbers, size * size], dim=1)
    pixels = images[:, :1].float() / 255
    pixels = _change_stroke_weight(pixels, affine[:, 8])
    field = (elastic.view(batch, 2, ELASTIC_GRID, ELASTIC_GRID) - 0.5) * (0.3 * affine[:, 9]).view(-1, 1, 1, 1)
    field = functional.interpolate(field, size=(size, size), mode="bicubic", align_corners=True)
    grid = functional.affine_grid(_affine_matrices(affine), [batch, 1, size, size], align_corners=False)
    grid = grid + field.permute(0, 2, 3, 1)
    pixels = functional.grid_sample(pixels, grid, align_corners=False)
    pixels = _blur(pixels, sigma_pixels=affine[:, 10].square() * (0.085 * size))
    contrast = 0.4 + 0.6 * affine[:, 11].view(-1, 1, 1, 1)
    background = (1 - contrast) * affine[:, 12].view(-1, 1, 1, 1)
    pixels = background + contrast * pixels
    inverted = (affine[:, 13] < 0.25).view(-1, 1, 1, 1)
    pixels = torch.where(inverted, 1 - pixels, pixels)
    noise_level = (0.2 * affine[:, 14].square()).view(-1, 1, 1, 1)
    pixels = pixels + (noise.view(batch, 1, size, size) - 0.5) * (2 * noise_level)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)


def _affine_matrices(numbers: Tensor) -> Tensor:
    """(batch, 2, 3): rotation up to 20 degrees, scale 0.7 to 1.45 by axis, shear up to 0.4, shift up to 0.2."""
    angle = (numbers[:, 0] - 0.5) * 0.7
    scale = torch.exp((numbers[:, 1] - 0.5) * 0.5 + 0.02)
    aspect = torch.exp((numbers[:, 2] - 0.5) * 0.5)
    shear = (numbers[:, 3] - 0.5) * 0.8
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([scale * aspect * cos, scale * (shear * cos - sin), (numbers[:, 4] - 0.5) * 0.4], dim=1),
        torch.stack([scale * sin, scale * (shear * sin + cos) / aspect, (numbers[:, 5] - 0.5) * 0.4], dim=1),
    ]
    return torch.stack(rows, dim=1)


def _change_stroke_weight(pixels: Tensor, numbers: Tensor) -> Tensor:
    """A third of the images get thicker strokes, a sixth thinner ones, by up to one canvas pixel on each side."""
    thicker = functional.max_pool2d(pixels, 3, stride=1, padding=1)
    thinner = -functional.max_pool2d(-pixels, 3, stride=1, padding=1)
    numbers = numbers.view(-1, 1, 1, 1)
    grow = ((numbers - 2 / 3) * 3).clamp(0, 1)
    shrink = ((1 / 6 - numbers) * 3).clamp(0, 0.5)
    return pixels + grow * (thicker - pixels) + shrink * (thinner - pixels)


def _blur(pixels: Tensor, sigma_pixels: Tensor) -> Tensor:
    """A Gaussian blur of (batch, 1, height, width), each image with its own sigma."""
    radius = 7
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernels = torch.exp(-0.5 * (offsets / sigma_pixels.clamp(min=0.05)[:, None]) ** 2)
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    batch = len(pixels)
    rows = functional.conv2d(pixels.transpose(0, 1), kernels.view(batch, 1, 1, -1), padding=(0, radius), groups=batch)
    return functional.conv2d(rows, kernels.view(batch, 1, -1, 1), padding=(radius, 0), groups=batch).transpose(0, 1)
