"""Memory that runs out: watched, survived by halves, told of. Real limits where the system has them."""

import math
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    DyingTerminal,
    Killed,
    assert_equal_runs,
    metrics_lines,
    read,
    resume_run,
    small_recipe,
    start_in,
    train_run,
)

from finetune import RunError
from finetune.base import memory
from finetune.base.halves import in_halves
from finetune.base.memory import Limit, Use, describe_shortage, guard_memory, limits
from finetune.base.signals import StopRequest
from finetune.models.freeze import learning_statistics
from finetune.recipe.execution import Machine, Numerics, Settings
from finetune.store.run_folder import RunFolder
from finetune.tasks.losses import ClassificationTask
from finetune.training import session, step

MB = 1_000_000


# ---- The guard -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total_mb", "free_mb", "near"),
    [(16_000, 600, False), (16_000, 400, True), (200_000, 1_100, False), (200_000, 900, True), (400, 50, False), (400, 30, True)],
)  # fmt: skip
def test_a_limit_is_near_when_less_is_left_than_saving_and_the_machine_need(total_mb, free_mb, near):
    assert Limit("memory", total_mb * MB, free_mb * MB).is_near == near


def test_the_tightest_control_group_counts_without_what_the_kernel_would_give_back(tmp_path):
    group = tmp_path / "slurm" / "job_7"
    group.mkdir(parents=True)
    membership = tmp_path / "membership"
    membership.write_text("0::/slurm/job_7\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text(f"{700 * MB}\n")
    (group.parent / "memory.max").write_text(f"{1000 * MB}\n")
    (group.parent / "memory.current").write_text(f"{900 * MB}\n")
    (group.parent / "memory.stat").write_text(f"anon 5\ninactive_file {100 * MB}\nactive_file {200 * MB}\n")
    limit = memory._control_group_limit(tmp_path, membership)
    assert (limit.total_bytes, limit.free_bytes) == (1000 * MB, 400 * MB)
    (group / "memory.max").write_text(f"{750 * MB}\n")
    assert memory._control_group_limit(tmp_path, membership).free_bytes == 50 * MB
    for name in (group / "memory.max", group.parent / "memory.max"):
        name.write_text("max\n")
    assert memory._control_group_limit(tmp_path, membership) is None


def test_control_groups_of_version_1_count_too(tmp_path):
    group = tmp_path / "memory" / "docker" / "7"
    group.mkdir(parents=True)
    membership = tmp_path / "membership"
    membership.write_text("5:cpu,cpuacct:/docker/7\n4:memory:/docker/7\n")
    (group / "memory.limit_in_bytes").write_text(f"{500 * MB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{450 * MB}\n")
    (group / "memory.stat").write_text(f"total_inactive_file {100 * MB}\n")
    assert memory._control_group_limit(tmp_path, membership).free_bytes == 150 * MB


def test_the_machine_itself_is_a_limit():
    machine = limits()[0]
    assert 0 < machine.free_bytes < machine.total_bytes and machine.what == "the machine's memory"


def test_what_grew_is_said():
    limit = Limit("the machine's memory", 8_000 * MB, 120 * MB)
    text = describe_shortage(limit, Use(600 * MB, 200 * MB), Use(5_000 * MB, 900 * MB))
    assert "only 120 of 8,000 MB of the machine's memory are left" in text
    assert "this process from 600 to 5,000 MB, its worker processes from 200 to 900 MB" in text
    assert "other programs" in describe_shortage(limit, Use(600 * MB, 0), Use(610 * MB, 0))


def test_the_guard_asks_once_and_its_thread_ends_with_the_block(monkeypatch):
    monkeypatch.setattr(memory, "limits", lambda: [Limit("the machine's memory", 8_000 * MB, MB)])
    stop = StopRequest("finetune resume run")
    with guard_memory(stop, seconds_between_looks=0.01):
        deadline = time.monotonic() + 10
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.01)
    error = stop.stopped("at step 3 of 9, saved")
    assert error.exit_code == 75
    assert str(error).startswith(
        "stopped because only 1 of 8,000 MB of the machine's memory are left (since the start "
    )
    assert str(error).endswith("at step 3 of 9, saved; go on with: finetune resume run")


class Filling(DyingTerminal):
    """Fills the address space more with each step, as a program that leaks would: 100 MB a second, of which the guard,
    that looks once a second, sees the last 200."""

    def __init__(self):
        super().__init__()
        self.kept: list[bytearray] = []

    def step(self, *_) -> None:
        self.kept.append(bytearray(20 * MB))
        time.sleep(0.2)


