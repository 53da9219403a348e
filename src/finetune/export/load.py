"""An export, read: its JSON, and the network that the JSON describes. Nothing of either is executed."""

import functools
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.base.files import BadFile, read_json, sha256_of_file
from finetune.base.migrate import Steps, migrate
from finetune.base.plain import Fields
from finetune.base.terminal import say_aside
from finetune.data.preprocess import Preprocessing
from finetune.data.tokens import Tokenization, tokenizer_folder
from finetune.errors import FinetuneError, RunError, UsageError, one_line
from finetune.models.backbones import backbone_of_export
from finetune.models.folding import is_scale, take_apart
from finetune.models.heads import find_head, plain_head, replaced_layers
from finetune.models.weight_files import read_weights
from finetune.models.weights import load_state
from finetune.recipe.spec import TASKS
from finetune.store.run_folder import RunFolder, peek
from finetune.store.state import generators_put_back
from finetune.tasks.novelty import NoveltyReference

SCHEMA_VERSION = 3
# What runs files that hold the network itself.
OTHER_RUNTIMES = {".onnx": "onnxruntime", ".pt2": "torch.export.load"}
# From the schema that is the key to the next one; 3 is the first that outlives a version of the kit.
MIGRATIONS: Steps = {}


def read_description(file: Path) -> dict[str, Any]:
    """The JSON beside an export.

    Raises:
        RunError: missing, damaged, or of a schema that cannot be read.
    """
    path = file.with_suffix(".json")
    description = read_json(path, "description of the export")
    needed = {"task", "classes", "architecture", "preprocessing", "sha256", "files"}
    instead = "export it again with this version"
    description = migrate(description, str(path), SCHEMA_VERSION, MIGRATIONS, instead)
    try:
        fields = Fields(description, str(path))
        fields.text("sha256"), fields.values("files", str)
        classes, task = fields.items("classes", str), fields.text("task")
        good = needed <= set(description) and task in TASKS and len(set(classes)) == len(classes)
        good &= "thresholds" not in description or len(fields.items("thresholds", float)) == len(classes)
        good &= "scale" not in description or is_scale(description["scale"])
        if "novelty" in description:
            fields.fields("novelty").text("sha256")
            fields.fields("novelty").text("layer")
        good &= "levels" not in description or len(fields.items("levels", float)) > 1
        if "interval" in description:
            good &= fields.fields("interval").number("half_width") > 0
    except BadFile:
        good = False
    if not good:
        raise BadFile(f"{path} does not describe an export; keep the .json that was written with it")
    return description


@generators_put_back()
def rebuild(description: dict[str, Any], tensors: dict[str, Tensor], source: str) -> nn.Module:
    """The network that a description names, with these tensors; in eval mode, on the CPU.

    Raises:
        RunError: the two do not belong together; calls them `source`.
    """
    architecture = description["architecture"]
    try:
        backbone = backbone_of_export(description)
        head_paths = find_head(backbone.build)
        again = "export it again"
        if architecture["head"] != "keep" and architecture["head_paths"] != head_paths:
            raise BadFile(f"{source}: {architecture['head_paths']} is not the head of {backbone.name}; {again}")
        outputs, classes = architecture["outputs"], len(description["classes"])
        if architecture["head"] != "append" and architecture["old_classes"] != outputs:
            raise BadFile(f"{source}: its .json has {outputs} outputs, the network another number; {again}")
        if classes and classes != (2 if architecture.get("one_logit") else outputs):
            raise BadFile(f"{source}: its .json has {classes} classes, the network another number; {again}")
        model = backbone.build(architecture["old_classes"])
        for path in replaced_layers(head_paths, architecture["head"]):
            plain_head(model, path, architecture["head"], architecture["outputs"], architecture["head_width"])
        take_apart(model, architecture.get("standardised", []), bool(architecture.get("unit_rows", False)))
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
    if runtime := OTHER_RUNTIMES.get(file.suffix):
        raise RunError(f"export {file}: is a file for {runtime}; give the .pt or .safetensors of the same run")
    description = read_description(file)
    found = sha256_of_file(file)
    if found not in {description["sha256"], *description["files"].values()}:
        raise BadFile(f"{file} does not match its .json (sha256 {found}); export it again")
    return rebuild(description, read_weights(file), str(file)), description


def novelty_file(file: Path) -> Path:
    """Where an export's features of training samples lie."""
    return file.with_name(f"{file.stem}-novelty.safetensors")


def read_novelty(file: Path, description: dict[str, Any]) -> NoveltyReference | None:
    """What an export knows of the samples that it was trained on; None = nothing. Where it should and does not, that is
    said.

    Raises:
        BadFile: the file is damaged, or of another export.
    """
    if "novelty" not in description:
        return None
    path = novelty_file(file)
    if not path.is_file():
        say_aside(f"finetune: {path} is missing, so samples that are like nothing it was trained on are not told apart")
        return None
    if sha256_of_file(path) != description["novelty"]["sha256"]:
        raise BadFile(f"{path} does not match {file.with_suffix('.json')}; export it again")
    try:
        return NoveltyReference.from_tensors(load_file(path))
    except (ValueError, SafetensorError) as error:
        raise BadFile(f"{path} is damaged ({one_line(error)}); export it again") from None


def in_own_unit(model: nn.Module, description: dict[str, Any]) -> nn.Module:
    """The model giving numbers in their own unit, where that is not folded into its weights: (batch, 1), in float64,
    as float32 could not tell them apart."""
    if scale := description.get("scale"):
        model.register_forward_hook(functools.partial(_in_unit, *scale))
    return model


def _in_unit(mean: float, deviation: float, _module: nn.Module, _inputs: object, outputs: Tensor) -> Tensor:
    """A forward hook: standardised numbers in their own unit."""
    outputs = outputs.cpu() if outputs.device.type == "mps" else outputs  # which has no float64
    return outputs.double() * deviation + mean


def prepared(file: Path, description: dict[str, Any]) -> Preprocessing | Tokenization:
    """What is done to images, or texts, before the network of an export sees them."""
    preprocessing = backbone_of_export(description).preprocessing
    return preprocessing.read(tokenizer_folder(file)) if isinstance(preprocessing, Tokenization) else preprocessing


def is_export_of(file: Path, run: RunFolder, which: str) -> bool:
    """Whether a file is there, whole, and of this checkpoint of a run as it is now."""
    try:
        description = read_description(file)
        state = peek(run.checkpoints / f"{which}.pt")
        same = description["checkpoint"] == {"which": which, "step": state.progress.step}
        return same and description.get("run_id") == state.run_id and sha256_of_file(file) == description["sha256"]
    except (FinetuneError, OSError):
        return False
