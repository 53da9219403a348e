"""What a data set is to the rest of the kit: classes, a class number for each sample, a way to read one."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.data.decode import read_image


@dataclass(frozen=True)
class ArraySource:
    """Images that lie in memory.

    Attributes:
        images: (samples, channels, height, width) uint8, one or three channels.
        targets: (samples,) int64 class numbers.
        classes: names, by class number.
        fingerprint: changes when the data does.
        groups: (samples,) int64 or None; samples of one group never stand on both sides of a split.
    """

    images: Tensor
    targets: Tensor
    classes: list[str]
    fingerprint: str
    groups: Tensor | None = None

    def read(self, index: int) -> Tensor:
        """One image: (3, height, width) uint8."""
        return self.images[index].expand(3, -1, -1)

    def name(self, index: int) -> str:
        return f"sample {index}"


@dataclass(frozen=True)
class FileSource:
    """Image files, decoded when asked for. Attributes as in `ArraySource`; `paths` are relative to `folder`."""

    folder: Path
    paths: list[str]
    targets: Tensor
    classes: list[str]
    fingerprint: str
    groups: Tensor | None = None

    def read(self, index: int) -> Tensor:
        """One image: (3, height, width) uint8.

        Raises:
            RunError: the file cannot be decoded.
        """
        return read_image(self.folder / self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index]


Source = ArraySource | FileSource


def class_counts(targets: Tensor, class_count: int) -> Tensor:
    """(classes,) int64: how many samples each class has."""
    return torch.bincount(targets, minlength=class_count)
