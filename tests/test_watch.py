"""Watching a run: told numbers, never in the way. The terminal, validation.json, and what a watcher that fails can do."""

import io
import json
import math
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import resume_in, start_in
from rich.console import Console
from terminal import ESCAPES, run_in_terminal

from finetune.base.events import Validated
from finetune.base.formatting import number_text, seconds_text
from finetune.base.terminal import Terminal, make_console
from finetune.data.digits import load_digits
from finetune.errors import RunError, StoppedEarly
from finetune.recipe.execution import Machine, Numerics, Settings
from finetune.recipe.head_options import AnyTable
from finetune.report.examples import examples_of
from finetune.runs.evaluate import evaluate
from finetune.store.restore import shipped
from finetune.store.run_folder import RunFolder
from finetune.tasks.evaluation import KEPT_FEATURES, Evaluation
from finetune.tasks.losses import ClassificationTask, MultiLabelTask, RegressionTask
from finetune.training.step import gradient_norm
from finetune.watch import trackers as start
from finetune.watch.watch import Watch

from conftest import (  # isort: skip
    DyingTerminal,
    Killed,
    assert_equal_runs,
    metrics_lines,
    small_recipe,
    train_run,
)


class Noting:
    """A watcher that notes what it is told, and fails where it is asked to."""

    name = "noting"

    def __init__(self, fails_at: str = ""):
        self.fails_at, self.told = fails_at, []

    def __getattr__(self, name):
        if name not in ("begin", "logged", "validated", "histograms", "draw", "flush", "end", "close"):
            raise AttributeError(name)

        def tell(*values):
            self.told.append((name, *values))
            if name == self.fails_at:
                torch.manual_seed(12345)  # as careless as a library can be
                raise ZeroDivisionError(f"in {name}")

        return tell

    def names(self) -> list[str]:
        return [name for name, *_ in self.told]


def watched_run(path: Path, monkeypatch, watcher, terminal=None, **options) -> DyingTerminal:
    """A run that `watcher` is told of."""
    monkeypatch.setattr(start, "_tensorboard", lambda run: watcher)
    terminal = terminal or DyingTerminal()
    settings = Settings(save_every_steps=5, log_every_steps=1, track="tensorboard")
    start_in(path, "test", options.pop("recipe", small_recipe()), Numerics(), Machine("cpu"), settings, terminal)
    return terminal


# ---- Watchers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unwatched(tmp_path_factory) -> RunFolder:
    return train_run(tmp_path_factory.mktemp("unwatched") / "run", small_recipe(), save_every_steps=5)


@pytest.mark.parametrize(
    "moment",
    [
        "begin",
        "validated",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("logged", "histograms", "draw", "flush", "end")),
    ],
)
def test_a_watcher_that_fails_is_said_once_and_dropped_and_the_run_is_the_same(
    tmp_path, monkeypatch, unwatched, moment
):
    watcher = Noting(moment)
    terminal = watched_run(tmp_path / "run", monkeypatch, watcher)
    said = [line for line in terminal.lines if "noting" in line]
    assert said == [f"noting: ZeroDivisionError: in {moment}; the run goes on without it"]
    assert watcher.names()[-2:] == [moment, "close"]
    assert_equal_runs(RunFolder(tmp_path / "run"), unwatched)


def test_a_watcher_is_told_of_everything_in_order(tmp_path, monkeypatch):
    watcher = Noting()
    watched_run(tmp_path / "run", monkeypatch, watcher)
    names = watcher.names()
    assert names[0] == "begin" and names[-2:] == ["draw", "end"]
    assert names.count("validated") == names.count("histograms") == 2
    steps = [told[1] for told in watcher.told if told[0] == "logged"]
    assert steps == sorted(set(steps)) and steps[-1] == 14
    begun, ended = watcher.told[0][1], watcher.told[-1][1]
    assert (begun.step, begun.total_steps, begun.epochs, begun.is_resumed) == (0, 14, 2, False)
    assert ended.status == "finished" and ended.text.startswith("finished: best validation accuracy 0.")


