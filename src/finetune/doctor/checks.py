"""What `finetune doctor` looks at: packages, devices, processors, memory, environment. Each look gives facts and says
what it makes of them."""

import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from finetune.base.formatting import size_text
from finetune.base.memory import CGROUPS, limits, usable_cores
from finetune.doctor.probe import NoAnswer

if TYPE_CHECKING:  # imported when packages are looked at
    from packaging.requirements import Requirement

LITTLE_MEMORY_BYTES = 2_000_000_000
LITTLE_SHARED_BYTES = 512_000_000
PCI = Path("/sys/bus/pci/devices")
# The first digits of a display's class; and who makes GPUs that torch can use.
DISPLAY, NVIDIA, AMD = "0x03", "0x10de", "0x1002"
# What may be shown of the environment. Of all else, only whether it is set: it may be secret.
SHOWN = (
    "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "FINETUNE_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "KMP_AFFINITY",
    "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OMP_PROC_BIND", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_HOME",
    "TRANSFORMERS_OFFLINE", "WANDB_MODE",
)  # fmt: skip
NAMED = (
    "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_SECRET_ACCESS_KEY", "FINETUNE_NOTIFY", "GOOGLE_APPLICATION_CREDENTIALS",
    "HF_TOKEN", "HTTPS_PROXY", "HTTP_PROXY", "WANDB_API_KEY",
)  # fmt: skip
# Values of CUDA_VISIBLE_DEVICES that somebody gives who wants no GPU.
HIDING = ("", "-1", "NoDevFiles")
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|NOTIFY|PROXY", re.IGNORECASE)
SHORTEST_SECRET = 6


@dataclass
class Findings:
    """What is said of one thing that was looked at; (level, text) each, a level being "ok", "note" or "problem"."""

    found: list[tuple[str, str]] = field(default_factory=list)

    def ok(self, text: str) -> None:
        self.found.append(("ok", text))

    def note(self, text: str) -> None:
        self.found.append(("note", text))

    def problem(self, text: str) -> None:
        self.found.append(("problem", text))


# ---- Packages -------------------------------------------------------------------------------------------------------


def requirements() -> "dict[str, list[Requirement]]":
    """Extra -> what it needs; "" = what finetune itself needs."""
    from packaging.requirements import Requirement

    needed: dict[str, list[Requirement]] = {}
    for line in importlib.metadata.requires("finetune") or []:
        requirement = Requirement(line)
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra[1] if extra else ""}):
            needed.setdefault(extra[1] if extra else "", []).append(requirement)
    return {extra: [one for one in needed[extra] if one.name != "finetune"] for extra in sorted(needed)}


