"""`finetune doctor`: what this machine has, and what is missing or wrong on it. Imports no torch itself."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.base.formatting import json_line, printable, size_text
from finetune.base.terminal import make_console
from finetune.doctor.checks import (
    Findings,
    cannot_be_found,
    installed_version,
    look_at_cpu,
    look_at_devices,
    look_at_environment,
    look_at_extras,
    look_at_memory,
    look_at_versions,
    module_name,
    redacted,
    requirements,
)
from finetune.doctor.disk import look_at_disk
from finetune.doctor.probe import NoAnswer, ask
from finetune.errors import one_line

if TYPE_CHECKING:  # imported when packages are looked at
    from packaging.requirements import Requirement

BUILDS = {"CUDA": "cuda_build", "cuDNN": "cudnn", "ROCm": "rocm_build", "Apple's MPS": "mps_build"}
STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


@dataclass
class Report:
    """What was found.

    Attributes:
        facts: look -> plain values; None where it failed.
        findings: {"level", "about", "text"} each.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[dict[str, str]] = field(default_factory=list)

    def count(self, level: str) -> int:
        return sum(finding["level"] == level for finding in self.findings)

    def look(self, about: str, action: Callable[[Findings], Any]) -> None:
        """Look at one thing; what goes wrong in that is a finding."""
        findings = Findings()
        try:
            self.facts[about] = action(findings)
        except Exception as error:  # a doctor must not fall ill: whatever is wrong with a machine is to be said
            self.facts[about] = None
            why = str(error) if isinstance(error, NoAnswer) else f"{type(error).__name__}: {one_line(error)}"
            findings.problem(f"could not be looked at: {why}")
        self.findings += [{"level": level, "about": about, "text": text} for level, text in findings.found]


def examine(as_json: bool, deep: bool) -> int:
    """`finetune doctor`. Returns 1 if there is a problem, else 0.

    Args:
        deep: import every package that is installed.
    """
    console = make_console(quiet=as_json)
    what = "importing every package, some twenty seconds" if deep else "looking at packages and devices"
    waits = console.status(what) if console.is_terminal else nullcontext()
    with waits:
        report = look_around(deep)
    if as_json:
        print(json_line(redacted(report.facts | {"findings": report.findings})))
    else:
        show(report, console)
    return 1 if report.count("problem") else 0


def look_around(deep: bool) -> Report:
    """Everything that there is to look at. What takes long is asked for first and answered meanwhile."""
    report = Report()
    needed: dict[str, list[Requirement]] = {"": []}
    with ThreadPoolExecutor(max_workers=max(os.cpu_count() or 1, 2)) as pool:
        torch_answer, nvml_answer = pool.submit(ask, "torch"), pool.submit(ask, "nvml")
        answers: dict[str, Future[dict[str, str]]] = {}

        def ask_for_imports(findings: Findings) -> list[str]:
            needed.update(requirements())
            for ones in needed.values() if deep else ():
                names = [module_name(one.name) for one in ones if installed_version(one.name)]
                new = [name for name in names if name not in answers]
                answers.update(dict.fromkeys(new, pool.submit(ask, "works", *new)))
            return list(needed)

        report.look("packages", ask_for_imports)
        report.look("environment", look_at_environment)
        report.look("memory", look_at_memory)
        report.look("disk", look_at_disk)
        report.look("cpu", lambda findings: look_at_cpu(torch_answer, findings))
        report.look("devices", lambda findings: look_at_devices(torch_answer, nvml_answer, findings))
        if report.facts.pop("packages") is not None:
            own, judge = needed.pop(""), (lambda module: answers[module].result()[module]) if deep else cannot_be_found
            report.look("versions", lambda findings: look_at_versions(own, judge, findings))
            report.look("extras", lambda findings: look_at_extras(needed, judge, findings))
    return report


# ---- For people -----------------------------------------------------------------------------------------------------


