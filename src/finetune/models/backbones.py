"""Architectures by name: those that ship with the kit, torchvision's, and encoders of transformers and timm."""

import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

from finetune.data.preprocess import Preprocessing
from finetune.data.tokens import Tokenization
from finetune.errors import UsageError
from finetune.models import hub, huggingface, text_encoders, timm_models
from finetune.models.bundled import BUNDLED, BUNDLED_TEXT, bundled_folder
from finetune.models.shapes import build_shapes

# Their own initialisation takes long and warns; pretrained or not, torch's own will do.
NO_OWN_INITIALISATION = ("googlenet", "inception_v3")
# Both normalise their input anew when they load pretrained weights, to (value - 0.5) / 0.5. We give them that at once,
# so that an export behaves the same in a network built without that switch.
OWN_NORMALISATION = ("googlenet", "inception_v3")
# Tried when an image size does not fit, to say which would.
CANDIDATE_SIZES = (32, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 480, 512, 518)


@dataclass(frozen=True)
class Backbone:
    """An architecture and how to prepare images, or texts, for it.

    Attributes:
        name: what `--backbone` takes.
        build: class count -> the network, randomly initialised, its head included. Called with a batch of images, or of
            tokens, it returns logits.
        preprocessing: what its weights were trained with; of a text encoder its tokenizer and longest text.
        stock_lines: Python lines that build the same network without this kit, into `model`; `{classes}` stands for
            the number of classes; `ABOUT` holds the export's description.
        options: plain values that, with the name, make the same architecture again: arguments of torchvision's
            builder, the config of a transformers model and how it pools, or timm's name and arguments. No file and no
            network is needed then.
    """

    name: str
    build: Callable[[int], nn.Module]
    preprocessing: Preprocessing | Tokenization
    stock_lines: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def reads_texts(self) -> bool:
        return isinstance(self.preprocessing, Tokenization)

    @property
    def libraries(self) -> tuple[str, ...]:
        """That the network is built by, besides those that every run names."""
        return (timm_models.NAME,) if timm_models.NAME in self.options else ()

    def to_plain(self) -> dict[str, object]:
        """What `backbone_from_plain` makes it from again."""
        return {"name": self.name, "options": self.options, "preprocessing": self.preprocessing.to_plain()}


def backbone_from_plain(plain: Mapping[str, Any]) -> Backbone:
    """The backbone that a run or an export describes; nothing is looked up. A text encoder's tokenizer is a file of its
    own: `Tokenization.read`."""
    name, options = plain["name"], plain["options"]
    build: Callable[[int], nn.Module]
    if "pooling" in options:
        build = functools.partial(text_encoders.build, options)
        return Backbone(name, build, Tokenization(**plain["preprocessing"]), text_encoders.STOCK_LINES, options)
    preprocessing = Preprocessing(**plain["preprocessing"])
    if name in BUNDLED:
        bundled = BUNDLED[name]
        return Backbone(name, bundled.build, preprocessing, bundled.stock_lines)
    if "config" in options:
        build = functools.partial(huggingface.build, options)
        lines = huggingface.TOWER_LINES if options.get(huggingface.TOWER) else huggingface.STOCK_LINES
        return Backbone(name, build, preprocessing, lines, options)
    if timm_models.NAME in options:
        build = functools.partial(timm_models.build, options)
        return Backbone(name, build, preprocessing, timm_models.stock_lines(options), options)
    if name not in torchvision_names():
        raise UsageError(
            f"--backbone {name}: this torchvision ({torchvision.__version__}) has no such model; upgrade it"
        )
    build = functools.partial(_build_torchvision, name, options)
    arguments = "".join(f", {option}={value!r}" for option, value in _arguments(name, options).items())
    stock_lines = f"import torchvision\nmodel = torchvision.models.{name}(num_classes={{classes}}{arguments})"
    return Backbone(name, build, preprocessing, stock_lines, options)


def backbone_of_export(description: Mapping[str, Any]) -> Backbone:
    """The backbone that an export's JSON describes."""
    architecture = description["architecture"]
    plain = {"name": architecture["backbone"], "options": architecture["options"]}
    return backbone_from_plain(plain | {"preprocessing": description["preprocessing"]})


def names_of(text: str) -> list[str]:
    """The backbones that `--backbone` names, with commas between; a folder may have one in its own name."""
    return [text] if hub.is_folder(text) else [name.strip() for name in text.split(",")]


def find_backbone(name: str) -> Backbone:
    """The backbone of that name, prepared for its default weights.

    Raises:
        UsageError: there is none; names the nearest.
    """
    if name in BUNDLED:
        return _described(name, {}, BUNDLED[name].preprocessing)
    if name in torchvision_names():
        return torchvision_backbone(name, default_member(name))
    if name.startswith(timm_models.PREFIX):
        return _described(*timm_models.describe(name))
    if name.startswith(hub.PREFIX) or hub.is_folder(name):
        folder = hub.folder_of(name, [huggingface.PREPROCESSOR_FILE])
        is_timm = hub.timm_config(folder) is not None
        return _described(name, *(timm_models.describe_folder if is_timm else huggingface.describe)(folder))
    if name in BUNDLED_TEXT:
        raise UsageError(f"--backbone {name}: reads texts, not images; use it with finetune bert_head")
    names = [*BUNDLED, *torchvision_names()]
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
    hint = f"; did you mean {', '.join(nearest)}?" if nearest else ""
    raise UsageError(
        f"--backbone {name}: unknown; allowed are {', '.join(BUNDLED)}, a classification model of torchvision "
        f"(resnet50, mobilenet_v2, ...), timm:NAME, hf:ID, or a folder with a config.json{hint}"
    )


