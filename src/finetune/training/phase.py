"""A stretch of training between two thaws: what trains, its optimizer, what is fed to it: samples or kept features."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from finetune.base.device import NO_TF32, autocast, bf16_unit, to_device
from finetune.base.signals import StopRequest
from finetune.base.terminal import Terminal
from finetune.data.batch import Batch, Request
from finetune.data.decode import formats_by_suffix
from finetune.data.order import reading_order
from finetune.data.source import FileSource
from finetune.data.texts import TextPipeline
from finetune.errors import RunError, UsageError
from finetune.features.kept import CannotKeep, Features, KeptRows, Pass, filled
from finetune.features.known import KnownRows, find_known
from finetune.models.backbones import Backbone
from finetune.models.freeze import Freeze
from finetune.models.fusion import Fusion
from finetune.models.network import Network
from finetune.models.split import CannotSplit, Split, split
from finetune.recipe.execution import Numerics
from finetune.recipe.spec import Recipe
from finetune.store.state import CheckpointState, FrozenFacts, numeric_environment
from finetune.tasks.losses import Outputs
from finetune.training.context import RunContext
from finetune.training.cost import cost_text
from finetune.training.optimizer import Pace, build_optimizer
from finetune.training.setup import Setup

CHECKED_SAMPLES = 2
# Computed in fp32 and bf16, to tell what the second would take; said where it is at most such a share.
TRIED_SAMPLES, WORTH_SHARE = 8, 0.8


class Batches(Protocol):
    """Where batches come from: a `Loader` of images or tokens, or kept `Features`."""

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Feed:
    """What training is fed.

    Attributes:
        forward: what a batch holds (images, tokens or rows, on the device) -> what the model returns.
        train, validation: give the batches.
        features: the kept ones, or None where the backbone runs in every epoch.
        why_not: the reason for that.
    """

    forward: Callable[[Tensor], Outputs]
    train: Batches
    validation: Batches
    features: Features | None = None
    why_not: str = ""

    @property
    def is_kept(self) -> bool:
        return self.features is not None

    @property
    def halvings(self) -> int:
        """Of the batch that kept features were computed in."""
        return 0 if self.features is None else self.features.halvings


@dataclass(frozen=True)
class Phase:
    """A stretch of training between two thaws.

    Attributes:
        freeze: the freeze map in one of its epochs.
        trainable: names of the parameters that train.
        frozen_sha256: over everything else.
        held_in_eval: paths of the modules in eval mode.
    """

    freeze: Freeze
    trainable: list[str]
    optimizer: torch.optim.Optimizer
    frozen_sha256: str
    held_in_eval: list[str]
    feed: Feed

    def close(self) -> None:
        """Let go of kept features; may be called twice."""
        if self.feed.features is not None:
            self.feed.features.close()

    def facts(self) -> FrozenFacts:
        """As a checkpoint holds them."""
        module = self.freeze.map.module
        return FrozenFacts(
            parameters=[name for name, value in module.named_parameters() if not value.requires_grad],
            trainable=self.trainable,
            modules_in_eval=self.held_in_eval,
            epoch=self.freeze.epoch,
            phase=self.freeze.number,
            sha256=self.frozen_sha256,
            features_kept=self.feed.is_kept,
            features_halvings=self.feed.halvings,
        )


def start_phase(
    setup: Setup, epoch: int, context: RunContext, saved: FrozenFacts | None = None, halvings: int = 0
) -> Phase:
    """requires_grad, modes, a new optimizer over exactly what trains from `epoch` on, and its feed.

    Args:
        saved: what was frozen when the checkpoint was written that the run goes on from.
        halvings: of the phase before.

    Raises:
        RunError: something else trains than when the checkpoint was written, or something else is frozen.
        StoppedEarly: asked for while the frozen backbone ran.
    """
    freeze, spec = setup.freeze.at(epoch), setup.recipe.optimizer
    names = freeze.apply()
    parameters = dict(setup.network.module.named_parameters())
    optimizer = build_optimizer(
        {name: parameters[name] for name in names}, spec.name, spec.lr, spec.weight_decay, spec.momentum,
        paces_of(setup),
    )  # fmt: skip
    held = freeze.modes()
    sha256 = freeze.sha256()
    if saved is not None:
        _check_same(names, sha256, saved)
    kept, halvings = (None, halvings) if saved is None else (saved.features_kept, saved.features_halvings)
    feed = choose_feed(setup, sha256, kept, context.terminal, context.stop, halvings)
    return Phase(freeze, names, optimizer, sha256, held, feed)


def paces_of(setup: Setup) -> dict[str, Pace]:
    """How fast each parameter learns that ever trains, by name; what is missing learns like a head."""
    spec, since = setup.recipe.optimizer, setup.freeze.since() if setup.recipe.schedule.warms_thawed else {}
    factors = setup.network.lr_factors(spec.lr_backbone, spec.lr_decay)
    paces = dict[str, Pace]()
    for name in since | factors:
        block, factor = factors.get(name, ("", 1.0))
        paces[name] = Pace(factor, since.get(name, 0), block)
    return paces


def _check_same(trainable: list[str], frozen_sha256: str, saved: FrozenFacts) -> None:
    if trainable != saved.trainable:
        other = sorted(set(trainable) ^ set(saved.trainable))
        raise RunError(
            f"what trains now is not what trained when the checkpoint was written: {', '.join(other[:5])}, ...; go on "
            "with the recipe as it was, or begin anew: --init-from RUN"
        )
    if frozen_sha256 != saved.sha256:
        raise RunError(
            f"the frozen tensors have sha256 {frozen_sha256}, the run trained on {saved.sha256}; restore frozen/"
        )


# ---- What is fed ----------------------------------------------------------------------------------------------------


def choose_feed(
    setup: Setup, frozen_sha256: str, kept: bool | None, terminal: Terminal, stop: StopRequest, halvings: int = 0
) -> Feed:
    """Kept features where the backbone need not run again, else samples; says which, and why.

    Args:
        kept: as it was when the run's checkpoint was written; None = for the first time.
        halvings: of the batch in which features are computed, likewise.
    """
    found: Split | None = None
    reason = _reason_against(setup, kept)
    if not reason or setup.numerics.splits:
        try:
            found = cut(setup.network.module, setup.backbone, setup.device)
        except CannotSplit as error:
            reason = reason or str(error)
            if setup.numerics.splits:
                raise UsageError(
                    f"--backbone-precision {setup.numerics.backbone_precision}: the backbone cannot be computed apart, "
                    f"because {error}; leave it out"
                ) from None
    if not reason and found is not None:
        try:
            feed = _feed_of_rows(setup, found, frozen_sha256, terminal, stop, halvings)
            if kept and feed.halvings != halvings:
                terminal.say("not bit for bit from here on: features were computed with more samples at once")
            return feed
        except CannotKeep as error:
            reason = str(error)
    if kept:
        terminal.say(f"not bit for bit from here on: features were kept, and now cannot be: {reason}")
    terminal.say(f"features: not kept, the backbone runs in every epoch, because {reason}")
    forward = forward_of_samples(setup.network.module, found, setup.numerics, setup.device)
    if text := cost_text(setup, forward):
        terminal.say(text)
    return Feed(forward, *setup.loaders, why_not=reason)


def feed_if_kept(setup: Setup, terminal: Terminal, stop: StopRequest) -> Feed | None:
    """Kept features of the first phase, where an earlier run has computed all of them; else None."""
    if (first := _first_cut(setup)) is None:
        return None
    found, frozen_sha256 = first
    run = _pass_of(setup, found, frozen_sha256)
    if any(KeptRows(run, samples, view).missing_bytes for view, samples in _parts(setup).items()):
        return None
    try:
        return _feed_of_rows(setup, found, frozen_sha256, terminal, stop, 0)
    except CannotKeep:
        return None


def known_feed(setup: Setup, samples: Tensor) -> tuple[Callable[[Tensor], Outputs], KnownRows] | None:
    """What computes outputs of kept features in the first phase, and those of some samples as they are, no view of
    them; None where one is not known. See `find_known`."""
    if (first := _first_cut(setup)) is None:
        return None
    found, frozen_sha256 = first
    run, kept = _pass_of(setup, found, frozen_sha256), _parts(setup)[None]
    rows = find_known(KeptRows(run, reading_order(kept, len(setup.data.whole.train)), None), samples)
    return None if rows is None else (lambda rows: found.suffix(rows.float()), rows)


def _first_cut(setup: Setup) -> tuple[Split, str] | None:
    """The model cut as in its first phase, and the sha256 of what is frozen then; None where no features are kept."""
    freeze = setup.freeze.at(0)
    freeze.apply()
    freeze.modes()
    if _reason_against(setup, None):
        return None
    try:
        return cut(setup.network.module, setup.backbone, setup.device), freeze.sha256()
    except CannotSplit:
        return None


def _reason_against(setup: Setup, kept: bool | None) -> str:
    """Why features are not to be kept, whatever the model is like; "" = nothing is against it."""
    data, recipe = setup.recipe.data, setup.recipe
    if not setup.numerics.cache:
        return "of --no-cache"
    if kept is False:
        return "that is how the run began"
    if data.mixup or data.cutmix:
        return f"--{'mixup' if data.mixup else 'cutmix'} makes other images in every epoch"
    if data.augment != "none" and not data.views:
        return f"--augment {data.augment} makes other images in every epoch (--views 4 would keep four of each)"
    if not recipe.epochs and recipe.max_steps * recipe.batch_size < len(setup.data.split.train):
        return f"the run ends before it has seen each {setup.data.source.noun} once"
    return ""


def cut(model: nn.Module, backbone: Backbone, device: torch.device) -> Split:
    """The model cut where training begins, tried on inputs of no meaning.

    Raises:
        CannotSplit: there is no frozen prefix, or it cannot be told apart.
    """
    return split(model, to_device(backbone.preprocessing.example(CHECKED_SAMPLES), device))


def forward_of_samples(
    model: nn.Module, found: Split | None, numerics: Numerics, device: torch.device
) -> Callable[[Tensor], Outputs]:
    """The whole model; in two parts where the backbone has a precision of its own."""
    if found is None or not numerics.splits:
        return model

    def forward(samples: Tensor) -> Outputs:
        with torch.no_grad(), autocast(device, numerics.of_backbone):
            rows = found.prefix(samples)
        outputs: Outputs = found.suffix(rows.float())
        return outputs

    return forward


def trained_forward(
    network: Network,
    recipe: Recipe,
    numerics: Numerics,
    state: CheckpointState,
    backbone: Backbone,
    device: torch.device,
) -> Callable[[Tensor], Outputs]:
    """Samples -> logits as the run computed them, everything in eval mode.

    Args:
        state: the checkpoint: says what was frozen.
    """
    model, found = network.module, None
    if numerics.splits:
        freeze = network.freeze_map(recipe.trainable, state.progress.plateaus).at(state.frozen.epoch)
        freeze.apply()
        freeze.modes()
        found = cut(model, backbone, device)
    model.eval()
    return forward_of_samples(model, found, numerics, device)


def _feed_of_rows(
    setup: Setup, found: Split, frozen_sha256: str, terminal: Terminal, stop: StopRequest, halvings: int
) -> Feed:
    """Raises: CannotKeep: there is no room."""
    run, limit, count = _pass_of(setup, found, frozen_sha256), setup.machine.cache_limit, len(setup.data.whole.train)
    features = filled(run, _parts(setup), count, limit, setup.device, terminal, stop, halvings)
    return Feed(lambda rows: found.suffix(rows.float()), features, features, features)


def _parts(setup: Setup) -> dict[int | None, Tensor]:
    """Samples whose features are kept, by view."""
    views, whole = setup.recipe.data.views, setup.data.whole
    if views:
        return {view: whole.train for view in range(views)} | {None: whole.validation}
    return {None: torch.cat([whole.train, whole.validation]).sort().values}


def _pass_of(setup: Setup, found: Split, frozen_sha256: str) -> Pass:
    device, precision, prefix, numerics = setup.device, setup.numerics.of_backbone, found.prefix, dict[str, object]()
    if _fuses(setup) and found.graph is not None and (fusion := Fusion(found.graph)).pairs:
        prefix, numerics = found.fused(fusion), {"fuse_batchnorm": True}

    def compute(samples: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(device, precision):
            return prefix(to_device(samples, device)).to("cpu", dtype).contiguous()

    spec, preprocessing = setup.recipe.data, setup.backbone.preprocessing
    # What comes out of the backbone's last layer: half as many bytes where that is bfloat16.
    with torch.inference_mode(), autocast(device, precision):
        dtype = found.prefix(to_device(preprocessing.example(1), device)).dtype
    identity = {
        "backbone": setup.backbone.to_plain(),
        "frozen": frozen_sha256,
        "places": list(found.places),
        "shapes": [list(shape) for shape in found.shapes],
        "numerics": {"precision": precision, "deterministic": setup.numerics.deterministic}
        | setup.tf32_named()
        | numerics,
        "environment": numeric_environment(device, setup.backbone.libraries),
        "data": setup.data.source.fingerprint,
        "augment": {"augment": spec.augment, "seed": setup.recipe.seed} if spec.views else "",
    }
    if spec.listing == "content" and isinstance(setup.data.source, FileSource):
        # A file that is broken where its format is not known is not where it is.
        identity["decoded"] = sorted(set(formats_by_suffix().values()))
    about = f"{setup.recipe.model.full_name} over {spec.place}, {preprocessing.text}"
    pipeline, lengths = setup.data.pipeline, None
    if isinstance(pipeline, TextPipeline):
        identity["tokens"], lengths = pipeline.table.sha256(), pipeline.lengths
    hint = partial(_bf16_hint, setup, prefix)
    return Pass(compute, found.width, dtype, identity, setup.data.source, setup.loaders.train, about, lengths, hint)


def _fuses(setup: Setup) -> bool:
    """Whether BatchNorm is computed with the convolution before it. Not where few bits are left: rounded once in place
    of twice, features would be others than those of the network that the head is used with."""
    is_fp32 = setup.numerics.of_backbone == "fp32" and (setup.device.type != "cuda" or setup.numerics.tf32 == NO_TF32)
    return setup.numerics.fuse_batchnorm and is_fp32


def _bf16_hint(setup: Setup, prefix: Callable[[Tensor], Tensor]) -> str:
    """What the frozen part would take in bf16, where this processor has arithmetic of its own for that; tried on inputs
    of no meaning. Nothing goes by it."""
    unit = bf16_unit()
    if setup.device.type != "cpu" or setup.numerics.of_backbone != "fp32" or not unit:
        return ""
    example = to_device(setup.backbone.preprocessing.example(TRIED_SAMPLES), setup.device)
    seconds, rows = dict.fromkeys(("fp32", "bf16"), math.inf), dict[str, Tensor]()
    with suppress(Exception):  # an operator without bf16: there is nothing to say
        for precision in (*seconds, *seconds, *seconds):  # the first is the slowest
            with torch.inference_mode(), autocast(setup.device, precision):
                started = time.perf_counter()
                rows[precision] = prefix(example).float()
                seconds[precision] = min(seconds[precision], time.perf_counter() - started)
    share = seconds["bf16"] / seconds["fp32"]
    if not share <= WORTH_SHARE:
        return ""
    likeness = torch.nn.functional.cosine_similarity(rows["fp32"], rows["bf16"]).min().item()
    return (
        f"this processor computes bf16 by itself ({unit}): --backbone-precision bf16 would take {share:.0%} of the "
        f"time, and give other features (cosine {math.floor(likeness * 1e4) / 1e4:.4f})"
    )