def test_watchers_are_told_how_a_run_ends_however_it_ends(tmp_path):
    def ended(error: BaseException | None) -> list[str]:
        watcher = Noting()
        with pytest.raises(type(error)), start.watching(DyingTerminal(), RunFolder(tmp_path), [], [], 0) as watch:
            watch.add("noting", lambda: watcher)
            raise error
        return [f"{told[1].status}: {told[1].text}" if told[0] == "end" else told[0] for told in watcher.told]

    assert ended(StoppedEarly("stopped by SIGTERM")) == ["stopped: stopped by SIGTERM"]
    assert ended(RunError("the disk is full")) == ["failed: the disk is full"]
    assert ended(ValueError("a fault")) == ["failed: ValueError: a fault"]
    assert ended(Killed()) == ["close"]


def test_pictures_wait_until_they_cost_next_to_nothing_of_the_time(monkeypatch):
    watch, clock = Watch(DyingTerminal()), [0.0]
    monkeypatch.setattr("finetune.watch.watch.time.monotonic", lambda: clock[0])
    watch._started, drawn = 0.0, []

    def draw(step, at_end):
        drawn.append(clock[0])
        watch._last_pictures_seconds = 2.0
        watch._pictures_seconds += 2.0

    monkeypatch.setattr(watch, "_draw", draw)
    monkeypatch.setattr(watch.terminal, "validated", lambda validated: None)
    for second in range(0, 1_000, 50):
        clock[0] = float(second)
        watch.validated(Validated(second, 1, 1, {"val/loss": 1.0}, {"metric": "loss"}, False), None)
    assert drawn == [300, 400, 600, 800]


# ---- What is logged -------------------------------------------------------------------------------------------------------


def test_the_logged_gradient_norm_is_that_of_the_whole_gradient_before_clipping():
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    bias = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([{"params": [weight]}, {"params": [bias]}], lr=1.0)
    weight.grad, bias.grad = torch.full((3, 4), 2.0), torch.full((3,), 1.0)
    assert gradient_norm(optimizer, torch.amp.GradScaler("cpu", enabled=False)).item() == pytest.approx(51**0.5)


def test_the_log_holds_throughput_memory_rates_and_gradient_norm(trained):
    lines = [json.loads(line) for line in trained.metrics_file.read_text().splitlines()]
    logged = [line for line in lines if "train/loss" in line]
    assert len(logged) == 69
    for line in logged:
        assert line["lr"] == line["lr/matrices"] == line["lr/vectors"]
        assert line["train/gradient_norm"] > 0 and line["memory/process_mb"] > 100
        assert line["time/samples_per_second"] > 0


# ---- validation.json --------------------------------------------------------------------------------------------------------


def test_validation_json_says_of_the_best_validation_what_evaluate_finds(trained):
    found = json.loads(trained.validation_file.read_text())
    figures = evaluate(trained, shipped(trained, "auto"), "", AnyTable(), "cpu", 0)
    assert found["step"] == figures["checkpoint"]["step"] and found["samples"] == figures["samples"]
    assert found["confusion"] == figures["confusion_matrix"]
    assert found["figures"]["accuracy"] == figures["accuracy"]
    assert found["figures"]["loss"] == pytest.approx(figures["loss"], rel=1e-5)
    assert found["calibration_error"] == pytest.approx(figures["calibration_error"], abs=1e-5)
    assert sum(count for _, _, count in found["mistakes"]) == sum(
        row["predicted"] != row["true"] for row in found["worst"]
    )
    losses = [row["loss"] for row in found["worst"]]
    assert losses == sorted(losses, reverse=True) and len(losses) == 48
    assert found["best"][0]["loss"] == min(row["loss"] for row in found["best"]) < losses[-1]
    assert list(found["facts"])[:4] == ["backbone", "weights", "frozen", "trains"]


def test_worst_and_best_are_those_of_all_batches():
    task, generator = ClassificationTask(4), torch.Generator().manual_seed(0)
    logits = torch.randn(300, 4, generator=generator)
    targets = torch.randint(4, (300,), generator=generator)
    evaluation = Evaluation(task, torch.device("cpu"), 300)
    for batch in torch.randperm(300, generator=generator).split(7):
        evaluation.add(batch, logits[batch], targets[batch])
    plain = evaluation.record(load_digits()).to_plain()
    order = torch.nn.functional.cross_entropy(logits, targets, reduction="none").argsort(descending=True)
    assert [row["index"] for row in plain["worst"]] == order[:48].tolist()
    assert [row["index"] for row in plain["best"]] == order.flip(0)[:12].tolist()
    first = plain["worst"][0]
    assert first["true"] == [targets[order[0]].item()] and first["predicted"] == [logits[order[0]].argmax().item()]
    assert sum(share for _, share in first["probabilities"]) == pytest.approx(1)