LEAK = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import *
from test_memory import Filling
recipe = small_recipe(epochs=200)
import psutil
limit = psutil.Process().memory_info().vms + 1_200 * 1_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from finetune import StoppedEarly
try:
    start_in(Path(sys.argv[1]), "test", recipe, Numerics(), Machine(device="cpu"), Settings(), Filling())
except StoppedEarly as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.slow
def test_a_run_that_nears_a_real_limit_saves_exits_75_and_says_what_grew(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", LEAK, str(tmp_path / "run")], capture_output=True, text=True, timeout=240
    )
    assert found.returncode == 75, found.stdout + found.stderr
    assert "MB of the address space (ulimit -v) are left (since the start this process from" in found.stdout
    assert "saved; go on with: finetune resume" in found.stdout
    state = read(RunFolder(tmp_path / "run"))
    assert state["status"] == "running" and state["step"] > 0


def test_memory_is_in_the_log(tmp_path):
    run = train_run(tmp_path / "run", small_recipe(epochs=1))
    lines = [line for line in run.metrics_file.read_text().splitlines() if "train/loss" in line]
    assert len(lines) == 7 and all('"memory/process_mb": ' in line for line in lines)


# ---- Out of memory -------------------------------------------------------------------------------------------------


def out_of_memory_above(samples: int, monkeypatch, error: Exception | None = None) -> list[int]:
    """Forward passes over more samples than that run out of memory, as on a small GPU; returns the sizes that passed."""
    passed: list[int] = []
    real = step.training_loss

    def loss(task, outputs, targets):
        if len(targets) > samples:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        passed.append(len(targets))
        return real(task, outputs, targets)

    monkeypatch.setattr(step, "training_loss", loss)
    return passed


def test_out_of_memory_halves_the_micro_batch_and_keeps_batch_and_steps(tmp_path, monkeypatch):
    recipe = small_recipe(dropout=0.0, epochs=1)
    whole = train_run(tmp_path / "whole", recipe)
    with monkeypatch.context() as patched:
        passed = out_of_memory_above(5, patched)
        terminal = DyingTerminal()
        start_in(tmp_path / "run", "test", recipe, Numerics(), Machine("cpu"), Settings(log_every_steps=1), terminal)
    run = RunFolder(tmp_path / "run")
    said = [line for line in terminal.lines if "out of memory" in line]
    assert said == [
        "out of memory (OutOfMemoryError) at 16 samples at once: 8 from here on",
        "out of memory (OutOfMemoryError) at 8 samples at once: 4 from here on",
    ]
    assert max(passed) == 4 and read(run)["halvings"] == 2 and read(run)["step"] == read(whole)["step"] == 7
    one, other = read(whole)["model"]["classifier.1.weight"], read(run)["model"]["classifier.1.weight"]
    # As in the test of accumulation: AdamW divides by the gradient's own size.
    torch.testing.assert_close(one, other, rtol=0, atol=3e-5)
    for ours, theirs in zip(metrics_lines(run), metrics_lines(whole), strict=True):
        assert list(ours) == list(theirs)
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5 if "loss" in name or "norm" in name else 0), name


def test_what_was_found_is_saved_at_once_and_a_resume_uses_it(tmp_path, monkeypatch):
    recipe = small_recipe(epochs=1)
    out_of_memory_above(5, monkeypatch)
    unbroken = train_run(tmp_path / "unbroken", recipe, save_every_steps=0)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(Killed):
        train_run(run.path, recipe, save_every_steps=0, die_after_steps=2)
    assert read(run)["step"] == 1 and read(run)["halvings"] == 2  # saved after the step that found it
    lines = resume_run(run)
    assert not any("out of memory" in line for line in lines)
    assert_equal_runs(run, unbroken)


def test_out_of_memory_with_one_sample_stops_and_says_what_to_try(tmp_path, monkeypatch):
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(
        RunError, match="with one sample at a time; give a smaller --image-size or --max-length, another"
    ):
        train_run(tmp_path / "run", small_recipe(epochs=1))


def test_another_error_is_not_taken_for_it(tmp_path, monkeypatch):
    out_of_memory_above(5, monkeypatch, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train_run(tmp_path / "run", small_recipe(epochs=1))


def test_validation_is_halved_as_well(tmp_path, monkeypatch):
    real, sizes = session.validate, []

    def validate(feed, indices, batch_size, task, device, precision, stop, watched, halvings=0):
        if batch_size >> halvings > 20:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
            )
        sizes.append(batch_size >> halvings)
        return real(feed, indices, batch_size, task, device, precision, stop, watched, halvings)

    monkeypatch.setattr(session, "validate", validate)
    run = train_run(tmp_path / "run", small_recipe(epochs=1))
    state = read(run)
    assert sizes == [16] and state["validation_halvings"] == 2
    assert state["halvings"] == 0  # the batches that train fit


