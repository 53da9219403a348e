"""The data set that a recipe names: opened, split, on its way to batches."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.data.batch import Split
from finetune.data.decode import formats_of
from finetune.data.images import ImagePipeline, decoded_for, names_to_indices, without
from finetune.data.open import open_source, split_data
from finetune.data.order import epoch_order, side_by_side
from finetune.data.preprocess import Preprocessing
from finetune.data.source import FileSource, Source, TextSource, class_counts
from finetune.data.texts import TextPipeline
from finetune.data.tokens import Tokenization
from finetune.data.wide import SMALL_EDGE, Survey, survey
from finetune.errors import UsageError
from finetune.models import text_encoders
from finetune.models.backbones import Backbone
from finetune.recipe import spec as recipes
from finetune.recipe.data_spec import pixel_limits
from finetune.recipe.spec import Recipe
from finetune.store.state import DataFacts
from finetune.tasks.levels import levels_of
from finetune.tasks.losses import all_same, scale_of, standardised


@dataclass(frozen=True)
class Data:
    """The opened data set, split, and its pipeline.

    Attributes:
        whole: the split before broken images were left out.
        skipped: names of samples that were left out, as broken or as copies.
        scale: mean and deviation of the training targets, where those are numbers to predict: they are standardised.
        taught_by: hash of the teacher that the targets are of.
        taught_halvings: of the batch in which it ran.
        levels: see `DataFacts`.
    """

    source: Source
    split: Split
    whole: Split
    pipeline: ImagePipeline | TextPipeline
    skipped: tuple[str, ...] = ()
    scale: tuple[float, ...] = ()
    taught_by: str = ""
    taught_halvings: int = 0
    levels: tuple[float, ...] = ()

    @property
    def class_count(self) -> int:
        return len(self.source.classes)

    @property
    def output_count(self) -> int:
        """Numbers that the network gives for a sample: one a class; one to predict; or the width of an embedding."""
        return self.class_count or (1 if self.source.targets.dim() == 1 else self.source.targets.shape[1])

    def epoch_samples(self, seed: int, epoch: int, batch_size: int, train_samples: Tensor) -> Tensor:
        """`train_samples` in the order of an epoch; texts of about equal length side by side."""
        samples = train_samples[epoch_order(seed, epoch, len(train_samples))]
        if isinstance(self.pipeline, TextPipeline):
            return side_by_side(samples, self.pipeline.lengths, batch_size)
        return samples

    def facts(self) -> DataFacts:
        """What a run was trained on, as a checkpoint holds it; a resume must find the same."""
        return DataFacts(
            fingerprint=self.source.fingerprint,
            classes=list(self.source.classes),
            outputs=self.output_count,
            scale=list(self.scale),
            taught_by=self.taught_by,
            train_samples=len(self.split.train),
            validation_samples=len(self.split.validation),
            skipped=list(self.skipped),
            taught_halvings=self.taught_halvings,
            levels=list(self.levels),
        )

    def with_targets(self, targets: Tensor) -> "Data":
        """The same with other targets."""
        return self.with_source(dataclasses.replace(self.source, targets=targets))

    def with_source(self, source: Source) -> "Data":
        """The same samples, from a source that says something else of them."""
        pipeline: ImagePipeline | TextPipeline
        if isinstance(self.pipeline, TextPipeline):
            assert isinstance(source, TextSource)
            pipeline = dataclasses.replace(self.pipeline, source=source)
        else:
            assert not isinstance(source, TextSource)
            pipeline = dataclasses.replace(self.pipeline, source=source)
        return dataclasses.replace(self, source=source, pipeline=pipeline)

    def leave_out(self, names: Sequence[str]) -> "Data":
        """The same without some samples.

        Raises:
            UsageError: nothing is left to train on, or to validate with.
        """
        if not names:
            return self
        dropped = names_to_indices(self.source, names)
        split = Split(*(without(part, dropped) for part in self.split))
        data = dataclasses.replace(self, split=split, skipped=tuple(sorted({*self.skipped, *names})))
        data.check()
        return data

    def check(self) -> None:
        """Every class must have something to train on, and something must validate."""
        targets = self.source.targets[self.split.train]
        for name, count in zip(self.source.classes, class_counts(targets, self.class_count).tolist(), strict=True):
            if not count:
                raise UsageError(
                    f"class {name!r} has no {self.source.noun} to train on; add some, remove it, or raise "
                    "--train-samples"
                )
        if not len(self.split.validation):
            noun = self.source.noun
            why = (
                f"no class has two {noun}s" if self.source.classes else f"there are {len(self.source.targets)} {noun}s"
            )
            raise UsageError(f"{why}, so nothing is left to validate with; add {noun}s")


def without_r2(data: Data, recipe: Recipe) -> str:
    """Why a validation of numbers gives no R2; "" = it gives one, or there are no numbers, or the run goes by an older
    way, which gave some number all the same."""
    numbers = data.source.targets[data.split.validation]
    if not isinstance(recipe.task, recipes.Regression) or recipe.task.moments == recipes.PLAIN or not all_same(numbers):
        return ""
    mean, deviation = data.scale
    return f"the {len(numbers):,} number(s) that validate are all {numbers[0].item() * deviation + mean:.6g}"


def check_numbers(data: Data, recipe: Recipe) -> None:
    """Refuse numbers that nothing can be learnt from, or that the metric which decides says nothing of.

    Raises:
        UsageError: those to train on are all the same; or those that validate, and R2 is to decide.
    """
    if not isinstance(recipe.task, recipes.Regression) or recipe.task.moments == recipes.PLAIN:
        return
    spec, count = recipe.data, len(data.split.train)
    if all_same(data.source.targets[data.split.train]):
        raise UsageError(
            f"{spec.option} {spec.place}: the {count:,} number(s) to train on are all {data.scale[0]:.12g}, so there "
            "is nothing to learn; give other data, or another --label-column"
        )
    if (why := without_r2(data, recipe)) and recipe.best_metric == "r2":
        raise UsageError(
            f"--stop-metric r2: {why}, so there is no variance to explain; give --stop-metric loss or mae, or a larger "
            "--validation-fraction"
        )


def make_pipeline(source: Source, spec: recipes.Data, backbone: Backbone, seed: int) -> ImagePipeline | TextPipeline:
    preprocessing = backbone.preprocessing
    if isinstance(preprocessing, Tokenization):
        assert isinstance(source, TextSource)
        return TextPipeline(source, preprocessing.tokenize(source.texts))
    source = decoded_for(source, preprocessing)
    assert not isinstance(source, TextSource)
    return ImagePipeline(source, preprocessing, spec.augment, spec.mixup, spec.cutmix, seed)


def open_data(recipe: Recipe, backbone: Backbone, skipped: Sequence[str] = ()) -> Data:
    """Open and split what the recipe names. Image files are listed, not read; texts are read and tokenized.

    Args:
        skipped: names of samples to leave out.

    Raises:
        UsageError: no such data, too little of it, or of another kind than the task.
    """
    spec, kind = recipe.data, recipe.task.kind
    source = open_source(spec, kind)
    if kind == "distillation":  # until the teacher has run, only their width is known
        width = text_encoders.width_of(backbone.options)
        source = dataclasses.replace(source, targets=torch.zeros(()).expand(len(source.targets), width))
    has_several = source.targets.dim() == 2 and not source.targets.is_floating_point()
    if has_several != (kind == "multi-label"):
        several = "several labels" if has_several else "one label"
        instead = "give --separator, or --label-column A,B" if has_several else "leave --separator out"
        raise UsageError(f"{spec.option} {spec.place}: has {several} a sample, which is no {kind} task; {instead}")
    if spec.augment == "glyphs" and spec.place != "glyphs":
        raise UsageError("--augment glyphs: is for --images glyphs only; give none, light or standard")
    pipeline, whole = make_pipeline(source, spec, backbone, recipe.seed), split_data(source, recipe)
    data = Data(pipeline.source, whole, whole, pipeline)
    data = data.leave_out(skipped)
    data.check()
    if isinstance(recipe.task, recipes.Regression):
        scale = tuple(scale_of(source.targets[whole.train], recipe.task.moments))
        levels = tuple(levels_of(source.targets[whole.train]))
        data = data.with_targets(standardised(source.targets, scale))
        data = dataclasses.replace(data, scale=scale, levels=levels)
    return data


def _unlike_characters(found: Survey) -> str:
    """What sets images apart from pictures of characters; "" = nothing."""
    are_large = found.large > found.looked_at / 2
    return " and ".join(["in colour"] * found.coloured + [f"larger than {SMALL_EDGE} px"] * are_large)


def survey_pixels(
    data: Data, backbone: Backbone, pixel_range: str, *, for_photos: str = "", prepared_by: str = ""
) -> tuple[Data, Backbone]:
    """Look into some image files to train on: which values pictures of more than 8 bits use, how many hold several, and
    whether the backbone was made for such.

    Args:
        pixel_range: as a recipe has it.
        for_photos: what to type for photographs, where the backbone learnt nothing but printed characters.
        prepared_by: the run whose way of preparing images holds; "" = none's.

    Returns:
        The data and the backbone that prepare such pictures by what was found, or given.

    Raises:
        UsageError: a range is given, and there is no picture that it applies to.
    """
    source, preprocessing = data.source, backbone.preprocessing
    limits: tuple[float, ...] = pixel_limits(pixel_range)
    if prepared_by and pixel_range != "auto":
        raise UsageError(f"--pixel-range {pixel_range}: images are prepared as in {prepared_by}; leave it out")
    if not isinstance(source, FileSource) or not isinstance(preprocessing, Preprocessing):
        if pixel_range != "auto":
            raise UsageError(f"--pixel-range {pixel_range}: is for image files only; leave it out")
        return data, backbone
    paths = [source.paths[index] for index in data.split.train.tolist()]
    found = survey(source.folder, paths, formats_of(""), colours=bool(for_photos))
    if pixel_range != "auto" and not found.wide:
        raise UsageError(
            f"--pixel-range {pixel_range}: none of the {found.looked_at:,} images looked at has more than 8 bits a "
            "value; leave it out"
        )
    if prepared_by:
        limits = tuple(preprocessing.pixel_range)
    elif pixel_range == "auto" and found.used and not found.is_full and found.used[0] < found.used[1]:
        limits = found.used
    notes, said = list[str](), f"{found.wide:,} of {found.looked_at:,} images looked at have more than 8 bits a value"
    if found.used:
        said += f", of which {found.used[0]:,g} to {found.used[1]:,g} are used"
    if found.wide:
        how = f"{limits[0]:,g} becomes black and {limits[1]:,g} white" if limits else "8 bits are kept of them"
        decides = f"as in {prepared_by}" if prepared_by else "--pixel-range LOW,HIGH or full decides otherwise"
        notes.append(f"{said}: {how} ({decides})")
    if found.several:
        notes.append(
            f"{len(found.several):,} of {found.looked_at:,} images looked at hold several pictures, like "
            f"{found.several[0]}: the first of each is taken"
        )
    if for_photos and (looks := _unlike_characters(found)):
        notes.append(
            f"{backbone.name} learnt from printed characters of 32 px, and these pictures are {looks}; for photographs "
            f"type: {for_photos}"
        )
    prepared = dataclasses.replace(preprocessing, pixel_range=list(limits))
    source = dataclasses.replace(source, decoding=prepared.decoding, notes=(*source.notes, *notes))
    assert isinstance(data.pipeline, ImagePipeline)
    pipeline = dataclasses.replace(data.pipeline, preprocessing=prepared)
    looked_at = dataclasses.replace(data, pipeline=pipeline).with_source(source)
    return looked_at, dataclasses.replace(backbone, preprocessing=prepared)
