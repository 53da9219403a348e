"""The learning rate of each step."""

import math

from finetune.errors import UsageError
from finetune.recipe.spec import Recipe
from finetune.store.state import Progress
from finetune.store.steps import Steps, extension_at


def learning_rate(recipe: Recipe, progress: Progress, steps: Steps) -> float:
    """The rate of the next step. The schedule keeps its first horizon; an extension runs at its own constant rate."""
    step, extension = progress.step, extension_at(progress, progress.step)
    if extension is not None:
        if extension["lr"]:
            return extension["lr"]
        step = steps.horizon - 1  # no rate of its own: the recipe's final one
    schedule = recipe.schedule
    factor = schedule_factor(
        schedule.name,
        step,
        steps.horizon,
        steps.per_epoch,
        schedule.warmup_fraction,
        schedule.final_fraction,
        schedule.step_epochs,
        schedule.factor,
    )
    return recipe.optimizer.lr * factor * schedule.factor**progress.reductions


def warmth(recipe: Recipe, step: int, steps: Steps, since: int) -> float:
    """What the rate of what was thawed is multiplied with at a step: it rises over its own first steps, as many as the
    whole began with. Pure, as `schedule_factor`.

    Args:
        since: the epoch of the thaw.
    """
    warmup_steps = round(steps.horizon * recipe.schedule.warmup_fraction)
    return min((step - since * steps.per_epoch + 1) / max(warmup_steps, 1), 1.0)


def schedule_factor(
    name: str,
    step: int,
    total_steps: int,
    steps_per_epoch: int,
    warmup_fraction: float,
    final_fraction: float,
    step_epochs: int,
    factor: float,
) -> float:
    """What the peak learning rate is multiplied with at optimizer step `step` (0 = the first).

    Pure, so that a resume computes what the unbroken run did. Cosine decay is Loshchilov and Hutter's ("SGDR", ICLR
    2017), without restarts. "plateau" depends on the metrics as well; the loop multiplies its
    reductions on top.
    """
    warmup_steps = round(total_steps * warmup_fraction)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "cosine":
        done = (step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1)
        return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if name == "step":
        return factor ** (step // (step_epochs * steps_per_epoch))
    if name in ("constant", "plateau"):
        return 1.0
    raise UsageError(f"--schedule {name}: unknown; allowed are cosine, step, plateau, constant")
