"""How a recipe is carried out: precision, machine, how a run is saved and watched. Imports no torch."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from finetune.errors import RunError, UsageError
from finetune.recipe.named import named
from finetune.recipe.serialize import asked, from_plain, spec_from_plain, to_plain
from finetune.recipe.spec import Recipe


@dataclass(frozen=True)
class Numerics:
    """Choices that change the last bits, saved with the run.

    Attributes:
        precision: of the arithmetic.
        deterministic: deterministic algorithms only.
        backbone_precision: of the frozen part before what trains; "" = the same.
        cache: whether features may be kept.
        tf32: what CUDA may compute with 10 of fp32's 23 bits: "none", "convolutions" (as torch does by itself), "all" =
            matrix products too.
        fuse_batchnorm: where features are kept and computed in fp32, a frozen BatchNorm is computed as a part of the
            convolution before it.
    """

    precision: str = "fp32"
    deterministic: bool = True
    backbone_precision: str = ""
    cache: bool = True
    tf32: str = named("none", before="convolutions")
    fuse_batchnorm: bool = named(True, before=False)

    @property
    def of_backbone(self) -> str:
        """The precision of the frozen part."""
        return self.backbone_precision or self.precision

    @property
    def splits(self) -> bool:
        """Whether the frozen part computes in another precision than the rest."""
        return self.of_backbone != self.precision

    def reduced(self, device_type: str) -> str:
        """The arithmetic with the fewest bits that a part computes in: "fp32", "tf32", "bf16" or "fp16"."""
        coarsest = self.precision if self.precision != "fp32" else self.of_backbone
        if coarsest == "fp32" and device_type == "cuda" and self.tf32 != "none":
            return "tf32"
        return coarsest


def check_precision(numerics: Numerics, device_type: str) -> None:
    """Refuse a precision that the device has no arithmetic for.

    Args:
        device_type: "cpu", "cuda" or "mps".

    Raises:
        UsageError: names the option.
    """
    for option in ("precision", "backbone_precision"):
        if getattr(numerics, option) == "fp16" and device_type != "cuda":
            raise UsageError(
                f"--{option.replace('_', '-')} fp16: not on {device_type}; allowed there are fp32 and bf16"
            )


def determining_config(recipe: Recipe, numerics: Numerics) -> dict[str, object]:
    """Everything that determines the result, as plain values: what a resume must find unchanged."""
    return to_plain(recipe) | dataclasses.asdict(numerics)


def split_config(config: Mapping[str, object]) -> tuple[Recipe, Numerics]:
    """What `determining_config` put together.

    Raises:
        RunError: values that no recipe has: the file was edited.
    """
    names = {field.name for field in dataclasses.fields(Numerics)}
    try:
        recipe = from_plain({name: value for name, value in config.items() if name not in names})
        return recipe, spec_from_plain(Numerics, {name: config[name] for name in names if name in config})
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        raise RunError(f"the saved recipe is not one ({error}); restore recipe.json from a copy") from None


def completed(config: Mapping[str, object]) -> dict[str, object]:
    """A config with every choice named, also those that came after it was written.

    Raises:
        RunError: see `split_config`.
    """
    return determining_config(*split_config(config))


def asked_config(recipe: Recipe, numerics: Numerics, record: Mapping[str, object]) -> dict[str, object]:
    """What `determining_config` gives, to be held against the config of an older run: see `serialize.asked`."""
    config = determining_config(recipe, numerics)
    return asked(numerics, asked(recipe, config, record), record)


@dataclass(frozen=True)
class Machine:
    """Choices that may differ at a resume: they do not change the result on the same kind of machine.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        workers: processes that fetch batches ahead; None = as many as there are cores to decode image files, up to 8.
        worker_start: how they start.
        cache_limit: how much of the disk new features may take, as in "20GB"; "" = a quarter of what is free.
    """

    device: str = "auto"
    workers: int | None = None
    worker_start: str = "auto"
    cache_limit: str = ""


TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class Settings:
    """How a run is run; none of it changes the result.

    Attributes:
        save_every_steps, save_every_minutes: save also this often; 0 = at the end of each epoch only.
        keep: numbered checkpoints to keep.
        log_every_steps: steps between two lines in metrics.jsonl.
        track: names of who else is told, with commas between: tensorboard, wandb; "" = nobody.
        notify_every_epochs: send a message that often; 0 = never for that.
        report: write report.html at the end.
    """

    save_every_steps: int = 0
    save_every_minutes: float = 0.0
    keep: int = 2
    log_every_steps: int = 10
    track: str = ""
    notify_every_epochs: int = 0
    report: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError for values that mean nothing."""
        numbers = {"save_every_steps": 0, "save_every_minutes": 0, "keep": 1, "log_every_steps": 1}
        for name, least in (numbers | {"notify_every_epochs": 0}).items():
            value = getattr(self, name)
            if not least <= value < math.inf:
                text = "0 (off) or more" if least == 0 else "1 or more"
                raise UsageError(f"--{name.replace('_', '-')} {value}: not allowed; give {text}")
        unknown = [name for name in self.trackers if name not in TRACKERS]
        if unknown:
            raise UsageError(
                f"--track {self.track}: {unknown[0]!r} is unknown; give {', '.join(TRACKERS)}, several with commas "
                "between, or none"
            )

    @property
    def trackers(self) -> list[str]:
        """Names of those who are told."""
        return [name for name in self.track.replace(" ", "").split(",") if name not in ("", "none")]
