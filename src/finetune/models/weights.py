"""Pretrained weights: find the file, read it safely, load it so that nothing is missing but what may be."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.errors import UsageError
from finetune.files import BadFile, sha256_of_file
from finetune.models.backbones import Backbone

# What a damaged file makes of torch's and safetensors' readers.
UNREADABLE = (SafetensorError, OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class WeightsFile:
    """Where pretrained tensors come from. `reference` is a name by which the same bytes can be had again, or ""."""

    path: Path
    sha256: str
    reference: str


def find_weights(weights: str, backbone: Backbone) -> WeightsFile | None:
    """The file that `--weights` means: "default" = the backbone's own, "none" = random, else a path.

    Raises:
        UsageError: no such file.
    """
    if weights == "none":
        return None
    path = backbone.weights_file if weights == "default" else Path(weights)
    if path is None or not path.is_file():
        raise UsageError(
            f"--weights {weights}: no file {path}; "
            "allowed are 'default', 'none' (random), or a .safetensors or .pt file"
        )
    reference = backbone.name if weights == "default" else ""
    return WeightsFile(path, sha256_of_file(path), reference)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors or .pt file. Runs no code from it.

    Raises:
        BadFile: not such a file, or one that would run code.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BadFile(
            f"{path} is refused: it holds more than plain tensors, which could run code; "
            "give a .safetensors file, or a .pt that holds a state dict"
        ) from None
    except UNREADABLE as error:
        raise BadFile(f"{path} cannot be read ({str(error).strip().splitlines()[0][:200]}); restore it") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadFile(f"{path} does not hold a state dict (names to tensors)")
    return state


def load_backbone_weights(model: nn.Module, state: dict[str, Tensor], head: list[str], source: str) -> None:
    """Load `state` into `model`; only tensors of the head may be missing or of another shape.

    Args:
        head: module paths of the head.
        source: named in the error.

    Raises:
        UsageError: anything else is missing ("-"), too much ("+") or of another shape.
    """
    own = model.state_dict()

    def in_head(name: str) -> bool:
        return any(name.startswith(path + ".") for path in head)

    missing = [name for name in own if name not in state and not in_head(name)]
    extra = [name for name in state if name not in own and not in_head(name)]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and not in_head(name) and state[name].shape != own[name].shape
    ]
    if missing or extra or shapes:
        lines = [f"  - {name}" for name in missing] + [f"  + {name}" for name in extra] + [f"  ~ {s}" for s in shapes]
        shown = "\n".join(lines[:20] + ([f"  ... {len(lines) - 20} more"] if len(lines) > 20 else []))
        raise UsageError(f"{source} does not fit the architecture (- missing, + unknown, ~ other shape):\n{shown}")
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    model.load_state_dict(fitting, strict=False)
