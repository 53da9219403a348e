"""How many steps a run takes, where its extensions begin, and how one that has ended goes on."""

from typing import NamedTuple

from finetune.data.order import count_batches
from finetune.recipe.spec import Recipe
from finetune.store.state import Extension, Progress


class Steps(NamedTuple):
    """Counts of optimizer steps: of an epoch, until the schedule's end, until the run's end."""

    per_epoch: int
    horizon: int
    end: int

    @property
    def epochs(self) -> int:
        """Until the run's end; the last one may be cut short."""
        return -(-self.end // self.per_epoch)


def count_steps(recipe: Recipe, train_samples: int, progress: Progress) -> Steps:
    """Of a recipe, as far as it was extended."""
    steps_per_epoch = count_batches(train_samples, recipe.batch_size, recipe.folds)
    horizon = max(recipe.epochs, -(-recipe.least_steps // steps_per_epoch)) * steps_per_epoch
    if recipe.max_steps:
        horizon = min(horizon, recipe.max_steps) if horizon else recipe.max_steps
    end = progress.extensions[-1]["epochs"] * steps_per_epoch if progress.extensions else horizon
    return Steps(steps_per_epoch, horizon, end)


def extension_at(progress: Progress, step: int) -> Extension | None:
    """The extension whose rate holds for the step after `step` others: the last that has begun; None = the recipe's
    schedule holds."""
    begun = [extension for extension in progress.extensions if extension["from_step"] <= step]
    if begun and not begun[-1].get("own_rate", False):
        return begun[0]  # an older version recorded it, and computed it at the first one's rate
    return begun[-1] if begun else None


def way_on(recipe: Recipe, progress: Progress, train_samples: int) -> tuple[list[str], str]:
    """What to give `finetune resume` so that a run that has ended trains longer, and what comes of it, for people."""
    steps = count_steps(recipe, train_samples, progress)
    if is_cut_short(progress, steps):
        epochs, meaning = steps.epochs, f"go on to the end of its {steps.epochs} epochs, the patience begun anew"
    else:
        epochs, meaning = 2 * max(steps.end // steps.per_epoch, 1), "train longer"
    words = ["--epochs", str(epochs)]
    if epochs * steps.per_epoch > steps.end and ends_at_zero(recipe):
        words += ["--lr", f"{recipe.optimizer.lr / 10:g}"]
    return words, meaning


def is_cut_short(progress: Progress, steps: Steps) -> bool:
    """Whether a run stopped early, with steps of its own left."""
    return progress.status == "stopped early" and progress.step < steps.end


def ends_at_zero(recipe: Recipe) -> bool:
    """Whether an extension needs a rate of its own, as the schedule leaves none."""
    return recipe.schedule.name == "cosine" and not recipe.schedule.final_fraction
