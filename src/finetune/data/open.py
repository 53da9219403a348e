"""The data that a recipe names, opened and split."""

from collections.abc import Sequence

from finetune.data.batch import Split
from finetune.data.images import open_images, split_source
from finetune.data.source import Reading, Source
from finetune.data.table import Columns
from finetune.data.texts import open_texts
from finetune.recipe import spec as recipes
from finetune.recipe.spec import Recipe, Texts


def open_source(spec: recipes.Data, kind: str, classes: Sequence[str] | None = None) -> Source:
    """The data that the recipe names, not split yet.

    Args:
        kind: of the task.
    """
    reading = Reading(spec.listing == "content", spec.quotes, spec.missing_labels, spec.group_by)
    if isinstance(spec, Texts):
        columns = Columns(spec.text_column, spec.label_column, spec.split_column, spec.separator, spec.group_column)
        return open_texts(spec.texts, kind, columns, classes, spec.allow_outside, reading)
    columns = Columns(spec.image_column, spec.label_column, spec.split_column, spec.separator, spec.group_column)
    return open_images(spec.images, spec.fonts, columns, classes, spec.allow_outside, reading)


def split_data(source: Source, recipe: Recipe) -> Split:
    """The recipe's split of a source."""
    spec = recipe.data
    return split_source(source, spec.validation_fraction, recipe.seed, spec.train_samples)
