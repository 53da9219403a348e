"""From a run to a file that stock libraries load, and back.

A `.pt` (or `.safetensors`) holds a plain state dict; the JSON beside it says how to build the network for it, what to
do to an image first and what the classes are called. Neither is ever executed.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.build import open_data, split_config, trained_network
from finetune.checkpoint import read_checkpoint
from finetune.data.images import Request
from finetune.errors import FinetuneError, RunError, UsageError
from finetune.files import BadFile, read_json, sha256_of_file, write_atomically, write_json
from finetune.models.backbones import find_backbone
from finetune.models.heads import find_head, folded_state, plain_head, standardised_layers
from finetune.models.weights import read_weights
from finetune.recipe import Recipe
from finetune.run import RunFolder

SCHEMA_VERSION = 1
# Logits of an export may differ from the run's by this share of the largest logit (or by this much, if that is under
# 1), because folding the standardisation into the weights rounds differently. Without folding they must be equal.
FOLDED_TOLERANCE = 1e-5
COMPARED_IMAGES = 64


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it compares with the run."""

    file: Path
    description: dict[str, Any]
    largest_difference: float
    stock_lines: str

    def text(self) -> str:
        same = "bit for bit" if self.largest_difference == 0 else f"within {self.largest_difference:.1g}"
        lines = [
            f"{self.file}: {self.file.stat().st_size:,} bytes, sha256 {self.description['sha256']}",
            f"{self.file.with_suffix('.json')}: classes, preprocessing, architecture",
            f"checked: loaded into a fresh model, its logits equal the run's {same}",
            "",
        ]
        return "\n".join(lines) + self.stock_lines


def export(run: RunFolder, which: str, output: Path) -> ExportReport:
    """Write the weights of a checkpoint for stock loading, load them again and compare.

    Args:
        which: "best" or "latest".
        output: ends in .pt or .safetensors; a .json of the same name is written beside it.

    Raises:
        RunError: the run cannot be read, or the file's outputs are not the run's.
    """
    network, state = trained_network(run, which)
    recipe, numerics = split_config(state["config"])
    backbone = find_backbone(recipe.model.backbone)
    tensors = folded_state(network.module)
    output.parent.mkdir(parents=True, exist_ok=True)
    sha256 = write_tensors(output, tensors)
    description = {
        "schema_version": SCHEMA_VERSION,
        "task": "classification",
        "classes": state["data"]["classes"],
        "architecture": {
            "backbone": backbone.name,
            "head": recipe.model.head,
            "head_path": network.head_path,
            "head_width": recipe.model.head_width,
            "old_classes": network.old_class_count,
            "stock": recipe.model.head in ("linear", "keep"),
        },
        "preprocessing": {
            "image_size": recipe.data.image_size or backbone.image_size,
            "resize": "bilinear, antialiased, proportions not kept",
            "channels": "RGB",
            "mean": backbone.mean,
            "std": backbone.std,
        },
        "metrics": state["metrics"]["last_validation"],
        "checkpoint": {"which": which, "step": state["step"]},
        "sha256": sha256,
        "source_run": run.path.resolve().name,
        "precision_trained": numerics.precision,
    }
    write_json(output.with_suffix(".json"), description)
    try:
        difference = compare_with_run(network.module, output, recipe)
    except RunError:
        output.unlink()
        output.with_suffix(".json").unlink()
        raise
    return ExportReport(output, description, difference, stock_lines(output, description))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a state dict atomically; returns the file's sha256."""
    if path.suffix == ".safetensors":
        temporary = path.with_name(f".{path.name}.tmp")
        save_file(tensors, temporary)
        content = temporary.read_bytes()
        temporary.unlink()
        return write_atomically(path, lambda stream: stream.write(content))
    return write_atomically(path, lambda stream: torch.save(tensors, stream))


