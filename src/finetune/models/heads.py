"""The new layers: where they go, the three kinds, standardised features, and folding for stock names.

While training, a head's first layer sees dropped-out, standardised features. At export mean and deviation go into
weight and bias, so that what is shipped is a plain `nn.Linear` (or, for SqueezeNet, a plain 1 x 1 `nn.Conv2d`).
"""

import functools
from collections.abc import Callable, Container, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import GoogLeNet, Inception3

from finetune.errors import UsageError
from finetune.models.shapes import build_shapes

HEADS = ("linear", "mlp", "append")
# No head at all: the network gives what the head would read.
NO_HEAD = "none"


class StandardisedLinear(nn.Linear):
    """`nn.Linear` on standardised features with dropout. Its weight and bias keep the stock names.

    Buffers `mean` and `deviation`: (in_features,), of the features over the training set; 0 and 1 until
    `standardise` measures them. Without a bias there is nothing to fold a mean into: the mean stays 0.

    Args:
        measured: whether its features are measured at all: not those that come from a layer which itself trains.
        unit_rows: whether each sample's features are divided by their norm first. No plain layer does that.
        one_logit: whether the layer's one number is the logit of the second of two classes, and it gives 0 for the
            first; a plain layer gives the number alone.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dropout: float,
        bias: bool = True,
        *,
        measured: bool = True,
        unit_rows: bool = False,
        one_logit: bool = False,
    ):
        super().__init__(in_features, out_features, bias)
        self.one_logit = one_logit
        self.dropout = dropout
        self.measured = measured
        self.unit_rows = unit_rows
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("deviation", torch.ones(in_features))

    def forward(self, features: Tensor) -> Tensor:
        if self.unit_rows:
            features = functional.normalize(features, dim=-1)
        features = (features - self.mean) / self.deviation
        outputs = super().forward(functional.dropout(features, self.dropout, self.training))
        return beside_zero(outputs) if self.one_logit else outputs

    def by_feature(self, inputs: Tensor) -> Tensor:
        """(..., in_features) to (rows, in_features), as they are standardised."""
        rows = inputs.flatten(0, -2)
        return functional.normalize(rows) if self.unit_rows else rows

    def plain(self) -> nn.Linear:
        """A plain layer of the same shape."""
        return nn.Linear(self.in_features, self.out_features, self.bias is not None)


class StandardisedConv2d(nn.Conv2d):
    """The same for a 1 x 1 convolution over a feature map."""

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dropout: float,
        bias: bool = True,
        *,
        measured: bool = True,
        unit_rows: bool = False,
    ):
        super().__init__(in_features, out_features, kernel_size=1, bias=bias)
        self.dropout = dropout
        self.measured = measured
        self.unit_rows = unit_rows
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("deviation", torch.ones(in_features))

    def forward(self, features: Tensor) -> Tensor:
        if self.unit_rows:
            features = functional.normalize(features, dim=1)
        features = (features - self.mean.view(-1, 1, 1)) / self.deviation.view(-1, 1, 1)
        return super().forward(functional.dropout(features, self.dropout, self.training))

    def by_feature(self, inputs: Tensor) -> Tensor:
        """(batch, in_features, height, width) to (rows, in_features), as they are standardised."""
        rows = inputs.movedim(1, -1).flatten(0, -2)
        return functional.normalize(rows) if self.unit_rows else rows

    def plain(self) -> nn.Conv2d:
        """A plain layer of the same shape."""
        return nn.Conv2d(self.in_channels, self.out_channels, kernel_size=1, bias=self.bias is not None)


Standardised = StandardisedLinear | StandardisedConv2d


def beside_zero(logit: Tensor) -> Tensor:
    """(..., 1) logit of the second of two classes to (..., 2) logits of both: the first has 0."""
    return functional.pad(logit, (1, 0))


def folded(layer: Standardised) -> dict[str, Tensor]:
    """Weight and bias of the plain layer that gives the same logits. Computed in float64."""
    weight = layer.weight.detach().double().flatten(1) / layer.deviation.double()
    rounded = weight.to(layer.weight.dtype)
    state = {"weight": rounded.view_as(layer.weight)}
    if layer.bias is not None:
        # Of the rounded weight: at the mean of the features, where most samples are, the rounding then cancels.
        state["bias"] = (layer.bias.detach().double() - rounded.double() @ layer.mean.double()).to(layer.bias.dtype)
    return state


@functools.lru_cache(maxsize=16)  # each look builds the network twice
def find_head(build: Callable[[int], nn.Module]) -> list[str]:
    """Paths of the modules whose parameters change shape with the number of classes; auxiliary ones come first."""
    few, many = build_shapes(build, 2), build_shapes(build, 3)
    sizes = {name: parameter.shape for name, parameter in many.named_parameters()}
    paths = [name.rpartition(".")[0] for name, parameter in few.named_parameters() if sizes[name] != parameter.shape]
    return list(dict.fromkeys(paths))


def replaced_layers(head_paths: list[str], kind: str) -> list[str]:
    """Which layers of the stock architecture a head of this kind goes in the place of."""
    if kind == "keep":
        return []
    return head_paths[-1:] if kind == "append" else head_paths


def _like(
    old: nn.Module, path: str, out_features: int, dropout: float, measured: bool = True, unit_rows: bool = False
) -> Standardised:
    """A new layer in place of `old`."""
    has_bias = getattr(old, "bias", None) is not None
    if isinstance(old, nn.Linear):
        return StandardisedLinear(
            old.in_features, out_features, dropout, has_bias, measured=measured, unit_rows=unit_rows
        )
    if isinstance(old, nn.Conv2d) and old.kernel_size == (1, 1):
        return StandardisedConv2d(
            old.in_channels, out_features, dropout, has_bias, measured=measured, unit_rows=unit_rows
        )
    raise UsageError(f"the head {path} is a {type(old).__name__}; only a linear layer or a 1 x 1 convolution will do")


def standardised_like(old: nn.Module, path: str, unit_rows: bool = False) -> Standardised:
    """A layer of the shape of `old` that standardises its features; it has no dropout.

    Args:
        unit_rows: see `StandardisedLinear`.

    Raises:
        UsageError: it is neither a linear layer nor a 1 x 1 convolution.
    """
    outputs = old.out_channels if isinstance(old, nn.Conv2d) else getattr(old, "out_features", 0)
    return _like(old, path, outputs, 0.0, unit_rows=unit_rows)


def renew_layer(model: nn.Module, path: str, dropout: float) -> None:
    """Give a layer without pretrained weights standardised features and dropout, if it is linear; its shape stays."""
    old = model.get_submodule(path)
    if isinstance(old, nn.Linear):
        model.set_submodule(path, _like(old, path, old.out_features, dropout))


def attach_head(
    model: nn.Module,
    path: str,
    kind: str,
    class_count: int,
    dropout: float,
    width: int,
    *,
    measured: bool = True,
    unit_rows: bool = False,
    one_logit: bool = False,
) -> None:
    """Replace one layer of `model` by a new, randomly initialised head.

    Args:
        path: of the layer to replace.
        kind: "linear"; "mlp" = linear, ReLU, dropout, linear; "append" = the old layer stays, a linear one behind it;
            "none" = nothing in its place.
        dropout: probability that a feature is zeroed while training, before each new linear layer.
        width: hidden features of "mlp".
        measured: whether what it reads is standardised.
        unit_rows, one_logit: see `StandardisedLinear`.

    Raises:
        UsageError: unknown kind, or a head that is neither a linear layer nor a 1 x 1 convolution.
    """
    old = model.get_submodule(path)
    head: nn.Module
    if kind == "linear":
        head = _like(old, path, class_count, dropout, measured, unit_rows)
    elif kind == "mlp":
        first = _like(old, path, width, dropout, measured, unit_rows)
        plain = nn.Conv2d(width, class_count, 1) if isinstance(first, nn.Conv2d) else nn.Linear(width, class_count)
        head = nn.Sequential(first, nn.ReLU(), nn.Dropout(dropout), plain)
    elif kind == "append":
        # Of a linear layer, whoever made it: what a module has besides its own is of no known type.
        old_classes = old.out_channels if isinstance(old, nn.Conv2d) else cast(int, old.out_features)
        options: dict[str, bool] = {"measured": measured, "unit_rows": unit_rows}
        new: Standardised
        if isinstance(old, nn.Conv2d):
            if one_logit:
                raise UsageError(
                    "--one-logit: this head is a convolution, behind which no number is below 0; leave it out"
                )
            new = StandardisedConv2d(old_classes, class_count, dropout, **options)
        else:
            new = StandardisedLinear(
                old_classes, 1 if one_logit else class_count, dropout, **options, one_logit=one_logit
            )
        head = nn.Sequential(old, new)
    elif kind == NO_HEAD:
        head = nn.Identity()
    else:
        raise UsageError(f"--head {kind}: unknown; allowed are {', '.join(HEADS)}")
    model.set_submodule(path, head)


def has_auxiliary_heads(model: nn.Module) -> bool:
    """Whether heads in the middle of the network help to train it. They are computed in train mode only."""
    return isinstance(model, GoogLeNet | Inception3) and model.aux_logits


def standardised_layers(model: nn.Module) -> Iterator[tuple[str, Standardised]]:
    for path, module in model.named_modules():
        if isinstance(module, Standardised):
            yield path, module


def folded_state(model: nn.Module, apart: Container[str] = ()) -> dict[str, Tensor]:
    """The state dict of `model` with every standardisation folded away: stock names, stock shapes, on the CPU.

    It keeps the versions of torchvision's modules, without which some refuse to load.

    Args:
        apart: paths of layers that stay as they are.
    """
    state = model.state_dict()
    for name in state:
        state[name] = state[name].detach().cpu().contiguous().clone()
    for path, layer in standardised_layers(model):
        if path in apart:
            continue
        for name, value in folded(layer).items():
            state[f"{path}.{name}"] = value.cpu().contiguous()
        del state[f"{path}.mean"], state[f"{path}.deviation"]
    return state


def first_layer(path: str, kind: str) -> str:
    """Path of the first new layer of a head that stands at `path`: it reads what the network computed before."""
    return path + {"mlp": ".0", "append": ".1"}.get(kind, "")


def last_layer(path: str, kind: str) -> str:
    """Path of the last linear layer of a head that stands at `path`."""
    return path + {"mlp": ".3", "append": ".1"}.get(kind, "")


def reorder(state: dict[str, Tensor], path: str, order: Sequence[int]) -> None:
    """Make a state dict's last layer, at `path`, give its numbers in another order.

    Args:
        order: the old place of each.
    """
    for name in (f"{path}.{one}" for one in ("weight", "bias")):
        if name in state and len(state[name]) == len(order):
            state[name] = state[name][list(order)]
        elif name in state:  # one logit for two classes, which change places
            state[name] = -state[name]


def rescale(state: dict[str, Tensor], path: str, old: Sequence[float], new: Sequence[float] = (0.0, 1.0)) -> None:
    """Make a state dict's last layer, at `path`, give the same numbers by another standard.

    Args:
        old, new: mean and deviation by which the numbers that it gives are standardised, and are to be; the default of
            `new` is their own unit.
    """
    (mean, deviation), (new_mean, new_deviation) = old, new
    weight, bias = state[f"{path}.weight"].double(), state[f"{path}.bias"].double()
    state[f"{path}.weight"] = (weight * deviation / new_deviation).float()
    # The means first: between large ones that lie close together the bias would be lost, in float64 too.
    state[f"{path}.bias"] = ((bias * deviation + (mean - new_mean)) / new_deviation).float()


def plain_head(model: nn.Module, path: str, kind: str, class_count: int, width: int) -> None:
    """Give a stock `model` a head of the shape that `folded_state` has: plain layers, no dropout needed."""
    attach_head(model, path, kind, class_count, dropout=0.0, width=width)
    for layer_path, layer in list(standardised_layers(model)):
        model.set_submodule(layer_path, layer.plain())
