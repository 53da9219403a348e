"""What the memory and the device of a run are doing just now, quick enough to be asked every few steps."""

import functools
import os
from contextlib import suppress
from typing import Any

import psutil
import torch

from finetune.base.memory import MB


@functools.cache
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)


def device_figures(device: torch.device) -> dict[str, float]:
    """Memory, and how busy the device is. Never fails: what cannot be found out is left out.

    Returns:
        memory/process_mb: resident memory of this process.
        memory/machine_free_mb: what the machine could still give.
        On CUDA also memory/cuda_mb: of this process's tensors; memory/cuda_peak_mb: the most since the last call;
            device/cuda_percent: the share of the time that the GPU computed; device/cuda_used_mb: of its memory, by
            everybody.
        On MPS also memory/mps_mb: of this process's tensors.
    """
    figures: dict[str, float] = {}
    with suppress(psutil.Error, OSError):
        # Looked up by number: a forked process is another one.
        figures["memory/process_mb"] = _megabytes(_process(os.getpid()).memory_info().rss)
        figures["memory/machine_free_mb"] = _megabytes(psutil.virtual_memory().available)
    if device.type == "cuda":
        with suppress(RuntimeError, AssertionError, KeyError):  # no CUDA here, or it is out of order
            index = torch.cuda.current_device() if device.index is None else device.index
            # One look for both: each costs as much as a small step.
            allocated = torch.cuda.memory_stats_as_nested_dict(index)["allocated_bytes"]["all"]
            torch.cuda.reset_peak_memory_stats(index)
            figures["memory/cuda_mb"] = _megabytes(allocated["current"])
            figures["memory/cuda_peak_mb"] = _megabytes(allocated["peak"])
            free_bytes, total_bytes = torch.cuda.mem_get_info(index)
            figures["device/cuda_used_mb"] = _megabytes(total_bytes - free_bytes)
            figures |= _nvml_figures(index)
    elif device.type == "mps":
        with suppress(RuntimeError):
            figures["memory/mps_mb"] = _megabytes(torch.mps.current_allocated_memory())
    return figures


def _megabytes(size_bytes: float) -> float:
    return round(size_bytes / MB, 1)


# ---- NVIDIA's own library ------------------------------------------------------------------------------------------


def _nvml_figures(index: int) -> dict[str, float]:
    """How busy torch's CUDA device `index` is, as the driver counts it."""
    handle = nvml_handle(index)
    if handle is None:
        return {}
    import pynvml

    # One that is divided among several (MIG) does not tell its use.
    with suppress(pynvml.NVMLError):
        return {"device/cuda_percent": float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)}
    return {}


@functools.cache
def nvml_handle(index: int) -> object:
    """The driver's name for torch's CUDA device `index`; None where there is no such library or device.

    The two number them differently as soon as CUDA_VISIBLE_DEVICES leaves some out: the device is found by its own name
    or its place on the bus.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        properties = torch.cuda.get_device_properties(index)
        pynvml.nvmlInit()
    except (pynvml.NVMLError, RuntimeError, AssertionError):
        return None
    for find in (_handle_by_uuid, _handle_by_bus):
        # Which of them a torch tells differs from release to release.
        with suppress(pynvml.NVMLError, AttributeError):
            handle = find(properties)
            if handle is not None:
                return handle
    return None


def _handle_by_uuid(properties: Any) -> object:
    import pynvml

    name = str(properties.uuid)
    for prefix in ("" if name.startswith(("GPU-", "MIG-")) else "GPU-", "MIG-"):
        with suppress(pynvml.NVMLError):
            return pynvml.nvmlDeviceGetHandleByUUID(f"{prefix}{name}")
    return None


def _handle_by_bus(properties: Any) -> object:
    import pynvml

    domain, bus, device = properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id
    return pynvml.nvmlDeviceGetHandleByPciBusId(f"{domain:08x}:{bus:02x}:{device:02x}.0")
