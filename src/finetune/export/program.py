"""A whole program that uses an export without this kit: an image or a text in, a class and its probability out.

It is printed, and stands in the card beside the export; `receiver` runs it.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from finetune.base.formatting import printable
from finetune.base.templates import templates_in
from finetune.data.preprocess import MAX_ASPECT, Preprocessing
from finetune.data.tokens import tokenizer_folder
from finetune.models.backbones import backbone_of_export
from finetune.models.heads import NO_HEAD, StandardisedConv2d, StandardisedLinear, replaced_layers
from finetune.models.huggingface import TOWER
from finetune.models.text_encoders import config_of, no_pooler

TEMPLATES = templates_in(Path(__file__).parent)
KINDS = {".onnx": "onnx", ".pt2": "torch-export"}
IMPORT = re.compile(r"(?:import|from) \S+.*")


def program_of(
    file: Path, description: Mapping[str, Any], model: nn.Module, *, is_folder: bool = False, record: str = "",
    head_file: str = "", heif: bool = False,
) -> str:  # fmt: skip
    """The program for an export.

    Args:
        file: the export, or, of a folder for transformers, that folder.
        description: what its JSON says.
        model: as `rebuild` makes it.
        record: the JSON in such a folder.
        heif: whether some of the pictures are of a kind for which Pillow needs a package.
        head_file: the weights of the head in such a folder, where transformers has no class for it.
    """
    architecture, plain = description["architecture"], description["preprocessing"]
    options, kind = architecture["options"], "folder" if is_folder else KINDS.get(file.suffix, "torch")
    reads_texts = "pooling" in options
    pooling = options.get("pooling", "")
    values: dict[str, Any] = {
        "kind": kind,
        "file": _quoted(file.as_posix()),
        "record": record,
        "head_file": head_file,
        "from_safetensors": file.suffix == ".safetensors",
        "beside": _beside(file, reads_texts),
        "task": description["task"],
        "scale": [repr(one) for one in description.get("scale", [])],
        "one_logit": architecture.get("one_logit", False),
        "arrays": kind in ("onnx", "torch-export"),
        "unit_rows": architecture.get("unit_rows", False),
        "standardised": _standardised_kinds(model),
        "reads_texts": reads_texts,
        "build": _build_lines(description, model) if kind == "torch" else "",
    }
    if reads_texts:
        values |= {
            "pooling": pooling,
            "max_length": plain["max_length"],
            "tokenizer": _quoted(tokenizer_folder(file).name),
            "prefix": getattr(model, "base_model_prefix", ""),
            "no_pooler": bool(no_pooler(config_of(options))),
            "head": _head_of(description, model) if pooling != "stock" else "",
        }
    else:
        values |= {
            "size": plain["image_size"],
            **{name: plain[name] for name in ("resize_size", "keep_proportions", "interpolation", "mean", "std")},
            "pixel_range": plain.get("pixel_range", []),
            "least_edge": Preprocessing(**plain).decoding.least_edge,
            "max_aspect": MAX_ASPECT,
            "heif": heif,
            "by_torchvision": kind == "torch",
            "gives_logits": "config" in options and TOWER not in options,
            "is_tower": TOWER in options,
        }
    return _tidied(TEMPLATES.get_template("program.py.j2").render(**values))


def _quoted(text: str) -> str:
    """As a string of Python; of a name that is no text (UTF-8), by its codes."""
    return json.dumps(text, ensure_ascii=text.encode("utf-8", "replace").decode() != text)


def _beside(file: Path, reads_texts: bool) -> str:
    return printable(f"{file.stem}.json" + (f", {tokenizer_folder(file).name}" if reads_texts else ""))


def _tidied(text: str) -> str:
    """A program with its imports sorted to the beginning, and blank lines as they are usual."""
    imported: dict[str, set[str]] = {}
    rest = list[str]()
    for line in text.splitlines():
        if IMPORT.fullmatch(line):
            module, _, names = line.partition(" import ") if line.startswith("from") else (line, "", "")
            imported.setdefault(module, set()).update(names.split(", ") if names else ())
        else:
            rest.append(line.rstrip())
    body = "\n".join(rest)
    lines = [
        f"{module} import {', '.join(sorted(names))}" if names else module
        for module, names in sorted(imported.items(), key=lambda one: (one[0].startswith("from"), one[0]))
    ]
    lines = [line for line in lines if _is_used(line, body)]
    own = [line for line in lines if line.split()[1].partition(".")[0] in sys.stdlib_module_names]
    others = [line for line in lines if line not in own]
    body = re.sub(r"\n{2,}(?=    )", "\n\n", body)  # within a function one blank line
    body = re.sub(r"\n+(?=(@.*\n)?(def|class|if __name__) ?)", "\n\n\n", body)
    body = body.replace("@torch.inference_mode()\n\n\n", "@torch.inference_mode()\n")
    body = re.sub(r"\n{4,}", "\n\n\n", body)
    return "\n".join(own) + "\n\n" + "\n".join(others) + "\n\n" + body.strip() + "\n"


def _is_used(line: str, body: str) -> bool:
    """Whether what a line imports is named in the program."""
    names = [part.split(" as ")[-1].strip() for part in line.rpartition("import ")[2].split(",")]
    return any(re.search(rf"\b{re.escape(name.partition('.')[0])}\b", body) for name in names)


def _head_of(description: Mapping[str, Any], model: nn.Module) -> str:
    return "" if description["architecture"]["head"] == NO_HEAD else constructor(model.get_submodule("classifier"))


# ---- The network ----------------------------------------------------------------------------------------------------


def constructor(module: nn.Module) -> str:
    """The expression that makes a layer of a head again, of torch's own classes but for those that standardise."""
    if isinstance(module, nn.Sequential):
        return f"torch.nn.Sequential({', '.join(constructor(child) for child in module)})"
    if isinstance(module, nn.Linear):
        name = "Standardised" if isinstance(module, StandardisedLinear) else "torch.nn.Linear"
        return f"{name}({module.in_features}, {module.out_features}{'' if module.bias is not None else ', bias=False'})"
    if isinstance(module, nn.Conv2d):
        name = "StandardisedConv2d" if isinstance(module, StandardisedConv2d) else "torch.nn.Conv2d"
        return f"{name}({module.in_channels}, {module.out_channels}, {module.kernel_size[0]})"
    assert isinstance(module, nn.ReLU | nn.Dropout | nn.Identity), "of nothing else is a head made"
    return f"torch.nn.{type(module).__name__}()"


