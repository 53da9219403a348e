import io
import json
import mmap
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from packaging.requirements import Requirement

from finetune.base.terminal import PatientConsole
from finetune.doctor import probe as doctor_probe
from finetune.doctor import report as doctor
from finetune.doctor.checks import (
    AMD,
    NVIDIA,
    Findings,
    cannot_be_found,
    cpu_limit,
    install_command,
    judge_devices,
    judge_threads,
    look_at_environment,
    look_at_memory,
    look_at_versions,
    module_name,
    package_facts,
    pci_gpus,
    redacted,
    unmet,
)
from finetune.doctor.disk import file_system, folder_size, judge, look_at_disk, places, trial
from finetune.doctor.probe import NoAnswer, ask
from finetune.watch.devices import device_figures, nvml_handle


def told(findings: Findings, level: str) -> str:
    return "\n".join(text for found, text in findings.found if found == level)


# ---- Questions to other processes ---------------------------------------------------------------------------------------


@pytest.fixture
def strange_modules(tmp_path, monkeypatch) -> Path:
    """Modules that do what a broken package does when it is imported."""
    folder = tmp_path / "strange"
    folder.mkdir()
    for name, code in (
        ("prints", "print('{}'); import os; os.write(1, b'{}')"),
        ("leaves", "import sys; sys.exit(3)"),
        ("fails", "raise OSError('libcudart.so.12: cannot open shared object file')"),
        ("dies", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        ("hangs", "import time; time.sleep(60)"),
    ):
        (folder / f"{name}.py").write_text(code)
    before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *before]))
    return folder


def test_imports_that_print_fail_or_leave_are_answered(strange_modules):
    assert ask("works", "prints", "leaves", "fails", "nowhere") == {
        "prints": "",
        "leaves": "SystemExit: 3",
        "fails": "OSError: libcudart.so.12: cannot open shared object file",
        "nowhere": "ModuleNotFoundError: No module named 'nowhere'",
    }


def test_an_import_that_crashes_or_hangs_is_told_as_that(strange_modules, monkeypatch):
    with pytest.raises(NoAnswer, match="ended by signal 11"):
        ask("works", "dies")
    monkeypatch.setattr(doctor_probe, "ANSWER_SECONDS", 1.5)
    with pytest.raises(NoAnswer, match="did not answer within 2 s"):
        ask("works", "hangs")


def test_nothing_in_the_working_folder_is_imported(tmp_path, monkeypatch):
    (tmp_path / "psutil.py").write_text("raise SystemExit('fooled')")
    monkeypatch.chdir(tmp_path)
    assert ask("works", "psutil") == {"psutil": ""}


