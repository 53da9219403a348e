"""Optimizers and learning-rate schedules, with everything keyed by parameter name."""

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from finetune.base.plain import Fields
from finetune.errors import UsageError, one_line
from finetune.recipe.spec import Optimizer as Spec

# What a class of torch.optim says of parameters or values that it cannot work with.
REFUSALS = (ValueError, RuntimeError, TypeError, AttributeError, AssertionError)
# A trial step needs the kind of a parameter, not its size.
TRIAL_EDGE = 2
FUSED_ON = ("cpu", "cuda")


class _MakesOptimizer(Protocol):
    """A class of torch.optim, called: each takes arguments of its own."""

    def __call__(self, groups: list[dict[str, object]], **arguments: object) -> torch.optim.Optimizer: ...


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The class of torch.optim with that name, in any case.

    Raises:
        UsageError: there is none, or it needs a closure (LBFGS); names the nearest.
    """
    classes = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and key not in ("Optimizer", "LBFGS")
    }
    if name.lower() not in classes:
        nearest = difflib.get_close_matches(name.lower(), classes, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UsageError(f"--optimizer {name}: unknown; allowed are {', '.join(sorted(classes))}{hint}")
    return classes[name.lower()]


class Pace(NamedTuple):
    """How fast a parameter learns, beside the schedule.

    Attributes:
        factor: what the rate is multiplied with.
        since: the epoch in which it was thawed; 0 = it trains from the beginning.
        block: of the backbone that it belongs to; "" = none, as the head.
    """

    factor: float = 1.0
    since: int = 0
    block: str = ""


def build_optimizer(
    parameters: dict[str, nn.Parameter],
    name: str,
    lr: float,
    weight_decay: float,
    momentum: float,
    paces: Mapping[str, Pace] = MappingProxyType({}),
) -> torch.optim.Optimizer:
    """An optimizer over named parameters. Those of one pace are in two groups: matrices, which decay, and vectors,
    which do not.

    Args:
        parameters: the trainable ones, by name.
        name: of a class in torch.optim, in any case. It gets those of the other arguments that it takes.
        paces: by name; of one that is missing the usual one.

    Raises:
        UsageError: see `find_optimizer`.
    """
    kind = find_optimizer(name)
    takes = inspect.signature(kind).parameters
    offered = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
    arguments: dict[str, object] = {key: value for key, value in offered.items() if key in takes}
    if "fused" in takes and all(value.device.type in FUSED_ON for value in parameters.values()):
        arguments["fused"] = True  # one kernel in place of ten
    members: dict[tuple[Pace, bool], list[str]] = {}
    for key, value in parameters.items():
        members.setdefault((paces.get(key, Pace()), value.ndim < 2), []).append(key)
    groups: list[dict[str, object]] = []
    # What learns fastest stands first: its rate is the one that is shown.
    for (pace, is_flat), names in sorted(members.items(), key=lambda one: (-one[0][0].factor, one[0])):
        group: dict[str, object] = {"params": [parameters[key] for key in names], "names": names, "pace": pace}
        groups.append(group | ({"weight_decay": 0.0 if is_flat else weight_decay} if "weight_decay" in takes else {}))
    return cast(_MakesOptimizer, kind)(groups, **arguments)


def check_optimizer(parameters: dict[str, nn.Parameter], spec: Spec, chosen: Collection[str] = ()) -> None:
    """Try the optimizer on small parameters of the same kinds as those that will train: a step with a zero gradient.

    Args:
        parameters: all that ever train, by name.
        chosen: see `recipe.effects.chosen`.

    Raises:
        UsageError: it cannot train them, or takes nothing of what somebody chose for it.
    """
    takes = inspect.signature(find_optimizer(spec.name)).parameters
    for name in ("weight_decay", "momentum"):
        if name not in takes and f"optimizer.{name}" in chosen:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(spec, name):g}: has no effect, --optimizer {spec.name} takes "
                "none; leave it out, or give another optimizer"
            )
    matrices = {name: value for name, value in parameters.items() if value.ndim == 2}
    reason = _refusal(parameters, spec)
    if not reason:
        return
    if matrices and not _refusal(matrices, spec):
        others = [name for name in parameters if name not in matrices]
        reason = f"it trains matrices only, and {len(others)} of {len(parameters)} tensors are none, like {others[0]}"
    raise UsageError(
        f"--optimizer {spec.name}: cannot train this network: {reason}; give adamw, sgd or another class of torch.optim"
    )


def _refusal(parameters: dict[str, nn.Parameter], spec: Spec) -> str:
    """What the optimizer says when it is to train such parameters; "" = it trains them."""
    small = {
        name: nn.Parameter(torch.zeros([min(edge, TRIAL_EDGE) for edge in value.shape], dtype=value.dtype))
        for name, value in parameters.items()
    }
    for value in small.values():
        value.grad = torch.zeros_like(value)
    try:
        build_optimizer(small, spec.name, spec.lr, spec.weight_decay, spec.momentum).step()
    except REFUSALS as error:
        return one_line(error)
    return ""


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """As they are logged: lr; and where there is more than one group, that of each by what is in it."""
    groups = optimizer.param_groups
    rates = {"lr": groups[0]["lr"]}
    if len({group["pace"] for group in groups}) > 1:
        return rates | {f"lr/{_label(group['pace'])}": group["lr"] for group in groups}
    kinds = {f"lr/{'matrices' if group['params'][0].ndim >= 2 else 'vectors'}": group["lr"] for group in groups}
    return rates | (kinds if len(groups) > 1 else {})


def _label(pace: Pace) -> str:
    return pace.block or (f"thawed_{pace.since}" if pace.since else "head")


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Plain state by parameter name: {"state": {name: {...}}, "groups": [{"names", "lr", "weight_decay"}]}."""
    state, groups = {}, []
    for group in optimizer.param_groups:
        groups.append({key: group[key] for key in ("names", "lr", "weight_decay") if key in group})
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if parameter in optimizer.state:
                state[name] = {
                    key: value.detach().cpu().clone() if isinstance(value, Tensor) else value
                    for key, value in optimizer.state[parameter].items()
                }
    return {"state": state, "groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, object]) -> None:
    """Put back what `optimizer_state` gave. Parameters without saved state (just thawed) start afresh."""
    fields = Fields(saved, "the optimizer's state")
    current, states = optimizer.state_dict(), fields.mapping("state")
    names = [name for group in optimizer.param_groups for name in group["names"]]
    positions = [position for group in current["param_groups"] for position in group["params"]]
    current["state"] = {
        position: states[name] for position, name in zip(positions, names, strict=True) if name in states
    }
    # The rate of the last step: a run that takes no other one saves it again.
    rates = [Fields(group, "a group of the optimizer").number("lr") for group in fields.items("groups", dict)]
    if len(rates) == len(current["param_groups"]):
        for group, rate in zip(current["param_groups"], rates, strict=True):
            group["lr"] = rate
    optimizer.load_state_dict(current)


def set_learning_rates(optimizer: torch.optim.Optimizer, lr: float, warmth: Callable[[int], float]) -> None:
    """Give each group its rate.

    Args:
        lr: of what has the factor 1.
        warmth: epoch of a thaw -> the share of its rate that what was thawed then has by now.
    """
    for group in optimizer.param_groups:
        pace = group["pace"]
        group["lr"] = lr * pace.factor * (warmth(pace.since) if pace.since else 1.0)
