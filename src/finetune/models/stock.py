"""What stock libraries can do with an export, in words."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.models import timm_models
from finetune.models.backbones import Backbone
from finetune.models.heads import NO_HEAD
from finetune.models.huggingface import TOWER
from finetune.recipe.spec import Recipe


def is_stock(recipe: Recipe, backbone: Backbone) -> bool:
    """Whether a stock class takes the weights."""
    folds = recipe.model.head in ("linear", "keep") and not recipe.model.unit_rows
    return folds and backbone.options.get("pooling", "stock") == "stock" and TOWER not in backbone.options


def exports_text(recipe: Recipe, backbone: Backbone) -> str:
    """Which formats `finetune export` has for a run, in words, before it is trained."""
    kinds = {"config": "transformers", timm_models.NAME: "timm"}
    stock = next((library for option, library in kinds.items() if option in backbone.options), "torchvision")
    whose = f"weights for stock {stock}" if is_stock(recipe, backbone) else "weights, built of stock parts"
    text = f"pt, safetensors ({whose}), onnx, torch-export"
    if not backbone.reads_texts:
        return text
    if why := reason_against_folder(recipe, backbone):
        return f"{text}; not hf, because {why.partition(';')[0]}"
    is_encoder = backbone.options["pooling"] != "stock"
    return (
        f"{text}, hf ({'an encoder for sentence-transformers, its head beside it' if is_encoder else 'transformers'})"
    )


def no_stock_lines(architecture: Mapping[str, Any]) -> list[str]:
    """What to know of a network that no stock class takes the weights of.

    Args:
        architecture: as the JSON of an export has it.
    """
    if architecture["stock"]:
        return []
    pooling = architecture["options"].get("pooling", "stock")
    what = f"pooling {pooling!r}" if pooling != "stock" else f"a head of kind {architecture['head']!r}"
    if TOWER in architecture["options"]:
        what = "a vision tower with a linear layer on its pooled output"
    if architecture.get("unit_rows"):
        what = "a head that divides features by their norm (--unit-rows)"
    elif architecture.get("standardised"):
        what = f"what {', '.join(architecture['standardised'])} reads deviates so little from its mean that it"
    return [f"{what} has no stock counterpart: the program builds it of stock parts"]


def threshold_lines(thresholds: Sequence[float], file: Path) -> list[str]:
    """What to know where a class does not apply from one half on.

    Args:
        file: the JSON that holds them.
    """
    if not thresholds:
        return []
    low, high = min(thresholds), max(thresholds)
    return [
        f"a class applies where its probability is above its own threshold ({low:.2g} to {high:.2g}): thresholds in "
        f"{file}"
    ]


def reason_against_folder(recipe: Recipe, backbone: Backbone, apart: Sequence[str] = ()) -> str:
    """Why transformers has no class for what a run on texts computes; "" = it has, or the head can stand beside an
    encoder.

    Args:
        apart: paths of layers that standardise their features themselves.
    """
    head, instead = recipe.model.head, "train with --pooling mean, or export a .pt, whose program builds it"
    if backbone.options["pooling"] != "stock" or head == NO_HEAD:
        return ""
    if recipe.model.unit_rows:
        return f"no class of transformers divides features by their norm; {instead}"
    if apart:
        return (
            f"what {', '.join(apart)} reads deviates so little from its mean that no weight of transformers' class can "
            f"hold both; {instead}"
        )
    return "" if is_stock(recipe, backbone) else f"no class of transformers has a head of kind {head!r}; {instead}"
