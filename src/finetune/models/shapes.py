"""A network without values: for looking at names and shapes, and at what it can take."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from finetune.errors import UsageError


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters are made without memory. Not everything as `torch.device("meta")` does: some builders compute."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = dict(kwargs or {})
        if func is torch.empty:
            given["device"] = "meta"
        return func(*args, **given)


def build_shapes(build: Callable[[int], nn.Module], class_count: int) -> nn.Module:
    """The network without values: for looking at names and shapes only."""
    state = torch.get_rng_state()
    try:
        try:
            with _EmptyOnMeta():
                return build(class_count).to("meta")
        except (RuntimeError, UsageError):  # some builders try a part of the network on a picture
            return build(class_count).to("meta")
    finally:
        torch.set_rng_state(state)