@pytest.mark.slow
def test_torch_tells_its_threads_and_devices_and_the_driver_answers_or_says_why_not():
    found = ask("torch")
    assert found["version"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["cuda"] == torch.cuda.is_available() and len(found["devices"]) == torch.cuda.device_count()
    assert not found["cuda"] or not found["devices"][0]["failure"]
    assert found["cuda"] or found["cuda_failure"]
    driver = ask("nvml")
    assert bool(driver["failure"]) == (not driver["devices"])


# ---- Packages ---------------------------------------------------------------------------------------------------------


def test_packages_that_are_missing_old_or_broken_are_named_with_the_command_that_mends_them():
    assert (module_name("PyYAML"), module_name("pillow"), module_name("torch")) == ("yaml", "PIL", "torch")
    needed = [Requirement(text) for text in ("torch>=99", "no-such-package>=1", "numpy>=1.26", "pillow>=10")]
    answers = {"torch": "", "numpy": "", "PIL": "ImportError: libjpeg is missing"}
    rows = package_facts(needed, answers.__getitem__)
    assert [row["failure"] for row in rows] == [
        f"{rows[0]['version']} is too old",
        "",
        "",
        "ImportError: libjpeg is missing",
    ]
    assert rows[1]["version"] == ""
    assert install_command(rows) == "pip install -U 'torch>=99' 'no-such-package>=1' 'pillow>=10'"
    assert install_command([rows[2]]) == ""


def test_without_an_import_files_that_are_gone_and_packages_that_do_not_fit_each_other_are_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, needs in (("here", "numpy>=1"), ("strange", "numpy==0.1"), ("alone", "no-such-package>=2")):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
        about = tmp_path / f"{name}-1.0.dist-info"
        about.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", f"Requires-Dist: {needs}"]
        (about / "METADATA").write_text("\n".join([*lines, "Requires-Dist: none-such; extra == 'more'", ""]))
        (about / "RECORD").write_text(f"{name}.py,,\n{name}-1.0.dist-info/METADATA,,\n")
    assert unmet("here") == ""
    assert re.fullmatch(r"needs numpy==0\.1, \d\S+ is installed", unmet("strange"))
    assert unmet("alone") == "needs no-such-package>=2, which is not installed"
    findings = Findings()
    (tmp_path / "alone.py").unlink()
    look_at_versions([Requirement(name) for name in ("here", "strange", "alone")], cannot_be_found, findings)
    levels = [level for level, _ in findings.found]
    assert levels == ["note", "problem"] and "alone: its files are gone" in findings.found[1][1]


# ---- Devices: what torch and the driver say on other machines -----------------------------------------------------------

CPU_BUILD = {
    "version": "2.9.0+cpu",
    "cuda_build": None,
    "rocm_build": None,
    "cuda": False,
    "cuda_failure": "",
    "devices": [],
}
CUDA_BUILD = CPU_BUILD | {"version": "2.9.0+cu128", "cuda_build": "12.8", "cuda_failure": "No CUDA GPUs are available"}
NO_DRIVER = {"failure": "NVML Shared Library Not Found", "devices": []}
DRIVER = {"failure": "", "driver": "550.54", "cuda": "12.4", "devices": [{"index": 0}, {"index": 1}]}
GPU = {"device": "cuda:0", "name": "NVIDIA H200", "failure": "", "free_bytes": 9_000, "total_bytes": 10_000}
WORKING = CUDA_BUILD | {"cuda": True, "cuda_failure": "", "devices": [GPU, GPU | {"device": "cuda:1"}]}
NO_GPU, ONE_GPU = {NVIDIA: 0, AMD: 0}, {NVIDIA: 1, AMD: 0}


@pytest.mark.parametrize(
    ("torch_says", "driver", "gpus", "visible", "level", "words"),
    [
        (CPU_BUILD, NO_DRIVER, NO_GPU, None, "ok", "no GPU: everything runs on the CPU"),
        (CPU_BUILD, DRIVER, ONE_GPU, None, "problem", "torch 2.9.0+cpu is built without CUDA"),
        (CUDA_BUILD, NO_DRIVER, ONE_GPU, None, "problem", "driver does not answer (NVML Shared Library Not Found)"),
        (CUDA_BUILD | {"cuda_build": "13.0"}, DRIVER, ONE_GPU, None, "problem", "driver 550.54 knows CUDA 12.4 at most"),
        (CUDA_BUILD, DRIVER, ONE_GPU, None, "problem", "cannot use them: No CUDA GPUs are available"),
        (CUDA_BUILD, DRIVER, ONE_GPU, "7", "problem", "CUDA_VISIBLE_DEVICES='7' leaves none; unset it"),
        (CUDA_BUILD, DRIVER, ONE_GPU, "", "note", "CUDA_VISIBLE_DEVICES='' leaves none"),
        (WORKING, DRIVER, ONE_GPU, None, "ok", "cuda:1: NVIDIA H200 can be used"),
        (WORKING | {"devices": [GPU]}, DRIVER, ONE_GPU, "0", "note", "torch sees 1 of 2 NVIDIA GPUs"),
        (WORKING | {"devices": [GPU | {"failure": "no kernel image"}]}, DRIVER, ONE_GPU, None, "problem", "out of order: no kernel"),
        (WORKING | {"devices": [GPU | {"free_bytes": 100}]}, DRIVER, ONE_GPU, "0", "note", "others use the rest"),
        (CPU_BUILD, NO_DRIVER, {NVIDIA: 0, AMD: 2}, None, "note", "2 AMD GPU(s) are there"),
    ],
)  # fmt: skip
def test_of_a_gpu_that_torch_cannot_use_it_is_said_why(torch_says, driver, gpus, visible, level, words):
    findings = Findings()
    judge_devices(torch_says, driver, gpus, visible, findings)
    assert words in told(findings, level), findings
    assert level == "problem" or not told(findings, "problem")


def test_gpus_are_found_on_the_bus_whether_a_driver_knows_them_or_not(tmp_path):
    for name, kind, maker in (("0", "0x030200", NVIDIA), ("1", "0x030000", AMD), ("2", "0x020000", NVIDIA)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "class").write_text(f"{kind}\n")
        (tmp_path / name / "vendor").write_text(f"{maker}\n")
    (tmp_path / "3").mkdir()
    assert pci_gpus(tmp_path) == {NVIDIA: 1, AMD: 1}
    assert pci_gpus(tmp_path / "nowhere") == {NVIDIA: 0, AMD: 0}


# ---- Processors and memory ------------------------------------------------------------------------------------------------


def test_the_processors_that_a_control_group_gives_are_found_in_both_versions(tmp_path):
    membership = tmp_path / "membership"
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "cpu.max").write_text("250000 100000\n")
    (tmp_path / "job" / "step" / "cpu.max").write_text("max 100000\n")
    membership.write_text("0::/job/step\n")
    assert cpu_limit(tmp_path, membership) == 2.5
    (tmp_path / "cpu,cpuacct" / "box").mkdir(parents=True)
    (tmp_path / "cpu,cpuacct" / "box" / "cpu.cfs_quota_us").write_text("400000\n")
    (tmp_path / "cpu,cpuacct" / "box" / "cpu.cfs_period_us").write_text("100000\n")
    membership.write_text("5:memory:/box\n4:cpu,cpuacct:/box\n")
    assert cpu_limit(tmp_path, membership) == 4
    (tmp_path / "cpu,cpuacct" / "box" / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_limit(tmp_path, membership) is None
    assert cpu_limit(tmp_path, tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("threads", "given", "omp", "level", "words"),
    [
        (8, 8, None, "ok", "torch computes with 8 threads"),
        (64, 4.0, None, "note", "64 threads, but may use 4 processor(s), so they wait for each other: set OMP_NUM_THREADS=4"),
        (1, 0.5, None, "ok", "1 thread"),
        (1, 16, "1", "note", "OMP_NUM_THREADS=1: torch leaves 15 of 16 processors idle"),
        (8, 8, "many", "note", "OMP_NUM_THREADS='many' is no number of threads; set it to 8"),
        (8, 8, "8,4", "ok", "torch computes with 8 threads"),
    ],
)  # fmt: skip
def test_threads_that_do_not_fit_the_processors_are_noted(threads, given, omp, level, words):
    findings = Findings()
    judge_threads(threads, given, omp, findings)
    assert words in told(findings, level)


def test_memory_is_told_with_its_limits():
    findings = Findings()
    facts = look_at_memory(findings)
    assert facts[0]["total_bytes"] == psutil.virtual_memory().total
    assert findings.found


# ---- Disk -----------------------------------------------------------------------------------------------------------------


def test_a_disk_is_tried_out_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = trial(tmp_path)
    assert facts["failure"] == "" and facts["links"] is True and facts["locks"] is True
    assert facts["sync_seconds"] is not None
    findings = Findings()
    looked = look_at_disk(findings)
    assert [one["what"] for one in looked] == list(places()) and looked[0]["path"] == str(tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []
    assert not told(findings, "problem")


def test_the_size_of_a_folder_counts_links_once(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1_000_000))
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "loop").symlink_to(tmp_path)
    size_bytes, is_whole = folder_size(tmp_path)
    assert 1_000_000 <= size_bytes < 1_020_000 and is_whole
    assert folder_size(tmp_path / "nowhere") == (0, True)


