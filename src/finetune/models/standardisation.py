"""Mean and deviation of what the head reads, measured over the training samples."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from finetune.base.moments import Moments
from finetune.models.heads import has_auxiliary_heads, standardised_layers
from finetune.recipe.spec import BY_ROWS, PLAIN

# A feature counts as constant where rounding hides how it deviates: it is centred, not blown up. That is the rounding
# of the type that it is computed in, and what sums in float32 add to it. The floor is for features that are all zero.
FLOAT32_ROUNDINGS = 16
SMALLEST_DEVIATION = 1e-12
# With fewer rows a feature one deviation is measured for all: that of each by itself would be known too badly.
ROWS_A_FEATURE = 50
# The plain way: where it deviates by less than this share of its mean.
SMALLEST_DEVIATION_SHARE = 1e-3


class _Squares:
    """Mean and deviation of features by their squares: the plain way, which older runs go on."""

    def __init__(self) -> None:
        self._count, self._total, self._squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, features: Tensor) -> None:
        self._count += len(features)
        self._total = self._total + features.sum(0)
        self._squares = self._squares + features.square().sum(0)

    def result(self, is_centred: bool) -> tuple[Tensor, Tensor]:
        """Args: is_centred: the mean is taken away; else the deviation is that from zero."""
        middle = self._total / self._count
        mean = middle if is_centred else torch.zeros_like(middle)
        deviation = (self._squares / self._count - mean.square()).clamp(min=0).sqrt()
        varies = deviation > (SMALLEST_DEVIATION_SHARE * middle.abs()).clamp(min=SMALLEST_DEVIATION)
        return mean, torch.where(varies, deviation, 1.0)


class _Centred:
    """The same about the mean.

    Args:
        dtype: that the features are computed in.
        by_rows: see `recipe.spec.Model.standardisation`.
    """

    def __init__(self, dtype: torch.dtype, by_rows: bool) -> None:
        self._moments, self._by_rows = Moments(torch.device("cpu")), by_rows
        self._share = max(torch.finfo(dtype).eps, FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps)

    def add(self, features: Tensor) -> None:
        self._moments.add(features)

    def result(self, is_centred: bool) -> tuple[Tensor, Tensor]:
        middle, deviation = self._moments.mean, self._moments.deviation()
        if not is_centred:
            deviation = torch.hypot(middle, deviation)
        varies = deviation > (self._share * middle.abs()).clamp(min=SMALLEST_DEVIATION)
        if self._by_rows and varies.any() and self._moments.count < ROWS_A_FEATURE * len(deviation):
            deviation = torch.where(varies, deviation[varies].square().mean().sqrt(), 0.0)
        return middle if is_centred else torch.zeros_like(middle), torch.where(varies, deviation, 1.0)


@torch.no_grad()
def standardise(
    model: nn.Module,
    batches: Iterable[Tensor],
    forward: Callable[[Tensor], object] | None = None,
    *,
    way: str = BY_ROWS,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Measure mean and deviation of what enters each standardised layer, and store them in its buffers.

    One pass over the batches in eval mode, in the arithmetic that the caller has set; sums in float64.

    Args:
        batches: inputs, on the model's device.
        forward: runs a batch through the model; None = the model itself.
        way: see `recipe.spec.Model.standardisation`.
        dtype: that the features are computed in.
    """
    forward = forward or model
    layers = {path: layer for path, layer in standardised_layers(model) if layer.measured}
    found: dict[str, _Squares | _Centred] = {}
    hooks = []

    def hook_for(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            features = layers[path].by_feature(inputs[0].cpu().double())  # MPS has no float64
            if path not in found:
                found[path] = _Squares() if way == PLAIN else _Centred(dtype, way == BY_ROWS)
            found[path].add(features)

        return add

    for path, layer in layers.items():
        hooks.append(layer.register_forward_pre_hook(hook_for(path)))
    model.eval()
    model.training = has_auxiliary_heads(model)  # the root's own switch: else they would not be computed
    try:
        for inputs in batches:
            forward(inputs)
    finally:
        model.training = False
        for hook in hooks:
            hook.remove()
    for path, measured in found.items():
        mean, deviation = measured.result(layers[path].bias is not None)
        layers[path].mean.copy_(mean)
        layers[path].deviation.copy_(deviation)
