"""What TensorBoard is given of real runs, read with TensorBoard's own reader; and seen in a real browser."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, find_browser
from conftest import (
    DyingTerminal,
    Killed,
    assert_equal_runs,
    finetune,
    finish,
    kill_after_progress,
    resume_in,
    small_recipe,
    start_in,
    train_run,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune.base.events import Begun, Example, Pictures
from finetune.recipe.execution import Machine, Numerics, Settings
from finetune.report.image_grids import confusion_sheet, example_sheet
from finetune.store.run_folder import RunFolder
from finetune.watch.tensorboard import EventFile, TensorBoard, Writer, principal_components

SETTINGS = Settings(save_every_steps=3, log_every_steps=1, track="tensorboard")


def events(run: RunFolder) -> EventAccumulator:
    everything = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    found = EventAccumulator(str(run.tensorboard), size_guidance=everything)
    found.Reload()
    return found


def tracked_run(path: Path, recipe=None, die_after_steps: int = 0) -> DyingTerminal:
    terminal = DyingTerminal(die_after_steps)
    start_in(path, "test", recipe or small_recipe(), Numerics(), Machine("cpu"), SETTINGS, terminal)
    return terminal


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> RunFolder:
    import tokenizers  # noqa: F401 - as their versions are in a checkpoint from when they are imported on
    import transformers  # noqa: F401

    run = RunFolder(tmp_path_factory.mktemp("tracked") / "run")
    assert "tensorboard" not in "\n".join(tracked_run(run.path).lines)
    return run


def steps_of(found: EventAccumulator, tag: str) -> list[int]:
    return [point.step for point in found.Scalars(tag)]


# ---- What is there ----------------------------------------------------------------------------------------------------


def test_losses_metrics_rates_gradients_throughput_and_memory_are_scalars(tracked):
    found = events(tracked)
    wanted = "train/loss train/epoch_loss val/loss val/accuracy val/f1 lr lr/matrices lr/vectors train/gradient_norm"
    assert {*wanted.split(), "time/samples_per_second", "memory/process_mb"} <= set(found.Tags()["scalars"])
    assert steps_of(found, "val/accuracy") == [7, 14]
    assert steps_of(found, "train/loss")[-1] == 14


def test_values_are_those_of_the_log(tracked):
    lines = [json.loads(line) for line in tracked.metrics_file.read_text().splitlines()]
    logged = {line["step"]: line for line in lines if "train/loss" in line}
    for point in events(tracked).Scalars("train/gradient_norm"):
        assert point.value == np.float32(logged[point.step]["train/gradient_norm"])
    accuracies = [line["val/accuracy"] for line in lines if "val/accuracy" in line]
    assert [point.value for point in events(tracked).Scalars("val/accuracy")] == [np.float32(a) for a in accuracies]


def test_the_graph_names_the_layers_of_the_network(tracked):
    assert any("classifier" in node.name for node in events(tracked).Graph().node)


def test_histograms_show_the_heads_weights_and_gradients_at_each_validation(tracked):
    found = events(tracked)
    names = [f"head {kind}/{name}" for kind in ("weights", "gradients") for name in ("bias", "weight")]
    assert sorted(found.Tags()["histograms"]) == sorted(names)
    for name in names:
        histograms = found.Histograms(name)
        assert [one.step for one in histograms] == [7, 14]
        assert histograms[-1].histogram_value.num == (10 if "bias" in name else 5120)


def test_the_worst_pictures_and_the_confusion_matrix_are_images(tracked):
    found = events(tracked)
    assert sorted(found.Tags()["images"]) == ["validation/confusion matrix", "validation/worst first"]
    sheet = found.Images("validation/worst first")[-1]
    assert (sheet.width, sheet.height) == (4 * 168, 4 * 212)


def test_the_features_are_points_in_the_projector_and_a_cloud(tracked):
    assert "features:validation" in (tracked.tensorboard / "projector_config.pbtxt").read_text()
    rows = (tracked.tensorboard / "validation/features/tensors.tsv").read_text().splitlines()
    labels = (tracked.tensorboard / "validation/features/metadata.tsv").read_text().splitlines()
    assert len(rows) == len(labels) == 90 and set(labels) == set("0123456789")
    assert {"features by class_VERTEX", "features by class_COLOR"} <= set(events(tracked).Tags()["tensors"])


def test_hyperparameters_stand_beside_the_best_metric(tracked):
    found = events(tracked)
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optimizer.lr" in content and b"model.backbone" in content
    assert b"val/accuracy" in found.SummaryMetadata("_hparams_/experiment").plugin_data.content
    assert found.SummaryMetadata("_hparams_/session_end_info")


# ---- Killed and resumed -----------------------------------------------------------------------------------------------


def test_a_resume_doubles_nothing_and_leaves_no_hole(tmp_path, tracked):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(Killed):
        tracked_run(run.path, die_after_steps=8)  # saved at 6 and 7, told up to 8
    with pytest.raises(Killed):
        resume_in(run, Machine("cpu"), DyingTerminal(11), settings={})
    resume_in(run, Machine("cpu"), DyingTerminal(), settings={})
    ours, theirs = events(run), events(tracked)
    assert len(list(run.tensorboard.glob("events*"))) == 3
    for tag in ("val/loss", "val/accuracy", "train/epoch_loss"):
        assert [(point.step, point.value) for point in ours.Scalars(tag)] == [
            (point.step, point.value) for point in theirs.Scalars(tag)
        ]
    steps = steps_of(ours, "train/loss")
    assert all(before < after for before, after in itertools.pairwise(steps)) and steps[-1] == 14
    assert [one.step for one in ours.Images("validation/worst first")] == [14]
    assert (run.tensorboard / "projector_config.pbtxt").read_text().count("embeddings") == 1
    assert ours.Tags()["graph"]


def test_a_run_that_is_begun_anew_in_its_folder_doubles_nothing(tmp_path):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(Killed):
        settings = dataclasses.replace(SETTINGS, save_every_steps=0)
        start_in(run.path, "test", small_recipe(), Numerics(), Machine("cpu"), settings, DyingTerminal(5))
    assert not run.has_checkpoint() and steps_of(events(run), "train/loss")
    resume_in(run, Machine("cpu"), DyingTerminal(), settings={})
    steps = steps_of(events(run), "train/loss")
    assert all(before < after for before, after in itertools.pairwise(steps)) and steps[-1] == 14


def test_a_clock_that_goes_back_changes_no_order(tmp_path, monkeypatch):
    first = Writer(tmp_path)
    first.add_values(1, {"loss": 1.0})
    first.add_values(2, {"loss": 0.5})
    first.close()
    monkeypatch.setattr("time.time_ns", lambda: 1)
    for value in (0.4, 0.3):
        with Writer(tmp_path, purge_step=2) as writer:
            writer.add_values(2, {"loss": value})
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(point.step, point.value) for point in found.Scalars("loss")] == [(1, 1.0), (2, np.float32(0.3))]


def test_who_looks_on_while_pictures_are_drawn_sees_the_curve_go_on(tmp_path):
    board, device = TensorBoard(tmp_path), torch.device("cpu")
    board.begin(Begun("", "run", tmp_path, {}, {}, 0, 10, 1, False, "accuracy"))
    board.logged(1, {"train/loss": 1.0})
    viewer = EventAccumulator(str(tmp_path))
    viewer.Reload()
    network = torch.nn.Linear(2, 2)
    board.draw(Pictures(1, (), None, (), None, network, torch.zeros(1, 2, device=device), False))
    for step in (2, 3):
        viewer.Reload()
        board.logged(step, {"train/loss": 1.0})
    viewer.Reload()
    assert steps_of(viewer, "train/loss") == [1, 2, 3] and viewer.Tags()["graph"]
    board.close()


def test_weights_too_large_for_a_histogram_are_left_out(tmp_path):
    board = TensorBoard(tmp_path)
    board.begin(Begun("", "run", tmp_path, {}, {}, 0, 10, 1, False, "accuracy"))
    large = {"huge": torch.full((4,), 1e25), "infinite": torch.tensor([torch.inf]), "weight": torch.ones(4)}
    board.histograms(1, large, {})
    board.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert found.Tags()["histograms"] == ["head weights/weight"]


def test_tracking_does_not_change_a_bit_of_a_run(tmp_path, tracked):
    plain = train_run(tmp_path / "plain", small_recipe(), save_every_steps=3)
    assert_equal_runs(tracked, plain)


@pytest.mark.slow
@pytest.mark.skipif(
    find_browser() is None and not os.environ.get("FINETUNE_NO_SKIP"), reason="there is no Chromium here"
)
def test_a_browser_shows_unbroken_curves_of_a_killed_and_resumed_run(tmp_path):
    run = RunFolder(tmp_path / "runs" / "killed")
    command = ["vgg_head", "--epochs", "60", "--run", str(run.path), "--save-every-steps", "40"]
    kill_after_progress(finetune(*command, is_watched=True), run, 200)
    finish(finetune("resume", str(run.path)))
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tensorboard.main",
            "--logdir",
            str(tmp_path / "runs"),
            "--host",
            "127.0.0.1",
            "--port",
            "0",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = next(match[0] for line in server.stderr if (match := re.search(r"http://127\.0\.0\.1:\d+/", line)))
        deadline = time.monotonic() + 60
        query = f"{address}data/plugin/scalars/scalars?run=killed%2Ftensorboard&tag=val%2Faccuracy"
        while True:  # the server is up before it has read the files
            try:
                points = json.load(urllib.request.urlopen(query))
                break
            except urllib.error.HTTPError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
        steps = [step for _, step, _ in points]
        assert steps == [23 * epoch for epoch in range(1, 61)]
        browser = Browser(tmp_path)
        try:
            browser.open(f"{address}?tagFilter=val#timeseries")
            deadline, text = time.monotonic() + 60, ""
            ending = r"killed/tensorboard[\d.]+1,?380"  # a row below a card says where its curve ends
            while not re.search(ending, text) and time.monotonic() < deadline:
                time.sleep(0.5)
                text = "".join(browser.run("document.body.innerText").split())
            assert "val/accuracy" in text and "val/loss" in text and re.search(ending, text)
        finally:
            browser.close()
    finally:
        server.terminate()
        server.communicate()


# ---- Other tasks, and trouble ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["texts", "numbers", "several labels"])
def test_other_tasks_are_shown_as_well(tmp_path, name):
    path, options = tmp_path / "list.csv", {}
    words = ["sun", "rain", "snow", "wind", "fog", "hail"]
    rows = [(f"{one} and {other}", words.index(one)) for one in words for other in words] * 2
    if name == "several labels":
        lines = [f'"{text}",{text.split()[0]}|{text.split()[2]}' for text, _ in rows]
        options = {"separator": "|"}
    elif name == "numbers":
        lines = [f'"{text}",{number}.5' for text, number in rows]
    else:
        lines = [f'"{text} <b>| *",{number}' for text, number in rows]
    path.write_text("\n".join(["text,label", *lines]))
    from finetune import TextTable, text_head

    recipe = text_head(
        texts=str(path), backbone="bundled/bert", epochs=1, table=TextTable(**options),
        task="regression" if name == "numbers" else "classification",
    )  # fmt: skip
    terminal = tracked_run(tmp_path / "run", recipe)
    assert not [line for line in terminal.lines if "goes on without" in line]
    found = events(RunFolder(tmp_path / "run"))
    assert "validation/worst first/text_summary" in found.Tags()["tensors"]
    assert (name == "texts") == ("validation/confusion matrix" in found.Tags()["images"])
    assert {"graph": True}.items() <= found.Tags().items()


def test_a_disk_that_takes_no_events_is_said_once_and_the_run_goes_on(tmp_path, tracked, monkeypatch):
    add = EventFile.add_event

    def full(self, event):
        if event.step >= 4:
            raise OSError(28, "No space left on device")
        add(self, event)

    monkeypatch.setattr(EventFile, "add_event", full)
    terminal = tracked_run(tmp_path / "run")
    said = [line for line in terminal.lines if "tensorboard" in line]
    assert said == ["tensorboard: OSError: [Errno 28] No space left on device; the run goes on without it"]
    monkeypatch.undo()
    assert_equal_runs(RunFolder(tmp_path / "run"), tracked)


def test_an_event_file_on_a_full_disk_ends_with_a_whole_record(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    file = EventFile(tmp_path)
    file.add_event(Event(step=1, wall_time=1.0))
    real, torn = file._stream, b"half of a record"

    class Full:
        def write(self, content):
            real.write(torn)
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(real, name)

    file._stream = Full()
    with pytest.raises(OSError):
        file.add_event(Event(step=2, wall_time=2.0))
    file._stream = real
    file.add_event(Event(step=3, wall_time=3.0))
    file.close()
    path = next(tmp_path.glob("events*"))
    assert [Event.FromString(one).step for one in RawEventFileLoader(str(path)).Load()] == [0, 1, 3]


def test_components_are_those_of_numpys_covariance():
    rows = torch.randn(40, 7, generator=torch.Generator().manual_seed(1)) * torch.arange(1.0, 8)
    ours = principal_components(rows, 3)
    _, vectors = np.linalg.eigh(np.cov(rows.double().numpy().T))
    theirs = (rows.double() - rows.double().mean(0)).numpy() @ vectors[:, ::-1][:, :3]
    assert ours.shape == (40, 3)
    np.testing.assert_allclose(np.abs(ours.numpy()), np.abs(theirs), rtol=1e-4, atol=1e-5)
    assert principal_components(rows[:2], 50).shape == (2, 2)


def test_sheets_have_room_for_many_classes_and_long_names():
    matrix = torch.eye(120, dtype=torch.int64).tolist()
    assert max(confusion_sheet(matrix, [f"class {n}" for n in range(120)]).shape) < 1000
    names = ["a name that is much too long for a margin", "b"]
    assert confusion_sheet([[3, 1], [0, 2]], names).shape[0] < 300
    examples = [Example(f"n{n}", 1.0, "x" * 99, "y", (("y", 0.5),)) for n in range(5)]
    assert example_sheet(examples).shape == (2 * 212, 4 * 168, 3)
