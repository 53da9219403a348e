"""From a run to a file that stock libraries load, and back.

A `.pt` (or `.safetensors`) holds a plain state dict; the JSON beside it says how to build the network for it, what to
do to an image first and what the classes are called. Neither is ever executed. An `.onnx` holds the network as well.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.build import open_data, split_config, trained_network
from finetune.checkpoint import read_checkpoint
from finetune.data.images import Request
from finetune.errors import FinetuneError, RunError, UsageError, one_line
from finetune.files import TEMPORARY_SUFFIX, BadFile, read_json, sha256_of_file, write_atomically, write_json
from finetune.models.backbones import backbone_from_plain, backbone_of_export
from finetune.models.heads import find_head, folded_state, plain_head, replaced_layers, standardised_layers
from finetune.models.network import Network
from finetune.models.weights import load_state, read_weights
from finetune.onnx import write_onnx
from finetune.recipe import TASKS, Recipe
from finetune.run import RunFolder

SCHEMA_VERSION = 2
FORMATS = (".pt", ".safetensors", ".onnx")
# Logits of an export may differ from the run's by this share of the largest logit (or by this much, if that is under
# 1), because folding the standardisation into the weights rounds differently. Without folding they must be equal.
FOLDED_TOLERANCE = 1e-5
# Another runtime has other kernels.
ONNX_TOLERANCE = 1e-4
COMPARED_IMAGES = 16


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it compares with the run."""

    file: Path
    description: dict[str, Any]
    largest_difference: float

    @property
    def stock_lines(self) -> str:
        """Lines of Python that load the file without this kit."""
        return loading_lines(self.file, self.description)

    def text(self) -> str:
        same = "bit for bit" if self.largest_difference == 0 else f"within {self.largest_difference:.1g}"
        where = "run in onnxruntime" if self.file.suffix == ".onnx" else "loaded into a fresh model"
        lines = [
            f"{self.file}: {self.file.stat().st_size:,} bytes, sha256 {self.description['sha256']}",
            f"{self.file.with_suffix('.json')}: classes, preprocessing, architecture",
            f"checked: {where}, its logits equal the run's {same}",
            "",
        ]
        return "\n".join(lines) + self.stock_lines


def export(run: RunFolder, which: str, output: Path) -> ExportReport:
    """Write the weights of a checkpoint for other programs, load them again and compare.

    Args:
        which: "best" or "latest".
        output: ends in .pt, .safetensors or .onnx; a .json of the same name is written beside it.

    Raises:
        RunError: the run cannot be read, or the file's outputs are not the run's.
        UsageError: a package that ONNX needs is missing.
    """
    network, state = trained_network(run, which)
    recipe, _ = split_config(state["config"])
    tensors = folded_state(network.module)
    description = describe(run, which, network, state)
    images = comparison_images(recipe, state)
    with torch.inference_mode():
        wanted = network.module.eval()(images)
    folded = any(True for _ in standardised_layers(network.module))
    largest = max(wanted.abs().max().item(), 1.0)
    if output.is_dir():
        raise UsageError(f"--output {output}: is a folder; name a file")
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".exporting-", suffix=TEMPORARY_SUFFIX, dir=output.parent) as place:
        temporary = Path(place) / output.name
        if output.suffix == ".onnx":
            difference = write_onnx(rebuild(description, tensors, str(run.path)), images, wanted, temporary)
            allowed = ONNX_TOLERANCE
        else:
            write_tensors(temporary, tensors)
            with torch.inference_mode():
                found = rebuild(description, read_weights(temporary), str(temporary))(images)
            difference = (found - wanted).abs().max().item()
            allowed = FOLDED_TOLERANCE * largest if folded else 0.0
        if not difference <= allowed:
            raise RunError(
                f"export {output}: logits differ from the run's by {difference:.3g}, allowed is {allowed:.3g}; "
                "nothing is written"
            )
        sha256 = write_atomically(output, lambda stream: _copy_into(stream, temporary))
    description |= {"sha256": sha256, "files": {output.name: sha256} | other_formats(output, description)}
    write_json(output.with_suffix(".json"), description)
    return ExportReport(output, description, difference)


