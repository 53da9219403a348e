"""A folder that transformers' `from_pretrained` loads: config, weights, tokenizer; of a run on texts.

A run with stock pooling becomes a classification model for `pipeline("text-classification")`. With another pooling it
becomes a sentence encoder, with the small files by which sentence-transformers knows how to pool, its head beside it;
so does an encoder without a head, as distillation makes it.
"""

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.base.files import TEMPORARY_SUFFIX, read_json, sha256_of_file, sync_folder, write_json
from finetune.data.tokens import KEPT_FILES, PADDING, SETTINGS_FILE, Tokenization
from finetune.errors import RunError, UsageError
from finetune.export.card import Program, write_card
from finetune.export.load import rebuild
from finetune.export.program import program_of
from finetune.export.receiver import Seen, receive
from finetune.export.verify import Trained, hold_against, trained_tensors
from finetune.export.weights import describe
from finetune.models import hub, text_encoders
from finetune.models.heads import NO_HEAD
from finetune.models.stock import reason_against_folder, threshold_lines
from finetune.store.run_folder import RunFolder
from finetune.store.state import generators_put_back

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Marks a folder as an export of ours, which a later one may replace.
RECORD_FILE = "finetune.json"
# The head, where transformers has no class for it; and the card, where people look for one in such a folder.
HEAD_FILE, CARD_FILE, WEIGHTS_FILE = "head.safetensors", "README.md", "model.safetensors"
# All that such an export consists of.
WRITTEN = {
    RECORD_FILE, HEAD_FILE, CARD_FILE, hub.CONFIG_FILE, WEIGHTS_FILE, *KEPT_FILES, "modules.json",
    text_encoders.LENGTH_FILE, text_encoders.POOLING_FILE.partition("/")[0],
}  # fmt: skip
PROBLEMS = {
    "classification": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
# Rounding to 16 bits moves a logit by about this share of their spread.
HALF_TOLERANCE = 5e-3


@dataclass(frozen=True)
class FolderReport:
    """What was written and how it compares with the run."""

    folder: Path
    largest_difference: float
    trained: Trained
    thresholds: list[float]
    program: str
    seen: Seen

    def text(self) -> str:
        size_bytes = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        head = f", the head in {HEAD_FILE}" if (self.folder / HEAD_FILE).exists() else ""
        lines = [
            f"{self.folder}: {size_bytes:,} bytes: config, weights, tokenizer{head}, a card ({CARD_FILE})",
            *(
                [f"sentence-transformers loads it as an encoder: SentenceTransformer({str(self.folder)!r})"]
                * bool(head)
            ),
            self.trained.checked("loaded by transformers' from_pretrained", self.largest_difference),
            *threshold_lines(self.thresholds, self.folder / RECORD_FILE),
            f"the program below uses it without this kit; {self.seen.text()}",
            "",
        ]
        return "\n".join(lines) + self.program


@generators_put_back()
def export_folder(run: RunFolder, which: str, output: Path, half: bool) -> FolderReport:
    """Write a checkpoint as a folder for transformers, load it again and compare.

    Args:
        which: "best", "latest" or "final".
        output: the folder; must not exist, be empty, or be an earlier export.
        half: store numbers of 16 bits.

    Raises:
        UsageError: the run is of images, or no class of transformers computes what it does.
        RunError: the run cannot be read, or the folder's outputs are not the run's.
    """
    dtype = torch.float16 if half else torch.float32
    trained = trained_tensors(run, which, dtype)
    _check_possible(trained)
    _check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".exporting-", suffix=TEMPORARY_SUFFIX, dir=output.parent) as place:
        folder = Path(place) / "model"
        description = {name: value for name, value in describe(run, which, trained).items() if name != "novelty"}
        rebuilt = rebuild(description, trained.tensors, str(run.path))
        model = _Loaded(_write(trained, folder, half), _head_of(trained, rebuilt, folder), _pooling(trained))
        tolerance = HALF_TOLERANCE if half else 0.0
        difference = hold_against(
            f"export {output}", trained, model, lambda model, tokens: model(tokens), tolerance, dtype
        )
        write_json(folder / RECORD_FILE, description)
        if output.exists():
            output.replace(Path(place) / "earlier")
        folder.replace(output)
        sync_folder(output.parent)
    program = program_of(output, description, rebuilt, is_folder=True, record=RECORD_FILE, head_file=HEAD_FILE)
    seen, sha256 = receive(program, trained, description), sha256_of_file(output / WEIGHTS_FILE)
    described = description | {"files": {output.name: sha256}, "sha256": sha256}
    write_card(output / CARD_FILE, run, trained, described, [Program(output.name, program, seen.text())])
    return FolderReport(output, difference, trained, description.get("thresholds", []), program, seen)


def _pooling(trained: Trained) -> str:
    """How the folder's encoder is pooled; "" = it is a classification model."""
    pooling: str = trained.backbone.options["pooling"]
    return pooling if pooling != "stock" or trained.recipe.model.head == NO_HEAD else ""


class _Loaded(nn.Module):
    """What transformers loads from the folder, with its pooling and head: tokens (batch, length) with `PADDING` to what
    the run's network gives."""

    def __init__(self, model: "PreTrainedModel", head: nn.Module, pooling: str):
        super().__init__()
        self.model, self.head, self.pooling = model, head, pooling
        self.padding = int(model.config.pad_token_id or 0)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != PADDING
        tokens = tokens.masked_fill(~mask, self.padding)
        output = self.model(input_ids=tokens, attention_mask=mask.long())
        if not self.pooling:
            logits: Tensor = output.logits
            return logits
        found: Tensor = self.head(text_encoders.pooled(output.last_hidden_state, mask, self.pooling))
        return found