def compare_with_run(module: nn.Module, file: Path, recipe: Recipe) -> float:
    """The largest difference between the logits of the run's model and of the exported file's.

    On images of the validation set; where the data is not at hand any more, on random ones.

    Raises:
        RunError: it is larger than it may be.
    """
    backbone = find_backbone(recipe.model.backbone)
    try:
        data = open_data(recipe, backbone)
        images, _ = data.pipeline.fetch(Request(data.validation[:COMPARED_IMAGES].tolist()))
    except FinetuneError:
        size = recipe.data.image_size or backbone.image_size
        images = torch.randn(COMPARED_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    loaded = load(file)
    with torch.inference_mode():
        ours, theirs = module.eval()(images), loaded(images)
    difference = (ours - theirs).abs().max().item()
    folded = any(True for _ in standardised_layers(module))
    allowed = FOLDED_TOLERANCE * max(ours.abs().max().item(), 1.0) if folded else 0.0
    if not difference <= allowed:
        raise RunError(
            f"export {file}: logits differ from the run's by {difference:.3g}, allowed is {allowed:.3g}; not written"
        )
    return difference


def copy_checkpoint(run: RunFolder, which: str, output: Path | None) -> Path:
    """Copy a whole checkpoint (optimizer, generators and all) out of a run, after checking it."""
    source = run.checkpoints / f"{which}.pt"
    read_checkpoint(source)
    target = output or run.path / f"checkpoint-{which}.pt"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def stock_lines(file: Path, description: dict[str, Any]) -> str:
    """Lines of Python that load the file without this kit, where that is possible."""
    architecture = description["architecture"]
    if not architecture["stock"]:
        return (
            f"A head of kind {architecture['head']!r} has no stock counterpart; load it with:\n\n"
            f"import finetune\nmodel = finetune.load({str(file)!r})"
        )
    build = find_backbone(architecture["backbone"]).stock_lines.format(classes=len(description["classes"]))
    if file.suffix == ".safetensors":
        read = f"from safetensors.torch import load_file\nmodel.load_state_dict(load_file({str(file)!r}), strict=True)"
    else:
        read = f"import torch\nmodel.load_state_dict(torch.load({str(file)!r}, weights_only=True), strict=True)"
    return f"{build}\n{read}\nmodel.eval()"


# ---- Reading an export -------------------------------------------------------------------------------------------


def read_description(file: Path) -> dict[str, Any]:
    """The JSON beside an export.

    Raises:
        RunError: missing, damaged, or of a newer schema.
    """
    description = read_json(file.with_suffix(".json"), "description of the export")
    if not isinstance(description, dict) or not {"classes", "architecture", "preprocessing", "sha256"} <= set(
        description
    ):
        raise BadFile(
            f"{file.with_suffix('.json')} does not describe an export; keep the .json that was written with it"
        )
    if description["schema_version"] > SCHEMA_VERSION:
        raise RunError(f"{file.with_suffix('.json')} was written by a newer finetune; upgrade it")
    return description


def load(path: str | Path) -> nn.Module:
    """Rebuild the model of an export: in eval mode, on the CPU. Runs no code from the file or its JSON.

    Args:
        path: the .pt or .safetensors; its .json must lie beside it.

    Returns:
        A module: (batch, 3, height, width) float32, prepared as the JSON says, to (batch, classes) logits.

    Raises:
        RunError: the files are missing, damaged, or do not belong together.
    """
    file = Path(path)
    if not file.is_file():
        raise RunError(f"export {file} does not exist; make it with: finetune export RUN")
    description = read_description(file)
    found = sha256_of_file(file)
    if found != description["sha256"]:
        raise BadFile(f"{file} does not match its .json (sha256 {found}); export it again")
    architecture = description["architecture"]
    try:
        backbone = find_backbone(architecture["backbone"])
    except UsageError as error:
        raise RunError(f"{file.with_suffix('.json')}: {error}") from None
    model = backbone.build(architecture["old_classes"])
    if architecture["head"] != "keep":
        if architecture["head_path"] not in find_head(backbone.build):
            raise BadFile(
                f"{file.with_suffix('.json')}: {architecture['head_path']!r} is not the head of {backbone.name}"
            )
        plain_head(
            model,
            architecture["head_path"],
            architecture["head"],
            len(description["classes"]),
            architecture["head_width"],
        )
    try:
        model.load_state_dict(read_weights(file), strict=True)
    except RuntimeError as error:
        raise BadFile(f"{file} does not fit the architecture in its .json: {' '.join(str(error).split())}") from None
    return model.eval()
