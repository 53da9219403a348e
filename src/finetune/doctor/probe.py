"""What `finetune doctor` asks other libraries, in a process of its own each time: some of them crash, hang or print.

`python -m finetune.doctor.probe QUESTION WORDS...` prints the answer as one line of JSON.
"""

import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from finetune.errors import one_line

ANSWER_SECONDS = 120.0
TRIAL_SIZE = 64


class NoAnswer(Exception):
    """Why a question was not answered, in words."""


def ask(question: str, *words: str) -> Any:
    """The answer of a process of its own.

    Raises:
        NoAnswer: it crashed, or did not answer in time.
    """
    # -P: what lies in the working folder is not imported.
    command = [sys.executable, "-P", "-m", "finetune.doctor.probe", question, *words]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        output, errors = process.communicate(timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
        with suppress(subprocess.TimeoutExpired):  # who hangs in a driver does not even hear that
            process.wait(1.0)
        raise NoAnswer(f"did not answer within {ANSWER_SECONDS:.0f} s") from None
    try:
        return json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        said = errors.decode(errors="replace").strip().splitlines()[-1:]
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        raise NoAnswer(f"ended by {how}{': ' if said else ''}{' '.join(said)[:200]}") from None


# ---- In the other process -------------------------------------------------------------------------------------------


def works(*modules: str) -> dict[str, str]:
    """Module -> why it cannot be imported; "" = it can."""
    found = {}
    for module in modules:
        try:
            importlib.import_module(module)
            found[module] = ""
        except BaseException as error:  # whatever the code of others does, also sys.exit, is the answer
            found[module] = f"{type(error).__name__}: {one_line(error)}"
    return found


def torch_facts() -> dict[str, Any]:
    """What torch says of itself and of the devices that it sees."""
    import torch

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        cuda = torch.cuda.is_available()
        why_not = "" if cuda else _cuda_failure()
    return {
        "version": str(torch.__version__),
        "cuda_build": torch.version.cuda,
        "rocm_build": torch.version.hip,
        "cudnn": _cudnn_text(torch.backends.cudnn.version()),
        "cuda": cuda,
        "cuda_failure": " ".join([why_not, *(one_line(cast(Warning, one.message)) for one in warned)]).strip(),
        "mps": torch.backends.mps.is_available(),
        "mps_build": "yes" if torch.backends.mps.is_built() else "",
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "devices": [_device_facts(f"cuda:{index}") for index in range(torch.cuda.device_count() if cuda else 0)]
        + ([_device_facts("mps")] if torch.backends.mps.is_available() else []),
    }


def _cudnn_text(version: int | None) -> str:
    """92600 -> 9.26.0; before 9, 8907 -> 8.9.7."""
    if not version:
        return ""
    major = 10_000 if version >= 90_000 else 1_000
    return f"{version // major}.{version % major // 100}.{version % 100}"


def _cuda_failure() -> str:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return one_line(error)
    return ""


def _device_facts(name: str) -> dict[str, Any]:
    """Name, memory, and whether a small product comes out right: "failure" says why not."""
    import torch

    facts: dict[str, Any] = {"device": name, "name": name, "failure": ""}
    try:
        if name.startswith("cuda"):
            properties = torch.cuda.get_device_properties(name)
            facts["name"], facts["compute"] = properties.name, f"{properties.major}.{properties.minor}"
            facts["uuid"] = str(getattr(properties, "uuid", ""))
            facts["free_bytes"], facts["total_bytes"] = torch.cuda.mem_get_info(name)
        ones = torch.ones(TRIAL_SIZE, TRIAL_SIZE, device=name)
        product = (ones @ ones).sum().item()
        if product != TRIAL_SIZE**3:
            facts["failure"] = f"it computes {product:g} where {TRIAL_SIZE**3} is right"
    except (RuntimeError, AssertionError) as error:
        facts["failure"] = one_line(error)
    return facts


def nvml_facts() -> dict[str, Any]:
    """What NVIDIA's driver says: its version, the newest CUDA that it knows, the GPUs."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"failure": one_line(error), "devices": []}
    cuda = pynvml.nvmlSystemGetCudaDriverVersion()
    facts: dict[str, Any] = {"failure": "", "driver": _text(pynvml.nvmlSystemGetDriverVersion())}
    facts["cuda"] = f"{cuda // 1000}.{cuda % 1000 // 10}"
    facts["devices"] = [_nvml_device(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return facts


def _nvml_device(index: int) -> dict[str, Any]:
    import pynvml

    facts: dict[str, Any] = {"index": index}
    with suppress(pynvml.NVMLError):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        facts["name"] = _text(pynvml.nvmlDeviceGetName(handle))
        facts["uuid"] = _text(pynvml.nvmlDeviceGetUUID(handle))
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        facts["total_bytes"], facts["free_bytes"] = int(memory.total), int(memory.free)
        facts["percent"] = int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    return facts


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


QUESTIONS: dict[str, Callable[..., Any]] = {"works": works, "torch": torch_facts, "nvml": nvml_facts}

if __name__ == "__main__":
    # Libraries print where they like: what they say goes with the errors, the answer alone to standard output.
    answers = os.dup(1)
    os.dup2(2, 1)
    answer = json.dumps(QUESTIONS[sys.argv[1]](*sys.argv[2:]))
    os.write(answers, answer.encode() + b"\n")
    os._exit(0)  # nobody is to have a last word