def test_several_labels_and_numbers_are_described_in_their_own_terms():
    evaluation = Evaluation(MultiLabelTask(3), torch.device("cpu"), 1)
    evaluation.add(torch.tensor([5]), torch.tensor([[2.0, -1.0, 1.0]]), torch.tensor([[1, 1, 0]]))
    (sample,) = evaluation.record(load_digits()).to_plain()["worst"]
    assert (sample["true"], sample["predicted"]) == ([0, 1], [0, 2])
    example = examples_of([sample], ["a", "b", "c"], None)[0]
    assert (example.true, example.predicted, example.picture) == ("a, b", "a, c", b"")
    evaluation = Evaluation(RegressionTask(10.0, 2.0), torch.device("cpu"), 1)
    evaluation.add(torch.tensor([5]), torch.tensor([[1.0]]), torch.tensor([0.5]))
    (sample,) = evaluation.record(load_digits()).to_plain()["worst"]
    assert (sample["true"], sample["predicted"]) == (11.0, 12.0)


def test_features_are_of_samples_evenly_spread_over_the_batches():
    layer = torch.nn.Linear(3, 2)
    count = 3 * KEPT_FEATURES + 10
    evaluation = Evaluation(ClassificationTask(2), torch.device("cpu"), count)
    rows = torch.arange(count)[:, None].expand(-1, 3).float()
    with evaluation.listening(layer), torch.inference_mode():
        for batch in torch.arange(count).split(17):
            evaluation.add(batch, layer(rows[batch]), torch.zeros(len(batch), dtype=torch.int64))
    features = evaluation.features()
    assert features.indices.tolist() == list(range(0, count, 4)) and len(features.indices) <= KEPT_FEATURES
    assert features.rows[:, 0].tolist() == list(range(0, count, 4))
    assert not layer._forward_pre_hooks


def test_a_validation_file_that_cannot_be_written_is_said_and_the_run_goes_on(tmp_path, monkeypatch, unwatched):
    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetune.watch.watch.write_json", full)
    terminal = DyingTerminal()
    settings = Settings(save_every_steps=5, log_every_steps=1)
    start_in(tmp_path / "run", "test", small_recipe(), Numerics(), Machine("cpu"), settings, terminal)
    said = [line for line in terminal.lines if "validation.json" in line]
    assert said == ["validation.json: OSError: [Errno 28] No space left on device; the run goes on without it"]
    assert_equal_runs(RunFolder(tmp_path / "run"), unwatched)


# ---- The terminal ---------------------------------------------------------------------------------------------------------------


def test_a_terminal_of_60_columns_shows_the_table_and_a_bar_with_every_figure(tmp_path):
    command = [sys.executable, "-m", "finetune.cli", "vgg_head", "--epochs", "60", "--run", str(tmp_path / "run")]
    written = run_in_terminal([*command, "--track", "none"], 60)
    plain = ESCAPES.sub("", written)
    training = plain.partition("finished:")[0]
    assert max(len(line) for line in re.split(r"[\r\n]+", training.replace(str(tmp_path), ""))) <= 60
    for label in ("backbone", "weights", "frozen", "trains", "features", "data", "device", "run folder"):
        assert re.search(rf"^{label} ", plain.replace("\r", ""), re.MULTILINE), label
    assert "sha256 0235955c8477" in plain and "of 26 modules in eval" in plain.replace("\r\n", " ").replace("  ", " ")
    bar = re.search(r"epoch \d+/60 .*?\d+/1380 .*? left\s+loss \d.*?saved \d+ s ago", plain, re.DOTALL)
    assert bar, plain[-3000:]
    for figure in ("val accuracy 0.", "samples/s", "memory "):
        assert figure in " ".join(plain.split()), figure
    assert len(re.findall(r"\d/60 +loss 0\.\d+ +val 0", plain)) >= 30
    assert "\x1b[1m" in written


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"CI": "true"}])
def test_no_color_and_ci_get_plain_lines_even_in_a_terminal(environment):
    script = """
from finetune.base.terminal import *
from finetune.base.events import Validated
terminal = Terminal(make_console())
terminal.begin({"backbone": "bundled/vgg"}, 0, 10)
terminal.step(1, 1, 2, 64)
terminal.validated(Validated(5, 1, 2, {"train/epoch_loss": 1.0, "val/accuracy": 0.5}, {"metric": "accuracy"}, True))
terminal.end()
"""
    written = run_in_terminal([sys.executable, "-c", script], 80, environment=environment)
    assert "\x1b" not in written
    assert written.split() == [
        "backbone",
        "bundled/vgg",
        "epoch",
        "1/2",
        "loss",
        "1.0000",
        "accuracy",
        "0.5000",
        "best",
    ]


