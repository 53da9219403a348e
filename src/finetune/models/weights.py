"""Pretrained weights: find the file, read it safely, load it so that nothing is missing but what may be."""

import dataclasses
import difflib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from finetune.base.files import sha256_of_file
from finetune.errors import FinetuneError, RunError, UsageError, one_line
from finetune.models import hub, huggingface, timm_models
from finetune.models.backbones import (
    Backbone,
    backbone_of_export,
    default_member,
    find_backbone,
    find_text_backbone,
    members,
    torchvision_backbone,
    torchvision_names,
)
from finetune.models.bundled import BUNDLED, BUNDLED_TEXT, bundled_folder, bundled_weights
from finetune.models.state_dicts import COUNTER, LEAST_SHARE, Picked, StateDict, groups_in, in_any, pick
from finetune.models.weight_files import hash_of

# torchvision's own files end in the first digits of their sha256.
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.")


@dataclass(frozen=True)
class Weights:
    """Where pretrained tensors come from.

    Attributes:
        path: the file; of a transformers model its folder.
        sha256: of the file.
        reference: a name by which the same bytes can be had again, or "".
        preprocessing_of: whose preprocessing goes with them, for a person to read.
        key: the part of the file that is meant; "" = all of it.
    """

    path: Path
    sha256: str
    reference: str
    preprocessing_of: str
    key: str = ""

    @property
    def text(self) -> str:
        return f"{self.path.name}{f':{self.key}' if self.key else ''}, sha256 {self.sha256[:12]}"


# ---- Which weights, and what they want their images prepared like -----------------------------------------------


def choose_weights(backbone_name: str, weights: str) -> tuple[Backbone, Weights | None]:
    """The backbone as `--weights` wants it, and the weights: None for random ones.

    Args:
        weights: "default", "none", a member of torchvision's enum, a file or folder, or FILE:KEY.

    Raises:
        UsageError: no such backbone, weights or file.
        RunError: they cannot be downloaded.
    """
    backbone = find_backbone(backbone_name)
    if weights == "none":
        return backbone, None
    if backbone_name in torchvision_names():
        member = _find_member(backbone_name, weights)
        if member is not None:
            reference = f"torchvision:{backbone_name}:{member.name}"
            return torchvision_backbone(backbone_name, member), Weights(*locate(reference), reference, member.name)
    elif weights == "default":
        return backbone, _default_weights(backbone_name)
    found = _file_of(weights, f"allowed are {_allowed(backbone_name, weights)}")
    backbone, origin = _prepared_for_file(backbone, found.path, found.sha256)
    return backbone, dataclasses.replace(found, preprocessing_of=origin)


def _default_weights(name: str) -> Weights:
    """What ships with the kit, or lies in the folder or repository that is the backbone itself."""
    if name in BUNDLED:
        reference = f"bundled:{name}"
        return Weights(*locate(reference), reference, name)
    if name.startswith(timm_models.PREFIX):
        name = timm_models.repository_of(name)
    path = hub.folder_of(name, [huggingface.PREPROCESSOR_FILE])
    if hub.timm_config(path) is not None:
        origin = f"its {hub.CONFIG_FILE}"
    elif (path / huggingface.PREPROCESSOR_FILE).is_file():
        origin = f"its {huggingface.PREPROCESSOR_FILE}"
    else:
        origin = "mean and deviation 0.5"
    return Weights(path, hub.hash_of_folder(path), name if name.startswith(hub.PREFIX) else "", origin)


def _file_of(weights: str, allowed: str) -> Weights:
    """FILE, FOLDER or FILE:KEY.

    Raises:
        UsageError: there is none; says what is allowed.
    """
    path, key = Path(os.path.expanduser(weights)), ""
    if not path.exists() and ":" in weights:
        name, _, key = weights.rpartition(":")
        path = Path(os.path.expanduser(name))
    if not path.exists():
        raise UsageError(f"--weights {weights}: no such file; {allowed}")
    if path.is_file() and hub.is_folder(str(path.parent)) and path in hub.weight_files(path.parent):
        path = path.parent  # transformers knows what its older files called the same tensors
    try:
        sha256 = hash_of(path)
    except FinetuneError as error:
        raise UsageError(f"--weights {error}") from None
    return Weights(path, sha256, "", "", key.rstrip("."))


