"""The freeze map: which parameters train, which modules are in train mode, and proof that the rest did not move.

An ordered list of (pattern over module paths, trainable or frozen); the first match wins; every module is covered.
Optimizer, clipping, weight decay and checkpoint all take their parameters from here.
"""

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.errors import UsageError
from finetune.models.heads import Standardised, has_auxiliary_heads


@dataclass(frozen=True)
class Rule:
    """One line of a freeze map.

    Attributes:
        pattern: a module path, or a shell pattern over paths ("features.2*"); what lies below a match is matched too.
        trainable: whether the matched modules train.
        from_epoch: a trainable rule applies from this epoch on (thaw); before it, its modules are frozen.
    """

    pattern: str
    trainable: bool = True
    from_epoch: int = 0


@dataclass(frozen=True)
class FreezeMap:
    """The rules, and whether BatchNorm layers that train also go on learning their statistics."""

    rules: tuple[Rule, ...]
    batchnorm: bool = False


def _matches(pattern: str, path: str) -> bool:
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:length]), pattern) for length in range(1, len(parts) + 1))


def phase_of(rules: Sequence[Rule], epoch: int) -> int:
    """How many thaws have happened by `epoch`: 0 before the first."""
    return len({rule.from_epoch for rule in rules if rule.trainable and 0 < rule.from_epoch <= epoch})


def check_rules(model: nn.Module, rules: Sequence[Rule]) -> None:
    """Every rule must match some module and every parameter's module some rule.

    Raises:
        UsageError: naming the rule and the nearest paths, or the first module that no rule covers.
    """
    paths = [path for path, _ in model.named_modules() if path]
    for rule in rules:
        if rule.pattern != "*" and not any(_matches(rule.pattern, path) for path in paths):
            nearest = difflib.get_close_matches(rule.pattern, paths, n=3, cutoff=0.0)
            raise UsageError(f"freeze rule {rule.pattern!r} matches no module; the nearest are {', '.join(nearest)}")
    for path, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and _first_match(rules, path) is None:
            raise UsageError(f"no freeze rule covers module {path!r}; end the list with ('*', frozen)")


def _first_match(rules: Sequence[Rule], path: str) -> Rule | None:
    return next((rule for rule in rules if rule.pattern == "*" or _matches(rule.pattern, path)), None)


def _is_trainable(rules: Sequence[Rule], path: str, epoch: int) -> bool:
    rule = _first_match(rules, path)
    return rule is not None and rule.trainable and epoch >= rule.from_epoch


def apply_freeze(model: nn.Module, rules: Sequence[Rule], epoch: int) -> list[str]:
    """Set `requires_grad` of every parameter as the rules say for `epoch`.

    Returns:
        Names of the parameters that train, in the model's order.

    Raises:
        UsageError: nothing trains.
    """
    trainable = []
    for path, module in model.named_modules():
        trains = _is_trainable(rules, path, epoch)
        for name, parameter in module.named_parameters(path, recurse=False):
            parameter.requires_grad_(trains)
            parameter.grad = None
            if trains:
                trainable.append(name)
    if not trainable:
        raise UsageError(f"nothing trains in epoch {epoch}: no freeze rule marks a module with parameters trainable")
    return trainable


def set_modes(model: nn.Module, rules: Sequence[Rule], batchnorm: bool, epoch: int) -> list[str]:
    """Put each module in train mode if its own path matches a trainable rule, else in eval mode.

    Called before each stretch of training: `model.train()` is never trusted.

    Returns:
        Paths of the modules held in eval mode.
    """
    held = []
    for path, module in model.named_modules():
        # The flag is set on the module alone; `module.train(mode)` would set it on everything below.
        module.training = _is_trainable(rules, path, epoch) and (batchnorm or not isinstance(module, _BatchNorm))
        if path and not module.training:
            held.append(path)
    # torchvision computes auxiliary heads only while the root is in train mode; its other modules have their own flag.
    if has_auxiliary_heads(model):
        auxiliary = (value for name, value in model.named_parameters() if name.lower().startswith("aux"))
        model.training |= any(value.requires_grad for value in auxiliary)
    return held


def learning_statistics(model: nn.Module) -> list[Tensor]:
    """The running statistics that a forward pass would move, as modes are set now."""
    return [
        buffer for module in model.modules() if isinstance(module, _BatchNorm) and module.training
        for buffer in module.buffers(recurse=False)
    ]  # fmt: skip


def frozen_tensors(model: nn.Module, rules: Sequence[Rule], epoch: int) -> dict[str, Tensor]:
    """Parameters and buffers of every module that is frozen in `epoch`: what a checkpoint need not hold."""
    tensors = {}
    for path, module in model.named_modules():
        if not _is_trainable(rules, path, epoch):
            tensors |= {name: value.detach() for name, value in module.named_parameters(path, recurse=False)}
            if not isinstance(module, Standardised):  # measured on the data, wherever it stands
                tensors |= dict(module.named_buffers(path, recurse=False))
    kept = model.state_dict()  # some buffers are computed from the config and never saved
    return {name: value for name, value in tensors.items() if name in kept}


def changeable_tensors(model: nn.Module, rules: Sequence[Rule], epoch: int) -> dict[str, Tensor]:
    """What a checkpoint must hold: everything trainable, and every buffer that can change."""
    frozen = frozen_tensors(model, rules, epoch)
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of the names."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        sha256.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        # A byte view that works for every type, bfloat16 included, and for tensors without dimensions.
        sha256.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Everything in eval mode; afterwards as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
