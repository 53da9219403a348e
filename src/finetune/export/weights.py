"""From a run to a file that stock libraries load.

A `.pt` (or `.safetensors`) holds a plain state dict; the JSON beside it says how to build the network for it, what to
do to an image or text first and what the classes are called; of a text encoder the tokenizer lies there too. None is
ever executed. An `.onnx` or `.pt2` holds the network as well; what "hf" writes is a folder for transformers.
"""

import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.base.files import TEMPORARY_SUFFIX, sha256_of_file, write_atomically, write_json
from finetune.base.formatting import finite
from finetune.base.terminal import say_aside
from finetune.data.tokens import Tokenization, tokenizer_folder
from finetune.errors import RunError, UsageError
from finetune.export.card import Program, write_card
from finetune.export.graphs import write_onnx, write_torch_export
from finetune.export.load import SCHEMA_VERSION, novelty_file, read_description, rebuild
from finetune.export.program import program_of
from finetune.export.receiver import Seen, receive
from finetune.export.verify import Trained, hold_against, trained_tensors
from finetune.models.freeze import hash_tensors
from finetune.models.network import Network
from finetune.models.stock import is_stock, no_stock_lines, threshold_lines
from finetune.models.weight_files import read_weights
from finetune.recipe.spec import Recipe
from finetune.store.checkpoint import read_checkpoint
from finetune.store.restore import shipped_half_width, shipped_thresholds
from finetune.store.run_folder import RunFolder
from finetune.store.state import CheckpointState, generators_put_back
from finetune.tasks.conformal import COVERAGE
from finetune.tasks.novelty import READ_BY, ROWS, about_file

