"""Distillation of sentence embeddings: a student that begins as a part of its teacher, and what the teacher gives.

A student of a few of the teacher's layers, evenly spread, learns faster than one from nothing: Sanh et al.,
"DistilBERT, a distilled version of BERT", 2019. The teacher runs over the texts once; what it gives is kept like the
features of any frozen backbone.
"""

import dataclasses
import hashlib
import json
import re
from collections import OrderedDict
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from finetune.base.device import autocast, to_device
from finetune.base.signals import StopRequest
from finetune.base.terminal import Terminal
from finetune.data.contents import Contents
from finetune.data.loader import Loader
from finetune.data.source import TextSource
from finetune.data.texts import TextPipeline
from finetune.data.tokens import TOKENIZER_FILE, Tokenization, hash_of_files
from finetune.errors import RunError, UsageError
from finetune.features.kept import CannotKeep, Features, Pass
from finetune.models import text_encoders
from finetune.models.backbones import Backbone, backbone_from_plain
from finetune.models.heads import NO_HEAD
from finetune.models.network import build_network
from finetune.models.weights import Weights, choose_teacher, read_weights
from finetune.recipe.spec import Distillation, Recipe
from finetune.store.restore import find_pretrained, sized
from finetune.store.state import numeric_environment
from finetune.training.dataset import open_source
from finetune.training.setup import Job, make_loaders

LAYER = re.compile(r"(\.layer\.)(\d+)(\.)")
EMBEDDINGS = "embeddings.word_embeddings.weight"
# Of a config: a network this small has nothing to spare.
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


# ---- The student ----------------------------------------------------------------------------------------------------


def pretrained(recipe: Recipe) -> tuple[Backbone, Weights | None, dict[str, Tensor] | None]:
    """What a recipe begins with: its backbone, the weights (None: random), and, where it is a student that begins as a
    part of those, its tensors. See `find_pretrained`."""
    backbone, weights = find_pretrained(recipe)
    spec = recipe.task
    if not isinstance(spec, Distillation):
        return backbone, weights, None
    source = open_source(recipe.data, spec.kind)
    assert isinstance(source, TextSource) and weights is not None
    student, tensors = student_of(backbone, read_weights(weights.path), source.texts, spec.layers, spec.vocabulary_size)
    return student, weights, tensors


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


def _fewer_layers(config: dict, tensors: dict[str, Tensor], count: int) -> tuple[dict, dict[str, Tensor]]:
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


def taught(job: Job, terminal: Terminal, stop: StopRequest, saved: str = "") -> Job:
    """The job with the teacher's embeddings as its targets, where its task is distillation.

    Args:
        saved: hash of the teacher of the run that goes on.

    Raises:
        RunError: there is no room to keep them, or the teacher is another.
        StoppedEarly: asked for while the teacher ran; what it has computed is kept.
    """
    spec = job.recipe.task
    if not isinstance(spec, Distillation):
        return job
    source = job.data.source
    assert isinstance(source, TextSource)
    teacher = _teacher_pass(job, spec.teacher, source)
    taught_by = hashlib.sha256(
        json.dumps([teacher.identity[name] for name in ("teacher", "weights")]).encode()
    ).hexdigest()
    if saved not in ("", taught_by):
        raise RunError(f"--teacher {spec.teacher}: is not the one that the run began with; put that one there")
    everything = torch.arange(len(source.texts))
    terminal.say(f"teacher: {spec.teacher}")
    try:
        with closing(Features(teacher, {None: everything}, 0)) as embeddings:
            embeddings.check_size(job.machine.cache_limit)
            embeddings.fill(terminal, stop)
            targets = embeddings.read(everything, None).float()
    except CannotKeep as error:
        raise RunError(f"the teacher's embeddings cannot be kept, because {error}; make room for them") from None
    data = dataclasses.replace(job.data.with_targets(targets), taught_by=taught_by)
    loaders = make_loaders(data, job.machine, job.device, Contents(data.source))
    return dataclasses.replace(job, data=data, loaders=loaders)


def _teacher_pass(job: Job, name: str, source: TextSource) -> Pass:
    backbone, weights = choose_teacher(name)
    backbone = sized(backbone, job.recipe)
    network = build_network(
        backbone,
        read_weights(weights.path),
        f"--teacher {name}",
        head=NO_HEAD,
        class_count=1,
        dropout=0.0,
        head_width=1,
        seed=0,
    )
    module = network.module.to(job.device).eval()
    pipeline = TextPipeline(source, backbone.preprocessing.tokenize(source.texts))

    def compute(tokens: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(job.device, job.numerics.of_backbone):
            return module(to_device(tokens, job.device)).to("cpu", torch.float32).contiguous()

    identity = {
        "teacher": {"options": backbone.options, "preprocessing": backbone.preprocessing.to_plain()},
        "weights": weights.sha256,
        "precision": job.numerics.of_backbone,
        "environment": numeric_environment(job.device),
        "data": source.fingerprint,
        "tokens": pipeline.table.sha256(),
    }
    loader = Loader(pipeline, 0, "auto", False, Contents(source))
    width = text_encoders.width_of(backbone.options)
    about = f"{name} over {job.recipe.data.place}, {backbone.preprocessing.text}"
    return Pass(compute, width, torch.float32, identity, source, loader, about, pipeline.lengths)
