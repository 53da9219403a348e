"""What survives a restart: one versioned dict of plain values, listed here and nowhere else."""

import platform
import random
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor

SCHEMA_VERSION = 4


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        epoch: the epoch that the next step belongs to.
        position_samples: samples of that epoch that are consumed.
        loss_sum, loss_samples: the running training loss of the unfinished epoch.
        best: {"metric", "value", "step", "epoch"} of the best validation so far, or {}.
        validations_without_best: in a row.
        reductions: of the learning rate by the plateau schedule.
        extensions: [{"from_step", "epochs", "lr"}], in order, by `resume --epochs`.
        halvings: how often memory ran out, and fewer samples were computed at once from then on.
        status: "running", "finished" or "stopped early".
        last_validation: metrics of the newest validation, or {}.
        validated_step: the step of that one; a stop may have come before it, then whoever resumes begins with it.
        history: [{"event", "step", "epoch", ...}]: starts, resumes, extensions, thaws.
    """

    step: int = 0
    epoch: int = 0
    position_samples: int = 0
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float32))
    loss_samples: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    validations_without_best: int = 0
    reductions: int = 0
    extensions: list[dict[str, Any]] = field(default_factory=list)
    halvings: int = 0
    status: str = "running"
    last_validation: dict[str, float] = field(default_factory=dict)
    validated_step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def epoch_loss(self) -> float:
        """Mean training loss of the epoch so far. Waits for the device."""
        return self.loss_sum.item() / max(self.loss_samples, 1)


def progress_to_plain(progress: Progress) -> dict[str, Any]:
    """The checkpoint keys that hold a `Progress`."""
    return {
        "step": progress.step,
        "epoch": progress.epoch,
        "position_samples": progress.position_samples,
        "scheduler": {"reductions": progress.reductions, "extensions": progress.extensions},
        "best_metric": progress.best,
        "patience": progress.validations_without_best,
        "metrics": {
            "loss_sum": progress.loss_sum.cpu(),
            "loss_samples": progress.loss_samples,
            "last_validation": progress.last_validation,
            "validated_step": progress.validated_step,
        },
        "halvings": progress.halvings,
        "history": progress.history,
        "status": progress.status,
    }


def progress_from_plain(state: dict[str, Any]) -> Progress:
    return Progress(
        step=state["step"],
        epoch=state["epoch"],
        position_samples=state["position_samples"],
        loss_sum=state["metrics"]["loss_sum"],
        loss_samples=state["metrics"]["loss_samples"],
        best=state["best_metric"],
        validations_without_best=state["patience"],
        reductions=state["scheduler"]["reductions"],
        extensions=state["scheduler"]["extensions"],
        halvings=state["halvings"],
        status=state["status"],
        last_validation=state["metrics"]["last_validation"],
        validated_step=state["metrics"]["validated_step"],
        history=state["history"],
    )


def capture_generators() -> dict[str, Any]:
    """The state of every global random generator, as plain values and tensors."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    states: dict[str, Any] = {
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
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_generators(states: dict[str, Any]) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


def seed_generators(seed: int) -> None:
    """Seed every global random generator, the devices' included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def numeric_environment(device: torch.device) -> dict[str, Any]:
    """What bit-for-bit equality depends on beyond the recipe: versions, device, threads."""
    return {
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        # Only where it builds the network: a VGG does not care.
        "transformers": str(sys.modules["transformers"].__version__) if "transformers" in sys.modules else "",
        "tokenizers": str(sys.modules["tokenizers"].__version__) if "tokenizers" in sys.modules else "",
        "numpy": str(np.__version__),
        "pillow": str(PIL.__version__),
        "python": platform.python_version(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "device_count": torch.cuda.device_count() if device.type == "cuda" else 1,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def environment_differences(saved: dict[str, Any], device: torch.device) -> list[str]:
    """In words, what is not as it was when the checkpoint was written and can move the last bits."""
    now = numeric_environment(device)
    return [f"{name} was {saved.get(name)}, is {now[name]}" for name in now if saved.get(name) != now[name]]
