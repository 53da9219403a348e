"""The teacher of a distillation runs over the texts once; what it gives are the targets."""

import dataclasses
import hashlib
import json
from contextlib import closing

import torch
from torch import Tensor

from finetune.base.device import autocast, to_device
from finetune.base.signals import StopRequest
from finetune.base.terminal import Terminal
from finetune.data.contents import Contents
from finetune.data.loader import Loader
from finetune.data.source import TextSource
from finetune.data.texts import TextPipeline
from finetune.data.tokens import Tokenization
from finetune.errors import RunError
from finetune.features.kept import CannotKeep, Pass, filled
from finetune.models import text_encoders
from finetune.models.heads import NO_HEAD
from finetune.models.network import build_network
from finetune.models.pretrained import sized
from finetune.models.weight_files import read_weights
from finetune.models.weights import choose_teacher
from finetune.recipe.spec import Distillation
from finetune.store.state import numeric_environment
from finetune.training.setup import Setup, make_loaders


def taught(setup: Setup, terminal: Terminal, stop: StopRequest, saved: str = "", halvings: int = 0) -> Setup:
    """The setup with the teacher's embeddings as its targets, where its task is distillation.

    Args:
        saved: hash of the teacher of the run that goes on.
        halvings: of the batch in which it ran then.

    Raises:
        RunError: there is no room to keep them, or the teacher is another.
        StoppedEarly: asked for while the teacher ran; what it has computed is kept.
    """
    spec = setup.recipe.task
    if not isinstance(spec, Distillation):
        return setup
    source = setup.data.source
    assert isinstance(source, TextSource)
    teacher = _teacher_pass(setup, spec.teacher, source)
    taught_by = hashlib.sha256(
        json.dumps([teacher.identity[name] for name in ("teacher", "weights")]).encode()
    ).hexdigest()
    if saved not in ("", taught_by):
        raise RunError(f"--teacher {spec.teacher}: is not the one that the run began with; put that one there")
    everything = torch.arange(len(source.texts))
    terminal.say(f"teacher: {spec.teacher}")
    try:
        limit = setup.machine.cache_limit
        with closing(
            filled(teacher, {None: everything}, 0, limit, setup.device, terminal, stop, halvings)
        ) as embeddings:
            targets = embeddings.read(everything, None).float()
    except CannotKeep as error:
        raise RunError(f"the teacher's embeddings cannot be kept, because {error}; make room for them") from None
    if saved and embeddings.halvings != halvings:
        terminal.say("not bit for bit from here on: the teacher ran over more texts at once")
    data = setup.data.with_targets(targets)
    data = dataclasses.replace(data, taught_by=taught_by, taught_halvings=embeddings.halvings)
    loaders = make_loaders(data, setup.machine, setup.device, Contents(data.source))
    return dataclasses.replace(setup, data=data, loaders=loaders)


def _teacher_pass(setup: Setup, name: str, source: TextSource) -> Pass:
    backbone, weights = choose_teacher(name)
    backbone = sized(backbone, setup.recipe)
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
    module, tokenization = network.module.to(setup.device).eval(), backbone.preprocessing
    assert isinstance(tokenization, Tokenization)
    pipeline = TextPipeline(source, tokenization.tokenize(source.texts))

    def compute(tokens: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(setup.device, setup.numerics.of_backbone):
            rows: Tensor = module(to_device(tokens, setup.device))
            return rows.to("cpu", torch.float32).contiguous()

    identity = {
        "teacher": {"options": backbone.options, "preprocessing": tokenization.to_plain()},
        "weights": weights.sha256,
        "precision": setup.numerics.of_backbone,
        "environment": numeric_environment(setup.device),
        **setup.tf32_named(),
        "data": source.fingerprint,
        "tokens": pipeline.table.sha256(),
    }
    loader = Loader(pipeline, 0, "auto", False, Contents(source))
    width = text_encoders.width_of(backbone.options)
    about = f"{name} over {setup.recipe.data.place}, {tokenization.text}"
    return Pass(compute, width, torch.float32, identity, source, loader, about, pipeline.lengths)
