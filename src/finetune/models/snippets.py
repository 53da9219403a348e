"""Lines of Python that load an export without this kit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.tokens import tokenizer_folder
from finetune.models import text_encoders
from finetune.models.backbones import Backbone, backbone_of_export
from finetune.recipe.spec import Recipe


def is_stock(recipe: Recipe, backbone: Backbone) -> bool:
    """Whether a stock class takes the weights."""
    folds = recipe.model.head in ("linear", "keep") and not recipe.model.unit_rows
    return folds and backbone.options.get("pooling", "stock") == "stock"


def loading_lines(file: Path, description: Mapping[str, Any]) -> str:
    """Lines of Python that load the file without this kit, where that is possible."""
    architecture = description["architecture"]
    if file.suffix == ".onnx":
        return (
            f"import onnxruntime\nsession = onnxruntime.InferenceSession({str(file)!r})\n"
            '(logits,) = session.run(None, {"images": images})  # float32 (batch, 3, height, width)'
            + _unit_line('logits.astype("float64")', description.get("scale"))
        )
    options, text_lines = architecture["options"], ""
    if "pooling" in options:
        # finetune.load gives a model that returns the logits themselves.
        names = {"tokenizer": str(tokenizer_folder(file)), "max_length": description["preprocessing"]["max_length"]}
        names["logits"] = ".logits" if architecture["stock"] else ""
        text_lines = "\n" + text_encoders.TOKENIZER_LINES.format(**names)
    if not architecture["stock"]:
        pooling = options.get("pooling", "stock")
        what = f"Pooling {pooling!r}" if pooling != "stock" else f"A head of kind {architecture['head']!r}"
        if architecture.get("unit_rows"):
            what = "A head that divides features by their norm (--unit-rows)"
        elif architecture.get("standardised"):
            what = f"What {', '.join(architecture['standardised'])} reads deviates so little from its mean that it"
        also = "from transformers import AutoTokenizer\n" if text_lines else ""
        return (
            f"{what} has no stock counterpart; load it with:\n\n"
            f"import finetune\n{also}model = finetune.load({str(file)!r}){text_lines}"
        )
    build = backbone_of_export(description).stock_lines.format(
        classes=architecture["outputs"], json=str(file.with_suffix(".json"))
    )
    if file.suffix == ".safetensors":
        read = f"from safetensors.torch import load_file\nmodel.load_state_dict(load_file({str(file)!r}), strict=True)"
    else:
        read = f"import torch\nmodel.load_state_dict(torch.load({str(file)!r}, weights_only=True), strict=True)"
    return f"{build}\n{read}\nmodel.eval()" + text_lines + _unit_line("logits.double()", description.get("scale"))


def _unit_line(numbers: str, scale: Sequence[float] | None) -> str:
    """The line that gives standardised numbers their unit, where that is not folded into the weights: in float64, as
    float32 could not tell them apart."""
    return f"\nvalues = {numbers} * {scale[1]!r} + {scale[0]!r}" if scale else ""


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


def folder_lines(folder: Path, has_head: bool, scale: Sequence[float] = ()) -> str:
    """Lines of Python that load the folder without this kit.

    Args:
        scale: mean and deviation of the numbers that it gives, where they are not folded into its weights.
    """
    if not has_head:
        return (
            f"from transformers import AutoModel, AutoTokenizer\nmodel = AutoModel.from_pretrained({str(folder)!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})"
        )
    call = 'classify("a text", truncation=True)'
    if scale:  # Python's own numbers are float64
        call = f'value = {call}[0]["score"] * {scale[1]!r} + {scale[0]!r}'
    return (
        f'from transformers import pipeline\nclassify = pipeline("text-classification", model={str(folder)!r})\n' + call
    )
