"""`finetune rehearse`: what it finds in recipes that cannot be resumed, what it measures, and that nothing of it stays."""

import csv
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import conftest
import psutil
import pytest
import torch
from encoders import make_encoder, sentences
from PIL import Image
from rich.console import Console

from finetune import Images, Schedule, Stop, StoppedEarly, Texts, Trainable
from finetune.base.files import write_atomically
from finetune.base.signals import StopRequest
from finetune.cli import main
from finetune.data.open import open_source
from finetune.data.sample import sampled
from finetune.data.source import FileSource
from finetune.rehearse import process
from finetune.rehearse.cause import cause_of
from finetune.rehearse.compare import Comparison, compare, is_equal
from finetune.rehearse.extent import Counts, Extent, extent_of
from finetune.rehearse.measure import Measured, Room
from finetune.rehearse.part import Part, epochs_of
from finetune.rehearse.process import carry_out
from finetune.rehearse.rehearsal import Rehearsal
from finetune.rehearse.show import show
from finetune.store.run_folder import RunFolder

QUICK = ["--device", "cpu", "--batch-size", "16"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder to be in, and one for temporary files, both watched: what is there afterwards was left behind. The
    processes start warm."""
    for name in ("here", "kept"):
        (tmp_path / name).mkdir()
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # a short name: worker processes have sockets in it
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "kept"))
    monkeypatch.chdir(tmp_path / "here")
    started = []

    def start(words, env):
        started.append(conftest.finetune(*words, env=dict(env)))
        return started[-1]

    monkeypatch.setattr(process, "start", start)
    yield tmp_path / "here"
    left = [*temporary.iterdir(), *(tmp_path / "kept").iterdir()]
    shutil.rmtree(temporary)
    assert left == []
    assert [one.poll() for one in started if one.poll() is None] == []
    assert [one.pid for one in started if psutil.pid_exists(one.pid)] == []


def rehearse(capsys, *words: str, code: int = 0) -> dict:
    before = sorted(Path.cwd().rglob("*"))
    assert main(["rehearse", *words, "--json"]) == code
    assert sorted(Path.cwd().rglob("*")) == before
    return json.loads(capsys.readouterr().out)


# ---- As a whole -----------------------------------------------------------------------------------------------------


def test_a_killed_and_resumed_run_is_the_same_in_every_bit_and_nothing_is_left(place, capsys):
    found = rehearse(capsys, "vgg_head", *QUICK, "--dropout", "0.3", "--run", "elsewhere/run", "--keep", "5")
    assert found["is_same"] and found["cause"] is None
    assert found["verdict"].startswith("the same in every bit: 51 tensors, ")
    steps = found["rehearsed"]
    assert steps == {"samples": 80, "epochs": 2, "steps": 10, "killed_after_step": 7, "resumed_from_step": 6} | {
        name: steps[name] for name in ("steps", "killed_after_step", "resumed_from_step")
    }
    assert steps["steps"] // 2 + 1 == steps["resumed_from_step"] == steps["killed_after_step"] - 1
    training = found["training"]
    assert training["run"]["folder"] == "elsewhere/run" and training["run"]["bytes"] >= 7 * training["checkpoint_bytes"]
    # Rows of 512 float32 of all 1,797 digits.
    assert abs(training["features"]["bytes"] / (1797 * 512 * 4) - 1) < 0.1 and training["are_kept"]
    assert training["peak_bytes"] > 100e6 and training["epochs"] == 15
    assert 0 < training["epoch_seconds"] < training["total_seconds"]


def test_what_is_wrong_is_said_as_the_run_would_say_it(place, capsys):
    assert main(["rehearse", "--json"]) == 2
    assert "needs a recipe" in capsys.readouterr().err
    assert main(["rehearse", "vgg_head", "--images", "nowhere"]) == 2
    assert "--images nowhere: no such folder" in capsys.readouterr().err
    assert main(["rehearse", "vgg_head", "--resume"]) == 2
    assert "--resume: has no effect without --run DIR" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_fails_ends_the_rehearsal_with_its_own_line_and_code(place, capsys):
    assert main(["rehearse", "vgg_head", "--optimizer", "muon", *QUICK]) == 2
    assert "--optimizer muon: cannot train this network" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("where", ["unbroken", "killed"])
def test_ctrl_c_ends_it_and_nothing_is_left(place, where):
    started = conftest.finetune("rehearse", "vgg_head", *QUICK, "--augment", "light")
    temporary = Path(tempfile.gettempdir())
    deadline = time.monotonic() + 60
    while not list(temporary.glob(f"rehearse-*/{where}")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = psutil.Process(started.pid).children(recursive=True)
    assert children
    started.send_signal(signal.SIGINT)
    said = conftest.finish(started, code=75, timeout_seconds=10)
    assert "stopped by SIGINT in a rehearsal, of which nothing is left" in said and "Traceback" not in said
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


# ---- Recipes that cannot be resumed ---------------------------------------------------------------------------------

HEAD = "from finetune import ImageTraining, Recipe, image_head\n"
OPTIMIZER = """
import torch, random, time
{before}
class Own(torch.optim.SGD):
    steps = 0
    def step(self, closure=None):
        {change}
        return super().step(closure)
torch.optim.Own = Own
def recipe(images: str = "digits", batch_size: int = 16, training: ImageTraining = ImageTraining(optimizer="own")) -> Recipe:
    return image_head(images=images, backbone="bundled/vgg", batch_size=batch_size, training=training)
"""
DROPOUT = """
import torch
from torch.nn import functional
{before}
real = functional.dropout
functional.dropout = lambda features, p, training=True, inplace=False: {change} if training else features
def recipe(images: str = "digits", batch_size: int = 16) -> Recipe:
    return image_head(images=images, backbone="bundled/vgg", batch_size=batch_size, dropout=0.3)
"""
VALUES = """
import random
def recipe(images: str = "digits", batch_size: int = 16) -> Recipe:
    return image_head(images=images, backbone="bundled/vgg", batch_size=batch_size, lr=random.uniform(1e-3, 3e-3))
"""
# Recipe; what differs; the kind of cause; a line to look at.
STRANGE = {
    "a counter of its own": (
        OPTIMIZER.format(before="", change="self.steps += 1; self.param_groups[0]['lr'] /= self.steps"),
        "the killed run cannot be resumed: --optimizer own: unknown", "state", "self.steps += 1",
    ),
    "numbers of the system": (
        OPTIMIZER.format(before="chance = random.SystemRandom()", change="self.param_groups[0]['lr'] *= chance.random()"),
        "the killed run cannot be resumed", "not repeatable", "SystemRandom()",
    ),
    "the clock": (
        DROPOUT.format(before="import time", change="features * (1 + time.time() % 1)"),
        "first train/", "not repeatable", "time.time()",
    ),
    "a generator of its own": (
        DROPOUT.format(
            before="own = torch.Generator().manual_seed(7)", change="features * torch.rand(features.shape, generator=own)"
        ),
        "first train/loss at step", "state", "torch.Generator()",
    ),
    "a change of the kit": (
        DROPOUT.format(before="", change="real(features, p, training) * 1.5"), "first train/loss at step", "code", None,
    ),
    "values that are drawn": (HEAD + VALUES, "optimizer.lr: ", "recipe", "random.uniform"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", STRANGE)
def test_a_recipe_of_ones_own_that_no_resume_can_repeat_is_found_and_the_cause_named(place, case):
    text, said, kind, line = STRANGE[case]
    Path("mine").mkdir()
    # What is strange lies in a file beside the recipe.
    body, _, function = (HEAD + text.removeprefix(HEAD)).partition("def recipe")
    Path("mine", "beside.py").write_text(body)
    Path("mine", "strange.py").write_text(f"from beside import *\n{HEAD}def recipe{function}")
    # In a process of its own: the recipe changes the one that reads it.
    found = json.loads(conftest.finish(conftest.finetune("rehearse", "mine/strange.py", "--json"), code=1))
    assert sorted(path.name for path in Path.cwd().rglob("*")) == ["beside.py", "mine", "strange.py"]
    assert not found["is_same"] and said in found["verdict"], found["verdict"]
    assert found["cause"]["kind"] == kind, found["cause"]
    assert (line in " ".join(found["cause"]["lines"])) if line else not found["cause"]["lines"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thaw", "augmented, workers, parts", "regression", "several labels", "distillation"])
def test_every_kind_of_training_can_be_rehearsed(place, capsys, kind):
    rows = sentences(200)
    if kind == "thaw":
        rules = '(("head", "trainable", 0), ("layer3", "trainable", 4), ("*", "trainable", 9))'
        Path("mine.py").write_text(
            f"import dataclasses\nfrom finetune import *\ndef recipe(batch_size: int = 16) -> Recipe:\n"
            f"    made = image_head(images='digits', backbone='bundled/resnet', batch_size=batch_size)\n"
            f"    return dataclasses.replace(made, trainable=Trainable({rules}, batchnorm=True))\n"
        )
        words = ["mine.py"]
    elif kind == "augmented, workers, parts":
        for part, count in (("train", 60), ("val", 30), ("test", 30)):
            for label in ("cat", "dog"):
                folder = Path("photos", part, label)
                folder.mkdir(parents=True)
                for number in range(count):
                    Image.new("RGB", (20, 20), (number * 4, len(label), len(part))).save(folder / f"{number}.png")
        words = ["vgg_head", "--images", "photos", "--augment", "standard", "--mixup", "0.2", "--workers", "2"]
    elif kind == "distillation":
        teacher = make_encoder(Path("teacher"))
        (teacher / "1_Pooling").mkdir()
        (teacher / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
        Path("texts.txt").write_text("\n".join(text for text, _ in rows))
        words = ["distill_bert", "--teacher", "teacher", "--texts", "texts.txt", "--max-length", "20"]
        words += ["--vocabulary-size", "75"]
    else:
        with open("t.csv", "w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["text", "label"])
            several = kind == "several labels"
            writer.writerows([text, f"{label}|x" if several else len(text)] for text, label in rows)
        words = ["bert_head", "--texts", "t.csv", *(["--separator", "|"] if several else ["--task", "regression"])]
    found = rehearse(capsys, *words, *QUICK)
    assert found["is_same"], found
    assert found["rehearsed"]["epochs"] == (3 if kind == "thaw" else 2)


# ---- The parts ------------------------------------------------------------------------------------------------------


def test_a_shortened_recipe_keeps_what_is_random_and_comes_to_every_thaw():
    recipe = conftest.small_recipe(
        trainable=Trainable(
            (("head", "trainable", 0), ("a", "trainable", 7), ("b", "trainable", 30), ("*", "frozen", 0))
        ),
        schedule=Schedule("step", step_epochs=10),
        stop=Stop(patience=2),
        epochs=0,
        max_steps=5000,
        validate_every_steps=500,
    )
    assert epochs_of(recipe) == 3 and epochs_of(conftest.small_recipe()) == 2
    short = Part("", 64, 0, 3, 0).shortened(recipe)
    assert [epoch for _, _, epoch in short.trainable.rules] == [0, 1, 2, 0]
    assert (short.epochs, short.max_steps, short.validate_every_steps, short.stop.patience) == (3, 0, 2, 0)
    assert (short.data.samples, short.data.train_samples, short.schedule.step_epochs) == (64, 0, 1)
    assert (short.model, short.optimizer, short.seed) == (recipe.model, recipe.optimizer, recipe.seed)
    assert Part.from_text(Part("a b", 1, 2, 3, 4).to_text()) == Part("a b", 1, 2, 3, 4)


def test_the_extent_is_a_few_steps_an_epoch_of_data_however_large_and_all_of_little():
    extent = extent_of(conftest.small_recipe(data=Images("digits"), batch_size=16), frozenset())
    assert 4 <= extent.short.steps <= 5 and extent.whole == Counts(1438, 359, 90) and extent.samples == 80
    assert extent.save_step == extent.short.steps + 1 and extent.kill_step == extent.save_step + 1
    little = extent_of(conftest.small_recipe(data=Images("digits"), batch_size=2000), frozenset())
    assert little.samples == 0 and little.short == little.whole == Counts(1438, 359, 1)
    assert (little.save_step, little.kill_step, little.steps) == (1, 2, 2)
    # Never more to train on than the training itself has.
    fewer = extent_of(conftest.small_recipe(data=Images("digits", train_samples=20), batch_size=16), frozenset())
    assert fewer.whole.train == fewer.short.train == fewer.train_samples == 20
    part = fewer.part("run")
    assert part.shortened(conftest.small_recipe(data=Images("digits", train_samples=20))).data.train_samples == 20


def test_a_sample_of_the_data_holds_every_class_of_every_part_and_is_always_the_same():
    digits = open_source(Images("digits"), "classification")
    few = sampled(digits, 25)
    assert torch.bincount(few.targets).tolist() == [3, 3, 3, 3, 3, 2, 2, 2, 2, 2]
    assert few.images.shape[0] == 25 and few.fingerprint != digits.fingerprint
    assert torch.equal(few.images, sampled(digits, 25).images) and sampled(digits, 0) is digits
    assert len(sampled(digits, 10_000).targets) == 1797
    labels = torch.tensor([[1, 0, 0]] * 50 + [[1, 1, 0]] * 3 + [[0, 0, 0]] * 20 + [[1, 1, 1]], dtype=torch.uint8)
    parts = torch.tensor([0] * 40 + [1] * 10 + [0] * 24)
    paths = [f"{number}.png" for number in range(74)]
    files = FileSource(Path("."), paths, labels, ["a", "b", "c"], "x", parts=parts)
    few = sampled(files, 4)
    assert [int((few.parts == part).sum()) for part in range(3)] == [4, 4, 0]
    assert few.targets[few.parts == 0].amax(0).tolist() == [1, 1, 1]
    assert all(
        torch.equal(files.targets[paths.index(path)], row) for path, row in zip(few.paths, few.targets, strict=True)
    )
    texts = open_source(Texts("messages"), "classification")
    few = sampled(texts, 16)
    assert len(few.texts) == 16 and all(
        texts.names.index(name) == texts.texts.index(text) for name, text in zip(few.names, few.texts, strict=True)
    )


def changed(run: RunFolder, target: Path, change) -> RunFolder:
    """A copy of a run whose checkpoints were changed."""
    copy = RunFolder(Path(shutil.copytree(run.path, target)))
    for name in ("best.pt", "latest.pt"):
        state = conftest.read(copy, name)
        change(state)
        (copy.checkpoints / name).unlink()
        write_atomically(copy.checkpoints / name, lambda stream, state=state: torch.save(state, stream), trailer=True)
    return copy


def test_one_bit_of_one_tensor_is_found_and_so_is_one_figure(trained, tmp_path):
    same = compare(trained, changed(trained, tmp_path / "same", lambda state: state.update(run_id=state["run_id"])))
    assert same.is_same and same.tensors > 10 and same.figures > 30

    def flip(state):
        bits = state["model"]["classifier.1.weight"].view(torch.int32)
        bits[3, 5] ^= 1

    found = compare(trained, changed(trained, tmp_path / "bit", flip))
    assert found.differing == 2 and found.figure is None
    assert found.tensor[0] == "model/classifier.1.weight of the best checkpoint" and "by up to" in found.tensor[1]
    other = changed(trained, tmp_path / "figure", lambda state: None)
    lines = [json.loads(line) for line in other.metrics_file.read_text().splitlines()]
    lines[-1]["finish/loss"] += 1e-9
    lines[0]["time/seconds"] = 1e9
    other.metrics_file.write_text("\n".join(map(json.dumps, lines)))
    found = compare(trained, other)
    assert found.figure[:2] == ("finish/loss", lines[-1]["step"]) and found.tensor is None and not found.is_same


SAME, OTHER = Comparison(), Comparison(figure=("train/loss", 7, 1.0, 2.0))
EARLY = Comparison(figure=("train/loss", 3, 1.0, 2.0))


@pytest.mark.parametrize(
    ("resumed", "repeated", "by_recipe", "is_free", "kind"),
    [
        (OTHER, Comparison(recipe=["lr"]), None, False, "recipe"),
        (OTHER, OTHER, None, False, "not repeatable"),
        (OTHER, OTHER, None, True, "not deterministic"),
        (EARLY, SAME, OTHER, False, "not repeatable"),
        (OTHER, SAME, SAME, False, "code"),
        (None, SAME, SAME, False, "code"),
        (OTHER, SAME, OTHER, False, "state"),
        (None, SAME, None, False, "state"),
    ],
)
def test_the_cause_is_what_the_runs_say_together(resumed, repeated, by_recipe, is_free, kind):
    assert cause_of(6, resumed, repeated, by_recipe, is_free=is_free, code=[]).kind == kind


@pytest.mark.skipif(os.name == "nt", reason="process groups are of POSIX")
def test_whoever_asks_to_stop_ends_a_process_and_what_it_started(monkeypatch):
    script = (
        "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print('here', flush=True); time.sleep(60)"
    )
    real, started = process.subprocess.Popen, []

    def start(_command, **options):
        started.append(real([sys.executable, "-c", script], **options))
        return started[-1]

    stop = StopRequest()
    monkeypatch.setattr(process.subprocess, "Popen", start)

    def ask():
        while not started or len(psutil.Process(started[0].pid).children()) == 0:
            time.sleep(0.01)
        stop.ask("by a test")

    threading.Thread(target=ask).start()
    with pytest.raises(StoppedEarly, match="stopped by a test in a rehearsal, of which nothing is left"):
        carry_out([], process.environment(Path("x"), Path("y")), stop)
    with pytest.raises(ProcessLookupError):
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            os.killpg(started[0].pid, 0)
            time.sleep(0.01)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_is_shown_within_the_terminal_and_what_will_not_do_is_said(width):
    counts = Counts(1_000_000, 200_000, 15_625)
    extent = Extent(320, 0, 2, counts, Counts(256, 64, 4), 15, False, "image")
    measured = Measured(
        0.123, 2000.0, 300.0, 4.0, 30000.0, 3 << 30, 5 << 30, 90_000, Room(Path("runs"), 1 << 40, 1 << 30),
        Room(Path("/home/somebody/.cache/finetune/features"), 1 << 33, 1 << 34), False,
    )  # fmt: skip
    cause = cause_of(6, OTHER, SAME, OTHER, is_free=False, code=[])
    for found in (OTHER, SAME, None):
        console = Console(width=width, file=io.StringIO(), highlight=False)
        show(Rehearsal(extent, found, "it broke", None if found is SAME else cause, measured), console)
        said = console.file.getvalue()
        assert all(len(line) <= width for line in said.splitlines())
        flat = " ".join(said.split())
        assert "too little room" in flat and "15 epochs" in flat and "every epoch" in flat
        start = "the same in every bit" if found is SAME else "not the same: "
        assert start in flat


def test_figures_that_are_no_number_are_the_same_and_their_absence_is_not():
    nan = torch.tensor([float("nan"), 1.0])
    assert is_equal(nan, nan.clone()) and is_equal(float("nan"), float("nan"))
    assert not is_equal(torch.zeros(1), -torch.zeros(1)) and not is_equal(1, 1.0) and not is_equal(None, 0.0)
    assert not is_equal(torch.zeros(1), torch.zeros(1, dtype=torch.float64))
