"""Small text encoders of every family, in folders as transformers writes them, and texts that they can tell apart."""

import copy
import csv
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from finetune import TextTable, Training, text_head

ANIMALS = ["cat", "dog", "horse", "cow", "sheep", "goat", "duck", "hen", "mouse", "fox"]
TOOLS = ["hammer", "saw", "drill", "nail", "screw", "wrench", "pliers", "file", "chisel", "ruler"]
FILLERS = [
    "the",
    "a",
    "one",
    "old",
    "new",
    "big",
    "small",
    "we",
    "saw",
    "they",
    "had",
    "it",
    "was",
    "near",
    "my",
    "very",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [*SPECIAL, *LETTERS, *("##" + one for one in LETTERS), *dict.fromkeys(ANIMALS + TOOLS + FILLERS)]
SIZES = {
    "vocab_size": len(VOCABULARY), "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "bert": transformers.BertConfig(**SIZES),
    "minilm": transformers.BertConfig(**SIZES | {"num_hidden_layers": 3}),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=len(VOCABULARY),
        dim=48,
        n_layers=2,
        n_heads=2,
        hidden_dim=32,
        max_position_embeddings=40,
    ),
    "roberta": transformers.RobertaConfig(**SIZES),
    "xlm-roberta": transformers.XLMRobertaConfig(**SIZES | {"pad_token_id": 1}),
    "deberta": transformers.DebertaConfig(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": transformers.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "electra": transformers.ElectraConfig(**SIZES, embedding_size=12),
    "albert": transformers.AlbertConfig(**SIZES, embedding_size=12),
    "mpnet": transformers.MPNetConfig(**SIZES | {"pad_token_id": 1}),
}
# By family: what a stock classification model has that its pretrained encoder lacks.
LACKING = {
    "bert": {"classifier"},
    "minilm": {"classifier"},
    "distilbert": {"pre_classifier", "classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "xlm-roberta": {"classifier.dense", "classifier.out_proj"},
    "deberta": {"pooler.dense", "classifier"},
    "deberta-v2": {"pooler.dense", "classifier"},
    "electra": {"classifier.dense", "classifier.out_proj"},
    "albert": {"classifier"},
    "mpnet": {"classifier.dense", "classifier.out_proj"},
}


def make_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer over `VOCABULARY`."""
    numbers = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", numbers["[CLS]"]), ("[SEP]", numbers["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=40,
    ).save_pretrained(folder)  # fmt: skip


def make_encoder(folder: Path, family: str = "bert", *, pooler: bool = True, initializer_range: float = 0.2) -> Path:
    """A pretrained encoder of a family (drawn from a seed), with its tokenizer; the base model, as hubs offer it.

    Args:
        initializer_range: a small one leaves the words as they are, so that their mean tells which there were.
    """
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    config.initializer_range = initializer_range
    switch = {} if pooler or family not in ("bert", "minilm") else {"add_pooling_layer": False}
    transformers.AutoModel.from_config(config, **switch).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label) of 2 to 22 words; a third of the words say which label."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        label, words = (("animal", ANIMALS), ("tool", TOOLS))[number % 2]
        chosen = [generator.choice(words if generator.random() < 0.33 else FILLERS) for _ in range(number % 21)]
        rows.append((" ".join([*chosen, generator.choice(words), "was"]), label))
    return rows


def write_csv(path: Path, rows: list[tuple], header: tuple = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def text_recipe(texts: Path | str, backbone: Path | str, **changes):
    """A small recipe on texts: 12 steps in 2 epochs of 96 samples to train on."""
    values = {
        "texts": str(texts), "backbone": str(backbone), "revision": "", "weights": "default", "pooling": "auto",
        "max_length": 0, "task": "classification", "head": "linear", "dropout": 0.1, "epochs": 2, "batch_size": 16,
        "lr": 1e-2, "seed": 3, "table": TextTable(), "training": Training(),
    }  # fmt: skip
    return text_head(**values | changes)