FORMATS = (".pt", ".safetensors", ".onnx", ".pt2")
# What `--format` says, by the end of the file's name.
SUFFIXES = {"pt": ".pt", "safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
# Another runtime has other kernels: by this share of the outputs' spread it may differ.
GRAPH_TOLERANCE = 1e-4
# How tokens become what the head reads, for people.
POOLING_TEXTS = {
    "stock": "pooled as transformers' own class does",
    "mean": "the last hidden states of all tokens are averaged, and `classifier` is applied to that",
    "cls": "`classifier` is applied to the first token's last hidden state",
}
WHERE_CHECKED = {".onnx": "run in onnxruntime", ".pt2": "loaded and run by plain torch"}


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it compares with the run.

    Attributes:
        program: uses the file without this kit.
        seen: what that says of some samples.
        card: the model's card.
    """

    file: Path
    description: dict[str, Any]
    largest_difference: float
    trained: Trained
    program: str
    seen: Seen
    card: Path

    def text(self) -> str:
        where = WHERE_CHECKED.get(self.file.suffix, "loaded into a fresh model")
        lines = [
            f"{self.file}: {self.file.stat().st_size:,} bytes, sha256 {self.description['sha256']}",
            f"{self.file.with_suffix('.json')}: classes, preprocessing, architecture",
            *([f"{tokenizer_folder(self.file)}: tokenizer"] if self.trained.backbone.reads_texts else []),
            *([f"{novelty}: what it has seen"] if (novelty := novelty_file(self.file)).exists() else []),
            f"{self.card}: a card for whoever gets it: data, figures, limits, licences, and this program",
            self.trained.checked(where, self.largest_difference, "; finetune.load and finetune predict do that"),
            *threshold_lines(self.description.get("thresholds", []), self.file.with_suffix(".json")),
            *no_stock_lines(self.description["architecture"]),
            f"the program below uses it without this kit; {self.seen.text()}",
            "",
        ]
        return "\n".join(lines) + self.program


@generators_put_back()
def export(run: RunFolder, which: str, output: Path) -> ExportReport:
    """Write the weights of a checkpoint for other programs, load them again and compare.

    Args:
        which: "best", "latest" or "final".
        output: ends in one of `FORMATS`; a .json and a card of the same name are written beside it.

    Raises:
        RunError: the run cannot be read, or the file's outputs are not the run's.
        UsageError: a package that ONNX needs is missing.
    """
    trained = trained_tensors(run, which)
    if output.is_dir():
        raise UsageError(f"--output {output}: is a folder; name a file")
    description = describe(run, which, trained)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".exporting-", suffix=TEMPORARY_SUFFIX, dir=output.parent) as place:
        temporary = Path(place) / output.name
        if output.suffix in WHERE_CHECKED:
            model = rebuild(description, trained.tensors, str(run.path))
            write = write_onnx if output.suffix == ".onnx" else write_torch_export
            found = write(model, trained.samples, temporary)
            difference = hold_against(f"export {output}", trained, model, lambda *_: found, GRAPH_TOLERANCE)
        else:
            write_tensors(temporary, trained.tensors)
            model = rebuild(description, read_weights(temporary), str(temporary))
            difference = hold_against(f"export {output}", trained, model, lambda model, samples: model(samples))
        sha256 = write_atomically(output, lambda stream: _copy_into(stream, temporary))
    if isinstance(trained.backbone.preprocessing, Tokenization):
        trained.backbone.preprocessing.write(tokenizer_folder(output))
    if "novelty" not in description:
        if (stale := novelty_file(output)).exists():
            stale.unlink()
            say_aside(f"finetune: {stale} was of another checkpoint, or of an older version, and is gone")
    elif output.suffix not in WHERE_CHECKED:  # only this kit reads it
        write_atomically(novelty_file(output), lambda stream: _copy_into(stream, run.novelty_file))
    description |= {"sha256": sha256, "files": {output.name: sha256} | other_formats(output, description)}
    write_json(output.with_suffix(".json"), description)
    program_for = partial(program_of, description=description, model=model, heif=trained.compared.has_heif)
    program = program_for(output)
    seen = receive(program, trained, description)
    others = [output.with_name(name) for name in description["files"] if name != output.name]
    programs = [Program(output.name, program, seen.text())]
    programs += [Program(other.name, program_for(other)) for other in others]
    card = write_card(output.with_suffix(".md"), run, trained, description, programs)
    return ExportReport(output, description, difference, trained, program, seen, card)


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
            "outputs": 1 if recipe.model.one_logit else state.data.outputs,
            "old_classes": network.old_class_count,
            "stock": is_stock(recipe, backbone) and not trained.apart,
            **({"standardised": trained.apart} if trained.apart else {}),
            **({"unit_rows": True} if recipe.model.unit_rows else {}),
            # Its one number is the logit of the second class; the first has 0.
            **({"one_logit": True} if recipe.model.one_logit else {}),
        },
        # From which probability on each class applies.
        **({"thresholds": thresholds} if (thresholds := shipped_thresholds(which, state)) else {}),
        # Mean and deviation of the numbers that it gives, where the weights could not hold them.
        **({"scale": trained.scale} if trained.scale else {}),
        # Numbers that are steps of a scale.
        **({"levels": state.data.levels} if state.data.levels else {}),
        **({"interval": {"coverage": COVERAGE, "half_width": width}} if (width := _half_width(which, state)) else {}),
        **_novelty(run, network, recipe),
        "preprocessing": preprocessing.to_plain(),
        "preprocessing_text": how,
        "quotes": recipe.data.quotes,
        "metrics": finite(_metrics(which, state)),
        "checkpoint": {"which": which, "step": state.progress.step},
        "source_run": run.path.resolve().name,
        "run_id": state.run_id,
        "precision_trained": trained.numerics.precision,
    }


def _half_width(which: str, state: CheckpointState) -> float:
    width = shipped_half_width(which, state)
    return width if math.isfinite(width) else 0.0


def _novelty(run: RunFolder, network: Network, recipe: Recipe) -> dict[str, Any]:
    """What the JSON says of the features of training samples; {} = the run kept none that this checkpoint's head
    reads."""
    about = about_file(run.novelty_file)
    if not about or about.get(READ_BY) != hash_tensors(network.changeable_before_head(recipe.trainable)):
        return {}
    layer = network.first_layer_path
    return {"novelty": {"sha256": sha256_of_file(run.novelty_file), "layer": layer, "samples": int(about[ROWS])}}


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
