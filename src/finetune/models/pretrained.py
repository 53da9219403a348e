"""The network that a recipe begins with: its backbone, pretrained weights, and a fresh head."""

import dataclasses

from torch import Tensor

from finetune.data.open import open_source
from finetune.data.source import TextSource
from finetune.data.tokens import Tokenization
from finetune.errors import FinetuneError, UsageError
from finetune.models.backbones import Backbone, check_image_size, names_of
from finetune.models.network import Network, build_network, check_padding
from finetune.models.student import student_of
from finetune.models.weight_files import read_weights
from finetune.models.weights import Weights, choose_teacher, choose_text_weights, choose_weights
from finetune.recipe.spec import Distillation, Recipe, Texts


def find_pretrained(recipe: Recipe) -> tuple[Backbone, Weights | None]:
    """The recipe's backbone, prepared for its data, and its weights: None for random ones.

    Raises:
        UsageError: there is no such backbone, or several are named.
        RunError: its weights cannot be had.
    """
    model = recipe.model
    if len(names_of(model.backbone)) > 1:
        raise UsageError(
            f"--backbone {model.backbone}: one at a time; only finetune RECIPE trains on several, and compares them"
        )
    weights: Weights | None
    if isinstance(recipe.task, Distillation):
        backbone, weights = choose_teacher(model.backbone)
    elif isinstance(recipe.data, Texts):
        backbone, weights = choose_text_weights(model.backbone, model.revision, model.weights, model.pooling)
    else:
        backbone, weights = choose_weights(model.backbone, model.weights)
    return sized(backbone, recipe), weights


def sized(backbone: Backbone, recipe: Recipe) -> Backbone:
    """The backbone for the recipe's way to decode and image size, or length of text, if it has one.

    Raises:
        UsageError: the architecture cannot take it, or is of the other kind.
    """
    data, preprocessing = recipe.data, backbone.preprocessing
    if isinstance(data, Texts) and isinstance(preprocessing, Tokenization):
        length = data.max_length or preprocessing.max_length
        return dataclasses.replace(backbone, preprocessing=preprocessing.at(length))
    if isinstance(data, Texts) or isinstance(preprocessing, Tokenization):
        reads = "texts" if isinstance(preprocessing, Tokenization) else "images"
        raise UsageError(
            f"--backbone {backbone.name}: reads {reads}, and {data.option} {data.place} holds none; give another"
        )
    size = data.image_size or preprocessing.image_size
    check_image_size(backbone, size)
    prepared = dataclasses.replace(preprocessing.at(size), decode=data.decode)
    return dataclasses.replace(backbone, preprocessing=prepared)


def new_network(
    recipe: Recipe,
    backbone: Backbone,
    weights: Weights | None,
    output_count: int,
    tensors: dict[str, Tensor] | None = None,
) -> Network:
    """The recipe's network with its pretrained weights and a fresh head, on the CPU.

    Args:
        tensors: what it begins with, where no file holds just that.
    """
    try:
        if tensors is None and weights is not None:
            tensors = read_weights(weights.path, weights.key)
    except FinetuneError as error:
        raise UsageError(f"--weights {recipe.model.weights}: {error.args[0]}", error.details) from None
    network = build_network(
        backbone,
        tensors,
        f"--weights {weights.path}" if weights else "",
        head=recipe.model.head,
        class_count=output_count,
        dropout=recipe.model.dropout,
        head_width=recipe.model.head_width,
        unit_rows=recipe.model.unit_rows,
        one_logit=recipe.model.one_logit,
        seed=recipe.seed,
    )
    network.freeze_map(recipe.trainable).check()
    if backbone.reads_texts:
        check_padding(network, backbone, f"--backbone {backbone.name}")
    return network


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
