"""From `--images` to batches: which samples there are, how they are split, and what is done to each on its way."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.base.table_names import KNOWN, is_table
from finetune.base.words import typed
from finetune.data.archives import how_to_unpack, is_archive
from finetune.data.augment import augment, mix
from finetune.data.batch import Batch, Request, Split
from finetune.data.decode import BrokenImage, is_image
from finetune.data.digits import load_digits
from finetune.data.folder import open_folder
from finetune.data.order import grouped_split, key, keyed_generator, stratified_split
from finetune.data.preprocess import Preprocessing
from finetune.data.source import ArraySource, FileSource, ImageSource, Reading, Source
from finetune.data.table import Columns, open_table
from finetune.errors import UsageError


def open_images(
    images: str,
    fonts: str = "",
    columns: Columns = Columns(),
    classes: Sequence[str] | None = None,
    allow_outside: bool = False,
    reading: Reading = Reading(),
) -> ImageSource:
    """The data set that `--images` names: `digits`, `glyphs`, a folder, or a csv, tsv or jsonl file.

    Args:
        classes: the only classes allowed, in order; None = those found.
        allow_outside: images may lie outside the folder, or that of the table.

    Raises:
        UsageError: there is no such data, or it holds fewer than two classes.
    """
    path = Path(os.path.expanduser(images))
    if is_table(path):
        return open_table(path, columns, classes, allow_outside, reading)
    if images == "digits" and columns == Columns():
        return load_digits()
    if images == "glyphs" and columns == Columns():
        from finetune.data.glyphs import render_glyphs

        return render_glyphs(fonts)
    if is_archive(path):
        raise UsageError(f"--images {images}: {how_to_unpack(path, '--images')}")
    if columns != Columns():
        raise UsageError(f"--images {images}: columns and --separator belong to a {KNOWN} file; leave them out")
    if path.is_file():
        raise UsageError(f"--images {images}: {_what_file(path)}")
    return open_folder(path, classes, allow_outside, reading)


def _what_file(path: Path) -> str:
    """Why a single file is no data set, and what to do."""
    if is_image(str(path.parent), path.name):
        predict = typed(["finetune", "predict", "RUN", str(path)])
        return f"is a single image; to train, give the folder with one sub-folder a class; to classify it: {predict}"
    return f"is a file, and no table ({KNOWN}); give one, or a folder with one sub-folder of images a class"


def decoded_for(source: Source, preprocessing: object) -> Source:
    """The source as the preprocessing of its run wants its pictures decoded."""
    if isinstance(source, FileSource) and isinstance(preprocessing, Preprocessing):
        return dataclasses.replace(source, decoding=preprocessing.decoding)
    return source


def split_source(source: Source, validation_fraction: float, seed: int, train_samples: int = 0) -> Split:
    """The data's own parts; else stratified by class, whole groups on one side where the source has groups.

    Without a validation part, some of the training part validates.
    """
    none = torch.zeros(0, dtype=torch.int64)
    if source.groups is not None and isinstance(source, ArraySource):  # fonts have all classes: any of them will do
        group_count = int(source.groups.max()) + 1
        order = torch.randperm(group_count, generator=torch.Generator().manual_seed(key("split", seed)))
        held_out = torch.zeros(group_count, dtype=torch.bool)
        held_out[order[: max(round(group_count * validation_fraction), 1)]] = True
        in_validation = held_out[source.groups]
        return Split((~in_validation).nonzero().squeeze(1), in_validation.nonzero().squeeze(1), none)
    everything = torch.arange(len(source.targets))
    train, validation, test = everything, none, none
    if source.parts is not None:
        train, validation, test = ((source.parts == part).nonzero().squeeze(1) for part in range(3))
    fraction = 0.0 if len(validation) else validation_fraction
    if fraction and source.groups is not None:
        kept, held = grouped_split(source.targets[train], source.groups[train], fraction, seed)
        train, validation, fraction = train[kept], train[held], 0.0
    # Of embeddings, which are one number expanded until the teacher has run, no copy is made.
    targets = source.targets if len(train) == len(source.targets) else source.targets[train]
    chosen, rest = stratified_split(targets, fraction, seed, train_samples)
    return Split(train[chosen], train[rest] if fraction else validation, test)


@dataclass(frozen=True)
class ImagePipeline:
    """Reads, augments, resizes and normalises. Stateless, so that any process can fetch any batch in any order.

    Attributes:
        preprocessing: what the backbone wants to see.
        augment: one of `recipe.AUGMENTATIONS`.
        mixup, cutmix: see `augment.mix`.
        seed: with epoch and sample index, the key of every random draw.
    """

    source: ImageSource
    preprocessing: Preprocessing
    augment: str
    mixup: float
    cutmix: float
    seed: int

    def fetch(self, request: Request) -> Batch:
        """Read a batch.

        Raises:
            BrokenImage: one of them, unless the request is tolerant.
        """
        images, indices, digests, broken = list[Tensor](), list[int](), list[int](), list[tuple[int, str]]()
        for index in request.indices:
            try:
                image, digest = self.source.read(index)
            except BrokenImage as error:
                if not request.tolerant:
                    raise
                broken.append((index, str(error)))
                continue
            images.append(image)
            indices.append(index)
            digests.append(digest)
        chosen = torch.tensor(indices, dtype=torch.int64)
        size, epoch = self.preprocessing.image_size, request.augment_epoch
        pixels = self._prepare(images, indices, epoch) if images else torch.zeros(0, 3, size, size, dtype=torch.uint8)
        normalised, targets = self.preprocessing.normalise(pixels), self.source.targets[chosen]
        if epoch is not None and (self.mixup or self.cutmix):
            # A batch is known by its first sample: no other batch of the epoch begins with it.
            with keyed_generator("mix", self.seed, epoch, indices[0]):
                normalised, targets = mix(normalised, targets, len(self.source.classes), self.mixup, self.cutmix)
        return Batch(normalised, targets, chosen, torch.tensor(digests, dtype=torch.int64), broken)

    def _prepare(self, images: list[Tensor], indices: list[int], epoch: int | None) -> Tensor:
        """(batch, 3, image_size, image_size), uint8 or float32 in 0..255."""
        if epoch is None or self.augment == "none":
            if all((image.shape, image.dtype) == (images[0].shape, images[0].dtype) for image in images):
                return self.preprocessing.resize(torch.stack(images))  # the same, at a tenth of the calls
            return _stacked([self.preprocessing.resize(image) for image in images])
        if self.augment == "glyphs":
            from finetune.data.glyphs import distort

            return distort(torch.stack(images), self.preprocessing.image_size, self.seed, epoch, indices)
        prepared = []
        for image, index in zip(images, indices, strict=True):
            with keyed_generator("augment", self.seed, epoch, index):
                prepared.append(augment(image, self.preprocessing.image_size, self.augment))
        return _stacked(prepared)


def _stacked(images: list[Tensor]) -> Tensor:
    """Images of 8 bits beside others become floats."""
    if any(image.is_floating_point() for image in images):
        images = [image.float() for image in images]
    return torch.stack(images)


def without(indices: Tensor, dropped: Sequence[int]) -> Tensor:
    """`indices` less those in `dropped`."""
    return indices[~torch.isin(indices, torch.tensor(list(dropped), dtype=torch.int64))]


def names_to_indices(source: Source, names: Sequence[str]) -> list[int]:
    """The samples of those names."""
    if not names:
        return []
    wanted = set(names)
    return [index for index in range(len(source.targets)) if source.name(index) in wanted]