def describe(run: RunFolder, which: str, network: Network, state: dict[str, Any]) -> dict[str, Any]:
    """What the JSON says of a checkpoint, but for the hashes of files."""
    recipe, numerics = split_config(state["config"])
    backbone = backbone_from_plain(state["network"]["backbone"])
    preprocessing = backbone.preprocessing
    return {
        "schema_version": SCHEMA_VERSION,
        "task": recipe.task.kind,
        "classes": state["data"]["classes"],
        "architecture": {
            "backbone": backbone.name,
            "options": backbone.options,
            "head": recipe.model.head,
            "head_paths": network.head_paths,
            "head_width": recipe.model.head_width,
            "old_classes": network.old_class_count,
            "stock": recipe.model.head in ("linear", "keep"),
        },
        "preprocessing": preprocessing.to_plain(),
        "preprocessing_text": f"RGB; antialiased resize: {preprocessing.text}; / 255; (value - mean) / std by channel",
        "metrics": state["metrics"]["last_validation"],
        "checkpoint": {"which": which, "step": state["step"]},
        "source_run": run.path.resolve().name,
        "precision_trained": numerics.precision,
    }


def other_formats(output: Path, description: dict[str, Any]) -> dict[str, str]:
    """Files of the same weights in other formats that the JSON already describes: they stay good."""
    try:
        found = read_description(output)
    except RunError:
        return {}
    files = {name: value for name, value in found["files"].items() if name != output.name}
    same = {name: value for name, value in found.items() if name not in ("sha256", "files")}
    return files if same == description else {}