def installed_version(name: str) -> str:
    """ "" = it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def module_name(package: str) -> str:
    """What is imported of an installed package: sklearn of scikit-learn."""
    usual = package.lower().replace("-", "_")
    files = importlib.metadata.files(package) or []
    tops = {path.parts[0].removesuffix(".py") for path in files if path.name == "__init__.py" or path.suffix == ".py"}
    names = sorted(name for name in tops if name.isidentifier() and not name.startswith("_"))
    return usual if usual in names or not names else names[0]


# Module -> why it cannot be used, "" = it can; raises NoAnswer where that crashes.
Judge = Callable[[str], str]


def cannot_be_found(module: str) -> str:
    """A `Judge` that imports nothing."""
    found = importlib.util.find_spec(module)  # also where it is installed in place
    return "" if found is not None and found.loader is not None else "its files are gone"


def unmet(name: str) -> str:
    """What an installed package needs and does not have, as torchvision does of a torch that somebody put in its
    place; "" = nothing."""
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires(name) or []:
        one = Requirement(line)
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            version = installed_version(one.name)
            if not version or not one.specifier.contains(version, prereleases=True):
                there = f"{version} is installed" if version else "which is not installed"
                return f"needs {one.name}{one.specifier}, {there}"
    return ""


def package_facts(needed: "list[Requirement]", judge: Judge) -> list[dict[str, str]]:
    """{"name", "needs", "version", "failure"} each; "version" "" = not installed, "failure" = why it cannot be used."""
    rows = []
    for one in needed:
        version, failure = installed_version(one.name), ""
        if version:
            try:
                failure = judge(module_name(one.name))
            except NoAnswer as error:
                failure = f"to import it {error}"
            if not failure and not one.specifier.contains(version, prereleases=True):
                failure = f"{version} is too old"
        rows.append({"name": one.name, "needs": str(one.specifier), "version": version, "failure": failure})
    return rows


def install_command(rows: list[dict[str, str]]) -> str:
    """What would install those that are missing or too old; "" = nothing to do."""
    wanted = [f"'{row['name']}{row['needs']}'" for row in rows if not row["version"] or row["failure"]]
    return f"pip install -U {' '.join(wanted)}" if wanted else ""


def look_at_versions(needed: "list[Requirement]", judge: Judge, findings: Findings) -> dict[str, str | None]:
    rows = package_facts(needed, judge)
    for row in rows:
        if not row["version"] or row["failure"]:
            why = row["failure"] or "is not installed"
            findings.problem(f"{row['name']}{row['needs']}: {why}; {install_command([row])}")
        elif lacks := unmet(row["name"]):
            findings.note(f"{row['name']} {row['version']} {lacks}; pip install -U {row['name']} mends it")
    if not findings.found:
        how = "are there: --deep also imports each" if judge is cannot_be_found else "can be imported"
        findings.ok(f"all {len(rows)} packages that finetune needs {how}")
    return {
        "finetune": installed_version("finetune"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{row["name"]: row["version"] or None for row in rows},
    }


def look_at_extras(
    needed: "dict[str, list[Requirement]]", judge: Judge, findings: Findings
) -> dict[str, dict[str, object]]:
    facts: dict[str, dict[str, object]] = {}
    for extra, requirements_of in needed.items():
        rows = package_facts(requirements_of, judge)
        broken = [row for row in rows if row["version"] and row["failure"]]
        for row in broken:
            findings.problem(f"{extra}: {row['name']} cannot be used ({row['failure']}); {install_command([row])}")
        missing = [row["name"] for row in rows if not row["version"]]
        state = "broken" if broken else "installed"
        if missing:
            state = "not installed" if len(missing) == len(rows) else f"without {', '.join(missing)}"
        facts[extra] = {"state": state, "packages": rows, "install": install_command(rows)}
    if not findings.found:
        how = "is there" if judge is cannot_be_found else "can be imported"
        findings.ok(f"every extra that is installed {how}")
    return facts


# ---- Devices --------------------------------------------------------------------------------------------------------


def pci_gpus(folder: Path = PCI) -> dict[str, int]:
    """Maker -> how many GPUs the bus shows (Linux), whether a driver knows them or not."""
    found = {NVIDIA: 0, AMD: 0}
    for device in folder.glob("*"):
        try:
            kind, maker = ((device / name).read_text().strip() for name in ("class", "vendor"))
        except OSError:
            continue
        if kind.startswith(DISPLAY) and maker in found:
            found[maker] += 1
    return found


def look_at_devices(
    torch_answer: Future[dict[str, Any]], nvml_answer: Future[dict[str, Any]], findings: Findings
) -> dict[str, Any]:
    """Raises NoAnswer: torch crashes."""
    try:
        nvml = nvml_answer.result()
    except NoAnswer as error:
        nvml = {"failure": f"NVIDIA's driver {error}", "devices": []}
    torch_says = torch_answer.result()
    judge_devices(torch_says, nvml, pci_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"), findings)
    percents = {device.get("uuid", "").removeprefix("GPU-"): device.get("percent") for device in nvml["devices"]}
    devices = [device | {"percent": percents.get(device.get("uuid"))} for device in torch_says["devices"]]
    return {"torch": torch_says | {"devices": devices}, "driver": nvml}


def judge_devices(
    torch_says: dict[str, Any],
    nvml: dict[str, Any],
    gpus: dict[str, int],
    visible: str | None,
    findings: Findings,
) -> None:
    """Say which devices can be used, and of a GPU that cannot, why.

    Args:
        torch_says, nvml: as `finetune.doctor.probe` answers.
        gpus: as `pci_gpus` gives them.
        visible: CUDA_VISIBLE_DEVICES.
    """
    for device in torch_says["devices"]:
        if device["failure"]:
            findings.problem(f"{device['device']} ({device['name']}) is out of order: {device['failure']}")
        else:
            findings.ok(f"{device['device']}: {device['name']} can be used")
        free, total = device.get("free_bytes"), device.get("total_bytes")
        if free is not None and free < total / 2:
            findings.note(f"{device['device']}: {size_text(free)} of {size_text(total)} are free, others use the rest")
    there = max(len(nvml["devices"]), gpus[NVIDIA])
    seen = sum(device["device"].startswith("cuda") for device in torch_says["devices"])
    if there and not torch_says["cuda"]:
        hidden = visible is not None and visible.strip() in HIDING
        (findings.note if hidden else findings.problem)(
            f"{there} NVIDIA GPU(s) are there, but torch cannot use them: {_why_no_cuda(torch_says, nvml, visible)}"
        )
    elif there > seen:
        findings.note(f"torch sees {seen} of {there} NVIDIA GPUs (CUDA_VISIBLE_DEVICES={visible or ''})")
    if gpus[AMD] and not torch_says["rocm_build"]:
        findings.note(f"{gpus[AMD]} AMD GPU(s) are there, but this torch is built without ROCm")
    if not torch_says["devices"] and not there:
        findings.ok("no GPU: everything runs on the CPU")


def _why_no_cuda(torch_says: dict[str, Any], nvml: dict[str, Any], visible: str | None) -> str:
    if not torch_says["cuda_build"]:
        return f"torch {torch_says['version']} is built without CUDA; install a build with it, as pytorch.org tells"
    if nvml["failure"]:
        return f"NVIDIA's driver does not answer ({nvml['failure']}); install or repair it, or restart the machine"
    if int(nvml["cuda"].split(".")[0]) < int(torch_says["cuda_build"].split(".")[0]):
        return (
            f"driver {nvml['driver']} knows CUDA {nvml['cuda']} at most, torch is for {torch_says['cuda_build']}: "
            "update the driver, or install a torch for that CUDA"
        )
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible!r} leaves none; unset it"
    return torch_says["cuda_failure"] or "it does not say why"


# ---- Processors, memory, environment --------------------------------------------------------------------------------


def cpu_limit(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """How many processors the control groups of this process give it (Linux, version 1 and 2); None = no limit."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers
        place = base / inside.lstrip("/")
        for folder in (place, *place.parents):
            found.append(_quota(folder))
            if folder == base:
                break
    return min((quota for quota in found if quota), default=None)


