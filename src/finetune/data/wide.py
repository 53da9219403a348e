"""Pictures of more than 8 bits a value, as thermal cameras, microscopes, detectors and scanners store them.

Few of the 65,536 values of such a file are used. Scaled by its type's full range a thermal picture would keep four
levels of grey; so the range that a data set uses is found, or given, and becomes black to white.
"""

import io
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from torch import Tensor

from finetune.data.order import spread

FULL_RANGE = (0.0, 65535.0)
# Where at least this share of the values of 16 bits is used, 8 bits keep 128 levels: files stay as they were read.
FULL_SHARE = 0.5
# Ends of the range: a dead pixel, or a hot one, must not decide.
LOW_QUANTILE, HIGH_QUANTILE = 0.001, 0.999
# Looked at: headers of so many files, values of so many of those that are wide, so many values of each.
LOOKED_AT, MEASURED_FILES, MEASURED_VALUES = 512, 64, 20_000
# Pictures of characters and signs are about as small, and grey. Looked into: so many that are stored in colours;
# compression colours grey a little, so a colour is more than so much of 255, in more than that share of the pixels; and
# so are more than that share of the files, as one that is marked in red does not make a data set of photographs.
SMALL_EDGE, GREY_MODES = 64, ("1", "L", "LA", "I", "F", "I;16", "I;16B")
COLOUR_FILES, GREY_TOLERANCE, COLOUR_SHARE, COLOURED_FILES = 16, 24, 0.01, 0.2
OPENED_AS_8_BITS = ("LA", "RGB", "RGBA")
TIFF_BITS, EXIF_ORIENTATION = 258, 274
Values = NDArray[np.float32]


def is_wide(image: Image.Image) -> bool:
    """Whether a picture, opened but not decoded, has more than 8 bits a value."""
    return image.mode.startswith("I") or image.mode == "F" or _bits_a_colour(image) > 8


def _bits_a_colour(image: Image.Image) -> int:
    """Of a PNG or TIFF in colours, or with transparency: PIL opens it as one of 8 bits, whatever it holds."""
    if image.mode not in OPENED_AS_8_BITS:
        return 8
    if image.format == "PNG":
        return 16 if isinstance(image, ImageFile) and any("16" in str(tile[3]) for tile in image.tile) else 8
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    return max((int(bits) for bits in tags.get(TIFF_BITS, (8,))), default=8)


def values_of(image: Image.Image, content: bytes) -> Values:
    """The values of a wide picture, upright: (height, width), or (height, width, 3 or 4).

    Args:
        image: opened from `content`.
    """
    if image.mode in OPENED_AS_8_BITS:
        colours = _colours_of(image, content)
        return np.ascontiguousarray(_upright(colours, image.getexif().get(EXIF_ORIENTATION, 1)), dtype=np.float32)
    image.load()
    with suppress(Exception):  # what a camera wrote beside the picture is damaged: it stays as it is
        image = ImageOps.exif_transpose(image)
    values = np.asarray(image).astype(np.float32)
    return np.nan_to_num(values, nan=float(np.finfo(np.float32).min))  # what is no number is black


def _colours_of(image: Image.Image, content: bytes) -> NDArray[np.float32]:
    """(height, width, 3 or 4), as they lie in the file; grey with transparency as such colours."""
    pixels = _channels_of(image, content)
    return pixels[:, :, [0, 0, 0, 1]] if pixels.shape[2] == 2 else pixels


def _channels_of(image: Image.Image, content: bytes) -> NDArray[np.float32]:
    # Both take a moment to import, and few pictures need them.
    if image.format == "PNG":
        import imagecodecs

        return imagecodecs.png_decode(content).astype(np.float32)
    import tifffile

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages.first
        pixels = page.asarray()
    planes_first = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
    return (np.moveaxis(pixels, 0, -1) if planes_first else pixels).astype(np.float32)


