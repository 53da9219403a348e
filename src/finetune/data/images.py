"""From `--images` to batches: which samples there are, how they are split, and what is done to each on its way."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.data.augment import augment_light
from finetune.data.decode import IMAGE_SUFFIXES, normalise, resize
from finetune.data.digits import load_digits
from finetune.data.order import key, keyed_generator, stratified_split
from finetune.data.source import FileSource, Source
from finetune.errors import UsageError


def open_images(images: str, fonts: str = "") -> Source:
    """The data set that `--images` names: `digits`, `glyphs`, or a folder with one sub-folder a class.

    Raises:
        UsageError: there is no such folder, or it holds fewer than two classes.
    """
    if images == "digits":
        return load_digits()
    if images == "glyphs":
        from finetune.data.glyphs import render_glyphs

        return render_glyphs(fonts)
    return open_folder(Path(images))


def open_folder(folder: Path) -> FileSource:
    """Image files, one sub-folder a class; classes in the order of their names."""
    if not folder.is_dir():
        raise UsageError(
            f"--images {folder}: no such folder; give 'digits', or a folder with one sub-folder of images a class"
        )
    classes, paths, targets = [], [], []
    listing = hashlib.sha256()
    for class_folder in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        files = sorted(
            (entry for entry in os.scandir(class_folder) if entry.name.lower().endswith(IMAGE_SUFFIXES)),
            key=lambda entry: entry.name,
        )
        if not files:
            raise UsageError(
                f"--images {folder}: class folder {class_folder.name!r} holds no images "
                f"({', '.join(IMAGE_SUFFIXES)}); fill or remove it"
            )
        for entry in files:
            paths.append(f"{class_folder.name}/{entry.name}")
            targets.append(len(classes))
            listing.update(f"{paths[-1]}\0{entry.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        classes.append(class_folder.name)
    if len(classes) < 2:
        raise UsageError(
            f"--images {folder}: {len(classes)} class folder(s) found, at least 2 are needed; "
            "put the images of each class into a sub-folder of its own"
        )
    return FileSource(folder, paths, torch.tensor(targets), classes, f"folder {listing.hexdigest()}")


def split_source(
    source: Source, validation_fraction: float, seed: int, train_samples: int = 0
) -> tuple[Tensor, Tensor]:
    """(train, validation) sample indices: stratified by class, or by whole groups where the source has groups."""
    if source.groups is None:
        return stratified_split(source.targets, validation_fraction, seed, train_samples)
    group_count = int(source.groups.max()) + 1
    order = torch.randperm(group_count, generator=torch.Generator().manual_seed(key("split", seed)))
    held_out = torch.zeros(group_count, dtype=torch.bool)
    held_out[order[: max(round(group_count * validation_fraction), 1)]] = True
    in_validation = held_out[source.groups]
    return (~in_validation).nonzero().squeeze(1), in_validation.nonzero().squeeze(1)


@dataclass(frozen=True)
class Request:
    """One batch to fetch. `augment_epoch` is the epoch whose random draws apply, or None for no augmentation."""

    indices: list[int]
    augment_epoch: int | None = None


@dataclass(frozen=True)
class ImagePipeline:
    """Reads, augments, resizes and normalises. Stateless, so that any process can fetch any batch in any order.

    Attributes:
        image_size: edge in pixels of what the backbone sees.
        augment: one of `augment.PRESETS`.
        mean, std: per channel, for values in 0..1.
        seed: with epoch and sample index, the key of every random draw.
    """

    source: Source
    image_size: int
    augment: str
    mean: list[float]
    std: list[float]
    seed: int

    def fetch(self, request: Request) -> tuple[Tensor, Tensor]:
        """A batch: images (batch, 3, image_size, image_size) float32 and targets (batch,) int64."""
        epoch, augment = request.augment_epoch, self.augment
        if epoch is None or augment == "none":
            images = torch.stack([resize(self.source.read(index), self.image_size) for index in request.indices])
        elif augment == "glyphs":
            from finetune.data.glyphs import distort

            images = torch.stack([self.source.read(index) for index in request.indices])
            images = distort(images, self.image_size, self.seed, epoch, request.indices)
        else:
            images = torch.stack([self._augmented(index, epoch) for index in request.indices])
        return normalise(images, self.mean, self.std), self.source.targets[torch.tensor(request.indices)]

    def _augmented(self, index: int, epoch: int) -> Tensor:
        image = self.source.read(index)
        with keyed_generator("augment", self.seed, epoch, index):
            return augment_light(image, self.image_size)
