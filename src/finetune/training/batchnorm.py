"""BatchNorm that learns does so from what is computed at once: what cannot be is refused, what it changes is said."""

from finetune.errors import UsageError
from finetune.training.setup import Setup
from finetune.training.step import count_parts


def check_parts(setup: Setup) -> None:
    """Refuse batches, and parts of them, of one sample.

    Raises:
        UsageError: names the option.
    """
    recipe, samples, noun = setup.recipe, len(setup.data.split.train), setup.data.source.noun
    if not (recipe.folds and setup.freeze.learns_statistics):
        return
    why = "BatchNorm learns here, and of one sample there are no statistics"
    accumulate, most = recipe.optimizer.accumulate, min(recipe.batch_size, samples) // 2
    if recipe.batch_size < 2:
        raise UsageError(
            f"--batch-size {recipe.batch_size}: {why}; give 2 or more, or take batchnorm=True out of the recipe"
        )
    if samples < 2:
        raise UsageError(f"{recipe.data.option} {recipe.data.place}: {samples} {noun} trains; {why}; add {noun}s")
    if accumulate > most:
        raise UsageError(f"--accumulate {accumulate}: {why}; give {most} at most, so that each part has two {noun}s")


def lines_on_parts(setup: Setup) -> list[str]:
    """What a person should know of the batches before the first step."""
    recipe, samples, noun = setup.recipe, len(setup.data.split.train), setup.data.source.noun
    if not setup.freeze.learns_statistics:
        return []
    size, accumulate, lines = min(recipe.batch_size, samples), recipe.optimizer.accumulate, []
    last = samples % size or size
    if recipe.folds and last == 1:
        last = size + 1
        lines.append(
            f"batches: the {noun} that is left over in each epoch of {samples:,} joins the batch before it, {last} "
            f"{noun}s, as BatchNorm learns, which it cannot from one; another --batch-size leaves none over"
        )
    if accumulate > 1:
        parts = count_parts(last, accumulate, recipe.folds)
        fewer = f" (the last batch of an epoch, {last} {noun}s, in {parts})" if parts < accumulate else ""
        lines.append(
            f"--accumulate {accumulate}{fewer}: BatchNorm learns from each part by itself, {size // accumulate} of "
            f"{size} {noun}s, so the step is not that of the whole batch; without --accumulate it is"
        )
    return lines
