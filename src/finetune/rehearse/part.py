"""The runs that a rehearsal is made of, as values: how a recipe is shortened, what each run does. Imports no torch."""

import dataclasses
import json
from dataclasses import dataclass

from finetune.recipe.spec import AT_PLATEAU, FROZEN, TRAINABLE, Recipe

# Before one of them on the command line.
OPTION = "--part"
# Few enough for a minute, enough for a kill in the middle with steps before and after it.
EPOCH_STEPS = 4
MOST_EPOCHS = 3


@dataclass(frozen=True)
class Part:
    """One of those runs.

    Attributes:
        run: its folder.
        samples: of each part of the data; 0 = all.
        train_samples: of those to train on, where samples are drawn; 0 = all.
        epochs: in all.
        save_step: save also at this step; 0 = at the end of each epoch only.
        wait_step: wait after this step, before anything of it is saved, to be killed; 0 = never.
        resume: go on with what is in the folder, by the recipe's own command.
    """

    run: str
    samples: int
    train_samples: int
    epochs: int
    save_step: int
    wait_step: int = 0
    resume: bool = False

    def to_text(self) -> str:
        """As a word of a command line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "Part":
        return cls(**json.loads(text))

    def shortened(self, recipe: Recipe) -> Recipe:
        """The recipe on a sample of its data, for few epochs: thaws come one after the other, the rate is reduced in
        each epoch where it is in some, nothing stops it early."""
        when = {thaw: min(number, self.epochs - 1) for number, thaw in enumerate(thaws_of(recipe), 1)}
        rules = tuple(
            (pattern, FROZEN if kind == FROZEN else TRAINABLE, when.get((kind == AT_PLATEAU, number), 0))
            for pattern, kind, number in recipe.trainable.rules
        )
        data = recipe.data
        if self.samples:
            data = dataclasses.replace(data, samples=self.samples, train_samples=self.train_samples)
        return dataclasses.replace(
            recipe,
            data=data,
            trainable=dataclasses.replace(recipe.trainable, rules=rules),
            schedule=dataclasses.replace(recipe.schedule, step_epochs=1),
            stop=dataclasses.replace(recipe.stop, patience=0),
            epochs=self.epochs,
            max_steps=0,
            least_steps=0,
            validate_every_steps=min(recipe.validate_every_steps, EPOCH_STEPS // 2),
        )


def thaws_of(recipe: Recipe) -> list[tuple[bool, int]]:
    """When something begins to train later on, in order: whether at a plateau, and the epoch, or which plateau."""
    return sorted({(kind == AT_PLATEAU, number) for _, kind, number in recipe.trainable.rules if number > 0})


def epochs_of(recipe: Recipe) -> int:
    """How many a rehearsal has: one before each thaw and one after; two where there is none."""
    return min(max(len(thaws_of(recipe)), 1) + 1, MOST_EPOCHS)
