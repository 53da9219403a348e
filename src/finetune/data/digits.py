"""The handwritten digits that ship with the kit; see bundled/digits.md for where they come from."""

import hashlib
import io
from importlib import resources

import numpy as np
import torch

from finetune.data.source import ArraySource

CLASSES = [str(digit) for digit in range(10)]


def load_digits() -> ArraySource:
    """1,797 digits of 8 x 8 pixels, strokes bright (255) on black (0)."""
    content = resources.files("finetune").joinpath("bundled/digits.npz").read_bytes()
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        # Ink was counted in 0..16 a cell; 16 becomes 255.
        images = torch.from_numpy((arrays["images"].astype(np.uint16) * 255 // 16).astype(np.uint8))
        targets = torch.from_numpy(arrays["labels"].astype(np.int64))
    return ArraySource(images[:, None], targets, CLASSES, f"digits {hashlib.sha256(content).hexdigest()}")
