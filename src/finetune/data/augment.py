"""Random changes of training images. Who draws from which generator is `order.keyed_generator`'s business."""

import functools
import math

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional


@functools.cache
def _light(size: int) -> v2.Compose:
    return v2.Compose(
        [
            v2.RandomAffine(degrees=10, translate=(0.08, 0.08), scale=(0.9, 1.1), shear=8),
            v2.RandomResizedCrop(size, scale=(0.7, 1.0), ratio=(0.85, 1.18), antialias=True),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
        ]
    )


@functools.cache
def _standard(size: int) -> v2.Compose:
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(num_ops=2, magnitude=9),
        ]
    )


def _shrink(image: Tensor, size: int) -> Tensor:
    """Bring a photo's shorter edge down to twice `size`: more pixels cost time and nobody sees them."""
    shorter = min(image.shape[-2:])
    if shorter <= 2 * size:
        return image
    edges = [math.ceil(edge * 2 * size / shorter) for edge in image.shape[-2:]]
    return functional.resize(image, edges, antialias=True)


def augment(image: Tensor, size: int, preset: str) -> Tensor:
    """One image, changed at random.

    "light": a small rotation, shift, scale and shear, a random crop, a change of colour; no flip, for a mirrored digit,
    letter or road sign is another one. "standard", for photos: a random crop, a horizontal flip, and RandAugment (Cubuk
    et al., "RandAugment: practical automated data augmentation with a reduced search space", NeurIPS 2020).

    Args:
        image: (3, height, width) uint8, or float32 in 0..255.
        size: edge of the result in pixels.

    Returns:
        (3, size, size), of the same kind.
    """
    transform = {"light": _light, "standard": _standard}[preset](size)
    small = _shrink(image, size)
    # To torchvision's transforms white is 1 where values are floats.
    changed: Tensor = transform(small / 255) * 255 if small.is_floating_point() else transform(small)
    return changed


def mix(images: Tensor, targets: Tensor, class_count: int, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Blend each image of a batch with another one, and their targets alike.

    mixup: Zhang et al., "mixup: beyond empirical risk minimization", ICLR 2018. cutmix: Yun et al., "CutMix:
    regularization strategy to train strong classifiers with localizable features", ICCV 2019. Where both are on, each
    batch gets one of them.

    Args:
        images: (batch, 3, height, width) float32.
        targets: (batch,) int64, or (batch, classes) of several labels.
        mixup, cutmix: alpha of the Beta distribution that the share is drawn from; 0 = off.

    Returns:
        The images, and targets (batch, classes) float32.
    """
    if targets.dim() == 1:
        targets = torch.nn.functional.one_hot(targets, class_count)
    targets = targets.float()
    kinds = [
        kind(alpha=alpha, num_classes=class_count) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha
    ]
    kind = kinds[int(torch.randint(len(kinds), ()))]
    return kind(images, targets)
