"""The freeze map: which parameters train, which modules are in train mode, and proof that the rest did not move.

An ordered list of (pattern over module paths, trainable or frozen); the first match wins; every module is covered.
Optimizer, clipping, weight decay and checkpoint all take their parameters from here.
"""

import difflib
import hashlib
import sys
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
        from_epoch: a trainable rule applies from this epoch on (thaw); before it, its modules are frozen. `NEVER` =
            from a plateau on that has not come yet.
    """

    pattern: str
    trainable: bool = True
    from_epoch: int = 0


# Later than any epoch.
NEVER = sys.maxsize


def _matches(pattern: str, path: str) -> bool:
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:length]), pattern) for length in range(1, len(parts) + 1))


class FreezeMap:
    """Which modules of a network train, and from which epoch on. Everything that asks, asks `at(epoch)`.

    Args:
        module: the network.
        rules: in order; the first match wins.
        batchnorm: whether BatchNorm layers that train also go on learning their statistics.
    """

    def __init__(self, module: nn.Module, rules: Sequence[Rule], batchnorm: bool = False):
        self.module, self.rules, self.batchnorm = module, tuple(rules), batchnorm

    def check(self) -> None:
        """Every rule must match some module and every parameter's module some rule.

        Raises:
            UsageError: naming the rule and the nearest paths, or the first module that no rule covers.
        """
        paths = [path for path, _ in self.module.named_modules() if path]
        for rule in self.rules:
            if rule.pattern != "*" and not any(_matches(rule.pattern, path) for path in paths):
                nearest = difflib.get_close_matches(rule.pattern, paths, n=3, cutoff=0.0)
                raise UsageError(
                    f"freeze rule {rule.pattern!r} matches no module; the nearest are {', '.join(nearest)}; besides "
                    "module paths there are head, last, last:N and all"
                )
        for path, module in self.module.named_modules():
            if any(True for _ in module.parameters(recurse=False)) and self._rule_of(path) is None:
                raise UsageError(f"no freeze rule covers module {path!r}; end the list with ('*', frozen)")

    def at(self, epoch: int) -> "Freeze":
        """What is frozen in an epoch, counted from 0."""
        return Freeze(self, epoch)

    @property
    def thaws(self) -> list[int]:
        """The epochs in which something begins to train, in order; `NEVER` is one where a plateau has not come yet."""
        return sorted({rule.from_epoch for rule in self.rules if rule.trainable and rule.from_epoch > 0})

    @property
    def last_thaw(self) -> int:
        """The epoch of the last one; 0 = there is none."""
        return max((rule.from_epoch for rule in self.rules), default=0)

    def ever_trains(self) -> dict[str, nn.Parameter]:
        """The parameters that train in any epoch, by name."""
        return {
            name: parameter
            for path, module in self.module.named_modules()
            if self.trains(path, self.last_thaw)
            for name, parameter in module.named_parameters(path, recurse=False)
        }

    def thaws_before(self, epoch: int) -> int:
        """How many thaws have happened by `epoch`: 0 before the first."""
        return sum(thaw <= epoch for thaw in self.thaws)

    def trains(self, path: str, epoch: int) -> bool:
        """Whether the module at `path` trains in an epoch."""
        rule = self._rule_of(path)
        return rule is not None and rule.trainable and epoch >= rule.from_epoch

    def since(self) -> dict[str, int]:
        """From which epoch on each parameter trains that ever does, by name."""
        found = dict[str, int]()
        for path, module in self.module.named_modules():
            rule = self._rule_of(path)
            if rule is not None and rule.trainable:
                found |= {name: rule.from_epoch for name, _ in module.named_parameters(path, recurse=False)}
        return found

    @property
    def learns_statistics(self) -> bool:
        """Whether BatchNorm layers go on learning theirs, from the beginning or from a thaw on."""
        rules = (self._rule_of(path) for path, one in self.module.named_modules() if isinstance(one, _BatchNorm))
        return self.batchnorm and any(rule is not None and rule.trainable for rule in rules)

    def _rule_of(self, path: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.pattern == "*" or _matches(rule.pattern, path)), None)


@dataclass(frozen=True)
class Freeze:
    """The freeze map in one epoch."""

    map: FreezeMap
    epoch: int

    @property
    def number(self) -> int:
        """Thaws before it: the phases of training are counted so."""
        return self.map.thaws_before(self.epoch)

    def _modules(self) -> Iterator[tuple[str, nn.Module, bool]]:
        """(path, module, whether it trains)."""
        for path, module in self.map.module.named_modules():
            yield path, module, self.map.trains(path, self.epoch)

    def apply(self) -> list[str]:
        """Set `requires_grad` of every parameter, and let go of old gradients.

        Returns:
            Names of the parameters that train, in the network's order.

        Raises:
            UsageError: nothing trains.
        """
        trainable = []
        for path, module, trains in self._modules():
            for name, parameter in module.named_parameters(path, recurse=False):
                parameter.requires_grad_(trains)
                parameter.grad = None
                if trains:
                    trainable.append(name)
        if not trainable:
            raise UsageError(
                f"nothing trains in epoch {self.epoch}: no freeze rule marks a module with parameters trainable; begin "
                "the rules with ('head', 'trainable', 0)"
            )
        return trainable

    def modes(self) -> list[str]:
        """Put each module in train mode if its own path matches a trainable rule, else in eval mode.

        Called before each stretch of training: `model.train()` is never trusted.

        Returns:
            Paths of the modules held in eval mode.
        """
        held = []
        for path, module, trains in self._modules():
            # The flag is set on the module alone; `module.train(mode)` would set it on everything below.
            module.training = trains and (self.map.batchnorm or not isinstance(module, _BatchNorm))
            if path and not module.training:
                held.append(path)
        # torchvision computes auxiliary heads only while the root is in train mode; its other modules have their own
        # flag.
        root = self.map.module
        if has_auxiliary_heads(root):
            auxiliary = (value for name, value in root.named_parameters() if name.lower().startswith("aux"))
            root.training |= any(value.requires_grad for value in auxiliary)
        return held

    def frozen(self) -> dict[str, Tensor]:
        """Parameters and buffers of every frozen module, by name: what a checkpoint need not hold."""
        tensors: dict[str, Tensor] = {}
        for path, module, trains in self._modules():
            if not trains:
                tensors |= {name: value.detach() for name, value in module.named_parameters(path, recurse=False)}
                if not isinstance(module, Standardised):  # measured on the data, wherever it stands
                    tensors |= dict(module.named_buffers(path, recurse=False))
        kept = self.map.module.state_dict()  # some buffers are computed from the config and never saved
        return {name: value for name, value in tensors.items() if name in kept}

    def changeable(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, by name: everything trainable, and every buffer that can change."""
        frozen = self.frozen()
        return {name: value for name, value in self.map.module.state_dict().items() if name not in frozen}

    def sha256(self) -> str:
        """Over the frozen tensors."""
        return hash_tensors(self.frozen())


def learning_statistics(module: nn.Module) -> list[Tensor]:
    """The running statistics that a forward pass would move, as modes are set now."""
    return [
        buffer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.training
        for buffer in layer.buffers(recurse=False)
    ]  # fmt: skip


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
