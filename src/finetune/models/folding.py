"""What of a run's own units goes into the weights that are written, and what must stand beside them.

A network trains on standardised features, and on standardised numbers to predict. With that folded into weight and bias
a stock layer gives the same; but a number of seven digits spends them on how far from zero it lies, and what sets it
apart may be behind the last. How many are lost is a question of how many deviations the mean lies away from zero.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from finetune.models.heads import standardised_like

# Folded in, rounding may move a number by so much of its deviation: what is more stays beside the weights. float16
# moves whatever it holds by that much.
ROUNDING_SHARES = {torch.float32: 2e-4, torch.float16: 5e-3}
# Within so many deviations of their mean lie all numbers that matter, and 1 / so much of one matters.
SPAN_DEVIATIONS = 100


def scale_beside(scale: Sequence[float], dtype: torch.dtype = torch.float32) -> list[float]:
    """Mean and deviation of numbers to predict where they must stand beside the weights; else [].

    Args:
        scale: mean and deviation, or [] where no numbers are predicted.
        dtype: of the weights.
    """
    if not scale:
        return []
    (mean, deviation), info = scale, torch.finfo(dtype)
    fits = abs(mean) + SPAN_DEVIATIONS * deviation < info.max and deviation > SPAN_DEVIATIONS * info.tiny
    is_held = info.eps * abs(mean) <= ROUNDING_SHARES[dtype] * deviation
    return [] if fits and is_held else [mean, deviation]


def lost_by_folding(tensors: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """By path of each layer that standardises its features: how far rounding to float32 may move what it gives once
    that is folded in; and the same as a share of how far that spreads.

    Args:
        tensors: of a network as it trains, by name.
    """
    found = {}
    for path in (name.removesuffix(".deviation") for name in tensors if name.endswith(".deviation")):
        names = [f"{path}.{name}" for name in ("weight", "mean", "deviation")]
        if all(name in tensors for name in names):
            weight, mean, deviation = (tensors[name].double() for name in names)
            weight = weight.flatten(1)
            terms = weight * (mean / deviation)  # what is added up, and taken away again by the bias
            largest = torch.maximum(terms.sum(1).abs(), terms.norm(dim=1))
            lost = torch.finfo(torch.float32).eps * largest
            spread = weight.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
            found[path] = lost.max().item(), (lost / spread).max().item()
    return found


def layers_apart(tensors: Mapping[str, Tensor], unit_rows: bool) -> list[str]:
    """Paths of the layers whose standardisation of features no plain layer can hold folded in.

    Args:
        tensors: of a network as it trains, by name.
        unit_rows: whether its head divides by norms, which no weight does.
    """
    if unit_rows:
        return list(lost_by_folding(tensors))
    most = ROUNDING_SHARES[torch.float32]
    # torchvision's auxiliary heads help to train and are computed nowhere else: what they lose nobody sees.
    used = {path: lost for path, lost in lost_by_folding(tensors).items() if not path.lower().startswith("aux")}
    return [path for path, (_, share) in used.items() if not share <= most]


def take_apart(model: nn.Module, paths: Iterable[str], unit_rows: bool = False) -> None:
    """Give a stock `model` layers that standardise their features themselves, where these were not folded in.

    Args:
        unit_rows: see `heads.StandardisedLinear`.

    Raises:
        UsageError: a path is of no layer that could.
    """
    for path in paths:
        model.set_submodule(path, standardised_like(model.get_submodule(path), path, unit_rows))


def is_scale(value: object) -> bool:
    """Whether it is a mean and a deviation, as an export's JSON may hold them."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in value)
        and value[1] > 0
    )
