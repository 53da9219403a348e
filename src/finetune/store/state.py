"""What survives a restart: one versioned dict of plain values, listed here and nowhere else.

A checkpoint's keys are the fields below. Each says which key it is stored under, who writes it and who reads it;
`docs/architecture.md` shows them as a table. All others read attributes.
"""

import dataclasses
import importlib
import platform
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from finetune.base.events import Best
from finetune.base.files import BadFile
from finetune.base.migrate import SCHEMA_KEY, Steps, migrate
from finetune.base.plain import Fields, Plain, part_from_plain, part_to_plain, stored
from finetune.store.finish_state import Finish

SCHEMA_VERSION = 4
# From the schema that is the key to the next one; 4 is the first that outlives a version of the kit.
MIGRATIONS: Steps = {}


# ---- The parts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataFacts:
    """What a run was trained on; a resume must find the same.

    Attributes:
        fingerprint: over the samples' names, sizes and targets.
        classes: their names by number; [] where numbers are predicted.
        outputs: numbers that the network gives for a sample.
        scale: mean and deviation of the training targets, where those are numbers to predict; else [].
        taught_by: hash of the teacher that the targets are of; "" = none.
        taught_halvings: how often memory ran out while it gave them, so that fewer samples were at once.
        skipped: names of samples that were left out, as broken or as copies.
        levels: the steps that numbers to predict are, as stars are; [] = they are any numbers. They follow from the
            targets, and a checkpoint of before has none.
    """

    fingerprint: str
    classes: list[str]
    outputs: int
    scale: list[float]
    taught_by: str
    train_samples: int
    validation_samples: int
    skipped: list[str]
    taught_halvings: int = 0
    levels: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class NetworkFacts:
    """How to build the network again, without its pretrained file.

    Attributes:
        old_class_count: classes of the layer that an appended head stands behind.
        new_paths: modules before the head that train like it.
        backbone: as `Backbone.to_plain` gives it.
    """

    old_class_count: int
    new_paths: list[str]
    backbone: dict[str, object]


@dataclass(frozen=True)
class FrozenFacts:
    """What was frozen when the checkpoint was written.

    Attributes:
        parameters, trainable: names of those that are frozen, and of those that train.
        modules_in_eval: paths of the modules held in eval mode; for people, nothing reads it.
        epoch: of the phase of training.
        phase: thaws before it; for people, nothing reads it.
        sha256: over the frozen tensors.
        features_kept: whether training read kept features.
        features_halvings: how often memory ran out while they were computed, so that fewer samples were at once.
    """

    parameters: list[str]
    trainable: list[str]
    modules_in_eval: list[str]
    epoch: int
    phase: int
    sha256: str
    features_kept: bool = False
    features_halvings: int = 0


@dataclass(frozen=True)
class LogMark:
    """How long metrics.jsonl was when the checkpoint was written, and what it held."""

    bytes: int
    sha256: str


