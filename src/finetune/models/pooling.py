"""Adaptive pooling whose backward pass is deterministic on CUDA, where torch's own is not.

torch refuses the backward pass of `AdaptiveAvgPool2d` under deterministic algorithms, but for a single place. Where the
places divide evenly, each is the mean of a block, which a reshape and a mean give, too.
"""

import torch
from torch import Tensor, nn

from finetune.errors import UsageError


class DeterministicPool(nn.AdaptiveAvgPool2d):
    """The same as `AdaptiveAvgPool2d`, by other operations where what comes before it trains."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, channels, *output_size).

        Raises:
            UsageError: something before it trains, and the places do not divide evenly.
        """
        if not (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        height, width = input.shape[-2:]
        rows, columns = _size_of(self)
        rows, columns = rows or height, columns or width
        if height % rows or width % columns:
            raise UsageError(
                f"this network pools {height} x {width} places to {rows} x {columns}, which has no deterministic "
                "backward pass on CUDA; give an --image-size for which they divide evenly, train only what comes "
                "after, or --no-deterministic"
            )
        blocks = input.reshape(*input.shape[:-2], rows, height // rows, columns, width // columns)
        return blocks.mean((-3, -1))


def give_deterministic_pools(module: nn.Module, device: torch.device) -> int:
    """Put such a layer in the place of each that torch could not compute backwards on the device, where deterministic
    algorithms are on; names of tensors stay.

    Returns:
        How many.
    """
    if device.type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        return 0
    found = [
        (path, layer)
        for path, layer in module.named_modules()
        if type(layer) is nn.AdaptiveAvgPool2d and _size_of(layer) != (1, 1)
    ]
    for path, layer in found:
        pool = DeterministicPool(layer.output_size)
        pool.training = layer.training
        module.set_submodule(path, pool)
    return len(found)


def _size_of(layer: nn.AdaptiveAvgPool2d) -> tuple[int, int]:
    """(rows, columns); 0 = as many as there are."""
    size = layer.output_size
    rows, columns = size if isinstance(size, tuple) else (size, size)
    return rows or 0, columns or 0
