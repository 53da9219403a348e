"""Random changes of one training image. Who draws from which generator is `order.keyed_generator`'s business."""

import functools

from torch import Tensor
from torchvision.transforms import v2

PRESETS = ("none", "light", "glyphs")


@functools.cache
def _light(size: int) -> v2.Compose:
    return v2.Compose(
        [
            v2.RandomAffine(degrees=10, translate=(0.08, 0.08), scale=(0.9, 1.1), shear=8),
            v2.RandomResizedCrop(size, scale=(0.7, 1.0), ratio=(0.85, 1.18), antialias=True),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
        ]
    )


def augment_light(image: Tensor, size: int) -> Tensor:
    """A small rotation, shift, scale and shear, a random crop, a change of colour.

    No flip: a mirrored digit, letter or road sign is another one.

    Args:
        image: (3, height, width) uint8.
        size: edge of the result in pixels.

    Returns:
        (3, size, size) uint8.
    """
    return _light(size)(image)
