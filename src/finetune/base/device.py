"""Where and in which arithmetic a network runs."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import deterministic

from finetune.errors import UsageError

# torch makes this a property of the module, which no type checker knows.
FILLS = "fill_uninitialized_memory"
# What makes cuBLAS deterministic; torch looks at it before each call.
CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What an NVIDIA GPU may compute in TF32, which keeps 10 of the 23 bits of fp32: nothing; convolutions, as torch does by
# itself; matrix products too.
NO_TF32, TF32_CONVOLUTIONS, ALL_TF32 = "none", "convolutions", "all"


def pick_device(name: str, before: str = "") -> torch.device:
    """ "auto" = CUDA, else Apple's MPS, else the CPU.

    Args:
        before: the kind of device that comes first for "auto", where this machine has one.

    Raises:
        UsageError: a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return torch.device(before if here.get(before) else next(kind for kind, is_here in here.items() if is_here))
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: cannot be used ({reason}); give auto, cpu, cuda, cuda:N or mps") from None
    return device


def bf16_unit(file: Path = Path("/proc/cpuinfo")) -> str:
    """What this processor multiplies bf16 with by itself, as Linux names it: amx_bf16, avx512_bf16; "" = nothing, or
    not known."""
    try:
        flags = next((line for line in file.read_text().splitlines() if line.startswith("flags")), "").split()
    except OSError:
        return ""
    return next((unit for unit in ("amx_bf16", "avx512_bf16") if unit in flags), "")


def set_numerics(is_deterministic: bool, tf32: str) -> None:
    """Deterministic algorithms or fast ones, and what may be computed in TF32. Must come before CUDA starts.

    Args:
        tf32: one of NO_TF32, TF32_CONVOLUTIONS, ALL_TF32.
    """
    if is_deterministic:
        if CUBLAS_VARIABLE in os.environ or not torch.cuda.is_initialized():
            _cublas["in time"] = True
        os.environ.setdefault(CUBLAS_VARIABLE, ":4096:8")
        # Filling fresh memory would only help against reading what was never written, and costs time.
        setattr(deterministic, FILLS, False)
    torch.use_deterministic_algorithms(is_deterministic)
    torch.backends.cudnn.benchmark = not is_deterministic
    set_tf32(tf32)


# Whether cuBLAS was told to be deterministic before CUDA was used in this process; later it does not look.
_cublas = {"in time": False}


def said_too_late(device: torch.device) -> str:
    """What to tell a person where CUDA began before `set_numerics`; "" = nothing. cuBLAS looks at its variable when it
    begins."""
    if device.type != "cuda" or _cublas["in time"] or not torch.are_deterministic_algorithms_enabled():
        return ""
    return (
        f"CUDA was used in this process before, without {CUBLAS_VARIABLE}: products of matrices may differ in their "
        f"last bits from run to run; for bit-equal ones start the process anew with {CUBLAS_VARIABLE}=:4096:8"
    )


def set_tf32(which: str) -> None:
    """See `set_numerics`."""
    torch.backends.cudnn.allow_tf32 = which != NO_TF32
    torch.backends.cuda.matmul.allow_tf32 = which == ALL_TF32


@contextlib.contextmanager
def _tf32_put_back() -> Iterator[None]:
    """What `set_tf32` sets within the block is afterwards as it was.

    Raises:
        UsageError: somebody set them by torch's newer names, after which it does not tell.
    """
    try:
        convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        raise UsageError(
            "torch.backends...fp32_precision was set in this process, which hides what is computed in TF32; leave it "
            "as it was, and say --tf32 none, convolutions or all"
        ) from None
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


@contextlib.contextmanager
def in_fp32() -> Iterator[None]:
    """Within the block nothing is computed in TF32; what else is set stays as it is, for others in this process."""
    with _tf32_put_back():
        set_tf32(NO_TF32)
        yield


@contextlib.contextmanager
def numerics_put_back() -> Iterator[None]:
    """What `set_numerics` sets within the block is afterwards as it was."""
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, fills = torch.backends.cudnn.benchmark, getattr(deterministic, FILLS)
    workspace = os.environ.get(CUBLAS_VARIABLE)
    try:
        with _tf32_put_back():
            yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
        torch.backends.cudnn.benchmark = benchmark
        setattr(deterministic, FILLS, fills)
        if workspace is None:
            os.environ.pop(CUBLAS_VARIABLE, None)
        else:
            os.environ[CUBLAS_VARIABLE] = workspace


def to_device(inputs: Tensor, device: torch.device) -> Tensor:
    """Images, in the memory format that convolutions are fastest in; or rows of features."""
    if inputs.dim() != 4:
        return inputs.to(device, non_blocking=True)
    return inputs.to(device, memory_format=torch.channels_last, non_blocking=True)


def module_to_device(module: nn.Module, device: torch.device) -> nn.Module:
    """A network on the device, in the memory format that convolutions are fastest in."""
    return module.to(device).to(memory_format=torch.channels_last)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Compute in a precision, also within a block of another."""
    if precision == "fp32":
        # To leave autocast costs a hundredth of a small step, so only where there is something to leave.
        inside = torch.is_autocast_enabled(device.type)
        return torch.autocast(device.type, enabled=False) if inside else contextlib.nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])