def _quota(folder: Path) -> float | None:
    try:
        words = (folder / "cpu.max").read_text().split()
    except OSError:
        try:
            words = [(folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")]
        except OSError:
            return None
    try:
        quota, period = map(int, words)
    except ValueError:  # "max"
        return None
    return quota / period if quota > 0 and period > 0 else None


def look_at_cpu(torch_answer: Future[dict[str, Any]], findings: Findings) -> dict[str, Any]:
    usable = usable_cores()
    limit = cpu_limit()
    try:
        torch_says = torch_answer.result()
    except NoAnswer:  # said of the devices
        torch_says = {"threads": None, "capability": ""}
    judge_threads(torch_says["threads"], min(usable, limit or usable), os.environ.get("OMP_NUM_THREADS"), findings)
    return {
        "processors": os.cpu_count(),
        "cores": psutil.cpu_count(logical=False),
        "usable": usable,
        "control_group": limit,
        "torch_threads": torch_says["threads"],
        "capability": torch_says["capability"],
    }


def judge_threads(threads: int | None, given: float, omp: str | None, findings: Findings) -> None:
    """Say whether torch computes with as many threads as it should.

    Args:
        threads: that torch computes with; None = not known.
        given: processors that this process may use.
        omp: OMP_NUM_THREADS.
    """
    whole = max(int(given), 1)
    if omp is not None and not re.fullmatch(r"\s*[1-9]\d*(\s*,\s*[1-9]\d*)*\s*", omp):
        findings.note(f"OMP_NUM_THREADS={omp!r} is no number of threads; set it to {whole}, or not at all")
    if threads is None:
        return
    if threads > max(given, 1):
        findings.note(
            f"torch computes with {threads} threads, but may use {given:g} processor(s), so they wait for each other: "
            f"set OMP_NUM_THREADS={whole}"
        )
    elif omp is not None and threads < whole // 2:
        findings.note(f"OMP_NUM_THREADS={omp}: torch leaves {whole - threads} of {whole} processors idle")
    if not findings.found:
        findings.ok(f"torch computes with {threads} thread{'' if threads == 1 else 's'}")


def look_at_memory(findings: Findings) -> list[dict[str, Any]]:
    found = limits()
    for limit in found:
        text = f"{size_text(limit.free_bytes)} of {size_text(limit.total_bytes)} of {limit.what} are free"
        if limit.is_near:
            findings.problem(f"{text}: a run would stop at once; close other programs")
        elif limit.free_bytes < LITTLE_MEMORY_BYTES:
            findings.note(f"{text}: give --batch-size 16 or --workers 0 if a run stops for it")
    shared = Path("/dev/shm")
    if shared.is_dir() and psutil.disk_usage(str(shared)).free < LITTLE_SHARED_BYTES:
        free = size_text(psutil.disk_usage(str(shared)).free)
        findings.note(f"{free} of {shared} are free, where workers hand over images: if they die, give --workers 0")
    if not findings.found:
        findings.ok(f"{size_text(min(limit.free_bytes for limit in found))} of memory are free")
    return [{"what": one.what, "total_bytes": one.total_bytes, "free_bytes": one.free_bytes} for one in found]


def look_at_environment(findings: Findings) -> dict[str, str]:
    """Values where they are harmless; of others "set"."""
    shown = {name: os.environ[name] for name in SHOWN if name in os.environ}
    return shown | {name: "set" for name in NAMED if os.environ.get(name)}


def redacted(value: Any) -> Any:
    """A text, or all texts in a plain value, without what might be a secret: values of such variables, names and
    passwords in addresses."""
    if isinstance(value, dict):
        return {key: redacted(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [redacted(entry) for entry in value]
    return _redacted_text(value) if isinstance(value, str) else value


def _redacted_text(text: str) -> str:
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "...")
    return re.sub(r"://[^/@\s]+@", "://...@", text)
