"""The data that a recipe names, opened and split."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from finetune.data.batch import Split
from finetune.data.folder import check_no_parts
from finetune.data.images import open_images, split_source
from finetune.data.sample import sampled
from finetune.data.source import PARTS, Reading, Source
from finetune.data.table import Columns
from finetune.data.texts import open_texts
from finetune.data.walk import IMAGES, TEXTS
from finetune.errors import UsageError
from finetune.recipe import spec as recipes
from finetune.recipe.spec import Recipe, Texts


def open_source(spec: recipes.Data, kind: str, classes: Sequence[str] | None = None) -> Source:
    """The data that the recipe names, not split yet.

    Args:
        kind: of the task.
    """
    return sampled(_whole_source(spec, kind, classes), spec.samples)


def _whole_source(spec: recipes.Data, kind: str, classes: Sequence[str] | None) -> Source:
    reading = Reading(
        spec.listing == "content", spec.quotes, spec.missing_labels, spec.group_by, spec.encoding,
        is_strict=spec.tables == "strict", is_whole=spec.tables == "whole",
    )  # fmt: skip
    if isinstance(spec, Texts):
        columns = Columns(spec.text_column, spec.label_column, spec.split_column, spec.separator, spec.group_column)
        return open_texts(spec.texts, kind, columns, classes, spec.allow_outside, reading)
    columns = Columns(spec.image_column, spec.label_column, spec.split_column, spec.separator, spec.group_column)
    return open_images(spec.images, spec.fonts, columns, classes, spec.allow_outside, reading)


def split_data(source: Source, recipe: Recipe) -> Split:
    """The recipe's split of a source."""
    spec = recipe.data
    return split_source(source, spec.validation_fraction, recipe.seed, spec.train_samples)


def check_data_effects(source: Source, recipe: Recipe, chosen: Collection[str]) -> None:
    """Refuse what was chosen and changes nothing about this data, and parts that would be taken for classes.

    Args:
        chosen: see `recipe.effects.chosen`.

    Raises:
        UsageError: the first of them.
    """
    spec, noun, place = recipe.data, source.noun, Path(os.path.expanduser(recipe.data.place))
    if place.is_dir():
        check_no_parts(place, source.classes, IMAGES if spec.kind == "images" else TEXTS, spec.option)
    own = 0 if source.parts is None else int((source.parts == PARTS.index("validation")).sum())
    if own and "data.validation_fraction" in chosen:
        raise UsageError(
            f"--validation-fraction {spec.validation_fraction:g}: has no effect, {spec.place} brings {own:,} {noun}s "
            "along to validate with; leave it out"
        )
