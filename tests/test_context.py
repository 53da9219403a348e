"""One boundary for side effects: a context that leaves no trace, many trainings in one process, trackers and a stop of
one's own."""

import csv
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    Killed,
    assert_equal_runs,
    assert_equal_values,
    comparable,
    read,
    resume_in,
    resume_run,
    small_recipe,
    train_run,
)
from PIL import Image
from torch.utils import deterministic

import finetune
from finetune import Images, RunError, StoppedEarly, StopRequest, UsageError
from finetune.base.terminal import Terminal, make_console
from finetune.errors import FinetuneError
from finetune.recipe.execution import Machine, Numerics, Settings
from finetune.runs.start import Plan, start
from finetune.store.run_folder import RunFolder
from finetune.store.state import capture_generators, restore_generators
from finetune.training.context import RunContext

CPU = Machine(device="cpu", workers=0)
QUIET = {"device": "cpu", "workers": 0, "quiet": True, "track": "none", "report": False}


class Heard:
    """A tracker of one's own, with some of the methods."""

    def __init__(self):
        self.told: list[str] = []
        self.values: list[dict[str, float]] = []

    def begin(self, begun) -> None:
        self.told.append("begin")

    def validated(self, validated) -> None:
        self.told.append("validated")
        self.values.append(validated.values)

    def end(self, ended) -> None:
        self.told.append(f"end: {ended.status}")

    def close(self) -> None:
        self.told.append("close")


def surroundings() -> list[object]:
    return [
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        deterministic.fill_uninitialized_memory,
        torch.get_default_dtype(),
        torch.get_num_threads(),
        csv.field_size_limit(),
        dict(os.environ),
        [one for one in warnings.filters if one[2] is Image.DecompressionBombWarning],
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    ]


def test_in_a_silent_context_a_run_trains_the_same_and_leaves_no_trace(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(epochs=1)
    wanted = read(train_run(tmp_path / "written", recipe))
    capfd.readouterr()
    heard, handlers = Heard(), []
    heard.logged = lambda step, values: handlers.append(signal.getsignal(signal.SIGTERM))
    before, there = surroundings(), sorted(tmp_path.rglob("*"))
    context = RunContext.silent(trackers=[heard])
    context.settings = Settings(log_every_steps=1)
    progress = start(Plan(recipe, Numerics(), CPU), context)
    assert progress.status == "finished" and progress.last_validation == wanted["metrics"]["last_validation"]
    assert progress.best == wanted["best_metric"] and progress.step == wanted["step"]
    assert heard.told == ["begin", "validated", "end: finished", "close"]
    assert set(handlers) == {signal.getsignal(signal.SIGTERM)}
    assert sorted(tmp_path.rglob("*")) == there and capfd.readouterr() == ("", "")
    assert surroundings() == before


def test_a_second_process_of_a_run_may_go_on_with_it_and_write_nothing(tmp_path, capfd):
    recipe = small_recipe()
    with pytest.raises(Killed):
        train_run(tmp_path / "run", recipe, die_after_steps=9)
    run = RunFolder(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with_lock = RunContext(Terminal(make_console(quiet=True)), run)
    with with_lock.locked():  # the process that writes holds it
        beside = RunContext(Terminal(make_console(quiet=True)), run, writes=False)
        progress = finetune_resume(beside)
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path in before}
    assert after == before and not (run.checkpoints / "step-000014.pt").exists()
    resume_run(run)
    assert progress.last_validation == read(run)["metrics"]["last_validation"] and progress.status == "finished"


def finetune_resume(context: RunContext):
    from finetune.runs.resume import resume

    return resume(context, CPU, settings={})


def test_trainings_in_one_process_do_not_know_of_each_other(tmp_path):
    first = train_run(tmp_path / "first", small_recipe(epochs=1))
    before = surroundings()
    train_run(tmp_path / "other", small_recipe("bundled/resnet", epochs=1, seed=5, dropout=0.0), precision="bf16")
    with pytest.raises(RunError):
        train_run(tmp_path / "first", small_recipe(epochs=1))  # it holds a run
    again = train_run(tmp_path / "again", small_recipe(epochs=1))
    assert_equal_values(comparable(read(again)), comparable(read(first)))
    assert surroundings() == before


def test_what_is_called_from_python_leaves_the_process_as_it_was(tmp_path, trained):
    from finetune.recipe.head_options import AnyTable
    from finetune.runs.evaluate import evaluate
    from finetune.runs.summary import summary_text

    before = surroundings()
    run = finetune.fit(small_recipe(epochs=1), tmp_path / "run", **QUIET)
    assert surroundings() == before
    finetune.load(run.export())
    assert surroundings() == before
    evaluate(trained, "best", "", AnyTable(), "cpu", 0)
    assert surroundings() == before
    summary_text(small_recipe())
    assert surroundings() == before
    with pytest.raises(FinetuneError, match="nowhere"):
        finetune.fit(small_recipe(data=Images(str(tmp_path / "nowhere"))), tmp_path / "other", **QUIET)
    assert surroundings() == before


def test_what_is_imported_at_the_first_call_draws_nothing_that_a_caller_would_miss():
    words = "import random; random.seed(1); import finetune; finetune.fit; print(random.random())"
    found = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert float(found.stdout) == random.Random(1).random()


@pytest.mark.parametrize("devices", [0, 1, 3])
def test_generators_of_two_devices_are_put_back_on_as_many_as_there_are(monkeypatch, devices):
    states = capture_generators() | {"cuda": [torch.zeros(4), torch.ones(4)]}
    found: dict[int, torch.Tensor] = {}

    def put(state: torch.Tensor, device: int) -> None:
        if device >= devices:
            raise IndexError(device)
        found[device] = state

    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda.random, "set_rng_state", put)
    restore_generators(states)
    assert list(found) == list(range(min(devices, 2)))