def _standardised_kinds(model: nn.Module) -> list[tuple[str, str]]:
    """Name and base of the classes that the program needs for layers which standardise."""
    kinds = {type(module) for module in model.modules()}
    found = {StandardisedLinear: ("Standardised", "torch.nn.Linear")}
    found |= {StandardisedConv2d: ("StandardisedConv2d", "torch.nn.Conv2d")}  # type: ignore[dict-item]
    return [pair for kind, pair in found.items() if kind in kinds]


def _build_lines(description: Mapping[str, Any], model: nn.Module) -> str:
    """Lines that build `model` out of stock parts."""
    architecture, backbone = description["architecture"], backbone_of_export(description)
    options = architecture["options"]
    if options.get("pooling", "stock") != "stock":
        prefix, switches = str(getattr(model, "base_model_prefix", "")), no_pooler(config_of(options))
        switch = "".join(f", {name}={value}" for name, value in switches.items())
        return (
            "from transformers import AutoConfig, AutoModel\n"
            'config = AutoConfig.for_model(**ABOUT["architecture"]["options"]["config"])\n'
            "model = torch.nn.Module()\n"
            f"model.{prefix} = AutoModel.from_config(config{switch}).float()\n"
            f"model.classifier = {constructor(model.get_submodule('classifier'))}"
        )
    lines = [backbone.stock_lines.format(classes=architecture["old_classes"])]
    kind = architecture["head"]
    paths = replaced_layers(architecture["head_paths"], kind) if kind in ("mlp", "append") else []
    for path in dict.fromkeys([*paths, *architecture.get("standardised", [])]):
        if not any(path.startswith(f"{other}.") for other in paths):
            lines.append(f"model.set_submodule({path!r}, {constructor(model.get_submodule(path))})")
    return "\n".join(lines)
