"""The last stage: a linear head solved after the loop, exactly, honestly, and killed at any moment to the same bits."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    DyingTerminal,
    Killed,
    assert_equal_runs,
    finetune,
    finish,
    read,
    resume_in,
    small_recipe,
    start_in,
)
from PIL import Image

from finetune import Classification, Finish, Images, Stop
from finetune.cli import main
from finetune.data.digits import load_digits
from finetune.recipe.execution import Machine, Numerics, Settings, completed, determining_config, split_config
from finetune.recipe.head_options import AnyTable
from finetune.runs.evaluate import evaluate
from finetune.store.restore import shipped
from finetune.store.run_folder import RunFolder
from finetune.tasks.evaluation import Evaluation
from finetune.tasks.losses import ClassificationTask
from finetune.training import last_stage
from finetune.training.finish import which_ships
from finetune.training.regularisation import solve_all, try_next

MACHINE = Machine("cpu", workers=0)


# ---- In a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> str:
    """A folder of 150 digits, fifteen a class."""
    folder, digits = tmp_path_factory.mktemp("few"), load_digits()
    for label in range(10):
        (folder / str(label)).mkdir()
        for number in (digits.targets == label).nonzero().flatten()[:15].tolist():
            Image.fromarray(digits.images[number, 0].numpy()).save(folder / str(label) / f"{number}.png")
    return str(folder)


def recipe(few: str, augment: str = "none", **changes):
    values = {"data": Images(few, augment=augment), "task": Classification(), "finish": Finish()} | changes
    return small_recipe(**values)


def run_in(path: Path, recipe_, **settings) -> RunFolder:
    run, _ = start_in(path, "t", recipe_, Numerics(), MACHINE, Settings(**settings), DyingTerminal())
    return run


def final_of(run: RunFolder) -> dict:
    return torch.load(run.checkpoints / "final.pt", weights_only=True)


def test_the_better_of_the_two_heads_ships_and_says_so(few, tmp_path):
    terminal = DyingTerminal()
    run, progress = start_in(tmp_path / "run", "t", recipe(few), Numerics(), MACHINE, Settings(), terminal)
    finish = progress.finish
    assert (progress.status, finish.status, finish.ships) == ("finished", "done", "final")
    assert finish.judged["solved"] < finish.judged["loop"] and finish.judged["optimism"] >= 0
    assert shipped(run, "auto") == "final" and shipped(run, "best") == "best"
    (line,) = [line for line in terminal.lines if line.startswith("solved head: ")]
    assert line.endswith("it ships (final.pt)") and f"of {len(finish.tried)} tried in 5 fold(s)" in line
    lines = [json.loads(text) for text in run.metrics_file.read_text().splitlines()]
    strengths = [one["finish/lambda"] for one in lines if "finish/lambda" in one]
    assert strengths == [one["strength"] for one in finish.tried] and "finish/accuracy" in lines[-1]
    # The loop's own checkpoints are what they were.
    assert set(read(run)["model"]) == set(final_of(run)["model"])
    assert not torch.equal(read(run)["model"]["classifier.1.weight"], final_of(run)["model"]["classifier.1.weight"])


def test_a_loop_that_is_better_ships(few, tmp_path, monkeypatch):
    evaluation = Evaluation(ClassificationTask(10), torch.device("cpu"), 2)
    evaluation.add(torch.arange(2), torch.eye(10)[:2], torch.arange(2))
    judged = {"solved": 2.0, "loop": 1.0, "samples": 2, "error": 0.5, "optimism": 0.0}
    monkeypatch.setattr(last_stage, "judge", lambda *_: (judged, evaluation))
    assert which_ships(judged) == "best" and which_ships(judged | {"error": 1.5}) == "final"
    run = run_in(tmp_path / "run", recipe(few))
    assert shipped(run, "auto") == "best" and "is_solved" in json.loads(run.validation_file.read_text())
    assert json.loads(run.validation_file.read_text())["is_solved"] is False


SLOW = [pytest.param(moment, marks=pytest.mark.slow) for moment in (0, 4, "solved")]


@pytest.mark.parametrize("moment", [1, "saved", *SLOW])
def test_a_run_killed_while_its_head_is_solved_ends_with_the_same_bits(few, tmp_path, monkeypatch, moment):
    whole = run_in(tmp_path / "whole", recipe(few), save_every_steps=1)
    calls = []

    def dying(function, when):
        def wrapper(*arguments):
            calls.append(1)
            if len(calls) - 1 == when:
                raise Killed
            return function(*arguments)

        return wrapper

    with monkeypatch.context() as patched:
        if moment == "solved":
            patched.setattr(last_stage, "solve_all", dying(solve_all, 0))
        elif moment == "saved":
            patched.setattr(last_stage, "finish_text", dying(last_stage.finish_text, 0))
        else:
            patched.setattr(last_stage, "try_next", dying(try_next, moment))
        with pytest.raises(Killed):
            run_in(tmp_path / "killed", recipe(few), save_every_steps=1)
    killed = RunFolder(tmp_path / "killed")
    assert read(killed)["status"] == "running" and read(killed)["finish"]["status"] == "due"
    progress = resume_in(killed, MACHINE, DyingTerminal(), settings={})
    assert progress.status == "finished"
    assert_equal_runs(killed, whole)
    for name, value in final_of(whole)["model"].items():
        assert torch.equal(final_of(killed)["model"][name], value), name


def test_what_ships_is_judged_by_heads_that_have_not_seen_what_they_judge(few, tmp_path):
    run = run_in(tmp_path / "run", recipe(few))
    figures = evaluate(run, "final", "", AnyTable(), "cpu", 0)
    assert figures["out_of_fold"] and figures["part"] == "validation"
    saved = json.loads(run.validation_file.read_text())
    assert saved["is_solved"] and saved["figures"]["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    of_loop = evaluate(run, "best", "", AnyTable(), "cpu", 0)
    assert not of_loop["out_of_fold"] and of_loop["loss"] != figures["loss"]
    only_train = run_in(tmp_path / "train", recipe(few, finish=Finish(rows="train")))
    assert not evaluate(only_train, "final", "", AnyTable(), "cpu", 0)["out_of_fold"]


def test_a_run_of_before_goes_on_without_a_last_stage(few, tmp_path):
    config = determining_config(recipe(few), Numerics())
    del config["finish"]
    old, _ = split_config(config)
    assert old.finish.way == "none" and completed(config)["finish"]["way"] == "none"
    run = run_in(tmp_path / "run", old)
    assert not (run.checkpoints / "final.pt").exists() and shipped(run, "auto") == "best"


@pytest.mark.parametrize(
    ("changes", "numerics"),
    [
        ({"augment": "light"}, Numerics()),
        ({"head": "mlp"}, Numerics()),
        ({}, Numerics(cache=False)),
        ({"finish": Finish(way="none")}, Numerics()),
    ],
)
def test_where_there_is_nothing_to_solve_the_loops_best_ships(few, tmp_path, changes, numerics):
    run, progress = start_in(
        tmp_path / "run", "t", recipe(few, **changes), numerics, MACHINE, Settings(), DyingTerminal()
    )
    assert progress.status == "finished" and progress.finish.status == ""
    assert not (run.checkpoints / "final.pt").exists()


def test_a_run_that_stopped_early_is_finished_and_one_that_is_made_longer_again(few, tmp_path):
    run = run_in(tmp_path / "run", recipe(few, epochs=6, stop=Stop(patience=1, metric="f1")))
    state = read(run)
    assert state["status"] in ("stopped early", "finished") and state["finish"]["status"] == "done"
    before = final_of(run)["finish"]
    progress = resume_in(run, MACHINE, DyingTerminal(), settings={}, epochs=8)
    assert progress.finish.status == "done" and progress.step > state["step"]
    assert final_of(run)["step"] == progress.step and final_of(run)["finish"]["tried"] == before["tried"]


def test_a_part_that_the_data_brings_along_is_never_trained_on(few, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 30), ("val", 10)):
        for label in ("dark", "light"):
            folder = tmp_path / "data" / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                level = (60 if label == "dark" else 130) + torch.randint(60, (8, 8), generator=generator)
                Image.fromarray(level.to(torch.uint8).numpy()).save(folder / f"{number}.png")
    run = run_in(tmp_path / "run", recipe(few, data=Images(str(tmp_path / "data"))))
    held_samples = final_of(run)["finish"]["held_samples"]
    assert len(held_samples) == 60
    figures = evaluate(run, shipped(run, "auto"), "", AnyTable(), "cpu", 0)
    assert not figures["out_of_fold"] and figures["samples"] == 20


def test_regression_and_several_labels_are_solved_too(tmp_path, capsys):
    rows = [f"word{n % 7} and word{n % 5} again,{n % 7 + 0.1 * (n % 3)},{'|'.join(sorted({'ab'[n % 2], 'cd'[n % 7 // 4]}))}"
            for n in range(120)]  # fmt: skip
    (tmp_path / "t.csv").write_text("\n".join(["text,number,labels", *rows]))
    common = ["--texts", str(tmp_path / "t.csv"), "--epochs", "2", "--track", "none", "--no-report", "--device", "cpu"]
    for name, words in {
        "number": ["--label-column", "number", "--task", "regression"],
        "several": ["--label-column", "labels", "--separator", "|"],
    }.items():
        assert main(["bert_head", *common, *words, "--run", str(tmp_path / name)]) == 0
        assert "it ships (final.pt)" in capsys.readouterr().out
        assert main(["export", str(tmp_path / name)]) == 0
        assert main(["evaluate", str(tmp_path / name)]) == 0
        assert "out of fold" in capsys.readouterr().out


def test_where_classes_are_uneven_a_prior_in_the_loss_finds_more_of_the_rare_ones(tmp_path):
    """In the loop and in the solved head: the bias of a rare class is higher by about the log of its share."""
    folder, digits = tmp_path / "data", load_digits()
    for label in range(4):
        (folder / str(label)).mkdir(parents=True)
        for number in (digits.targets == label).nonzero().flatten()[: 80 if label == 0 else 10].tolist():
            Image.fromarray(digits.images[number, 0].numpy()).save(folder / str(label) / f"{number}.png")
    shares = {}
    for kind in ("none", "prior"):
        made = recipe(str(folder), task=Classification(class_weights=kind), epochs=4)
        run = run_in(tmp_path / kind, made)
        for name in ("best", "final"):
            model = torch.load(run.checkpoints / f"{name}.pt", weights_only=True)["model"]
            shares[kind, name] = (model["classifier.1.bias"] - model["classifier.1.bias"].mean())[1:].mean().item()
    assert shares["prior", "best"] > shares["none", "best"] and shares["prior", "final"] > shares["none", "final"] + 0.1


def test_what_ships_of_the_loop_is_calibrated_too_and_decides_the_same(few, tmp_path, capsys):
    words = ["vgg_head", "--images", few, "--head", "mlp", "--epochs", "2", "--track", "none", "--no-report"]
    found = {}
    for name, more in {"yes": [], "no": ["--no-calibrate"]}.items():
        run = RunFolder(tmp_path / name)
        assert main([*words, *more, "--device", "cpu", "--run", str(run.path)]) == 0
        assert ("temperature" in read(run)["best_metric"]) == (name == "yes")
        found[name] = evaluate(run, "best", "", AnyTable(), "cpu", 0)
        assert main(["export", str(run.path)]) == 0
        (place, *_) = Path(few).rglob("*.png")
        capsys.readouterr()
        assert main(["predict", str(run.path / "model.pt"), str(place)]) == 0
        found[f"{name} predicts"] = json.loads(capsys.readouterr().out)
    assert found["yes"]["accuracy"] == found["no"]["accuracy"] and found["yes"]["loss"] != found["no"]["loss"]
    assert found["yes predicts"]["label"] == found["no predicts"]["label"]
    assert found["yes predicts"]["probability"] != found["no predicts"]["probability"]


def test_the_export_of_a_solved_head_is_a_stock_one(tmp_path, capsys):
    words = ["vgg_head", "--train-samples", "200", "--epochs", "2", "--track", "none", "--no-report", "--device", "cpu"]
    assert main([*words, "--run", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run")]) == 0
    described = json.loads((tmp_path / "run" / "model.json").read_text())
    assert described["checkpoint"]["which"] == "final" and described["architecture"]["stock"]
    state = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert set(state) == {name for name in state if "mean" not in name.rpartition(".")[2] or "running" in name}
    assert main(["export", str(tmp_path / "run"), "--from", "best", "--output", str(tmp_path / "b.pt")]) == 0
    other = torch.load(tmp_path / "b.pt", weights_only=True)
    assert not torch.equal(state["classifier.1.weight"], other["classifier.1.weight"])


def test_an_option_without_effect_is_refused(tmp_path, capsys):
    words = ["vgg_head", "--finish", "none", "--final", "train", "--run", str(tmp_path / "run")]
    assert main(words) == 2
    assert "--final train: has no effect with --finish none" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("save_every", ["0", "1"])
def test_processes_killed_while_they_solve_end_with_the_bits_of_one_that_lived(tmp_path, save_every):
    words = ["vgg_head", "--epochs", "2", "--device", "cpu", "--save-every-steps", save_every]
    finish(finetune(*words, "--run", str(tmp_path / "whole")))
    whole, run = (RunFolder(tmp_path / name) for name in ("whole", "killed"))
    process = finetune(*words, "--run", str(run.path))
    deaths = 0
    for goal in (1, 2, 4, 5, 7):
        while process.poll() is None and not run.metrics_file.exists():
            time.sleep(0.005)
        while process.poll() is None and run.metrics_file.read_text().count("finish/lambda") < goal:
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            deaths += 1
        process.communicate()
        process = finetune("resume", str(run.path))
    finish(process)
    assert deaths >= 3, "too few died while they solved"
    assert_equal_runs(run, whole)
    for name, value in final_of(whole)["model"].items():
        assert torch.equal(final_of(run)["model"][name], value), name
    assert (run.path / "labels.csv").read_bytes() == (whole.path / "labels.csv").read_bytes()