def _copy_into(stream: Any, path: Path) -> None:
    with open(path, "rb") as source:
        shutil.copyfileobj(source, stream, 1 << 20)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a state dict."""
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def comparison_images(recipe: Recipe, state: dict[str, Any]) -> Tensor:
    """Network inputs to compare on: of the validation set; where the data is not at hand any more, random ones."""
    backbone = backbone_from_plain(state["network"]["backbone"])
    try:
        data = open_data(recipe, backbone, state["data"]["skipped"])
        return data.pipeline.fetch(Request(data.split.validation[:COMPARED_IMAGES].tolist())).inputs
    except FinetuneError:
        size = backbone.preprocessing.image_size
        return torch.randn(COMPARED_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))


def copy_checkpoint(run: RunFolder, which: str, output: Path | None) -> Path:
    """Copy a whole checkpoint (optimizer, generators and all) out of a run, after checking it."""
    source = run.checkpoints / f"{which}.pt"
    read_checkpoint(source, run.read_recipe()["id"])
    target = output or run.path / f"checkpoint-{which}.pt"
    if target.is_dir():
        raise UsageError(f"--output {target}: is a folder; name a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def loading_lines(file: Path, description: dict[str, Any]) -> str:
    """Lines of Python that load the file without this kit, where that is possible."""
    architecture = description["architecture"]
    if file.suffix == ".onnx":
        return (
            f"import onnxruntime\nsession = onnxruntime.InferenceSession({str(file)!r})\n"
            '(logits,) = session.run(None, {"images": images})  # float32 (batch, 3, height, width)'
        )
    if not architecture["stock"]:
        return (
            f"A head of kind {architecture['head']!r} has no stock counterpart; load it with:\n\n"
            f"import finetune\nmodel = finetune.load({str(file)!r})"
        )
    build = backbone_of_export(description).stock_lines.format(
        classes=len(description["classes"]), json=str(file.with_suffix(".json"))
    )
    if file.suffix == ".safetensors":
        read = f"from safetensors.torch import load_file\nmodel.load_state_dict(load_file({str(file)!r}), strict=True)"
    else:
        read = f"import torch\nmodel.load_state_dict(torch.load({str(file)!r}, weights_only=True), strict=True)"
    return f"{build}\n{read}\nmodel.eval()"


# ---- Reading an export -------------------------------------------------------------------------------------------


def read_description(file: Path) -> dict[str, Any]:
    """The JSON beside an export.

    Raises:
        RunError: missing, damaged, or of another schema.
    """
    path = file.with_suffix(".json")
    description = read_json(path, "description of the export")
    needed = {"task", "classes", "architecture", "preprocessing", "sha256", "files"}
    if not isinstance(description, dict) or "schema_version" not in description:
        raise BadFile(f"{path} does not describe an export; keep the .json that was written with it")
    if description["schema_version"] != SCHEMA_VERSION:
        raise RunError(
            f"{path} has schema {description['schema_version']}, this finetune reads {SCHEMA_VERSION}; export it again "
            "with this version"
        )
    classes = description.get("classes")
    good = needed <= set(description) and isinstance(description["files"], dict) and isinstance(classes, list)
    good = good and all(isinstance(one, str) for one in (description["sha256"], *description["files"].values()))
    good = good and description["task"] in list(TASKS)  # a list: the value may not even be hashable
    if not good or not all(isinstance(name, str) for name in classes) or len(set(classes)) < len(classes):
        raise BadFile(f"{path} does not describe an export; keep the .json that was written with it")
    return description


def rebuild(description: dict[str, Any], tensors: dict[str, Tensor], source: str) -> nn.Module:
    """The network that a description names, with these tensors; in eval mode, on the CPU.

    Raises:
        RunError: the two do not belong together; calls them `source`.
    """
    architecture = description["architecture"]
    try:
        backbone = backbone_of_export(description)
        head_paths = find_head(backbone.build)
        if architecture["head"] != "keep" and architecture["head_paths"] != head_paths:
            raise BadFile(f"{source}: {architecture['head_paths']} is not the head of {backbone.name}")
        if architecture["head"] != "append" and architecture["old_classes"] != len(description["classes"]):
            raise BadFile(f"{source}: its .json has {len(description['classes'])} classes, the network another number")
        model = backbone.build(architecture["old_classes"])
        for path in replaced_layers(head_paths, architecture["head"]):
            plain_head(model, path, architecture["head"], len(description["classes"]), architecture["head_width"])
        missing, extra = load_state(model, tensors, getattr(tensors, "_metadata", None), source)
    except UsageError as error:
        raise BadFile(str(error)) from None
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError, OverflowError) as error:
        if isinstance(error, FinetuneError):
            raise
        raise BadFile(f"{source}: its .json describes no network ({one_line(error)}); export it again") from None
    if missing or extra:
        names = ", ".join([*missing, *extra][:5])
        raise BadFile(f"{source} does not fit the architecture in its .json: {names}, ...; export it again")
    return model.eval()


def load_described(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """`load`, and what the JSON says."""
    file = Path(path)
    if not file.is_file():
        raise RunError(f"export {file} does not exist; make it with: finetune export RUN")
    if file.suffix == ".onnx":
        raise RunError(f"export {file}: an .onnx is for onnxruntime; give the .pt or .safetensors of the same run")
    description = read_description(file)
    found = sha256_of_file(file)
    if found not in {description["sha256"], *description["files"].values()}:
        raise BadFile(f"{file} does not match its .json (sha256 {found}); export it again")
    return rebuild(description, read_weights(file), str(file)), description


def load(path: str | Path) -> nn.Module:
    """Rebuild the model of an export: in eval mode, on the CPU. Runs no code from the file or its JSON.

    Args:
        path: the .pt or .safetensors; its .json must lie beside it.

    Returns:
        A module: (batch, 3, height, width) float32, prepared as the JSON says, to (batch, classes) logits.

    Raises:
        RunError: the files are missing, damaged, or do not belong together.
    """
    return load_described(path)[0]
