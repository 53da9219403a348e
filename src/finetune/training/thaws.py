"""What a run thaws, held against its network and its length before it begins; and in words."""

from collections.abc import Iterator

from finetune.errors import UsageError
from finetune.models.network import Network
from finetune.recipe.spec import AT_PLATEAU, FROZEN, HEAD, Recipe, Trainable
from finetune.store.state import Progress
from finetune.store.steps import Steps


def check_thaws(network: Network, recipe: Recipe, steps: Steps) -> None:
    """Refuse what is to train and never would.

    Raises:
        UsageError: a rule adds no tensor, or comes after the last epoch, or the run ends before a plateau.
    """
    stop, plateau = recipe.stop.patience, recipe.schedule.patience
    if 0 < stop < plateau and any(state == AT_PLATEAU for _, state, _ in recipe.trainable.rules):
        raise UsageError(
            f"--patience {stop}: ends the run before a plateau, which is {plateau} validations without a new best; "
            f"give {plateau} or more, or 0"
        )
    for rule, names in _added(network, recipe.trainable):
        pattern, state, number = rule
        if not names:
            blocks = ", ".join(block.name for block in network.blocks)
            raise UsageError(
                f"{pattern} ({when_text(state, number)}) adds no tensor to what trains: {_why(network, pattern)}; the "
                f"blocks of {recipe.model.backbone}, from its end, are {blocks}"
            )
        if state != AT_PLATEAU and number >= steps.epochs:
            raise UsageError(
                f"{pattern} is thawed after {number} epoch(s), and the run ends after {steps.epochs}: it never would; "
                f"give --epochs {number + 1} or more, or thaw earlier (a resume with --epochs {number + 1} would come "
                "to it, at the schedule's final rate)"
            )


def _added(network: Network, trainable: Trainable) -> Iterator[tuple[tuple[str, str, int], set[str]]]:
    """Each rule by which more than the head trains, and the names of the parameters that it adds."""
    before = set[str]()
    for count, rule in enumerate(trainable.rules, start=1):
        names = set(network.freeze_map(Trainable((*trainable.rules[:count], ("*", FROZEN, 0)))).ever_trains())
        if rule[1] != FROZEN and rule[0] != HEAD:
            yield rule, names - before
        before = names


def _why(network: Network, pattern: str) -> str:
    module = dict(network.module.named_modules()).get(pattern)
    if module is not None and not any(True for _ in module.parameters()):
        return f"it is of the kind {type(module).__name__}, without parameters"
    return "all of it is in rules before"


def when_text(state: str, number: int) -> str:
    """When a rule begins to hold, in words."""
    if state == AT_PLATEAU:
        return "at a plateau" if number == 1 else f"at plateau {number}"
    return f"after {number} epoch(s)" if number else "from the beginning"


def waiting_text(recipe: Recipe, progress: Progress) -> str:
    """What was to be thawed at a plateau, and no plateau came; "" = nothing."""
    waiting = [
        pattern
        for pattern, state, number in recipe.trainable.rules
        if number > len(progress.plateaus) and state == AT_PLATEAU
    ]
    if not waiting:
        return ""
    return (
        f"{', '.join(waiting)} waited for a plateau of {recipe.schedule.patience} validations, which did not come; "
        "EPOCHS:PATTERN in the place of plateau:PATTERN does not wait"
    )


def thaws_text(trainable: Trainable) -> str:
    """What is thawed, and when; "" = nothing is."""
    later = [rule for rule in trainable.rules if rule[1] != FROZEN and rule[2]]
    return ", ".join(f"{pattern} {when_text(state, number)}" for pattern, state, number in later)