class Extension(TypedDict):
    """A run made longer.

    Attributes:
        from_step: it begins behind so many steps.
        epochs: in all.
        lr: its learning rate; 0 = the recipe's final one.
        own_rate: that rate holds; where it is missing, the first extension's does, as an older version computed.
    """

    from_step: int
    epochs: int
    lr: float
    own_rate: NotRequired[bool]


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        epoch: the epoch that the next step belongs to.
        position_samples: samples of that epoch that are consumed.
        reductions: of the learning rate by the plateau schedule.
        extensions: in order, by `resume --epochs`.
        best: of the best validation so far.
        validations_without_best: in a row, since the last thaw.
        plateaus: the epochs behind those that thawed something.
        loss_sum, loss_samples: the running training loss of the unfinished epoch.
        last_validation: metrics of the newest validation, or {}.
        validated_step: the step of that one; a stop may have come before it, then whoever resumes begins with it.
        halvings: how often memory ran out in a step, and fewer samples were computed at once from then on.
        validation_halvings: likewise in a validation, which begins with those of the steps.
        skipped_steps: in fp16: those that moved nothing, as their gradient was too large for its numbers.
        history: [{"event", "step", "epoch", ...}]: starts, resumes, extensions, thaws, ends of an early stop.
        status: "running", "finished" or "stopped early".
        finish: the last stage, in which a linear head is solved.
    """

    step: int = field(default=0, metadata=stored("step", writer="session", reader="session, listing, report, export"))
    epoch: int = field(default=0, metadata=stored("epoch", writer="session", reader="session, listing, report"))
    position_samples: int = field(default=0, metadata=stored("position_samples", writer="session", reader="session"))
    reductions: int = field(default=0, metadata=stored("scheduler.reductions", writer="validation", reader="schedule"))
    extensions: list[Extension] = field(
        default_factory=list,
        metadata=stored("scheduler.extensions", writer="resume", reader="schedule, listing"),
    )
    best: Best = field(
        default_factory=Best,
        metadata=stored("best_metric", writer="validation", reader="validation, checkpoint, listing, report"),
    )
    validations_without_best: int = field(
        default=0, metadata=stored("patience", writer="validation", reader="session, validation")
    )
    plateaus: list[int] = field(
        default_factory=list,
        metadata=stored("plateaus", writer="validation", reader="session, resume, restore", may_lack=True),
    )
    loss_sum: Tensor = field(
        default_factory=lambda: torch.zeros((), dtype=torch.float32),
        metadata=stored("metrics.loss_sum", writer="session", reader="session"),
    )
    loss_samples: int = field(default=0, metadata=stored("metrics.loss_samples", writer="session", reader="session"))
    last_validation: dict[str, float] = field(
        default_factory=dict, metadata=stored("metrics.last_validation", writer="validation", reader="export")
    )
    validated_step: int = field(
        default=0, metadata=stored("metrics.validated_step", writer="validation", reader="session")
    )
    halvings: int = field(default=0, metadata=stored("halvings", writer="loop", reader="loop, session"))
    validation_halvings: int = field(
        default=0, metadata=stored("validation_halvings", writer="session", reader="session", may_lack=True)
    )
    skipped_steps: int = field(
        default=0, metadata=stored("skipped_steps", writer="session", reader="session, start", may_lack=True)
    )
    history: list[dict[str, object]] = field(
        default_factory=list, metadata=stored("history", writer="start, resume, session", reader="report")
    )
    status: str = field(
        default="running", metadata=stored("status", writer="session", reader="resume, listing, report")
    )
    finish: Finish = field(
        default_factory=Finish,
        metadata=stored("finish", writer="finish", reader="finish, export, evaluate, report", may_lack=True),
    )

    def epoch_loss(self) -> float:
        """Mean training loss of the epoch so far. Waits for the device."""
        return self.loss_sum.item() / max(self.loss_samples, 1)


@dataclass(kw_only=True)
class CheckpointState:
    """A whole checkpoint.

    Attributes:
        run_id: of the run; a checkpoint of another run is not taken for one of this.
        config: all that determines the result; must equal recipe.json's.
        model: every tensor that trains or can change, by name.
        optimizer: by parameter name; see `optimizer_state`.
        scaler: of the loss, in fp16.
        rng: of every global random generator; see `capture_generators`.
        keep, trackers: nothing reads them; a file may lack them. Written until the next schema, which drops them.
        versions: of libraries and devices; see `numeric_environment`.
    """

    run_id: str = field(metadata=stored("run_id", writer="start", reader="checkpoint, listing, report"))
    config: dict[str, object] = field(metadata=stored("config", writer="setup", reader="resume, restore"))
    data: DataFacts = field(metadata=stored("data", writer="dataset", reader="resume, evaluate, export, report"))
    network: NetworkFacts = field(metadata=stored("network", writer="setup", reader="restore, report"))
    progress: Progress
    model: dict[str, Tensor] = field(metadata=stored("model", writer="session", reader="restore, report"))
    frozen: FrozenFacts = field(metadata=stored("frozen", writer="phase", reader="phase, restore, report"))
    optimizer: dict[str, object] = field(metadata=stored("optimizer", writer="optimizer", reader="optimizer"))
    scaler: dict[str, object] = field(metadata=stored("scaler", writer="session", reader="session"))
    rng: dict[str, object] = field(metadata=stored("rng", writer="state", reader="state"))
    metrics_file: LogMark = field(metadata=stored("metrics_file", writer="metrics_log", reader="metrics_log"))
    keep: int = field(default=0, metadata=stored("retention.keep", writer="session", reader="nobody", may_lack=True))
    trackers: dict[str, object] = field(
        default_factory=dict, metadata=stored("trackers", writer="session", reader="nobody", may_lack=True)
    )
    versions: dict[str, object] = field(metadata=stored("versions", writer="state", reader="resume, report"))

    def to_plain(self) -> Plain:
        """What is written: plain types only, the schema first; the running loss on the CPU."""
        progress = dataclasses.replace(self.progress, loss_sum=self.progress.loss_sum.cpu())
        return {SCHEMA_KEY: SCHEMA_VERSION} | part_to_plain(dataclasses.replace(self, progress=progress))

    @classmethod
    def from_plain(cls, plain: object, what: str) -> "CheckpointState":
        """What a file of this schema or an older one holds.

        Args:
            what: what to call it in an error.

        Raises:
            BadFile: it is no checkpoint, or one of its keys is not as it is written.
            RunError: it is of a schema that cannot be read.
        """
        if not isinstance(plain, dict) or SCHEMA_KEY not in plain:
            raise BadFile(f"{what} is not a checkpoint of this kit")
        return part_from_plain(cls, Fields(migrate(plain, what, SCHEMA_VERSION, MIGRATIONS), what))


# ---- Random generators ----------------------------------------------------------------------------------------------


CUDA_OF_RUN = "cuda of the run"


def capture_generators(device: torch.device | None = None) -> dict[str, object]:
    """The state of every global random generator, as plain values and tensors.

    Args:
        device: that a run is computed on: its generator has a name of its own, as the device may have another number
            when the run goes on.
    """
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    states: dict[str, object] = {
        "python": [version, list(numbers), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
        if device is not None and device.type == "cuda":
            states[CUDA_OF_RUN] = torch.cuda.get_rng_state(device)
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_generators(states: dict[str, object], device: torch.device | None = None) -> None:
    """Put back what `capture_generators` took down.

    Args:
        device: that the run is computed on now.
    """
    fields = Fields(states, "the random generators of the checkpoint")
    version, numbers, gauss = fields.take("python", list)
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = fields.take("numpy", list)
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(fields.take("torch", Tensor))
    if "cuda" in fields and torch.cuda.is_available():
        # There may be fewer devices now.
        torch.cuda.set_rng_state_all(fields.items("cuda", Tensor)[: torch.cuda.device_count()])
        if device is not None and device.type == "cuda" and CUDA_OF_RUN in fields:
            torch.cuda.set_rng_state(fields.take(CUDA_OF_RUN, Tensor), device)
    if "mps" in fields and torch.backends.mps.is_available():
        torch.mps.set_rng_state(fields.take("mps", Tensor))


@contextmanager
def generators_put_back() -> Iterator[None]:
    """Whatever draws random numbers within the block, nobody outside it notices."""
    states = capture_generators()
    try:
        yield
    finally:
        restore_generators(states)
        if "cuda" not in states and torch.cuda.is_available() and torch.cuda.is_initialized():
            # It began within the block; `torch.manual_seed` before it was meant for it as well.
            torch.cuda.manual_seed_all(torch.initial_seed())


def seed_generators(seed: int) -> None:
    """Seed every global random generator, the devices' included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---- What the last bits depend on -----------------------------------------------------------------------------------


def numeric_environment(device: torch.device, libraries: Sequence[str] = ()) -> dict[str, object]:
    """What bit-for-bit equality depends on beyond the recipe: versions, device, threads.

    Args:
        libraries: that the network is built by besides.
    """
    import PIL
    import torchvision  # takes half a second; whoever only looks into a checkpoint does without

    return {
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        # Only where it builds the network: a VGG does not care.
        "transformers": str(sys.modules["transformers"].__version__) if "transformers" in sys.modules else "",
        "tokenizers": str(sys.modules["tokenizers"].__version__) if "tokenizers" in sys.modules else "",
        **{name: str(importlib.import_module(name).__version__) for name in libraries},
        "numpy": str(np.__version__),
        "pillow": str(PIL.__version__),
        "python": platform.python_version(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        # A run is computed on one, however many can be seen; kept features are known by it.
        "device_count": 1,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def environment_differences(saved: dict[str, object], device: torch.device, libraries: Sequence[str] = ()) -> list[str]:
    """In words, what is not as it was when the checkpoint was written and can move the last bits."""
    now = numeric_environment(device, libraries)
    names = [name for name in now if name != "device_count"]
    return [f"{name} was {saved.get(name)}, is {now[name]}" for name in names if saved.get(name) != now[name]]