def choose_text_weights(
    backbone_name: str, revision: str, weights: str, pooling: str
) -> tuple[Backbone, Weights | None]:
    """The text encoder, and its weights: None for random ones.

    Args:
        backbone_name: see `find_text_backbone`.
        revision: of a model on the hub; "" = its newest.
        weights: "default", "none", a file or folder, or FILE:KEY.
        pooling: "auto", "stock", "mean" or "cls".

    Raises:
        UsageError: no such backbone.
        RunError: it cannot be downloaded.
    """
    if revision and (backbone_name in BUNDLED_TEXT or hub.is_folder(backbone_name)):
        raise UsageError(f"--revision {revision}: belongs to a model on the hub, not to {backbone_name}; leave it out")
    backbone, folder = find_text_backbone(f"{backbone_name}@{revision}" if revision else backbone_name, pooling)
    if weights == "none":
        return backbone, None
    if weights != "default":
        allowed = "give default, none (random), a folder, or a .safetensors, .bin or .pt file"
        return backbone, dataclasses.replace(_file_of(weights, allowed), preprocessing_of="its tokenizer")
    reference = ""
    if backbone_name in BUNDLED_TEXT:
        reference = f"bundled:{backbone_name}"
    elif not hub.is_folder(backbone_name):
        reference = hub.PREFIX + backbone.name.removeprefix(hub.PREFIX)
    return backbone, Weights(folder, hub.hash_of_folder(folder), reference, "its tokenizer")


def choose_teacher(name: str) -> tuple[Backbone, Weights]:
    """A sentence encoder to distil, and its weights.

    Raises:
        UsageError: there is none of that name, or it does not say how it makes one embedding of a text's tokens.
        RunError: it cannot be downloaded.
    """
    try:
        backbone, weights = choose_text_weights(name, "", "default", "auto")
    except FinetuneError as error:  # which knows it by its other name
        raise type(error)(error.args[0].replace("--backbone", "--teacher"), error.details) from None
    if backbone.options["pooling"] == "stock":
        raise UsageError(f"--teacher {name}: makes no sentence embeddings; give one of sentence-transformers")
    assert weights is not None
    return backbone, weights


def _find_member(name: str, weights: str) -> WeightsEnum | None:
    if weights.lower() == "default":
        # Not the enum's DEFAULT where that needs the architecture built otherwise: then it has to be asked for by name.
        return default_member(name)
    return next((member for member in members(name) if member.name.lower() == weights.lower()), None)


def _allowed(name: str, weights: str) -> str:
    names = ["default", *(member.name for member in members(name))] if name in torchvision_names() else ["default"]
    nearest = difflib.get_close_matches(weights.upper(), names, n=1)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    return f"{', '.join(names)}{hint}, none (random), or a .safetensors, .pt or .pth file, or a folder"


def _prepared_for_file(backbone: Backbone, path: Path, sha256: str) -> tuple[Backbone, str]:
    """The backbone with the preprocessing of a weights file, and whose that is.

    In this order: 1. an export's own, from the JSON beside it; 2. that of torchvision's weights whose hash it has;
    3. that of the backbone's default weights.
    """
    description = path.with_suffix(".json")
    if description.is_file():
        try:
            found = json.loads(description.read_text(encoding="utf-8"))
            if sha256 in found["files"].values() and found["architecture"]["backbone"] == backbone.name:
                return backbone_of_export(found), description.name
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass  # some other JSON
    if backbone.name in torchvision_names():
        for member in members(backbone.name):
            digits = HASH_IN_NAME.search(member.url)
            if digits and sha256.startswith(digits[1]):
                return torchvision_backbone(backbone.name, member), f"{member.name}, whose file it is"
        return backbone, f"{default_member(backbone.name).name}, the file being none of torchvision's own"
    return backbone, f"{backbone.name}'s own weights"


