"""Small pictures put together on one sheet, as pixels: samples with their labels, a confusion matrix."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finetune.base.events import Example

COLUMNS = 4
CELL_PIXELS, LABEL_PIXELS = 168, 44
# Of a matrix: longer names are cut, more classes have no names at all.
NAME_CHARACTERS, NAMED_CLASSES = 16, 40
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
WHITE, INK, WRONG, RIGHT = "white", "#1f2933", "#b42318", "#1a7f37"


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 2] + ".."


def example_sheet(examples: Sequence[Example]) -> np.ndarray:
    """(height, width, 3) uint8: pictures in rows, below each what it is and what it was taken for."""
    rows = -(-len(examples) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL_PIXELS, rows * (CELL_PIXELS + LABEL_PIXELS)), WHITE)
    draw, font = ImageDraw.Draw(sheet), _font(13)
    for number, example in enumerate(examples):
        left, top = number % COLUMNS * CELL_PIXELS, number // COLUMNS * (CELL_PIXELS + LABEL_PIXELS)
        if example.picture:
            picture = Image.open(io.BytesIO(example.picture))
            at = left + (CELL_PIXELS - picture.width) // 2, top + (CELL_PIXELS - picture.height) // 2
            sheet.paste(picture, at)
        share = f" {example.probabilities[0][1]:.0%}" if example.probabilities else ""
        draw.text((left + 6, top + CELL_PIXELS), f"is {_short(example.true, 22)}", INK, font)
        colour = RIGHT if example.is_right else WRONG
        draw.text((left + 6, top + CELL_PIXELS + 18), f"taken for {_short(example.predicted, 14)}{share}", colour, font)
    return np.asarray(sheet)


def confusion_sheet(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> np.ndarray:
    """(height, width, 3) uint8: a row a true class, a column a predicted one, the darker the larger its share."""
    counts = np.asarray(matrix, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    named = len(classes) <= NAMED_CLASSES
    cell = max(6, min(44, 880 // max(len(classes), 1)))
    names = [_short(name, NAME_CHARACTERS) for name in classes]
    font = _font(max(9, min(13, cell - 6)))
    margin = 24 + (max(int(font.getlength(name)) for name in names) if named else 0)
    size = margin + cell * len(classes) + 12
    sheet = Image.new("RGB", (size, size), WHITE)
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 2), "rows: true class, columns: predicted", "#5b6770", _font(11))
    for row, column in np.ndindex(counts.shape):
        share = shares[row, column]
        # From white to a dark blue; of mistakes to a dark red.
        dark = np.array((8, 69, 148) if row == column else (165, 15, 21))
        colour = tuple(int(part) for part in 255 - (255 - dark) * share**0.6)
        left, top = margin + column * cell, margin + row * cell
        draw.rectangle((left, top, left + cell - 2, top + cell - 2), colour, "#e4e7eb" if cell > 12 else None)
        if counts[row, column] and cell >= 22:
            middle = left + cell / 2 - 1, top + cell / 2 - 1
            draw.text(middle, f"{int(counts[row, column])}", WHITE if share > 0.4 else INK, font, anchor="mm")
    if named:
        for number, name in enumerate(names):
            centre = margin + number * cell + cell / 2
            draw.text((margin - 6, centre), name, INK, font, anchor="rm")
            _draw_upwards(sheet, name, font, int(centre), margin - 6)
    return np.asarray(sheet)


def _draw_upwards(sheet: Image.Image, text: str, font: Font, middle: int, bottom: int) -> None:
    """Text that reads from the bottom to the top, its end at `bottom`."""
    width, height = int(font.getlength(text)) + 2, 18
    strip = Image.new("RGB", (width, height), WHITE)
    ImageDraw.Draw(strip).text((0, height / 2), text, INK, font, anchor="lm")
    turned = strip.rotate(90, expand=True)
    sheet.paste(turned, (middle - height // 2, bottom - width))