def _upright(pixels: NDArray[np.float32], orientation: int) -> NDArray[np.float32]:
    """As EXIF's orientation says, for PIL turns pictures of 8 bits only."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def scaled(values: Values, low: float, high: float) -> Tensor:
    """(3, height, width) float32 in 0..255: `low` becomes black, `high` white, what lies beyond is that, too.

    Args:
        values: (height, width), or (height, width, 3 or 4); the fourth is transparency, and is put on white.
    """
    if values.ndim == 3 and values.shape[2] == 4:
        opaque = values[:, :, 3:] / FULL_RANGE[1]
        shades = np.clip((values[:, :, :3] - low) / (high - low), 0, 1) * opaque + (1 - opaque)
    else:
        shades = np.clip((values - low) / (high - low), 0, 1)
    pixels = torch.from_numpy(shades.astype(np.float32) * np.float32(255))
    return pixels.permute(2, 0, 1).contiguous() if pixels.dim() == 3 else pixels.expand(3, -1, -1).contiguous()


# ---- What a data set holds ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """What some files of a data set hold.

    Attributes:
        looked_at: how many were opened.
        wide: how many of them are wide.
        several: those that hold several pictures, pages or frames, of which the first is taken.
        large: how many are larger than `SMALL_EDGE` in both directions.
        coloured: whether those that could hold colours do, not just one or two.
        used: the range that values of wide pictures lie in, () = none was measured.
        whole_numbers: whether the values are such.
    """

    looked_at: int
    wide: int
    several: list[str]
    large: int
    coloured: bool
    used: tuple[float, ...]
    whole_numbers: bool = True

    @property
    def is_full(self) -> bool:
        """Whether the type's whole range is used, so that 8 bits hold what there is."""
        if not self.used or not self.whole_numbers or self.used[0] < 0 or self.used[1] > FULL_RANGE[1]:
            return False
        return self.used[1] - self.used[0] >= FULL_SHARE * FULL_RANGE[1]


def _some(paths: Sequence[str], count: int) -> list[str]:
    """At most `count` of them, evenly spread."""
    return [paths[place] for place in spread(torch.arange(len(paths)), count).tolist()]


def survey(folder: Path, paths: Iterable[str], formats: Iterable[str], *, colours: bool = True) -> Survey:
    """Look into files, evenly spread over the data set; those that are broken are found elsewhere.

    Args:
        colours: decode some, to see whether they hold colours.
    """
    chosen, formats = _some(list(paths), LOOKED_AT), list(formats)
    wide, several, large, in_colour_mode = list[str](), list[str](), 0, list[str]()
    for path in chosen:
        with suppress(Exception), Image.open(folder / path, formats=formats) as image:
            large += min(image.size) > SMALL_EDGE
            if image.mode not in GREY_MODES:
                in_colour_mode.append(path)
            if is_wide(image):
                wide.append(path)
            # A photo that holds a second one (of its depth, of another eye) is one photo to everybody.
            if image.format in ("TIFF", "GIF", "PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
                several.append(path)
    parts, whole_numbers = list[Values](), True
    for path in _some(wide, MEASURED_FILES):
        with suppress(Exception):
            content = (folder / path).read_bytes()
            with Image.open(io.BytesIO(content), formats=formats) as image:
                whole_numbers &= image.mode != "F"
                values = values_of(image, content)
            values = values[..., :3].reshape(-1) if values.ndim == 3 else values.reshape(-1)
            parts.append(values[:: max(len(values) // MEASURED_VALUES, 1)])
    used: tuple[float, ...] = ()
    if parts:
        values = np.concatenate(parts)
        low, high = np.quantile(values.astype(np.float64), [LOW_QUANTILE, HIGH_QUANTILE]).tolist()
        if low == high:  # a few bright spots on black are all that there is
            low, high = float(values.min()), float(values.max())
        used = (float(np.floor(low)), float(np.ceil(high))) if whole_numbers else (low, high)
    looked_into = _some(in_colour_mode, COLOUR_FILES if colours else 0)
    coloured = sum(_holds_colours(folder / path, formats) for path in looked_into)
    are_coloured = coloured > COLOURED_FILES * len(looked_into)
    return Survey(len(chosen), len(wide), several, large, are_coloured, used, whole_numbers)


def _holds_colours(path: Path, formats: list[str]) -> bool:
    """Whether a picture is more than shades of grey, which are often stored as colours."""
    with suppress(Exception), Image.open(path, formats=formats) as image:
        image.draft("RGB", (SMALL_EDGE, SMALL_EDGE))
        pixels = np.asarray(image.convert("RGB").resize((SMALL_EDGE, SMALL_EDGE)), dtype=np.int16)
        return bool((pixels.max(2) - pixels.min(2) > GREY_TOLERANCE).mean() > COLOUR_SHARE)
    return False
