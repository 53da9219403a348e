"""How much of a training is rehearsed: which share of its data, how many steps, and where it is killed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.open import check_data_effects, open_source, split_data
from finetune.data.order import count_batches
from finetune.recipe.effects import check_effects
from finetune.recipe.spec import Recipe
from finetune.rehearse.part import EPOCH_STEPS, Part, epochs_of, thaws_of
from finetune.store.state import Progress
from finetune.store.steps import count_steps

# Of each class: one to train on, one to validate with.
CLASS_SAMPLES = 2


@dataclass(frozen=True)
class Asked:
    """What is to be rehearsed.

    Attributes:
        words: the recipe and its options, as they were typed.
        machine_words: those options that a resume takes too.
        code: the recipe's files.
        place: where the training's own folder will lie; "" = below runs/.
        keep: checkpoints that it will keep.
        cache_limit: see `Machine`.
        is_free: it computes on a GPU without deterministic algorithms.
    """

    recipe: Recipe
    words: Sequence[str]
    machine_words: Sequence[str]
    code: Sequence[Path]
    place: str
    keep: int
    cache_limit: str
    is_free: bool


@dataclass(frozen=True)
class Counts:
    """Samples to train on and to validate with, and the steps of an epoch."""

    train: int
    validation: int
    steps: int


@dataclass(frozen=True)
class Extent:
    """A rehearsal, as it will be.

    Attributes:
        samples, train_samples: see `Part`.
        whole: of the training itself, `short`: of the rehearsal.
        whole_epochs: of the training itself.
        thaws: the last epoch begins with a thaw.
        noun: what a sample is called.
    """

    samples: int
    train_samples: int
    epochs: int
    whole: Counts
    short: Counts
    whole_epochs: int
    thaws: bool
    noun: str

    @property
    def steps(self) -> int:
        return self.epochs * self.short.steps

    @property
    def save_step(self) -> int:
        """The first step of the last epoch: it goes on from there. Of epochs of one step, the last but one."""
        return (self.epochs - 1) * self.short.steps + (1 if self.short.steps > 1 else 0)

    @property
    def kill_step(self) -> int:
        """One step later: it was computed, and is lost."""
        return self.save_step + 1

    def part(self, run: str, *, killed: bool = False, resume: bool = False) -> Part:
        """One of the runs."""
        wait_step = self.kill_step if killed else 0
        return Part(run, self.samples, self.train_samples, self.epochs, self.save_step, wait_step, resume)


def extent_of(recipe: Recipe, chosen: frozenset[str]) -> Extent:
    """Look at the recipe's data, and decide.

    Args:
        chosen: see `recipe.effects.chosen`.

    Raises:
        UsageError: the data cannot be used, or an option has no effect on it.
    """
    check_effects(recipe, chosen)
    source = open_source(recipe.data, recipe.task.kind)
    check_data_effects(source, recipe, chosen)
    split = split_data(source, recipe)
    whole = _counts(len(split.train), len(split.validation), recipe)
    share = 1.0 if source.parts is not None else 1 - recipe.data.validation_fraction
    wanted = max(math.ceil(EPOCH_STEPS * recipe.batch_size / share), CLASS_SAMPLES * len(source.classes))
    samples = wanted if wanted < len(source.targets) else 0
    epochs = epochs_of(recipe)
    short_recipe = Part("", samples, 0, epochs, 0).shortened(recipe)
    few = split_data(open_source(short_recipe.data, recipe.task.kind), short_recipe) if samples else split
    # The sample may hold more to train on than somebody asked for, or fewer.
    asked = recipe.data.train_samples
    train_samples = asked if samples and asked < len(few.train) else 0
    short = _counts(train_samples or len(few.train), len(few.validation), recipe)
    whole_epochs = count_steps(recipe, len(split.train), Progress()).epochs
    return Extent(samples, train_samples, epochs, whole, short, whole_epochs, bool(thaws_of(recipe)), source.noun)


def _counts(train: int, validation: int, recipe: Recipe) -> Counts:
    return Counts(train, validation, count_batches(train, recipe.batch_size, recipe.folds))
