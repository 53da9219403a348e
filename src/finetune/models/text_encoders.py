"""Text encoders of transformers: BERT and whatever else has a sequence classification class; and pooled ones.

With "stock" pooling the network is transformers' own classification model. With "mean" or "cls" it is the same encoder,
under the same names, its last hidden states pooled, and one linear layer: Reimers and Gurevych, "Sentence-BERT", EMNLP
2019, found the mean of an encoder's tokens a better sentence embedding than what its pooler makes of the first one.
"""

import functools
import inspect
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune.base.files import read_safetensors_header
from finetune.base.safe_load import load_plain
from finetune.data.tokens import (
    KEPT_FILES,
    LONGEST_TEXT_TOKENS,
    PADDING,
    SETTINGS_FILE,
    TOKENIZER_FILE,
    Tokenization,
    hash_of_files,
)
from finetune.errors import UsageError
from finetune.models import hub
from finetune.models.heads import find_head
from finetune.models.shapes import build_shapes

POOLINGS = ("stock", "mean", "cls")
POOLING_FILE = "1_Pooling/config.json"
LENGTH_FILE = "sentence_bert_config.json"
# Of these a tokenizer can be made.
TOKENIZER_FILES = (TOKENIZER_FILE, "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "spm.model")
# Besides config and weights; what there is of it.
FOLDER_FILES = (
    *TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    LENGTH_FILE, POOLING_FILE,
)  # fmt: skip
# Attention costs the square of it; longer has to be asked for.
LONGEST_DEFAULT_TOKENS = 512
# Of a config: what the network returns, whatever its makers wanted to see of it.
PLAIN_OUTPUT = {"return_dict": True, "output_hidden_states": False, "output_attentions": False, "use_cache": False}
# ABOUT stands for what the JSON beside an export says.
STOCK_LINES = """\
from transformers import AutoConfig, AutoModelForSequenceClassification
config = AutoConfig.for_model(**ABOUT["architecture"]["options"]["config"], num_labels={classes})
model = AutoModelForSequenceClassification.from_config(config).float()"""


def stock_class() -> Any:
    """transformers' auto class of text classification models."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification


# ---- What a folder holds --------------------------------------------------------------------------------------------


def describe(folder: Path, pooling: str) -> tuple[dict[str, Any], Tokenization]:
    """Options (plain values: config, resolved pooling) and tokenizer of a model in a folder.

    Args:
        pooling: "auto", "stock", "mean" or "cls".

    Raises:
        UsageError: not a text encoder, or without a tokenizer that can be kept.
    """
    config, plain = hub.read_config(folder)
    for name in ("id2label", "label2id", "problem_type"):  # of whatever it was trained for before
        plain.pop(name, None)
    if type(config) not in stock_class()._model_mapping or config.is_encoder_decoder:
        raise UsageError(
            f"--backbone {folder}: a {config.model_type} is no text encoder with a classification class in "
            "transformers; give one such as BERT, DistilBERT, RoBERTa, DeBERTa or MiniLM"
        )
    vocabulary_size = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary_size, int):
        raise UsageError(
            f"--backbone {folder}: a {config.model_type} has no vocabulary, so no tokens; give a BERT or such"
        )
    build_stock = functools.partial(build, {"config": plain, "pooling": "stock"})
    stock = build_shapes(build_stock, 2)
    if pooling == "auto":
        pooling = _folders_pooling(folder)
    if not pooling:
        pooling = "mean" if _lacks_a_pooler(folder, stock, find_head(build_stock)) else "stock"
    if pooling not in POOLINGS:
        raise UsageError(f"--pooling {pooling}: not allowed; give auto, {', '.join(POOLINGS)}")
    return {"config": plain, "pooling": pooling}, _tokenization(folder, stock, vocabulary_size)


def _folders_pooling(folder: Path) -> str:
    """As sentence-transformers' file says; "" where there is none, or it says something else."""
    given = _small_json(folder / POOLING_FILE)
    if given.get("pooling_mode_mean_tokens"):
        return "mean"
    return "cls" if given.get("pooling_mode_cls_token") else ""


def _small_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with hub.refusing(f"--backbone {path.parent}: its {path.name} cannot be read"):
        found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _lacks_a_pooler(folder: Path, stock: nn.Module, head_paths: list[str]) -> bool:
    """Whether the stock class has more behind the encoder's tokens than its last layer that the folder has no weights
    of: a pooler that would have to be trained from nothing."""
    found, prefix = _names_in(folder), f"{stock.base_model_prefix}."
    between = [name for name, _ in stock.named_parameters() if may_be_new(stock, name)]
    between = [name for name in between if not name.startswith(tuple(f"{path}." for path in head_paths))]
    return any(name not in found and name.removeprefix(prefix) not in found for name in between)


def may_be_new(model: nn.Module, name: str) -> bool:
    """Whether a pretrained file may lack a tensor: what comes behind the encoder's tokens."""
    prefix = f"{model.base_model_prefix}."
    return not name.startswith(prefix) or name.startswith(f"{prefix}pooler.")


def _names_in(folder: Path) -> set[str]:
    """Names of the tensors that a folder holds.

    Raises:
        UsageError: they cannot be read.
    """
    names: set[str] = set()
    for path in hub.weight_files(folder):
        with hub.refusing(f"--backbone {folder}: its weights cannot be read"):
            is_safe = path.suffix == ".safetensors"
            found = read_safetensors_header(path) if is_safe else load_plain(path, mapped=True)
            names |= set(cast(Iterable[str], found))  # what is none is refused like any other
    return names


# ---- Tokenizer -----------------------------------------------------------------------------------------------------


def _tokenization(folder: Path, stock: nn.Module, vocabulary_size: int) -> Tokenization:
    """The tokenizer of a folder, as one file.

    Raises:
        UsageError: there is none, or one that is code rather than a file.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UsageError(f"--backbone {folder}: holds no tokenizer ({', '.join(TOKENIZER_FILES)}); put its files there")
    with hub.refusing(f"--backbone {folder}: its tokenizer cannot be used"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UsageError(
            f"--backbone {folder}: its {type(tokenizer).__name__} cannot be written as a {TOKENIZER_FILE}; give a "
            "model whose tokenizer can"
        )
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    # As the kit pads and cuts: whoever loads an export's tokenizer must do the same.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    with tempfile.TemporaryDirectory() as place:
        tokenizer.name_or_path = ""  # where it lay on this machine
        tokenizer.save_pretrained(place)
        files = {name: (Path(place) / name).read_text(encoding="utf-8") for name in KEPT_FILES}
    settings = hub.without_foreign_code(json.loads(files[SETTINGS_FILE]))
    files[SETTINGS_FILE] = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    limit = most_tokens(stock, tokenizer.model_max_length)
    asked = _small_json(folder / LENGTH_FILE).get("max_seq_length")
    default = min(limit, asked if isinstance(asked, int) and asked > 2 else LONGEST_DEFAULT_TOKENS)
    sha256 = hash_of_files(files)
    tokenization = Tokenization(default, limit, vocabulary_size, sha256, files)
    check_tokenizer(tokenizer, tokenization, f"--backbone {folder}")
    return tokenization


def check_tokenizer(tokenizer: Any, tokenization: Tokenization, what: str) -> None:
    """Hold transformers' own tokenizer against ours, on a short text and on one that is too long.

    Raises:
        UsageError: they differ: it does more than its file says.
    """
    texts = ["A short one, isn't it?", "and one that is too long " * tokenization.max_length]
    table = tokenization.tokenize(texts)
    for number, text in enumerate(texts):
        theirs = tokenizer(text, truncation=True, max_length=tokenization.max_length)["input_ids"]
        if theirs != table.batch([number])[0].tolist():
            raise UsageError(
                f"{what}: its {type(tokenizer).__name__} gives other tokens than its {TOKENIZER_FILE} says; save "
                "it anew with transformers, or give another encoder"
            )


def most_tokens(model: nn.Module, tokenizers_limit: int = LONGEST_TEXT_TOKENS) -> int:
    """The longest text that a model has positions for; without learnt positions what the tokenizer says."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.endswith("position_embeddings"):
            # RoBERTa and its kin begin to count behind the padding's number.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return min(tokenizers_limit, LONGEST_TEXT_TOKENS)


def config_of(options: dict[str, Any], **changes: Any) -> Any:
    """transformers' config of a backbone's options.

    Raises:
        UsageError: it cannot be used.
    """
    from transformers import AutoConfig

    with hub.refusing("the config of this backbone cannot be used"):
        return AutoConfig.for_model(**hub.without_foreign_code(options["config"]) | changes)


def width_of(options: dict[str, Any]) -> int:
    """Width of the hidden states; DistilBERT calls it otherwise."""
    return config_of(options).hidden_size


def layers_option(config: dict[str, Any]) -> str:
    """What a family's config calls the number of layers."""
    return config_of({"config": config}).attribute_map.get("num_hidden_layers", "num_hidden_layers")


# ---- Networks ------------------------------------------------------------------------------------------------------


class PooledClassifier(nn.Module):
    """An encoder, the mean of its tokens or its first one, and a linear layer. The encoder keeps its stock names.

    Args:
        encoder: of transformers, without a pooler of its own.
        prefix: what the stock class calls it.
        pooling: "mean" or "cls".
    """

    def __init__(self, encoder: nn.Module, prefix: str, pooling: str, class_count: int):
        super().__init__()
        self.base_model_prefix = prefix
        self.pooling = pooling
        config: Any = encoder.config  # transformers' own
        self.config = config
        self.add_module(prefix, encoder)
        self.classifier = nn.Linear(config.hidden_size, class_count)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> Tensor:
        """Tokens and mask (batch, length) int64, and what else a tokenizer gives, to what the last layer makes of the
        pooled hidden states."""
        encoder = self.get_submodule(self.base_model_prefix)
        hidden = encoder(input_ids=input_ids, attention_mask=attention_mask, **others).last_hidden_state
        return self.classifier(pooled(hidden, attention_mask, self.pooling))


def pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """(batch, length, width) hidden states to (batch, width): the first token's, or the mean over those of the mask."""
    if pooling == "cls":
        return hidden[:, 0]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def _masked(padding_token: int, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A forward pre-hook: one tensor of tokens becomes what a model of transformers takes; anything else is left."""
    if len(args) != 1 or kwargs:
        return args, kwargs
    mask = args[0] != PADDING
    tokens = args[0].masked_fill(~mask, padding_token)
    return (), {"input_ids": tokens, "attention_mask": mask.long()}


def no_pooler(config: Any) -> dict[str, bool]:
    """What transformers' encoder of a config is told to have no pooler of its own; {} = it never has one."""
    from transformers import AutoModel

    encoder_class: Any = AutoModel._model_mapping[type(config)]
    takes = "add_pooling_layer" in inspect.signature(encoder_class.__init__).parameters
    return {"add_pooling_layer": False} if takes else {}


def build(options: dict[str, Any], output_count: int) -> nn.Module:
    """The network of these options, randomly initialised. It takes tokens (batch, length) int64, `PADDING` behind the
    end of a text, and returns (batch, output_count)."""
    from transformers import AutoModel

    if options["pooling"] not in list(POOLINGS):  # a list: the value may not even be hashable
        raise UsageError(f"pooling {options['pooling']!r} is unknown; allowed are {', '.join(POOLINGS)}")
    config = config_of(options, **PLAIN_OUTPUT, num_labels=output_count)
    with hub.refusing("the config of this backbone cannot be used"):
        kind = stock_class()._model_mapping[type(config)]
        kind = kind[0] if isinstance(kind, tuple) else kind
        if options["pooling"] == "stock":
            model = stock_class().from_config(config, dtype=torch.float32, trust_remote_code=False)
            model.register_forward_hook(hub.only_logits)
        else:
            switches = no_pooler(config)
            encoder = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False, **switches)
            model = PooledClassifier(encoder, kind.base_model_prefix, options["pooling"], output_count)
    hook = functools.partial(_masked, config.pad_token_id or 0)
    model.register_forward_pre_hook(hook, with_kwargs=True)
    return model
