"""A checkpoint's network ready to be written for other programs, and what was written held against it."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.data.batch import Request
from finetune.data.open import open_source, split_data
from finetune.data.source import TextSource
from finetune.data.tokens import Tokenization
from finetune.errors import FinetuneError, RunError
from finetune.models.backbones import Backbone
from finetune.models.heads import folded_state, rescale, standardised_layers
from finetune.models.network import Network
from finetune.recipe.execution import Numerics, split_config
from finetune.recipe.spec import Recipe
from finetune.store.restore import backbone_of_run, trained_network
from finetune.store.run_folder import RunFolder
from finetune.store.state import CheckpointState
from finetune.training.dataset import open_data

COMPARED_SAMPLES = 16
# Outputs of an export may differ from the run's by this share of the largest (or by this much, if that is under 1),
# because folding the standardisation into the weights rounds differently. Without folding they must be equal.
FOLDED_TOLERANCE = 1e-5
# Where features hardly deviate from their mean, sums of folded weights lose more of float32's digits than that. Then it
# is float64 that must agree so well, and float32 so:
ROUNDED_TOLERANCE = 1e-3
# Of a large mean, that times `FOLDED_TOLERANCE` is the last digit.
FLOAT32_SHARE = 0.05


@dataclass(frozen=True)
class Trained:
    """What an export writes, and what it is held against.

    Attributes:
        tensors: the network's, by their stock names; standardisation folded in.
        samples, outputs: some network inputs, and what the run's own network gives for them.
        folded: whether standardisation, of features or of numbers to predict, was folded in.
    """

    recipe: Recipe
    numerics: Numerics
    backbone: Backbone
    network: Network
    state: CheckpointState
    tensors: dict[str, Tensor]
    samples: Tensor
    outputs: Tensor
    folded: bool


def trained_tensors(run: RunFolder, which: str) -> Trained:
    """A checkpoint's network, ready to be written."""
    network, state = trained_network(run, which)
    recipe, numerics = split_config(state.config)
    backbone = backbone_of_run(run, state)
    tensors = folded_state(network.module)
    samples = comparison_samples(recipe, backbone, state)
    if scale := state.data.scale:
        rescale(tensors, network.last_layer_path, scale)
    folded = bool(scale) or any(True for _ in standardised_layers(network.module))
    outputs = own_outputs(network.module.eval(), samples, scale)
    return Trained(recipe, numerics, backbone, network, state, tensors, samples, outputs, folded)


@torch.inference_mode()
def own_outputs(module: nn.Module, samples: Tensor, scale: Sequence[float]) -> Tensor:
    """What the run's network gives; numbers that it predicts in their own unit."""
    outputs = module(samples)
    return outputs * scale[1] + scale[0] if scale else outputs


def comparison_samples(recipe: Recipe, backbone: Backbone, state: CheckpointState) -> Tensor:
    """Network inputs to compare on: of the validation set; where the data is not at hand any more, some of no
    meaning."""
    preprocessing = backbone.preprocessing
    try:
        if not isinstance(preprocessing, Tokenization):
            data = open_data(recipe, backbone, state.data.skipped)
            return data.pipeline.fetch(Request(data.split.validation[:COMPARED_SAMPLES].tolist())).inputs
        source = open_source(recipe.data, recipe.task.kind)  # to tokenize all of it would take long
        assert isinstance(source, TextSource)
        chosen = split_data(source, recipe).validation[:COMPARED_SAMPLES].tolist()
        return preprocessing.tokenize([source.texts[index] for index in chosen]).batch(list(range(len(chosen))))
    except FinetuneError:
        return preprocessing.example(COMPARED_SAMPLES)


def hold_against(
    what: str, trained: Trained, model: nn.Module, compute: Callable[[nn.Module, Tensor], Tensor], rounding: float = 0.0
) -> float:
    """The largest difference between what was written and the run.

    Args:
        what: names it in the error.
        model: loaded from what was written; in eval mode.
        compute: (model, samples) -> its outputs.
        rounding: share of the largest output by which numbers of fewer bits may move it.

    Raises:
        RunError: it does not give the run's outputs.
    """
    scale = trained.state.data.scale
    largest = max(trained.outputs.abs().max().item(), 1.0)
    if scale:  # numbers around a mean: what counts is how far they lie from it, as well as float32 can say it
        largest = max((trained.outputs - scale[0]).abs().max().item(), scale[1]) + FLOAT32_SHARE * abs(scale[0])
    allowed = (FOLDED_TOLERANCE if trained.folded else 0.0) * largest
    with torch.inference_mode():
        difference = (compute(model, trained.samples) - trained.outputs).abs().max().item()
        if rounding:
            allowed = max(allowed, rounding * largest)
        elif trained.folded and allowed < difference <= ROUNDED_TOLERANCE * largest:
            samples = trained.samples.double() if trained.samples.is_floating_point() else trained.samples
            module = copy.deepcopy(trained.network.module).double()
            wanted = own_outputs(module, samples, scale)
            exact = (compute(copy.deepcopy(model).double(), samples) - wanted).abs().max().item()
            refuse_above(what, exact, allowed)
            return difference
    refuse_above(what, difference, allowed)
    return difference


def refuse_above(what: str, difference: float, allowed: float) -> None:
    """Raises: RunError: what was written does not give the run's outputs."""
    if not difference <= allowed:
        raise RunError(
            f"{what}: logits differ from the run's by {difference:.3g}, allowed is {allowed:.3g}; nothing is written"
        )
