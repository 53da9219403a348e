"""The last stage where data is odd, files are gone, or a run goes back: nothing is lost, and nothing false is said."""

import json
import os
import random
import shutil

import pytest
import torch
from conftest import DyingTerminal, Killed, assert_equal_runs, read, resume_in, small_recipe, start_in
from PIL import Image

from finetune.cli import main
from finetune.data.digits import load_digits
from finetune.errors import RunError
from finetune.recipe.execution import Machine, Numerics, Settings
from finetune.store.run_folder import RunFolder
from finetune.tasks.calibration import LARGEST_TEMPERATURE, temperature_of, temperature_that_helps
from finetune.training import last_stage
from finetune.training.context import RunContext

MACHINE = Machine("cpu", workers=0)
QUIET = ["--track", "none", "--no-report", "--device", "cpu"]


def texts(path, rows, header="text,label"):
    path.write_text("\n".join([header, *rows]), encoding="utf-8")
    return str(path)


def test_a_temperature_has_an_end_and_helps_or_is_one():
    outputs, targets = torch.eye(3)[torch.arange(30) % 3] * 4, torch.eye(3)[(torch.arange(30) + 1) % 3]
    assert temperature_of(outputs, targets, "classification") == LARGEST_TEMPERATURE  # all the contrary
    assert temperature_that_helps(outputs, targets, "classification") == LARGEST_TEMPERATURE
    right = outputs.roll(1, 1)
    assert temperature_of(3 * right, targets, "classification") > 1  # few, and all right: who knows
    assert temperature_that_helps(3 * right, targets, "classification") == 1.0