def _head_of(trained: Trained, rebuilt: nn.Module, folder: Path) -> nn.Module:
    """Write the head beside an encoder, and load it again; nothing where it is a part of the model."""
    if not _pooling(trained) or trained.recipe.model.head == NO_HEAD:
        return nn.Identity()
    prefix = f"{trained.network.head_paths[-1]}."
    tensors = {name.removeprefix(prefix): value for name, value in trained.tensors.items() if name.startswith(prefix)}
    save_file(tensors, folder / HEAD_FILE)
    head = copy.deepcopy(rebuilt.get_submodule(trained.network.head_paths[-1]))
    head.load_state_dict(load_file(folder / HEAD_FILE), strict=True)
    return head.eval()


def _check_output(output: Path) -> None:
    """Raises: UsageError: the folder holds something that is no earlier export of ours."""
    if not os.path.lexists(output):
        return
    names = {path.name for path in output.iterdir()} if output.is_dir() else {output.name}
    is_export = RECORD_FILE in names and names <= WRITTEN
    if is_export:
        try:
            is_export = "source_run" in read_json(output / RECORD_FILE, "record of an export")
        except RunError:
            is_export = False
    if names and not is_export:
        other = min(names - WRITTEN, default=RECORD_FILE)
        raise UsageError(f"--output {output}: holds something else ({other}); name a new folder")


def _check_possible(trained: Trained) -> None:
    """Raises: UsageError: why there is no such folder for this run."""
    if not trained.backbone.reads_texts:
        raise UsageError("--format hf: is for runs on texts; give pt, safetensors or onnx")
    if why := reason_against_folder(trained.recipe, trained.backbone, trained.apart):
        raise UsageError(f"--format hf: {why}")


def _write(trained: Trained, folder: Path, half: bool) -> "PreTrainedModel":
    """Write the folder; return what transformers loads from it."""
    from transformers import AutoTokenizer

    tokenization = trained.backbone.preprocessing
    assert isinstance(tokenization, Tokenization)
    is_encoder = bool(_pooling(trained))
    model = _encoder(trained) if is_encoder else _classifier(trained)
    with hub.refusing(f"export {folder.name}: transformers cannot write it"):
        nn.Module.to(model, torch.float16 if half else torch.float32)  # in place
        model.save_pretrained(folder)
    files = tokenization.files or {}
    settings = json.loads(files[SETTINGS_FILE]) | {"model_max_length": tokenization.max_length}
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    for name, content in (files | {SETTINGS_FILE: text}).items():
        (folder / name).write_text(content, encoding="utf-8")
    if is_encoder:
        _write_sentence_files(folder, trained.backbone.options, tokenization)
    with hub.refusing(f"export {folder.name}: transformers cannot load it"):
        text_encoders.check_tokenizer(AutoTokenizer.from_pretrained(folder), tokenization, f"export {folder.name}")
        return type(model).from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()


def _classifier(trained: Trained) -> "PreTrainedModel":
    """The stock classification model, its labels named."""
    classes, task = trained.state.data.classes, trained.recipe.task.kind
    names = dict(enumerate(classes)) or {0: "value"}
    numbers = {name: number for number, name in names.items()}
    labels = {"id2label": names, "label2id": numbers, "problem_type": PROBLEMS[task]}
    config = text_encoders.config_of(trained.backbone.options, **labels)
    with hub.refusing("the config of this backbone cannot be used"):
        model = text_encoders.stock_class().from_config(config, dtype=torch.float32, trust_remote_code=False)
    _fill(model, trained.tensors)
    return model


def _encoder(trained: Trained) -> "PreTrainedModel":
    """The stock encoder, without a pooler."""
    from transformers import PreTrainedModel

    with hub.refusing("the config of this backbone cannot be used"):
        network = text_encoders.build(trained.backbone.options, 1)
    prefix = str(network.base_model_prefix)
    encoder = network.get_submodule(prefix)
    assert isinstance(encoder, PreTrainedModel)
    own = f"{prefix}."
    _fill(
        encoder,
        {name.removeprefix(own): value for name, value in trained.tensors.items() if name.startswith(own)},
    )
    return encoder


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise RunError(f"the run's weights do not fit transformers' class ({str(error)[:200]}); report it") from None
    model.eval()


def _write_sentence_files(folder: Path, options: dict[str, Any], tokenization: Tokenization) -> None:
    """How sentence-transformers pools, and how long a text may be."""
    pooling = {
        "word_embedding_dimension": text_encoders.width_of(options),
        "pooling_mode_cls_token": options["pooling"] == "cls",
        "pooling_mode_mean_tokens": options["pooling"] == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    kinds = {"": "sentence_transformers.models.Transformer", "1_Pooling": "sentence_transformers.models.Pooling"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    (folder / text_encoders.POOLING_FILE).parent.mkdir()
    contents = {
        text_encoders.POOLING_FILE: pooling,
        "modules.json": modules,
        text_encoders.LENGTH_FILE: {"max_seq_length": tokenization.max_length, "do_lower_case": False},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