def test_numbers_of_any_size_are_short():
    numbers = {0.0: "0.0000", 0.98614: "0.9861", 3.14e-5: "3.14e-05", 12345.67: "12,345.7", -2e39: "-2e+39"}
    assert {number: number_text(number) for number in numbers} == numbers
    assert [number_text(value, 3) for value in (0.98765, 1.5e12, math.inf, math.nan)] == [
        "0.988",
        "1.5e+12",
        "inf",
        "nan",
    ]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_what_a_stream_cannot_encode_is_shown_by_its_code(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    terminal = Terminal(Console(file=stream, width=80))
    terminal.begin({"run folder": "日本/é"}, 0, 10)
    terminal.say("\ud800")
    stream.flush()
    shown = stream.buffer.getvalue().decode(encoding)
    assert ("日本" if encoding == "utf-8" else r"\u65e5\u672c") in shown and ("é" in shown) == (encoding != "ascii")


def test_a_stream_that_fails_or_is_closed_is_let_go():
    for stream in (open("/dev/full", "w", buffering=1), io.StringIO()):  # noqa: SIM115
        terminal = Terminal(Console(file=stream, force_terminal=True, width=80))
        if isinstance(stream, io.StringIO):
            stream.close()
        with terminal.track("first look", 3) as advance:
            advance(1)
        terminal.begin({"device": "cpu"}, 0, 10)
        terminal.say("much " * 10_000)
        terminal.end()
        with suppress(OSError):
            stream.close()


def test_quiet_says_the_run_folder_only_and_a_pipe_gets_no_bar(capsys):
    for quiet in (True, False):
        terminal = Terminal(make_console(quiet))
        terminal.begin({"backbone": "bundled/vgg"}, 0, 10)
        terminal.step(1, 1, 2, 64)
        terminal.end()
        assert capsys.readouterr().out.split() == ([] if quiet else ["backbone", "bundled/vgg"])


def test_an_epochs_line_fits_a_narrow_terminal(capsys):
    values = {"train/epoch_loss": 1.23456, "val/loss": 2.3456, "val/accuracy": 0.98765, "val/f1": 0.98765}
    for columns, words in ((60, "epoch 7/30"), (100, "epoch  7/30")):
        terminal = Terminal(Console(width=columns))
        terminal.validated(Validated(70, 7, 30, values, {"metric": "accuracy"}, True))
        line = capsys.readouterr().out
        assert line.count("\n") == 1 and len(line.rstrip()) <= columns
        assert line.startswith(words if columns == 100 else " 7/30") and line.rstrip().endswith("best")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1:01"), (3_723, "1:02:03"), (187_200, "2 d 4 h")]
)
def test_durations_read_as_people_say_them(seconds, text):
    assert seconds_text(seconds) == text


def test_a_resume_told_to_track_otherwise_does_so(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(start, "_tensorboard", lambda run: made.append(run) or Noting())
    run = train_run(tmp_path / "run", small_recipe(epochs=1), save_every_steps=0)
    assert not made
    resume_in(run, Machine("cpu"), DyingTerminal(), settings={"track": "tensorboard"}, epochs=2, lr=1e-3)
    assert made == [run]
    assert [line["epoch"] for line in metrics_lines(run) if "val/loss" in line] == [1, 2]


@pytest.mark.parametrize(("epochs", "every"), [(30, 1), (31, 2), (300, 10), (5_000, 200)])
def test_of_many_epochs_some_get_a_line(epochs, every):
    stream = io.StringIO()
    terminal = Terminal(Console(file=stream, width=120))
    for epoch in range(1, epochs + 1):
        terminal.validated(Validated(epoch, epoch, epochs, {"val/accuracy": 0.5}, {"metric": "accuracy"}, True))
    shown = [int(line.split()[1].partition("/")[0]) for line in stream.getvalue().splitlines()]
    assert shown == sorted({1, *range(every, epochs + 1, every), epochs})
