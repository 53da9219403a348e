"""What a person should hear of the labels before a training, and of the training before it is over: a line each, with
the option that helps. No number depends on it."""

import math

from finetune.base.formatting import number_text
from finetune.base.intervals import FEW, wilson
from finetune.data.source import class_counts
from finetune.recipe.spec import Images, Recipe
from finetune.training.dataset import Data

# The largest class has so many times the samples of the smallest.
UNEVEN = 5
# A class that validates with fewer has a figure that one sample moves by more than a tenth.
FEW_OF_A_CLASS = 10
# Of the lowest so far, and how much that is at least: less is noise.
RISEN_LOSS, DIVERGED_LOSS, LEAST_RISE = 1.05, 1.5, 0.01
# Validations in a row above the lowest loss.
RISES = 3


def counts_text(data: Data) -> str:
    """How many samples a class has to train on, as in "12 to 68 a class"."""
    counts = class_counts(data.source.targets[data.split.train], data.class_count)
    least, most = int(counts.min()), int(counts.max())
    return f"{least:,} a class" if least == most else f"{least:,} to {most:,} a class"


def of_labels(data: Data, recipe: Recipe) -> list[str]:
    """What to say of classes and of what validates."""
    noun, validation = data.source.noun, len(data.split.validation)
    # A part that the data brings along stays as it is.
    more = f"add {noun}s" if data.source.parts is not None else f"add {noun}s, or raise --validation-fraction"
    few = [_few_text(validation, noun, bool(data.class_count), more)] if validation < FEW else []
    if not data.class_count:
        return few
    names = data.source.classes
    train, judged = (class_counts(data.source.targets[part], data.class_count) for part in data.split[:2])
    lines = list[str]()
    if train.max() > UNEVEN * train.min() and getattr(recipe.task, "class_weights", "") == "none":
        large, small = int(train.argmax()), int(train.argmin())
        judges = "" if recipe.best_metric == "f1" else ", --stop-metric f1 judges by each the same"
        lines.append(
            f"{names[large]!r} has {int(train[large]):,} {noun}s to train on, {names[small]!r} {int(train[small]):,}: "
            f"--class-weights prior lets the head do without that{judges}"
        )
    if none := (judged == 0).nonzero().flatten().tolist():
        lines.append(
            f"{len(none):,} class(es) have no {noun} that validates, like {names[none[0]]!r} "
            f"({int(train[none[0]]):,} to train on): no figure says how well they are known; add {noun}s"
        )
    thin = ((judged > 0) & (judged < FEW_OF_A_CLASS)).nonzero().flatten().tolist()
    if thin and not few:
        first = min(thin, key=lambda number: int(judged[number]))
        lines.append(
            f"{len(thin):,} of {len(names):,} classes validate with fewer than {FEW_OF_A_CLASS} {noun}s, like "
            f"{names[first]!r} ({int(judged[first])}): figures of a class say little then; {more}"
        )
    return lines + few


def _few_text(count: int, noun: str, has_classes: bool, more: str) -> str:
    if not has_classes:
        return f"only {count} {noun}(s) validate: figures are rough; {more}"
    low, _ = wilson(count, count)
    return f"only {count} {noun}(s) validate: {count} of {count} right would still mean {low:.2f} to 1.00; {more}"


class CurveAdvice:
    """Follows the losses of one process, and says once what goes wrong with them."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._lowest, self._lowest_epoch, self._above = math.inf, 0, 0
        self._lowest_training, self._first_training, self._first_epoch = math.inf, math.inf, 0
        self._said = set[str]()

    def after(self, epoch: int, training_loss: float, validation_loss: float, lr: float) -> list[str]:
        """Lines to say after a validation.

        Args:
            training_loss: mean of the epoch so far.
            lr: learning rate of the moment.
        """
        falls = training_loss < self._lowest_training
        lines = list[str]()
        if _rose(training_loss, self._first_training, DIVERGED_LOSS):
            lines += self._once("diverges", self._diverges_text(epoch, training_loss, lr))
        if math.isinf(self._first_training):
            self._first_training, self._first_epoch = training_loss, epoch
        self._lowest_training = min(self._lowest_training, training_loss)
        if validation_loss < self._lowest:
            self._lowest, self._lowest_epoch, self._above = validation_loss, epoch, 0
            return lines
        self._above += 1
        if falls and self._above >= RISES and _rose(validation_loss, self._lowest, RISEN_LOSS):
            lines += self._once("overfits", self._overfits_text(epoch, validation_loss))
        return lines

    def _once(self, what: str, text: str) -> list[str]:
        if what in self._said:
            return []
        self._said.add(what)
        return [text]

    def _overfits_text(self, epoch: int, loss: float) -> str:
        recipe = self._recipe
        helps = [f"--epochs {self._lowest_epoch}"]
        if recipe.model.dropout < 0.5:
            helps.append(f"--dropout {0.2 if recipe.model.dropout < 0.2 else 0.5:g}")
        if isinstance(recipe.data, Images) and recipe.data.augment == "none":
            helps.append("--augment light --views 4")
        return (
            f"validation loss rises from epoch {self._lowest_epoch} on ({number_text(self._lowest)}; in epoch {epoch} "
            f"{number_text(loss)}), while the training loss falls: what is learnt by heart; {', '.join(helps)} or more "
            "labels help"
        )

    def _diverges_text(self, epoch: int, loss: float, lr: float) -> str:
        clips = "" if self._recipe.optimizer.clip_norm else ", or --clip-norm 1 from the beginning,"
        return (
            f"the training loss grows ({number_text(self._first_training)} in epoch {self._first_epoch}, "
            f"{number_text(loss)} in epoch {epoch}): the rate of {lr:g} is too high; a tenth of it{clips} helps"
        )


def _rose(loss: float, before: float, factor: float) -> bool:
    return loss > factor * before and loss > before + LEAST_RISE