def show(report: Report, console: Console) -> None:
    """Facts first, then what to make of them, the worst last: that stays in sight."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for describe in (_versions, _devices, _cpu, _memory, _disk, _extras, _environment):
        about = describe.__name__.removeprefix("_")
        if report.facts.get(about):
            for label, text in describe(report.facts[about]):
                table.add_row(Text(_clean(label)), Text(_clean(text)))
    console.print(table)
    console.print()
    findings = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    findings.add_column(no_wrap=True)
    findings.add_column(overflow="fold")
    for finding in sorted(report.findings, key=lambda finding: list(STYLES).index(finding["level"])):
        said = Text.assemble((f"{finding['about']}: ", "dim"), _clean(finding["text"]))
        findings.add_row(Text(finding["level"], STYLES[finding["level"]]), said)
    console.print(findings)
    problems, notes = report.count("problem"), report.count("note")
    words = [
        f"{count} {name}{'' if count == 1 else 's'}"
        for count, name in ((problems, "problem"), (notes, "note"))
        if count
    ]
    console.print(Text(f"\n{' and '.join(words) or 'all is well'}"))


def _clean(text: str) -> str:
    return redacted(printable(text))


Rows = list[tuple[str, str]]


def _versions(facts: dict[str, Any]) -> Rows:
    own = ("finetune", "python", "system")
    others = [f"{name} {version}" for name, version in facts.items() if name not in own and version]
    return [
        ("finetune", f"{facts['finetune']}, Python {facts['python']}, {facts['system']}"),
        ("packages", ", ".join(others)),
    ]


def _devices(facts: dict[str, Any]) -> Rows:
    torch_says, driver = facts["torch"], facts["driver"]
    builds = [f"{name} {torch_says[key]}".removesuffix(" yes") for name, key in BUILDS.items() if torch_says[key]]
    rows = [("torch", f"{torch_says['version']}, built for {', '.join(builds) or 'the CPU alone'}")]
    if not driver["failure"]:
        rows.append(("driver", f"NVIDIA {driver['driver']}, for CUDA up to {driver['cuda']}"))
    for device in torch_says["devices"]:
        parts = [device["name"]]
        if device.get("total_bytes"):
            parts.append(f"{size_text(device['free_bytes'])} of {size_text(device['total_bytes'])} free")
        if device.get("percent") is not None:
            parts.append(f"{device['percent']} % in use")
        rows.append((device["device"], ", ".join(parts)))
    return rows


def _cpu(facts: dict[str, Any]) -> Rows:
    parts = [f"{facts['processors']} processors"]
    if facts["cores"]:
        parts.append(f"{facts['cores']} cores")
    if facts["usable"] != facts["processors"]:
        parts.append(f"{facts['usable']} for this process")
    if facts["control_group"]:
        parts.append(f"{facts['control_group']:g} for this container or job")
    if facts["torch_threads"]:
        parts.append(f"torch: {facts['torch_threads']} threads, {facts['capability']}")
    return [("cpu", ", ".join(parts))]


def _memory(facts: list[dict[str, Any]]) -> Rows:
    return [
        (
            "memory" if number == 0 else "",
            f"{size_text(one['free_bytes'])} of {size_text(one['total_bytes'])} free of {one['what']}",
        )
        for number, one in enumerate(facts)
    ]


def _disk(facts: list[dict[str, Any]]) -> Rows:
    rows = []
    for one in facts:
        size = f"{'' if one['is_whole_size'] else 'more than '}{size_text(one['size_bytes'])}"
        network = ", a network drive" if one["is_network"] else ""
        kind = f" ({one['file_system']}{network})" if one["file_system"] else ""
        rows.append((one["what"], f"{size} in {_short(one['path'])}{kind}, {size_text(one['free_bytes'])} free"))
    return rows


def _short(path: str) -> str:
    """A path as one would type it."""
    try:
        home = str(Path.home())
    except RuntimeError:  # nobody has one here
        return path
    return f"~{path.removeprefix(home)}" if path.startswith(f"{home}{os.sep}") else path


def _extras(facts: dict[str, Any]) -> Rows:
    rows = []
    for extra, one in facts.items():
        missing = f"; {one['install']}" if one["state"] != "installed" else ""
        rows.append((f"[{extra}]", f"{one['state']}{missing}"))
    return rows


def _environment(facts: dict[str, str]) -> Rows:
    words = [f"{name} is set" if value == "set" else f"{name}={value}" for name, value in facts.items()]
    return [("environment", ", ".join(words))]