def test_trackers_from_python_are_told_and_what_they_raise_reaches_the_caller(tmp_path):
    unbroken = train_run(tmp_path / "unbroken", small_recipe())
    heard = Heard()
    finished = finetune.fit(
        small_recipe(), tmp_path / "whole", save_every_steps=1, log_every_steps=1, trackers=[heard], **QUIET
    )
    assert finished.status == "finished" and heard.told == ["begin", *["validated"] * 2, "end: finished", "close"]
    assert_equal_runs(RunFolder(finished.folder), unbroken)

    class Pruned(Exception):
        """Of somebody else's."""

    class Pruning(Heard):
        def logged(self, step: int, values: dict[str, float]) -> None:
            torch.rand(3)  # what a tracker draws, the run does not notice
            if step == 9:
                raise Pruned(f"at step {step}")

    pruning = Pruning()
    with pytest.raises(Pruned, match="at step 9"):
        finetune.fit(
            small_recipe(), tmp_path / "run", save_every_steps=1, log_every_steps=1, trackers=[pruning], **QUIET
        )
    assert pruning.told == ["begin", "validated", "end: failed", "close"]
    run = RunFolder(tmp_path / "run")
    assert read(run)["step"] == 8
    heard = Heard()
    assert finetune.resume(run.path, trackers=[heard], device="cpu", workers=0, quiet=True).status == "finished"
    assert heard.told == ["begin", "validated", "end: finished", "close"]
    assert_equal_runs(run, unbroken)


