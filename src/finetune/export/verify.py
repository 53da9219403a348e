"""A checkpoint's network ready to be written for other programs, and what was written held against it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from finetune.base.device import PRECISIONS, autocast, module_to_device, numerics_put_back, set_tf32, to_device
from finetune.base.formatting import counted
from finetune.data.batch import Request, Split
from finetune.data.decode import PACKAGES
from finetune.data.images import names_to_indices, without
from finetune.data.open import open_source, split_data
from finetune.data.order import keyed_generator
from finetune.data.source import ArraySource, FileSource, Source, TextSource, class_counts
from finetune.data.tokens import Tokenization
from finetune.errors import FinetuneError, RunError
from finetune.models.backbones import Backbone
from finetune.models.folding import layers_apart, lost_by_folding, scale_beside
from finetune.models.heads import NO_HEAD, beside_zero, folded_state, rescale, standardised_layers
from finetune.models.network import Network
from finetune.recipe.execution import Numerics, split_config
from finetune.recipe.spec import Recipe
from finetune.store.restore import backbone_of_run, trained_network
from finetune.store.run_folder import RunFolder
from finetune.store.state import CheckpointState
from finetune.tasks.losses import ClassificationTask, MultiLabelTask, Task, make_task
from finetune.training.dataset import open_data
from finetune.training.phase import trained_forward

COMPARED_SAMPLES = 16
# Where there is no data any more: texts of so many words, pictures of noise of so many pixels.
MADE_UP_WORDS = (
    "this",
    "is",
    "a",
    "text",
    "that",
    "nobody",
    "wrote",
    "to",
    "say",
    "any",
    "thing",
    "at",
    "all",
    "but",
    "it",
)
MADE_UP_SIZES = ((32, 32), (300, 200), (200, 300), (64, 640))
# Everything is compared in units of how far the run's own outputs spread: logits, and standardised numbers, whose unit
# is the deviation of the targets; outputs that spread by less than 1 count as if they did by 1.
# By this share an export may differ, because folding the standardisation into the weights rounds differently. Without
# folding it must be equal.
FOLDED_TOLERANCE = 1e-5
# Where features hardly deviate from their mean, sums of folded weights lose more of float32's digits than that. Then it
# is float64 that must agree so well, and float32 so:
ROUNDED_TOLERANCE = 1e-3
# A mean that is folded in, or a feature that another runtime computes, costs so many units of its last place.
ROUNDINGS = 4
# What a run in fewer bits computed lies so many roundings from what its weights give in fp32; more, and it was
# something else than those bits.
PRECISION_ROUNDINGS = 16


@dataclass(frozen=True)
class Own:
    """What the run's own arithmetic gives, beside what its weights give in fp32.

    Attributes:
        share: the largest difference between the two, as a share of the spread.
        alike, samples: how many samples are decided alike, of how many; None where nothing is decided.
    """

    precision: str
    share: float
    alike: int | None
    samples: int

    def text(self) -> str:
        """A line for a person."""
        decided = "" if self.alike is None else f"; decided alike: {self.alike} of {counted(self.samples, 'sample')}"
        line = f"the run computed in {self.precision}: what it gave lies within {self.share:.2g} of the spread{decided}"
        # TF32 has as many bits as fp16, in the range of fp32.
        bits = torch.finfo(PRECISIONS["fp16" if self.precision == "tf32" else self.precision])
        if self.share <= PRECISION_ROUNDINGS * bits.eps:
            return line
        return f"{line}: more than rounding explains, so judge the file anew, or compute it in {self.precision} too"


@dataclass(frozen=True)
class Compared:
    """Samples that an export is tried on.

    Attributes:
        inputs: of the network.
        originals: the same as people have them: paths of files, pictures (channels, height, width) uint8, or texts.
        validate: whether they are of the validation set; else they are made up.
        class_sizes: how many samples of each class were trained on; {} where the data is not at hand, or has changed,
            and where numbers are predicted.
    """

    inputs: Tensor
    originals: list[Path | Tensor | str]
    validate: bool
    class_sizes: dict[str, int] = field(default_factory=dict)

    @property
    def has_heif(self) -> bool:
        """Whether some are pictures for which Pillow needs a package."""
        return any(isinstance(one, Path) and one.suffix.lower() in PACKAGES for one in self.originals)


@dataclass(frozen=True)
class Trained:
    """What an export writes, and what it is held against.

    Attributes:
        tensors: the network's, by their stock names; standardisation folded in, but for that of `apart`.
        compared: some samples.
        outputs: what the run's own network gives for them in fp32: numbers to predict standardised.
        folded: whether standardisation, of features or of numbers to predict, was folded in.
        lost: how far rounding may move an output because features that hardly deviate were computed otherwise: in
            folded layers, and in all, which a runtime with other kernels does.
        folded_scale: mean and deviation of the numbers to predict where those were folded in; else [].
        scale: likewise where the weights could not hold them.
        apart: paths of the layers whose standardisation, or division by norms, the weights could not hold.
        own: None where the run itself computed in fp32, or in what this machine cannot.
    """

    recipe: Recipe
    numerics: Numerics
    backbone: Backbone
    network: Network
    state: CheckpointState
    tensors: dict[str, Tensor]
    compared: Compared
    outputs: Tensor
    folded: bool
    lost: tuple[float, float]
    folded_scale: list[float]
    scale: list[float]
    apart: list[str]
    own: Own | None

    @property
    def samples(self) -> Tensor:
        """The inputs of `compared`."""
        return self.compared.inputs

    @property
    def deviation(self) -> float:
        """Of the numbers to predict, in their unit."""
        return self.state.data.scale[1] if self.state.data.scale else 1.0

    @property
    def spread(self) -> float:
        return spread_of(self.outputs)

    @property
    def reduced(self) -> str:
        """The arithmetic that the run itself computed in; see `Numerics.reduced`."""
        return reduced_in(self.numerics, self.state)

    def checked(self, where: str, difference: float, by_kit: str = "") -> str:
        """What was compared, in lines for a person.

        Args:
            by_kit: what of this kit gives numbers their unit.
        """
        numbers = bool(self.state.data.scale)
        what = "numbers" if numbers else "embeddings" if self.recipe.model.head == NO_HEAD else "logits"
        equal = "bit for bit"
        if difference:
            equal = f"within {difference:.1g}" + (" of the targets' deviation" if numbers else "")
        in_fp32 = ", both computed in fp32" if self.reduced != "fp32" else ""
        lines = [f"checked: {where}, its {what} equal the run's {equal}{in_fp32}"]
        if self.own is not None:
            lines.append(self.own.text())
        elif in_fp32:
            lines.append(f"the run computed in {self.reduced}, which this machine cannot: not compared")
        if self.scale:
            mean, deviation = self.scale
            lines.append(
                f"its numbers are standardised, for no weight can hold a mean that lies {abs(mean) / deviation:,.3g} "
                f"deviations from zero: value = output * {deviation!r} + {mean!r}, in float64{by_kit}"
            )
        return "\n".join(lines)


def spread_of(outputs: Tensor) -> float:
    """How far outputs lie from the mean over the samples, at most; 1 where that is less."""
    return max((outputs - outputs.mean(0)).abs().max().item(), 1.0)


def trained_tensors(run: RunFolder, which: str, dtype: torch.dtype = torch.float32) -> Trained:
    """A checkpoint's network, ready to be written.

    Args:
        dtype: that its weights will be written in.
    """
    network, state = trained_network(run, which)
    recipe, numerics = split_config(state.config)
    backbone = backbone_of_run(run, state)
    own_tensors = network.module.state_dict()
    apart = layers_apart(own_tensors, recipe.model.unit_rows)
    tensors = folded_state(network.module, apart)
    losses = {path: lost for path, (lost, _) in lost_by_folding(own_tensors).items()}
    lost = sum(value for path, value in losses.items() if path not in apart), sum(losses.values())
    compared = comparison_samples(recipe, backbone, state)
    samples = compared.inputs
    beside = scale_beside(state.data.scale, dtype)
    folded_scale = [] if beside else list(state.data.scale)
    if folded_scale:
        rescale(tensors, network.last_layer_path, folded_scale)
    folded = bool(folded_scale) or any(path not in apart for path, _ in standardised_layers(network.module))
    outputs = plain_outputs(network.module.eval(), samples)
    reduced = reduced_in(numerics, state)
    own = own_outputs(reduced, network, recipe, numerics, state, backbone, samples)
    task = make_task(recipe.task, state.data.outputs)
    beside_own = None if own is None else _compared(reduced, task, outputs, own)
    return Trained(
        recipe, numerics, backbone, network, state, tensors, compared, outputs, folded, lost, folded_scale, beside,
        apart, beside_own,
    )  # fmt: skip


@torch.inference_mode()
def plain_outputs(module: nn.Module, samples: Tensor) -> Tensor:
    """What a network gives in the arithmetic of its weights, in float64."""
    return cast(Tensor, module(samples)).double()


def own_outputs(
    reduced: str,
    network: Network,
    recipe: Recipe,
    numerics: Numerics,
    state: CheckpointState,
    backbone: Backbone,
    samples: Tensor,
) -> Tensor | None:
    """What the run's network gives in the run's arithmetic; None where that is fp32, or nothing here computes in it.

    Args:
        reduced: see `Trained`.
    """
    if reduced == "fp32":
        return None
    # Of these the CPU has bf16 only.
    needs_cuda = reduced == "tf32" or "fp16" in (numerics.precision, numerics.of_backbone)
    device = torch.device("cuda" if needs_cuda else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    module_to_device(network.module, device)
    forward = trained_forward(network, recipe, numerics, state, backbone, device)
    with numerics_put_back(), torch.inference_mode(), autocast(device, numerics.precision):
        set_tf32(numerics.tf32)
        outputs = forward(to_device(samples, device))
    network.module.cpu()
    assert isinstance(outputs, Tensor)  # auxiliary heads give theirs in training only
    return outputs.cpu().double()


def reduced_in(numerics: Numerics, state: CheckpointState) -> str:
    """`Numerics.reduced` on the kind of device that a checkpoint was computed on."""
    return numerics.reduced(str(state.versions.get("device", "cpu")))


def _compared(precision: str, task: Task, outputs: Tensor, own: Tensor) -> Own:
    alike = None
    if isinstance(task, MultiLabelTask):
        alike = int(((outputs > 0) == (own > 0)).all(1).sum())
    elif isinstance(task, ClassificationTask):
        alike = int((outputs.argmax(1) == own.argmax(1)).sum())
    share = (outputs - own).abs().max().item() / spread_of(outputs)
    return Own(precision, share, alike, len(outputs))


def comparison_samples(recipe: Recipe, backbone: Backbone, state: CheckpointState) -> Compared:
    """Samples of the validation set; where the data is not at hand any more, made-up ones."""
    preprocessing = backbone.preprocessing
    originals: list[Path | Tensor | str]
    try:
        if not isinstance(preprocessing, Tokenization):
            data = open_data(recipe, backbone, state.data.skipped)
            chosen = data.split.validation[:COMPARED_SAMPLES].tolist()
            source, inputs = data.source, data.pipeline.fetch(Request(chosen)).inputs
            if isinstance(source, FileSource):
                originals = [source.folder / source.paths[index] for index in chosen]
            else:
                assert isinstance(source, ArraySource)
                originals = [source.images[index] for index in chosen]
            return Compared(inputs, originals, True, _class_sizes(source, data.split, state))
        texts = open_source(recipe.data, recipe.task.kind)  # to tokenize all of it would take long
        assert isinstance(texts, TextSource)
        dropped = names_to_indices(texts, state.data.skipped)
        split = Split(*(without(part, dropped) for part in split_data(texts, recipe)))
        originals = [texts.texts[index] for index in split.validation[:COMPARED_SAMPLES].tolist()]
        validate, sizes = True, _class_sizes(texts, split, state)
    except FinetuneError:
        validate, sizes = False, {}
        originals = [" ".join(MADE_UP_WORDS[: 1 + number]) for number in range(len(MADE_UP_WORDS))]
        if not isinstance(preprocessing, Tokenization):
            with keyed_generator("split"):
                pictures = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in MADE_UP_SIZES]
            inputs = torch.stack([preprocessing.resize(picture).float() for picture in pictures])
            return Compared(preprocessing.normalise(inputs), list(pictures), False)
    words = [one for one in originals if isinstance(one, str)]
    return Compared(preprocessing.tokenize(words).batch(list(range(len(words)))), originals, validate, sizes)


def _class_sizes(source: Source, split: Split, state: CheckpointState) -> dict[str, int]:
    """See `Compared`."""
    if source.fingerprint != state.data.fingerprint or list(source.classes) != state.data.classes:
        return {}
    counts = class_counts(source.targets[split.train], len(source.classes)).tolist()
    return dict(zip(source.classes, counts, strict=bool(source.classes)))


def hold_against(
    what: str,
    trained: Trained,
    model: nn.Module,
    compute: Callable[[nn.Module, Tensor], Tensor],
    rounding: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> float:
    """The largest difference between what was written and the run; of numbers to predict in units of their deviation.

    Args:
        what: names it in the error.
        model: loaded from what was written; in eval mode.
        compute: (model, samples) -> its outputs.
        rounding: share of the spread by which numbers of fewer bits, or another runtime, may move it.
        dtype: that the weights are written in.

    Raises:
        RunError: it does not give the run's outputs.
    """
    allowed = (max(rounding, FOLDED_TOLERANCE) if trained.folded else rounding) * trained.spread
    allowed += ROUNDINGS * trained.lost[1] if rounding else trained.lost[0]
    if trained.folded_scale:
        mean, deviation = trained.folded_scale
        allowed += ROUNDINGS * torch.finfo(dtype).eps * abs(mean) / deviation
    with torch.inference_mode():
        difference = _difference(trained, compute(model, trained.samples), trained.outputs)
        if not rounding and trained.folded and allowed < difference <= ROUNDED_TOLERANCE * trained.spread:
            samples = trained.samples.double() if trained.samples.is_floating_point() else trained.samples
            wanted = plain_outputs(copy.deepcopy(trained.network.module).double(), samples)
            exact = _difference(trained, compute(copy.deepcopy(model).double(), samples), wanted)
            refuse_above(what, trained, exact, allowed)
            return difference
    refuse_above(what, trained, difference, allowed, "" if dtype == torch.float32 else "leave --half out; ")
    return difference


def _difference(trained: Trained, found: Tensor, wanted: Tensor) -> float:
    """Between outputs of what was written and those of the run."""
    found = found.double()
    if trained.recipe.model.one_logit:
        found = beside_zero(found)
    if trained.folded_scale:
        mean, deviation = trained.folded_scale
        found = (found - mean) / deviation
    return (found - wanted).abs().max().item()


def refuse_above(what: str, trained: Trained, difference: float, allowed: float, instead: str = "") -> None:
    """Raises: RunError: what was written does not give the run's outputs; says what to do `instead`."""
    if not difference <= allowed:
        numbers, unit = ("numbers", " deviations of the targets") if trained.state.data.scale else ("logits", "")
        raise RunError(
            f"{what}: {numbers} differ from the run's by {difference:.3g}{unit}, allowed is {allowed:.3g}; {instead}"
            "nothing is written"
        )
