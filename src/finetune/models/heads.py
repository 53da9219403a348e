"""The new layers: where they go, the three kinds, standardised features, and folding for stock names.

While training, a head's first linear layer sees dropped-out, standardised features. At export mean and deviation go
into weight and bias, so that what is shipped is a plain `nn.Linear`.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.errors import UsageError

HEADS = ("linear", "mlp", "append")
# Deviation below which a feature counts as constant: it is centred, not blown up.
SMALLEST_DEVIATION = 1e-6


class StandardisedLinear(nn.Linear):
    """`nn.Linear` on standardised features with dropout. Its weight and bias keep the stock names.

    Buffers `mean` and `deviation`: (in_features,), of the features over the training set; 0 and 1 until
    `standardise` measures them.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, in_features: int, out_features: int, dropout: float):
        super().__init__(in_features, out_features)
        self.dropout = dropout
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("deviation", torch.ones(in_features))

    def forward(self, features: Tensor) -> Tensor:
        features = (features - self.mean) / self.deviation
        return super().forward(functional.dropout(features, self.dropout, self.training))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the plain `nn.Linear` that gives the same logits. Computed in float64."""
        weight = self.weight.detach().double() / self.deviation.double()
        bias = self.bias.detach().double() - weight @ self.mean.double()
        return weight.to(self.weight.dtype), bias.to(self.bias.dtype)


def find_head(build: Callable[[int], nn.Module]) -> list[str]:
    """Paths of the modules whose parameters change shape with the number of classes."""
    with torch.device("meta"):
        few, many = build(2), build(3)
    sizes = {name: parameter.shape for name, parameter in many.named_parameters()}
    paths = [name.rpartition(".")[0] for name, parameter in few.named_parameters() if sizes[name] != parameter.shape]
    return list(dict.fromkeys(paths))


def attach_head(model: nn.Module, path: str, kind: str, class_count: int, dropout: float, width: int) -> None:
    """Replace the last linear layer of `model` by a new, randomly initialised head.

    Args:
        path: of the layer to replace.
        kind: "linear"; "mlp" = linear, ReLU, dropout, linear; "append" = the old layer stays, a linear one behind it.
        dropout: probability that a feature is zeroed while training, before each new linear layer.
        width: hidden features of "mlp".

    Raises:
        UsageError: unknown kind, or a head that is no linear layer.
    """
    old = model.get_submodule(path)
    if not isinstance(old, nn.Linear):
        raise UsageError(f"the head {path} is a {type(old).__name__}; only a linear head can be replaced")
    if kind == "linear":
        head: nn.Module = StandardisedLinear(old.in_features, class_count, dropout)
    elif kind == "mlp":
        head = nn.Sequential(
            StandardisedLinear(old.in_features, width, dropout),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width, class_count),
        )
    elif kind == "append":
        head = nn.Sequential(old, StandardisedLinear(old.out_features, class_count, dropout))
    else:
        raise UsageError(f"--head {kind}: unknown; allowed are {', '.join(HEADS)}")
    model.set_submodule(path, head)


def trainable_head_path(path: str, kind: str) -> str:
    """What trains of a head at `path`: all of it, but for the old layer under an appended one."""
    return f"{path}.1" if kind == "append" else path


def standardised_layers(model: nn.Module) -> Iterator[tuple[str, StandardisedLinear]]:
    for path, module in model.named_modules():
        if isinstance(module, StandardisedLinear):
            yield path, module


@torch.no_grad()
def standardise(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure mean and deviation of what enters each `StandardisedLinear`, and store them in its buffers.

    One pass; sums in float64.

    Args:
        batches: model inputs, on the model's device.
    """
    sums: dict[str, list] = {}
    hooks = []

    def hook_for(path: str):
        def add(_module, inputs):
            features = inputs[0].cpu().double().flatten(0, -2)  # MPS has no float64
            count, total, squares = sums.get(path, (0, 0.0, 0.0))
            sums[path] = [count + len(features), total + features.sum(0), squares + features.square().sum(0)]

        return add

    layers = dict(standardised_layers(model))
    for path, layer in layers.items():
        hooks.append(layer.register_forward_pre_hook(hook_for(path)))
    try:
        for images in batches:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    for path, (count, total, squares) in sums.items():
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        layers[path].mean.copy_(mean)
        layers[path].deviation.copy_(torch.where(deviation > SMALLEST_DEVIATION, deviation, 1.0))


def folded_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of `model` with every standardisation folded away: stock names, stock shapes, on the CPU."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    for path, layer in standardised_layers(model):
        weight, bias = layer.folded()
        state[f"{path}.weight"], state[f"{path}.bias"] = weight.cpu(), bias.cpu()
        del state[f"{path}.mean"], state[f"{path}.deviation"]
    return {name: value.contiguous().clone() for name, value in state.items()}


def plain_head(model: nn.Module, path: str, kind: str, class_count: int, width: int) -> None:
    """Give a stock `model` a head of the shape that `folded_state` has: plain linear layers, no dropout needed."""
    attach_head(model, path, kind, class_count, dropout=0.0, width=width)
    for layer_path, layer in list(standardised_layers(model)):
        model.set_submodule(layer_path, nn.Linear(layer.in_features, layer.out_features))