def test_a_small_disk_in_memory_is_a_problem_and_a_folder_that_cannot_be_written_too(tmp_path):
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root can make a file system for this test; .ci/run does")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(tmp_path)], check=True)
    try:
        assert file_system(tmp_path) == "tmpfs"
        place = {"what": "runs", "path": str(tmp_path), "file_system": "tmpfs", "is_network": False}
        findings = Findings()
        judge(place | {"free_bytes": 3_000_000} | trial(tmp_path), findings)
        assert "3.0 MB are free, too little" in told(findings, "problem")
        assert "lies in memory" in told(findings, "note")
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        findings = Findings()
        judge(place | {"free_bytes": 3_000_000} | trial(tmp_path), findings)
        assert "cannot be written (Read-only file system)" in told(findings, "problem")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


GOOD_PLACE = {
    "what": "runs", "path": "/data", "free_bytes": 10**11, "file_system": "ext4", "is_network": False, "failure": "",
    "links": True, "locks": True, "sync_seconds": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({}, "note", ""),
        ({"links": False}, "note", "no hard links there"),
        ({"locks": False}, "note", "locks do not work there"),
        ({"sync_seconds": None}, "problem", "a power cut may cost what lies there"),
        ({"sync_seconds": 2.5}, "note", "it takes 2.5 s until a megabyte is on the disk"),
        ({"is_network": True, "file_system": "nfs4"}, "note", "a network drive (nfs4)"),
        ({"file_system": "overlay"}, "note", "lies in a container and goes with it"),
        ({"free_bytes": 10**9}, "note", "1.0 GB are free"),
        ({"what": "features", "failure": "Read-only file system"}, "note", "set FINETUNE_CACHE to another"),
    ],
)
def test_what_a_file_system_cannot_do_is_said(change, level, words):
    findings = Findings()
    judge(GOOD_PLACE | change, findings)
    assert words in told(findings, level)
    assert bool(findings.found) == bool(words)


