"""Distillation of sentence embeddings: a student that begins as a part of its teacher, and what the teacher gives.

A student of a few of the teacher's layers, evenly spread, learns faster than one from nothing: Sanh et al.,
"DistilBERT, a distilled version of BERT", 2019. The teacher runs over the texts once; what it gives is kept like the
features of any frozen backbone.
"""

import dataclasses
import json
import re
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.tokens import TOKENIZER_FILE, Tokenization, hash_of_files
from finetune.errors import UsageError
from finetune.models import text_encoders
from finetune.models.backbones import Backbone, backbone_from_plain

LAYER = re.compile(r"(\.layer\.)(\d+)(\.)")
EMBEDDINGS = "embeddings.word_embeddings.weight"
# Of a config: a network this small has nothing to spare.
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


# ---- The student ----------------------------------------------------------------------------------------------------


def student_of(
    teacher: Backbone, tensors: dict[str, Tensor], texts: list[str], layers: int, vocabulary_size: int
) -> tuple[Backbone, dict[str, Tensor]]:
    """A smaller encoder and what it begins with.

    Args:
        tensors: the teacher's, by their stock names.
        layers: to keep; 0 = all.
        vocabulary_size: tokens to keep; 0 = all.

    Raises:
        UsageError: the teacher's architecture or tokenizer cannot be made smaller so.
    """
    config = teacher.options["config"]
    config = config | {name: 0.0 for name in DROPOUTS if name in config}
    tokenization = teacher.preprocessing
    assert isinstance(tokenization, Tokenization), "a teacher reads texts"
    if layers:
        config, tensors = _fewer_layers(config, tensors, layers)
    if vocabulary_size:
        tokenization, kept = _fewer_tokens(tokenization, texts, vocabulary_size)
        names = [name for name in tensors if name.endswith(EMBEDDINGS)]
        if len(names) != 1:
            raise UsageError(
                f"--vocabulary-size {vocabulary_size}: a {config['model_type']} keeps its tokens elsewhere; give 0"
            )
        tensors = tensors | {names[0]: tensors[names[0]][kept]}
        config = config | {"vocab_size": len(kept), "pad_token_id": _place(kept, config.get("pad_token_id") or 0)}
    plain = {"name": teacher.name, "options": teacher.options | {"config": config}, "preprocessing": {}}
    student = backbone_from_plain(plain | {"preprocessing": tokenization.to_plain()})
    return dataclasses.replace(student, preprocessing=tokenization), tensors


def _place(kept: Tensor, token: int) -> int:
    return int((kept == token).nonzero()[0])


def _fewer_layers(
    config: dict[str, Any], tensors: dict[str, Tensor], count: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Evenly spread layers, the first among them."""
    found = sorted({int(match[2]) for name in tensors if (match := LAYER.search(name))})
    option = text_encoders.layers_option(config)
    if len(found) != config.get(option):
        raise UsageError(f"--layers {count}: the layers of a {config['model_type']} are not known; give --layers 0")
    if not 1 <= count <= len(found):
        raise UsageError(f"--layers {count}: the teacher has {len(found)}; give 1 to {len(found)}, or 0 for all")
    chosen = [found[round(place)] for place in np.linspace(0, len(found) - 1, count)] if count > 1 else found[:1]
    numbers = {old: new for new, old in enumerate(chosen)}
    kept = OrderedDict()
    for name, value in tensors.items():
        match = LAYER.search(name)
        if match is None:
            kept[name] = value
        elif int(match[2]) in numbers:
            kept[LAYER.sub(rf"\g<1>{numbers[int(match[2])]}\g<3>", name, count=1)] = value
    return config | {option: count}, kept


def _fewer_tokens(tokenization: Tokenization, texts: list[str], count: int) -> tuple[Tokenization, Tensor]:
    """The tokenizer with only the tokens that are most frequent in the texts, those it marks texts with, and every
    single ASCII character; and the old numbers of what is kept (tokens,) int64."""
    assert tokenization.files is not None
    plain = json.loads(tokenization.files[TOKENIZER_FILE])
    if plain["model"]["type"] != "WordPiece":
        raise UsageError(f"--vocabulary-size {count}: of a {plain['model']['type']} tokenizer all must stay; give 0")
    vocabulary: dict[str, int] = plain["model"]["vocab"]
    counts = np.bincount(tokenization.tokenize(texts).tokens, minlength=max(vocabulary.values()) + 1)
    special = {token["content"] for token in plain["added_tokens"]}
    prefix = plain["model"]["continuing_subword_prefix"]

    def is_always_kept(token: str) -> bool:
        piece = token.removeprefix(prefix)
        return token in special or (len(piece) == 1 and piece.isascii())

    fewest = sum(map(is_always_kept, vocabulary))
    if not fewest <= count <= len(vocabulary):
        raise UsageError(f"--vocabulary-size {count}: not allowed; give {fewest} to {len(vocabulary)}, or 0 for all")
    ranked = sorted(vocabulary, key=lambda token: (not is_always_kept(token), -counts[vocabulary[token]]))
    kept = sorted(ranked[:count], key=vocabulary.__getitem__)
    old = [vocabulary[token] for token in kept]
    new = {token: number for number, token in enumerate(kept)}
    plain["model"]["vocab"] = new
    for token in plain["added_tokens"]:
        token["id"] = new[token["content"]]
    post = plain["post_processor"]
    if post["type"] != "TemplateProcessing":
        raise UsageError(f"--vocabulary-size {count}: a tokenizer with {post['type']} cannot be made smaller; give 0")
    for token in post["special_tokens"].values():
        token["ids"] = [new[name] for name in token["tokens"]]
    content = json.dumps(plain, ensure_ascii=False)
    files = tokenization.files | {TOKENIZER_FILE: content}
    smaller = dataclasses.replace(
        tokenization, vocabulary_size=len(kept), sha256=hash_of_files(files), files=files
    )  # fmt: skip
    return smaller, torch.tensor(old)


# ---- The teacher ----------------------------------------------------------------------------------------------------