def locate(reference: str) -> tuple[Path, str]:
    """The file or folder that a `Weights.reference` names, and its sha256; what is not cached is downloaded.

    Raises:
        RunError: it cannot be had, or is damaged.
    """
    kind, name, *rest = reference.split(":")
    if kind == "bundled":
        if name in BUNDLED_TEXT:
            return bundled_folder(name), hub.hash_of_folder(bundled_folder(name))
        path = bundled_weights(name)
        return path, sha256_of_file(path)
    if kind == hub.PREFIX.rstrip(":"):
        folder = hub.folder_of(reference, [])
        return folder, hub.hash_of_folder(folder)
    member = next(member for member in members(name) if member.name == rest[0])
    path = cached_file(member)
    digits = HASH_IN_NAME.search(path.name)
    expected = digits[1] if digits else ""
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(member.url, str(path), expected or None, progress=True)
        except (URLError, OSError, RuntimeError) as error:
            raise RunError(
                f"--weights {member.name}: not cached and cannot be fetched ({one_line(error, 150)}); put {member.url} "
                f"into {path.parent}, or take --backbone bundled/mobilenet, whose weights ship with the kit"
            ) from None
    found = sha256_of_file(path)
    if not found.startswith(expected):
        raise RunError(f"{path} is damaged: sha256 {found}, expected {expected}...; delete it, it is then fetched anew")
    return path, found


def cached_file(member: WeightsEnum) -> Path:
    """Where torchvision keeps a file that it fetched."""
    return Path(torch.hub.get_dir()) / "checkpoints" / member.url.rsplit("/", 1)[-1]


# ---- Loading ----------------------------------------------------------------------------------------------------


def load_backbone_weights(model: nn.Module, state: Mapping[str, Tensor], head: list[str], source: str) -> Picked:
    """Load `state` into `model`; only tensors of the head may be missing or of another shape.

    Args:
        state: see `state_dicts.pick`: what is over beside the network is left aside.
        head: module paths of the head.
        source: named in the error.

    Raises:
        UsageError: anything else is missing ("-"), too much within the network ("+") or of another shape ("~"); or
            holds no numbers.
    """
    own = model.state_dict()
    picked = pick(state, own, head, source, str(getattr(model, "base_model_prefix", "")))
    if picked.share < LEAST_SHARE:
        raise UsageError(
            f"{source}: holds {picked.share:.0%} of this network's names, so it is of another, or calls its tensors "
            "otherwise; --weights FILE:KEY names a part of a file",
            ["  this network has:", *_deeper(groups_in(own)), "  the file has:", *_deeper(groups_in(state))],
        )
    named = picked.state
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in named.items()
        if name in own and not in_any(name, head) and own[name].shape != value.shape
    ]
    for name, value in named.items():
        if name in own and own[name].is_floating_point() != value.is_floating_point():
            raise UsageError(f"{source}: {name} holds {value.dtype}, not {own[name].dtype}; give weights as trained")
    fitting = StateDict(
        {
            name: value
            for name, value in named.items()
            if name not in own or own[name].shape == value.shape
            if name in own or not in_any(name, head)
        },
        named._metadata,
    )
    missing, extra = load_state(model, fitting, named._metadata, source)
    named_in_shapes = {line.partition(" ")[0] for line in shapes}
    # How often BatchNorm has been updated says nothing where its momentum is fixed, and converters leave it out.
    missing = [
        name
        for name in missing
        if not in_any(name, head) and name not in named_in_shapes and not name.endswith(COUNTER)
    ]
    if missing or extra or shapes:
        lines = [f"  - {name}" for name in missing] + [f"  + {name}" for name in extra] + [f"  ~ {s}" for s in shapes]
        shown = lines[:20] + ([f"  ... {len(lines) - 20} more"] if len(lines) > 20 else [])
        raise UsageError(f"{source} does not fit the architecture (- missing, + unknown, ~ other shape):", shown)
    for name, value in model.state_dict().items():
        if not in_any(name, head) and value.is_floating_point() and not value.isfinite().all():
            raise UsageError(f"{source}: {name} holds values that are no numbers; give weights that are whole")
    return picked


def _deeper(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], metadata: object, source: str
) -> tuple[list[str], list[str]]:
    """`load_state_dict` that tells torchvision's modules which version a state dict is of.

    Some rename or refuse tensors of other versions; a file that does not say (safetensors) is taken for today's.

    Returns:
        (missing, unexpected) names.

    Raises:
        UsageError: a tensor has another shape.
    """
    versioned = OrderedDict(state)
    versioned._metadata = metadata or model.state_dict()._metadata  # type: ignore[attr-defined]
    try:
        result = model.load_state_dict(versioned, strict=False)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{source} does not fit the architecture: {one_line(error, 150)}") from None
    return result.missing_keys, result.unexpected_keys
