"""From a run to a file that stock libraries load.

A `.pt` (or `.safetensors`) holds a plain state dict; the JSON beside it says how to build the network for it, what to
do to an image or text first and what the classes are called; of a text encoder the tokenizer lies there too. None is
ever executed. An `.onnx` holds the network as well; what "hf" writes is a folder for transformers.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.base.files import TEMPORARY_SUFFIX, write_atomically, write_json
from finetune.base.formatting import finite
from finetune.data.tokens import Tokenization, tokenizer_folder
from finetune.errors import RunError, UsageError
from finetune.export.load import SCHEMA_VERSION, read_description, rebuild
from finetune.export.onnx import write_onnx
from finetune.export.verify import Trained, hold_against, trained_tensors
from finetune.models.snippets import is_stock, loading_lines, threshold_lines
from finetune.models.weights import read_weights
from finetune.store.checkpoint import read_checkpoint
from finetune.store.restore import shipped_thresholds
from finetune.store.run_folder import RunFolder
from finetune.store.state import CheckpointState, generators_put_back

FORMATS = (".pt", ".safetensors", ".onnx")
# Another runtime has other kernels: by this share of the outputs' spread it may differ.
ONNX_TOLERANCE = 1e-4
# How tokens become what the head reads, for people.
POOLING_TEXTS = {
    "stock": "pooled as transformers' own class does",
    "mean": "the last hidden states of all tokens are averaged, and `classifier` is applied to that",
    "cls": "`classifier` is applied to the first token's last hidden state",
}


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it compares with the run."""

    file: Path
    description: dict[str, Any]
    largest_difference: float
    trained: Trained

    @property
    def stock_lines(self) -> str:
        """Lines of Python that load the file without this kit."""
        return loading_lines(self.file, self.description)

    @property
    def _options(self) -> dict[str, Any]:
        return self.description["architecture"]["options"]

    def text(self) -> str:
        where = "run in onnxruntime" if self.file.suffix == ".onnx" else "loaded into a fresh model"
        lines = [
            f"{self.file}: {self.file.stat().st_size:,} bytes, sha256 {self.description['sha256']}",
            f"{self.file.with_suffix('.json')}: classes, preprocessing, architecture",
            *([f"{tokenizer_folder(self.file)}: tokenizer"] if "pooling" in self._options else []),
            self.trained.checked(where, self.largest_difference, "; finetune.load and finetune predict do that"),
            *threshold_lines(self.description.get("thresholds", []), self.file.with_suffix(".json")),
            "",
        ]
        return "\n".join(lines) + self.stock_lines


@generators_put_back()
def export(run: RunFolder, which: str, output: Path) -> ExportReport:
    """Write the weights of a checkpoint for other programs, load them again and compare.

    Args:
        which: "best", "latest" or "final".
        output: ends in .pt, .safetensors or .onnx; a .json of the same name is written beside it.

    Raises:
        RunError: the run cannot be read, or the file's outputs are not the run's.
        UsageError: a package that ONNX needs is missing.
    """
    trained = trained_tensors(run, which)
    if output.suffix == ".onnx" and trained.backbone.reads_texts:
        raise UsageError(f"--output {output}: .onnx files are for images only; give .pt, .safetensors or --format hf")
    if output.is_dir():
        raise UsageError(f"--output {output}: is a folder; name a file")
    description = describe(run, which, trained)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".exporting-", suffix=TEMPORARY_SUFFIX, dir=output.parent) as place:
        temporary = Path(place) / output.name
        if output.suffix == ".onnx":
            model = rebuild(description, trained.tensors, str(run.path))
            found = write_onnx(model, trained.samples, temporary)
            difference = hold_against(f"export {output}", trained, model, lambda *_: found, ONNX_TOLERANCE)
        else:
            write_tensors(temporary, trained.tensors)
            model = rebuild(description, read_weights(temporary), str(temporary))
            difference = hold_against(f"export {output}", trained, model, lambda model, samples: model(samples))
        sha256 = write_atomically(output, lambda stream: _copy_into(stream, temporary))
    if isinstance(trained.backbone.preprocessing, Tokenization):
        trained.backbone.preprocessing.write(tokenizer_folder(output))
    description |= {"sha256": sha256, "files": {output.name: sha256} | other_formats(output, description)}
    write_json(output.with_suffix(".json"), description)
    return ExportReport(output, description, difference, trained)


def describe(run: RunFolder, which: str, trained: Trained) -> dict[str, Any]:
    """What the JSON says of a checkpoint, but for the hashes of files."""
    recipe, backbone, network, state = trained.recipe, trained.backbone, trained.network, trained.state
    preprocessing = backbone.preprocessing
    how = f"RGB; antialiased resize: {preprocessing.text}; / 255; (value - mean) / std by channel"
    if backbone.reads_texts:
        pooling = POOLING_TEXTS[backbone.options["pooling"]]
        how = f"the tokenizer beside this file; {preprocessing.text}, longer texts are cut off; {pooling}"
    return {
        "schema_version": SCHEMA_VERSION,
        "task": recipe.task.kind,
        "classes": state.data.classes,
        "architecture": {
            "backbone": backbone.name,
            "options": backbone.options,
            "head": recipe.model.head,
            "head_paths": network.head_paths,
            "head_width": recipe.model.head_width,
            "outputs": state.data.outputs,
            "old_classes": network.old_class_count,
            "stock": is_stock(recipe, backbone) and not trained.apart,
            **({"standardised": trained.apart} if trained.apart else {}),
            **({"unit_rows": True} if recipe.model.unit_rows else {}),
        },
        # From which probability on each class applies.
        **({"thresholds": thresholds} if (thresholds := shipped_thresholds(which, state)) else {}),
        # Mean and deviation of the numbers that it gives, where the weights could not hold them.
        **({"scale": trained.scale} if trained.scale else {}),
        "preprocessing": preprocessing.to_plain(),
        "preprocessing_text": how,
        "quotes": recipe.data.quotes,
        "metrics": finite(_metrics(which, state)),
        "checkpoint": {"which": which, "step": state.progress.step},
        "source_run": run.path.resolve().name,
        "precision_trained": trained.numerics.precision,
    }


def _metrics(which: str, state: CheckpointState) -> dict[str, float]:
    """Figures of the validation, as what is exported gives them."""
    figures = state.progress.best.get("figures", {}) if which == "best" else {}
    return state.progress.last_validation | {f"val/{name}": value for name, value in figures.items()}


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


def copy_checkpoint(run: RunFolder, which: str, output: Path | None) -> Path:
    """Copy a whole checkpoint (optimizer, generators and all) out of a run, after checking it."""
    source = run.checkpoints / f"{which}.pt"
    read_checkpoint(source, run.read_recipe().id)
    target = output or run.path / f"checkpoint-{which}.pt"
    if target.is_dir():
        raise UsageError(f"--output {target}: is a folder; name a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target