# ---- Secrets, and the whole -------------------------------------------------------------------------------------------------


def test_no_secret_is_shown(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("FINETUNE_NOTIFY", "slack://token-a/token-b")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:mine@proxy:3128")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    found = look_at_environment(Findings())
    assert found["WANDB_API_KEY"] == found["FINETUNE_NOTIFY"] == found["HTTPS_PROXY"] == "set"
    assert found["OMP_NUM_THREADS"] == "2"
    plain = {"a": ["no key 0123456789abcdef here", "ftp://you:yours@host/x", 3, None]}
    assert redacted(plain) == {"a": ["no key ... here", "ftp://...@host/x", 3, None]}


def test_whatever_goes_wrong_in_a_look_is_a_finding():
    report = doctor.Report()
    report.look("disk", lambda findings: 1 / 0)
    assert report.facts == {"disk": None}
    assert report.findings == [
        {"level": "problem", "about": "disk", "text": "could not be looked at: ZeroDivisionError: division by zero"}
    ]


def test_a_report_fits_into_sixty_columns(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    report = doctor.Report()
    report.look("memory", look_at_memory)
    report.look("disk", look_at_disk)
    report.look("devices", lambda findings: {"torch": WORKING | {"cudnn": "9.1.0", "mps_build": ""}, "driver": DRIVER})
    report.look("cpu", lambda findings: judge_threads(64, 4.0, None, findings))
    report.look("extras", lambda findings: 1 / 0)
    console = PatientConsole(file=io.StringIO(), width=60)
    doctor.show(report, console)
    lines = console.file.getvalue().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 60
    text = " ".join(" ".join(lines).split())
    for words in ("NVIDIA 550.54, for CUDA up to 12.4", "NVIDIA H200", "set OMP_NUM_THREADS=4", "ZeroDivisionError"):
        assert words in text
    assert re.fullmatch(r"1 problem and \d notes?", lines[-1])


@pytest.mark.slow
def test_the_command_tells_all_and_ends_with_1_where_there_is_a_problem(tmp_path):
    secret = "0123456789abcdef"
    environment = os.environ | {"WANDB_API_KEY": secret, "COLUMNS": "60"}
    code = "import sys; from finetune.cli import main; code = main(['doctor', *sys.argv[1:]]); assert 'torch' not in sys.modules; sys.exit(code)"

    def command(*words: str, cwd: str = str(tmp_path)) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=cwd, env=environment
        )  # fmt: skip

    well = command("--json", "--deep")
    found = json.loads(well.stdout)
    problems = [finding for finding in found["findings"] if finding["level"] == "problem"]
    assert well.returncode == bool(problems) and secret not in well.stdout and well.stderr == ""
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["extras"]["onnx"]["state"] == "installed" and found["environment"]["WANDB_API_KEY"] == "set"
    assert list(tmp_path.iterdir()) == []
    shown = command(cwd="/proc")
    assert shown.returncode == 1 and "problem" in shown.stdout.splitlines()[-1] and secret not in shown.stdout
    assert "runs (/proc/runs): cannot be written" in " ".join(shown.stdout.split())


# ---- Figures of devices while a run goes on ---------------------------------------------------------------------------------


def test_figures_of_memory_are_there_and_right():
    figures = device_figures(torch.device("cpu"))
    assert set(figures) == {"memory/process_mb", "memory/machine_free_mb"}
    assert figures["memory/process_mb"] == pytest.approx(psutil.Process().memory_info().rss / 1e6, rel=0.05)
    assert figures["memory/machine_free_mb"] == pytest.approx(psutil.virtual_memory().available / 1e6, rel=0.2)
    before = device_figures(torch.device("cpu"))["memory/process_mb"]
    with mmap.mmap(-1, 100_000_000) as block:  # memory that nothing in this process had before
        for place in range(0, len(block), mmap.PAGESIZE):
            block[place] = 1
        assert 95 < device_figures(torch.device("cpu"))["memory/process_mb"] - before < 110


def test_figures_of_devices_that_are_not_there_are_left_out():
    for name in ("mps", "cuda:99", *([] if torch.cuda.is_available() else ["cuda"])):
        assert {"memory/process_mb", "memory/machine_free_mb"} == set(device_figures(torch.device(name)))


def test_figures_cost_less_than_a_fifth_of_a_millisecond():
    device = torch.device("cpu")
    best_seconds = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(50):
            device_figures(device)
        best_seconds = min(best_seconds, (time.perf_counter() - started) / 50)
    assert best_seconds < 200e-6, f"{best_seconds * 1e6:.0f} µs"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_figures_of_a_gpu_are_those_of_the_one_in_use():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    device_figures(device)
    block = torch.zeros(50_000_000, device=device)
    del block
    figures = device_figures(device)
    assert figures["memory/cuda_peak_mb"] >= 200 > figures["memory/cuda_mb"]
    assert 0 <= figures["device/cuda_percent"] <= 100
    import pynvml

    # The second way to ask leaves out what the driver keeps for itself.
    used = pynvml.nvmlDeviceGetMemoryInfo(nvml_handle(device.index), version=pynvml.nvmlMemory_v2).used
    assert figures["device/cuda_used_mb"] == pytest.approx(used / 1e6, rel=0.2)
    assert device_figures(device)["memory/cuda_peak_mb"] < 200