def find_text_backbone(name: str, pooling: str) -> tuple[Backbone, Path]:
    """The text encoder of that name, and the folder that it lies in.

    Args:
        name: "bundled/bert", a folder, hf:ID, hf:ID@REVISION, or a plain ID.
        pooling: "auto", "stock", "mean" or "cls".

    Raises:
        UsageError: there is none, or it is no text encoder.
        RunError: it is not at hand, and cannot be fetched.
    """
    if name in BUNDLED_TEXT:
        folder = bundled_folder(name)
    elif hub.is_folder(name) or name.startswith(hub.PREFIX):
        folder = hub.folder_of(name, text_encoders.FOLDER_FILES)
    elif hub.is_identifier(name) and not name.startswith("bundled/") and name not in torchvision_names():
        folder = hub.folder_of(hub.PREFIX + name, text_encoders.FOLDER_FILES)
    else:
        raise UsageError(
            f"--backbone {name}: is no text encoder; give {', '.join(BUNDLED_TEXT)}, a folder with a "
            f"{hub.CONFIG_FILE}, or a model's name on the hub, as in google-bert/bert-base-uncased"
        )
    if hub.timm_config(folder) is not None:
        raise UsageError(f"--backbone {name}: is of timm and reads images, not texts; use it with finetune photo_head")
    options, tokenization = text_encoders.describe(folder, pooling)
    return replace(_described(name, options, tokenization), preprocessing=tokenization), folder


def _described(name: str, options: dict[str, Any], preprocessing: Preprocessing | Tokenization) -> Backbone:
    """As a run that records these will make it again."""
    return backbone_from_plain({"name": name, "options": options, "preprocessing": preprocessing.to_plain()})


# ---- torchvision -------------------------------------------------------------------------------------------------


@functools.cache
def torchvision_names() -> tuple[str, ...]:
    """Every classification model of torchvision."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


def members(name: str) -> list[WeightsEnum]:
    """The pretrained weights that torchvision offers for a model."""
    return list(torchvision.models.get_model_weights(name))


def default_member(name: str) -> WeightsEnum:
    """torchvision's DEFAULT; for an architecture whose DEFAULT is built with another image size, the plain one."""
    default = torchvision.models.get_model_weights(name).DEFAULT
    return next((member for member in (default, *members(name)) if not member_options(name, member)), default)


def member_options(name: str, member: WeightsEnum) -> dict[str, object]:
    """What the builder must be told for these weights: a vision transformer is built for one image size."""
    smallest = member.meta["min_size"][0]
    return {"image_size": smallest} if name.startswith("vit_") and smallest != 224 else {}


def torchvision_backbone(name: str, member: WeightsEnum) -> Backbone:
    """A model of torchvision, prepared for these weights."""
    transform = member.transforms()
    mean, std = ([0.5] * 3, [0.5] * 3) if name in OWN_NORMALISATION else (transform.mean, transform.std)
    preprocessing = Preprocessing(
        image_size=transform.crop_size[0],
        resize_size=transform.resize_size[0],
        keep_proportions=True,
        interpolation=transform.interpolation.value,
        mean=list(mean),
        std=list(std),
    )
    return _described(name, member_options(name, member), preprocessing)


def _arguments(name: str, options: dict[str, object]) -> dict[str, object]:
    return ({"init_weights": False} if name in NO_OWN_INITIALISATION else {}) | options


def _build_torchvision(name: str, options: dict[str, object], class_count: int) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, num_classes=class_count, **_arguments(name, options))


def check_image_size(backbone: Backbone, image_size: int) -> None:
    """Refuse a size that the architecture cannot take.

    Raises:
        UsageError: says which it can.
    """
    own = backbone.preprocessing
    assert isinstance(own, Preprocessing), "it reads texts"
    if image_size == own.image_size and not {"config", timm_models.NAME} & set(backbone.options):
        return  # what torchvision's own weights were trained at
    model = build_shapes(backbone.build, 2).eval()
    model.training = True  # the root's own switch: auxiliary heads want to be fed as well

    def fits(size: int) -> bool:
        try:
            with torch.inference_mode():
                model(torch.empty(1, 3, size, size, device="meta"))
        except (RuntimeError, ValueError, AssertionError, LookupError, TypeError):
            return False
        return True

    if not fits(image_size):
        sizes = sorted({*CANDIDATE_SIZES, own.image_size})
        allowed = [str(size) for size in sizes if fits(size)]
        can = f"it can take {', '.join(allowed)}" if allowed else "nor any other size: give another backbone"
        raise UsageError(f"--image-size {image_size}: {backbone.name} cannot take it; {can}")
