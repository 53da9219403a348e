"""What trains, and from when on: the words of `--train` and `--thaw` to rules of a freeze map. No import of torch."""

from finetune.errors import UsageError
from finetune.recipe.spec import ALL, AT_PLATEAU, FROZEN, HEAD, TRAINABLE, count_of_last

Rules = tuple[tuple[str, str, int], ...]
PLATEAU = "plateau"
WAYS = "give EPOCHS:PATTERN or plateau:PATTERN, with commas between, as in 3:layer4,6:layer3"


def rules_of(train: str, thaw: str, thaw_last: int, thaw_every: int) -> Rules:
    """The rules of a freeze map: the head, what else trains from the beginning, what is thawed in order, nothing else.

    Args:
        train: "head", "last", "last:N", "all", or patterns of module paths with commas between.
        thaw: "EPOCHS:PATTERN" or "plateau:PATTERN", with commas between: after so many epochs, or once the figure no
            longer improves.
        thaw_last, thaw_every: one block more after every so many epochs, so many in all.

    Raises:
        UsageError: they cannot be read.
    """
    begin = [] if train == HEAD else [_pattern(one, f"--train {train}") for one in train.split(",")]
    if ALL in begin and len(begin) > 1:
        raise UsageError(f"--train {train}: all is everything; leave the others out")
    at_epochs, at_plateaus = list[tuple[str, str, int]](), list[tuple[str, str, int]]()
    for entry in thaw.split(",") if thaw else []:
        when, colon, pattern = entry.strip().partition(":")
        is_number = when.isdecimal() and int(when) > 0
        if not colon or not (is_number or when == PLATEAU):
            raise UsageError(f"--thaw {thaw}: {entry.strip()!r} says not when, or not what; {WAYS}")
        pattern = _pattern(pattern, f"--thaw {thaw}")
        if is_number:
            at_epochs.append((pattern, TRAINABLE, int(when)))
        else:
            at_plateaus.append((pattern, AT_PLATEAU, len(at_plateaus) + 1))
    if thaw_last < 0 or thaw_every < 1:
        name, value = ("last", thaw_last) if thaw_last < 0 else ("every", thaw_every)
        raise UsageError(f"--thaw-{name} {value}: not allowed; give {0 if name == 'last' else 1} or more")
    at_epochs += [(f"last:{count}", TRAINABLE, count * thaw_every) for count in range(1, thaw_last + 1)]
    if ALL in begin and (at_epochs or at_plateaus):
        raise UsageError("--train all: leaves nothing to thaw; leave --thaw and --thaw-last out, or --train")
    # The first match wins, so what comes first stands first.
    at_epochs.sort(key=lambda rule: rule[2])
    return (
        (HEAD, TRAINABLE, 0),
        *((pattern, TRAINABLE, 0) for pattern in begin),
        *at_epochs,
        *at_plateaus,
        ("*", FROZEN, 0),
    )


def _pattern(text: str, option: str) -> str:
    """Raises: UsageError: it is empty, or counts no block."""
    pattern = text.strip()
    if not pattern or pattern == HEAD:
        raise UsageError(
            f"{option}: {pattern or 'nothing'!r} is no part of the backbone; give last, last:N, all or a module path"
        )
    if pattern.startswith("last:") and not count_of_last(pattern):
        raise UsageError(f"{option}: {pattern!r} is not allowed; give last, or last:N with N from 1 on")
    return pattern


def trains_backbone(rules: Rules) -> bool:
    """Whether more than the head ever trains."""
    return any(state != FROZEN and pattern != HEAD for pattern, state, _ in rules)
