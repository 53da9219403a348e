"""Why a resumed run does not end as an unbroken one: what two more runs tell, and lines that may be it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.rehearse.compare import Comparison

# What draws numbers that no seed of the run decides, and what keeps a state that no checkpoint holds.
DRAWS = re.compile(
    r"SystemRandom|urandom|\bsecrets\b|\btime\.|datetime|uuid|default_rng\(\)|Random\(\)|\.seed\(\)|getpid"
)
VALUES = re.compile(r"rand|urandom|secrets|time\.|datetime|uuid|getpid|environ")
STATE = re.compile(r"Generator\(|default_rng\(|Random\(|\bglobal\s|\bnonlocal\s|self\.\w+\s*[-+*/]=|itertools\.count")
SHOWN_LINES = 3


@dataclass(frozen=True)
class Cause:
    """What is likely the reason.

    Attributes:
        kind: "recipe", "not repeatable", "not deterministic", "code", "state".
        text: for a person.
        lines: of the recipe's own files that may be it: "FILE:NUMBER: TEXT".
    """

    kind: str
    text: str
    lines: tuple[str, ...] = ()


def cause_of(
    kill_step: int, resumed: Comparison | None, repeated: Comparison, by_recipe: Comparison | None, *,
    is_free: bool, code: Sequence[Path],
) -> Cause:  # fmt: skip
    """What the runs say together.

    Args:
        kill_step: after which the run was killed.
        resumed: unbroken against killed and resumed; None: the resume failed.
        repeated: unbroken against unbroken.
        by_recipe: unbroken against killed and gone on with by the recipe's own command; None: that failed, or was not
            tried because of what `repeated` says.
        is_free: computed on a GPU without deterministic algorithms.
        code: the recipe's file and the modules that it imported from its own folder.
    """
    if repeated.recipe:
        text = f"the recipe gives other values each time it is called: {'; '.join(repeated.recipe)}"
        return Cause("recipe", text, _lines(code, VALUES))
    early = resumed is not None and resumed.figure is not None and resumed.figure[1] < kill_step
    if not repeated.is_same or early:
        text = (
            "two runs that nobody interrupted differ from each other as well"
            if not repeated.is_same
            else "they differ from before the kill on"
        )
        if is_free:
            return Cause("not deterministic", f"{text}: that is --no-deterministic on a GPU; leave it out")
        return Cause(
            "not repeatable",
            f"{text}: something draws numbers that the run's seed does not decide (the clock, os.urandom, "
            "SystemRandom, a generator without a seed)",
            _lines(code, DRAWS),
        )
    if by_recipe is not None and by_recipe.is_same:
        return Cause(
            "code",
            "the recipe's file does more than return a Recipe, and `finetune resume` runs no code of it: go on with "
            "the recipe's own command and --resume, which ends the same in every bit",
        )
    own_way = "" if resumed is not None else "the recipe's own command with --resume does not end the same either: "
    return Cause(
        "state",
        f"{own_way}two runs that nobody interrupted are the same, so it is a state that the checkpoint does not hold: "
        "it holds the network's and the optimizer's tensors and the global generators of random, numpy and torch; "
        "not attributes, counters or generators of the recipe's own",
        _lines(code, STATE),
    )


def _lines(code: Sequence[Path], pattern: re.Pattern[str]) -> tuple[str, ...]:
    """Lines of the recipe's files that match, to be looked at first."""
    found = [
        f"{path.name}:{number}: {text.strip()}"
        for path in code
        for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(text) and not text.lstrip().startswith("#")
    ]
    return tuple(found[:SHOWN_LINES])