@pytest.mark.slow
def test_labels_that_have_nothing_to_do_with_the_texts_are_said_to_and_predictions_still_differ(tmp_path, capsys):
    draw = random.Random(3)
    words = ["red", "late", "small", "cold", "new", "far", "old", "thin"]
    rows = [f"{' '.join(draw.sample(words, 4))} {number},{draw.choice('abc')}" for number in range(60)]
    place, run = texts(tmp_path / "t.csv", rows), tmp_path / "run"
    assert main(["bert_head", "--texts", place, "--epochs", "2", *QUIET, "--run", str(run)]) == 0
    assert read(RunFolder(run))["finish"]["tried"][0]["temperature"] <= LARGEST_TEMPERATURE
    assert "60 of 60 labels look wrong" not in capsys.readouterr().out
    assert main(["export", str(run)]) == 0
    capsys.readouterr()
    assert main(["predict", str(run / "model.pt"), place]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({row["probability"] for row in rows}) > 10


def test_where_all_belongs_together_the_loops_best_ships_and_the_start_says_why(tmp_path, capsys):
    rows = [f"a {'good' if number % 2 else 'bad'} thing {number},{number % 2},g{number // 40},{'train' if number < 40 else 'val'}"
            for number in range(60)]  # fmt: skip
    place = texts(tmp_path / "t.csv", rows, "text,label,group,split")
    words = [
        "bert_head",
        "--texts",
        place,
        "--group-column",
        "group",
        "--split-column",
        "split",
        "--epochs",
        "2",
        *QUIET,
    ]
    assert main([*words, "--run", str(tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the head is not solved, because all samples belong together, so none can be held out" in said
    assert not (tmp_path / "run" / "checkpoints" / "final.pt").exists()


def digits_in(folder, count=8):
    digits = load_digits()
    for label in range(3):
        (folder / str(label)).mkdir(parents=True)
        for number in (digits.targets == label).nonzero().flatten()[:count].tolist():
            Image.fromarray(digits.images[number, 0].numpy()).save(folder / str(label) / f"{number}.png")
    return folder


@pytest.mark.skipif(os.name == "nt", reason="names of files are Unicode there")
def test_a_name_that_is_no_text_is_listed_and_can_be_left_out(tmp_path):
    folder = digits_in(tmp_path / "data")
    first = next((folder / "0").iterdir())
    first.rename(os.fsdecode(os.fsencode(folder / "0") + b"/\xff.png"))
    words = ["vgg_head", "--images", str(folder), "--epochs", "1", *QUIET]
    assert main([*words, "--run", str(tmp_path / "run")]) == 0
    labels = (tmp_path / "run" / "labels.csv").read_text().splitlines()
    labels = [f"x{line}" if "udcff" in line else line for line in labels]
    (tmp_path / "labels.csv").write_text("\n".join(labels))
    assert main([*words, "--without", str(tmp_path / "labels.csv"), "--run", str(tmp_path / "again")]) == 0
    data = read(RunFolder(tmp_path / "again"))["data"]
    assert data["train_samples"] + data["validation_samples"] == 23


def test_a_rewound_run_has_no_solved_head_until_it_is_solved_again_to_the_same_bits(tmp_path):
    recipe = small_recipe(augment="none")
    run, _ = start_in(
        tmp_path / "run", "t", recipe, Numerics(), MACHINE, Settings(save_every_steps=5, keep=9), DyingTerminal()
    )
    whole = RunFolder(shutil.copytree(run.path, tmp_path / "whole"))
    terminal = DyingTerminal(12)
    with pytest.raises(Killed):
        resume_in(run, MACHINE, terminal, settings={}, from_file=run.checkpoints / "step-000010.pt")
    assert not (run.checkpoints / "final.pt").exists()
    assert main(["export", str(run.path), "--from", "final"]) == 1
    resume_in(run, MACHINE, DyingTerminal(), settings={})
    assert_equal_runs(run, whole)
    one, other = (torch.load(one.checkpoints / "final.pt", weights_only=True)["model"] for one in (run, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_the_loops_best_the_solved_head_ships_and_says_so(tmp_path, monkeypatch):
    recipe = small_recipe(augment="none")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(last_stage, "try_next", die)
        with pytest.raises(KeyboardInterrupt):
            start_in(tmp_path / "run", "t", recipe, Numerics(), MACHINE, Settings(), DyingTerminal())
    run = RunFolder(tmp_path / "run")

    def gone(_context):
        raise RunError("checkpoint best.pt does not exist")

    monkeypatch.setattr(RunContext, "read_best", gone)
    terminal = DyingTerminal()
    progress = resume_in(run, MACHINE, terminal, settings={})
    assert (progress.status, progress.finish.ships) == ("finished", "final")
    assert any(line.startswith("the loop's best is gone (") for line in terminal.lines)


@pytest.mark.slow
def test_after_an_extension_in_which_the_loop_is_better_the_report_is_of_the_loop(tmp_path, monkeypatch):
    run, _ = start_in(
        tmp_path / "run", "t", small_recipe(augment="none"), Numerics(), MACHINE, Settings(), DyingTerminal()
    )
    of_loop = json.loads(run.loop_validation_file.read_text())
    assert json.loads(run.validation_file.read_text())["is_solved"] and not of_loop["is_solved"]
    monkeypatch.setattr(last_stage, "which_ships", lambda _: "best")
    resume_in(run, MACHINE, DyingTerminal(), settings={}, epochs=3, lr=1e-9)
    assert json.loads(run.validation_file.read_text())["is_solved"] is False
    assert main(["report", str(run.path)]) == 0
    page = run.report_file.read_text()
    assert "was interrupted in between" not in page and "by heads that were solved without them" not in page


def test_a_head_of_features_of_norm_one_does_not_begin_another(tmp_path, capsys):
    words = ["vgg_head", "--train-samples", "60", "--epochs", "1", *QUIET]
    run = str(tmp_path / "run")
    assert main([*words, "--run", run]) == 0
    for more, said in (
        (["--init-from", run, "--unit-rows"], "another head; leave --unit-rows out"),
        (["--init-from", f"{run}:final"], "the solved head has seen the samples that validate"),
    ):
        assert main([*words, *more]) in (1, 2)
        assert said in capsys.readouterr().err


def test_what_is_exported_of_the_loop_says_the_figures_that_it_gives(tmp_path, capsys):
    rows = [f"{'good' if number % 3 else 'bad'} thing {number % 11},{'up' if number % 3 else 'down'}|{'odd' if number % 7 else 'even'}"
            for number in range(90)]  # fmt: skip
    run = tmp_path / "run"
    words = ["bert_head", "--texts", texts(tmp_path / "t.csv", rows), "--separator", "|", "--finish", "none"]
    assert main([*words, "--epochs", "1", *QUIET, "--run", str(run)]) == 0
    assert main(["export", str(run)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    found, said = json.loads(capsys.readouterr().out), json.loads((run / "model.json").read_text())["metrics"]
    for name in ("loss", "accuracy", "f1"):
        assert said[f"val/{name}"] == pytest.approx(found[name], abs=1e-5)