@pytest.mark.parametrize("samples", [1, 2, 7, 64])
def test_halving_goes_down_to_one_sample_and_no_further(samples):
    tried: list[int] = []

    def never(halvings: int) -> None:
        tried.append(max(1, samples >> halvings))
        raise MemoryError

    with pytest.raises(RunError, match="one sample at a time"):
        in_halves(never, samples, 0, lambda _: None)
    assert tried[-1] == 1 and len(tried) == math.floor(math.log2(samples)) + 1


LITTLE_ROOM = """
import resource, sys
import psutil
from finetune.cli import main
import finetune.runs.start
limit = psutil.Process().memory_info().vms + int(sys.argv[1]) * 1_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_real_limit_of_the_address_space_is_survived_by_halves(tmp_path):
    """A batch that does not fit under `ulimit -v`: fewer samples at once do."""
    words = [
        "vgg_head", "--image-size", "96", "--epochs", "1", "--no-cache", "--train-samples", "600", "--batch-size", "600",
        "--device", "cpu", "--workers", "0", "--run", str(tmp_path / "run"),
    ]  # fmt: skip
    found = subprocess.run(
        [sys.executable, "-c", LITTLE_ROOM, "900", *words], capture_output=True, text=True, timeout=280
    )
    # So near the limit the guard may ask for a stop besides, if it looks at the right moment.
    assert found.returncode in (0, 75), found.stdout[-2000:] + found.stderr[-2000:]
    assert "out of memory (RuntimeError) at 600 samples at once: 300 from here on" in found.stdout
    assert read(RunFolder(tmp_path / "run"))["halvings"] > 0
    resume_run(RunFolder(tmp_path / "run"))
    assert read(RunFolder(tmp_path / "run"))["status"] == "finished"


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here: the same path is tested on the CPU above"
)
def test_a_gpu_that_is_nearly_full_is_survived_by_halves(tmp_path):
    torch.cuda.set_per_process_memory_fraction(1.5e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        words = ["resnet_head", "--backbone", "resnet50", "--weights", "none", "--image-size", "224", "--epochs", "1",
                 "--no-cache", "--batch-size", "512", "--train-samples", "512"]  # fmt: skip
        from finetune.cli import main

        assert main([*words, "--device", "cuda", "--run", str(tmp_path / "run")]) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert read(RunFolder(tmp_path / "run"))["halvings"] > 0


def test_out_of_memory_in_the_optimizers_own_step_is_no_second_step(tmp_path, monkeypatch):
    """Some weights have moved by then: whoever tried again would move them twice."""
    run = RunFolder(tmp_path / "run")
    real, steps = torch.optim.AdamW.step, []

    def moves_and_fails(optimizer, *arguments, **options):
        steps.append(1)
        found = real(optimizer, *arguments, **options)
        if len(steps) == 3:  # the first is a trial, before the run begins
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
            )
        return found

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", moves_and_fails)
        with pytest.raises(RunError, match=r"out of memory in the optimizer's own step.* the last checkpoint is good"):
            train_run(run.path, small_recipe(augment="none"))
    assert len(steps) == 3 and read(run)["step"] == 1
    resume_run(run)
    assert_equal_runs(run, train_run(tmp_path / "unbroken", small_recipe(augment="none")))


def test_a_failed_attempt_leaves_no_trace_in_statistics_and_random_numbers():
    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5)).train()
    statistics = learning_statistics(norm)
    assert len(statistics) == 3
    inputs, attempts = torch.randn(8, 3), []

    def compute(halvings: int):
        outputs = norm(inputs)
        attempts.append(outputs)
        if len(attempts) == 1:
            raise MemoryError
        return outputs

    torch.manual_seed(5)
    found, halvings = in_halves(compute, 8, 0, lambda _: None, statistics)
    assert halvings == 1 and torch.equal(found, attempts[0])
    assert norm[0].num_batches_tracked == 1


def test_the_gradients_of_an_attempt_that_failed_halfway_do_not_count():
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    task, inputs, targets = ClassificationTask(2), torch.randn(8, 3), torch.randint(2, (8,))
    parts: list[int] = []

    def forward(part: torch.Tensor) -> torch.Tensor:
        parts.append(len(part))
        if parts == [4, 4]:
            raise MemoryError
        return layer(part)

    attempt = partial(step.gradients, forward, task, inputs, targets, 2, optimizer, scaler, nullcontext(), False)
    loss, halvings = in_halves(attempt, 4, 0, lambda _: None)
    assert parts == [4, 4, 2, 2, 2, 2] and halvings == 1
    expected = torch.nn.functional.cross_entropy(layer(inputs), targets)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(layer.weight.grad, torch.autograd.grad(expected, layer.weight)[0])