def test_a_stop_from_python_saves_after_the_step_and_the_rest_is_exact(tmp_path):
    unbroken = train_run(tmp_path / "unbroken", small_recipe())
    stop = StopRequest()

    class Button:
        def logged(self, step: int, values: dict[str, float]) -> None:
            if step == 5:  # from another thread, as a button would
                presser = threading.Thread(target=stop.ask, args=["by a button"])
                presser.start()
                presser.join()

    options = QUIET | {"log_every_steps": 1}
    with pytest.raises(StoppedEarly, match="stopped by a button at step 5 of 14, saved; go on with: finetune resume"):
        finetune.fit(small_recipe(), tmp_path / "run", trackers=[Button()], stop=stop, **options)
    run = RunFolder(tmp_path / "run")
    assert read(run)["step"] == 5
    resume_in(run, CPU, Terminal(make_console(quiet=True)), settings={})
    for name in ("latest.pt", "best.pt"):
        ours, theirs = comparable(read(run, name)), comparable(read(unbroken, name))
        assert_equal_values(ours, theirs, name)


def test_a_stop_in_a_silent_context_says_that_nothing_was_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stop = StopRequest()
    stop.ask("by the search")
    with pytest.raises(StoppedEarly) as error:
        start(Plan(small_recipe(epochs=1), Numerics(), CPU), RunContext.silent(stop))
    assert str(error.value) == "stopped by the search in the first look at the images" and list(Path().iterdir()) == []


class Raising(Heard):
    """Raises in one of its methods, each time."""

    def __init__(self, method: str):
        super().__init__()
        self.method = method

        def raises(*values: object) -> None:
            self.told.append(f"raising: {method}")
            raise ValueError(method)

        setattr(self, method, raises)


@pytest.mark.parametrize(
    "method", ["validated", "end", *(pytest.param(one, marks=pytest.mark.slow) for one in ("begin", "flush", "draw"))]
)
def test_whatever_a_tracker_raises_where_the_run_can_be_gone_on_with_and_nobody_is_told_two_ends(tmp_path, method):
    raising, beside = Raising(method), Heard()
    options = QUIET | {"report": True}
    with pytest.raises(ValueError, match=method):
        finetune.fit(small_recipe(epochs=1), tmp_path / "run", trackers=[raising, beside], **options)
    ends = [line for line in beside.told if line.startswith("end")]
    over = method in ("flush", "draw", "end")  # all that comes after the last step
    assert ends == ["end: failed" if method in ("begin", "validated", "flush") else "end: finished"]
    run = RunFolder(tmp_path / "run")
    assert run.has_checkpoint() == over and run.report_file.exists() == (method in ("draw", "end"))
    resume_run(run)
    assert read(run)["status"] == "finished" and read(run)["step"] == 7


def test_one_request_to_stop_names_the_run_that_it_stops(tmp_path):
    stop = StopRequest()
    finetune.fit(small_recipe(epochs=1), tmp_path / "first", stop=stop, **QUIET)
    stop.ask("")
    with pytest.raises(StoppedEarly, match=r"stopped on request .*; go on with: finetune resume .*second"):
        finetune.fit(small_recipe(epochs=1), tmp_path / "second", stop=stop, **QUIET)


def test_what_is_no_tracker_is_found_before_anything_is_changed(tmp_path):
    run = train_run(tmp_path / "run", small_recipe(epochs=1))
    before = run.latest.read_bytes()
    with pytest.raises(UsageError, match="has none of the methods"):
        finetune.resume(run.path, epochs=2, lr=1e-3, trackers=[object()], device="cpu", quiet=True)
    assert run.latest.read_bytes() == before


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"trackers": [object()]}, "tracker object: has none of the methods begin, logged, validated"),
        ({"trackers": [Heard]}, r"tracker Heard: is a class; give an object: Heard\(\)"),
        ({"trackers": "tensorboard"}, "trackers: 'tensorboard' is no list; give trackers=.*by track=\"tensorboard\""),
        ({"stop": lambda: True}, r"stop: function is no finetune.StopRequest; make one: stop=StopRequest\(\)"),
    ],
)
def test_what_cannot_be_told_or_asked_is_refused_by_name(tmp_path, wrong, words):
    with pytest.raises(UsageError, match=words):
        finetune.fit(small_recipe(), tmp_path / "run", **QUIET, **wrong)
    assert not (tmp_path / "run").exists()
