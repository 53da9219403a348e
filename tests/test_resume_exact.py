"""Interrupted within one process, many combinations; test_resume.py does it with real processes and SIGKILL."""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import (
    DyingTerminal,
    Killed,
    assert_equal_runs,
    metrics_lines,
    read,
    resume_in,
    resume_run,
    small_recipe,
    start_in,
    train_run,
    train_with_deaths,
)
from PIL import Image

from finetune import Images, Optimizer, RunError, Schedule, Stop, StoppedEarly, Trainable, UsageError
from finetune.base.signals import StopRequest
from finetune.cli import main
from finetune.errors import FinetuneError
from finetune.listing.found import describe
from finetune.recipe.execution import Numerics, Settings
from finetune.report.curves import read_curves
from finetune.runs import start as begin
from finetune.runs.start import Machine
from finetune.store import checkpoint
from finetune.store.run_folder import RunFolder
from finetune.tasks.losses import ClassificationTask
from finetune.training import step as one_step
from finetune.training.context import RunContext

# Four deaths in the first epoch of seven steps and two in the second.
DEATHS = [2, 3, 5, 6, 9, 13]


@pytest.mark.parametrize(
    ("backbone", "workers", "accumulate", "precision", "head"),
    [
        pytest.param("bundled/vgg", 0, 1, "fp32", "linear", marks=pytest.mark.slow),
        ("bundled/vgg", 2, 4, "fp32", "mlp"),
        pytest.param("bundled/vgg", 0, 4, "bf16", "append", marks=pytest.mark.slow),
        pytest.param("bundled/resnet", 2, 1, "bf16", "linear", marks=pytest.mark.slow),
        pytest.param("bundled/resnet", 0, 4, "fp32", "mlp", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_six_times_ends_bit_for_bit_like_one_that_was_not(
    tmp_path, backbone, workers, accumulate, precision, head
):
    recipe = small_recipe(backbone, accumulate=accumulate, head=head)
    options = {"precision": precision, "workers": workers}
    unbroken = train_run(tmp_path / "unbroken", recipe, **options)
    interrupted = train_with_deaths(tmp_path / "interrupted", recipe, DEATHS, **options)
    assert_equal_runs(interrupted, unbroken)
    assert len([event for event in read(interrupted)["history"] if event["event"] == "resume"]) == len(DEATHS)


def test_deaths_with_saves_only_at_the_end_of_epochs_repeat_steps_and_end_the_same(tmp_path):
    recipe = small_recipe(epochs=3)
    unbroken = train_run(tmp_path / "unbroken", recipe, save_every_steps=0)
    interrupted = train_with_deaths(tmp_path / "interrupted", recipe, [10, 11, 17], save_every_steps=0)
    assert_equal_runs(interrupted, unbroken)


# Far too high a rate: the loss is best at step 4 and never again as good.
WORSENING = {"optimizer": Optimizer(lr=0.3), "validate_every_steps": 2}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"trainable": Trainable(rules=(("*", "trainable", 0),), batchnorm=True)}, marks=pytest.mark.slow),
        {"trainable": Trainable(rules=(("head", "trainable", 0), ("layer3", "trainable", 1), ("*", "frozen", 0)))},
        pytest.param(
            {"optimizer": Optimizer(name="sgd", lr=0.1), "schedule": Schedule(name="step", step_epochs=1)},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            WORSENING
            | {"stop": Stop(metric="loss"), "schedule": Schedule(name="plateau", patience=1, warmup_fraction=0)},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            WORSENING | {"stop": Stop(metric="loss", patience=5), "schedule": Schedule(name="constant")},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["everything trains", "thaw", "sgd and step", "plateau", "early stop"],
)
def test_every_kind_of_state_survives(tmp_path, changes):
    recipe = small_recipe("bundled/vgg" if "stop" in changes else "bundled/resnet", **changes)
    unbroken = train_run(tmp_path / "unbroken", recipe)
    interrupted = train_with_deaths(tmp_path / "interrupted", recipe, [2, 4, 8, 9, 11])
    assert_equal_runs(interrupted, unbroken)
    state = read(unbroken)
    if recipe.schedule.name == "plateau":
        assert state["scheduler"]["reductions"] > 2
    if recipe.stop.patience:
        assert state["status"] == "stopped early" and state["best_metric"]["step"] < 11 < state["step"] < 14


def test_the_number_of_workers_may_change_at_a_resume(tmp_path):
    recipe = small_recipe()
    unbroken = train_run(tmp_path / "unbroken", recipe, workers=0)
    with pytest.raises(Killed):
        train_run(tmp_path / "interrupted", recipe, workers=2, die_after_steps=4)
    run = RunFolder(tmp_path / "interrupted")
    resume_run(run, workers=0)
    assert_equal_runs(run, unbroken)


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    whole = train_run(tmp_path / "whole", small_recipe(dropout=0.0, epochs=1), save_every_steps=0)
    parts = train_run(tmp_path / "parts", small_recipe(dropout=0.0, epochs=1, accumulate=4), save_every_steps=0)
    one, four = read(whole)["model"]["classifier.1.weight"], read(parts)["model"]["classifier.1.weight"]
    assert not torch.equal(one, torch.zeros_like(one))
    # AdamW divides by the gradient's own size, so a last-bit difference in a tiny gradient can move its weight by a
    # hundredth of a step of 3e-3.
    torch.testing.assert_close(one, four, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", [pytest.param("SIGINT", marks=pytest.mark.slow), "SIGTERM"])
def test_a_polite_signal_finishes_the_step_saves_and_the_rest_is_exact(tmp_path, name):
    recipe = small_recipe()

    class Signalling(DyingTerminal):
        def step(self, step, *_):
            if step == 4:
                os.kill(os.getpid(), getattr(signal, name))

    with pytest.raises(StoppedEarly, match=f"stopped by {name} at step 4 of 14, saved") as stopped:
        start_in(
            tmp_path / "run", "test", recipe, Numerics(), Machine("cpu"), Settings(log_every_steps=1), Signalling()
        )
    assert stopped.value.exit_code == 75
    run = RunFolder(tmp_path / "run")
    assert read(run)["position_samples"] == 64
    resume_run(run)
    unbroken = train_run(tmp_path / "unbroken", recipe, save_every_steps=0)
    assert_equal_runs(run, unbroken)


def test_steps_that_fp16_skips_are_counted_logged_as_no_number_and_survive(tmp_path, monkeypatch):
    real, real_loss = torch.amp.GradScaler, one_step.training_loss
    monkeypatch.setattr(torch.amp, "GradScaler", lambda _device, enabled: real("cpu", init_scale=2.0**127))
    monkeypatch.setattr(one_step, "training_loss", lambda *arguments: 20 * real_loss(*arguments))
    recipe = small_recipe(epochs=1, augment="none")
    unbroken = train_run(tmp_path / "unbroken", recipe)
    run = train_with_deaths(tmp_path / "run", recipe, [2, 5])
    assert_equal_runs(run, unbroken)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in run.metrics_file.read_text().splitlines()]
    assert lines[0]["train/gradient_norm"] is None
    assert (
        0
        < read(run)["skipped_steps"]
        == [line for line in lines if "train/loss" in line][-1]["train/skipped_steps"]
        < 7
    )
    assert "train/loss" in read_curves(run.metrics_file) and describe(run.path).step == 7


# ---- What a resume refuses, and says --------------------------------------------------------------------------------


def test_resuming_a_finished_run_says_so_and_changes_nothing(tmp_path):
    run = train_run(tmp_path / "run", small_recipe(epochs=1), save_every_steps=0)
    before = (run.checkpoints / "latest.pt").read_bytes()
    assert "finished at step 7" in resume_run(run)[0]
    assert (run.checkpoints / "latest.pt").read_bytes() == before


def test_an_extension_keeps_the_first_horizon_then_runs_at_the_final_rate(tmp_path):
    recipe = small_recipe(epochs=1)
    run = train_run(tmp_path / "run", recipe)
    resume_run(run, epochs=2)
    rates = [json.loads(line)["lr"] for line in run.metrics_file.read_text().splitlines() if '"lr"' in line]
    assert len(rates) == 14
    assert rates[6:] == [rates[6]] * 8 and rates[6] == pytest.approx(3e-3 * 0.01)
    state = read(run)
    assert state["scheduler"]["extensions"] == [{"from_step": 7, "epochs": 2, "lr": 0.0, "own_rate": True}]
    assert state["status"] == "finished" and state["step"] == 14


@pytest.mark.slow
def test_an_extension_at_its_own_rate_killed_in_the_middle_is_exact_and_not_forgotten(tmp_path):
    recipe = small_recipe(epochs=1)
    unbroken = train_run(tmp_path / "unbroken", recipe)
    resume_run(unbroken, epochs=3, lr=1e-3)
    run = train_run(tmp_path / "run", recipe)
    for step, options in ((8, {"epochs": 3, "lr": 1e-3}), (9, {}), (15, {})):
        with pytest.raises(Killed):
            resume_run(run, die_after_steps=step, **options)
    resume_run(run)
    assert_equal_runs(run, unbroken)
    assert read(run)["step"] == 21


def lrs(run: RunFolder) -> list[float]:
    return [line["lr"] for line in metrics_lines(run) if "lr" in line]


@pytest.mark.slow
def test_three_extensions_with_a_thaw_killed_and_rewound_are_exact_each_at_its_rate(tmp_path, monkeypatch):
    # A new run whose thaw comes after its last epoch is refused; one of before may have begun so.
    monkeypatch.setattr(begin, "check_thaws", lambda *_: None)
    rules = (("head", "trainable", 0), ("features.7", "trainable", 3), ("*", "frozen", 0))
    # Four steps an epoch.
    recipe = small_recipe(epochs=1, augment="none", trainable=Trainable(rules=rules), batch_size=32)
    more = [{"epochs": 2}, {"epochs": 4, "lr": 1e-3}, {"epochs": 5, "lr": 2e-3}]
    unbroken = train_run(tmp_path / "unbroken", recipe)
    for options in more:
        resume_run(unbroken, **options)
    assert lrs(unbroken)[4:] == [pytest.approx(3e-5)] * 4 + [1e-3] * 8 + [2e-3] * 4
    run, kept = train_run(tmp_path / "run", recipe), tmp_path / "run" / "kept.pt"
    for options, death in zip(more, (6, 14, 18), strict=True):
        with pytest.raises(Killed):
            resume_run(run, die_after_steps=death, **options)
        if death == 14:
            shutil.copy(run.latest, kept)
        resume_run(run)
    assert any("rewound to kept.pt" in line for line in resume_run(run, from_file=kept))
    assert read(run)["step"] == 16
    resume_run(run, **more[2])
    assert_equal_runs(run, unbroken)
    assert [event["event"] for event in read(unbroken)["history"]].count("thaw") == 1


def test_an_extension_that_an_older_version_began_goes_on_as_it_began_and_says_so(tmp_path):
    run = train_run(tmp_path / "run", small_recipe(epochs=1, batch_size=32))
    resume_run(run, epochs=2)
    with pytest.raises(Killed):
        resume_run(run, epochs=3, lr=0.1, die_after_steps=10)
    state = checkpoint.read_checkpoint(run.latest, run.read_recipe().id)
    for extension in state.progress.extensions:
        del extension["own_rate"]
    checkpoint.write_checkpoint(run.checkpoints, state, is_best=False, keep=2)
    said = resume_run(run)
    assert any(
        line.startswith("up to epoch 3 at the recipe's final rate, not at 0.1: an older version") for line in said
    )
    assert lrs(run)[9:] == [pytest.approx(3e-5)] * 3


def test_what_is_printed_after_an_early_stop_is_typed_and_trains_on(tmp_path, capfd):
    words = ["vgg_head", "--lr", "0.3", "--stop-metric", "loss", "--patience", "2", "--validate-every-steps", "2"]
    words += ["--epochs", "4", "--train-samples", "100", "--batch-size", "16", "--device", "cpu", "--track", "none"]
    run = RunFolder(tmp_path / "run")
    assert main([*words, "--no-report", "--run", str(run.path)]) == 0

    def advised() -> str:
        return next(line.strip() for line in capfd.readouterr().out.splitlines() if "finetune resume" in line)

    first = read(run)
    assert first["status"] == "stopped early" and first["step"] < 20
    advice = advised().partition("  ")[0]
    assert advice == f"finetune resume {run} --epochs 4"
    assert main(["resume", str(run.path)]) == 0  # without it nothing trains, and that is said
    assert advised().endswith(f"to go on to the end of its 4 epochs, the patience begun anew: {advice}")
    assert main([*advice.split()[1:], "--device", "cpu"]) == 0
    second = read(run)
    assert second["step"] > first["step"]
    assert [one["event"] for one in second["history"]] == ["start", "patience", "resume"]
    assert "the patience of 2 validations without a new best begins anew" in capfd.readouterr().out


def test_fewer_epochs_than_there_are_is_refused(tmp_path):
    run = train_run(tmp_path / "run", small_recipe(epochs=2), save_every_steps=0)
    with pytest.raises(UsageError, match="--epochs 1: the run has 2 already; give more"):
        resume_run(run, epochs=1)


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
    recipe = small_recipe()
    unbroken = train_run(tmp_path / "unbroken", recipe)
    interrupted = train_with_deaths(tmp_path / "run", recipe, [1])
    assert_equal_runs(interrupted, unbroken)


def test_a_recipe_that_was_changed_by_hand_is_refused_with_what_differs(tmp_path):
    run = train_run(tmp_path / "run", small_recipe(epochs=1), save_every_steps=0)
    record = json.loads(run.recipe_file.read_text())
    record["config"]["seed"], record["config"]["model"]["dropout"] = 4, 0.1
    run.recipe_file.write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"recipe\.json is damaged: its content does not match its checksum"):
        resume_run(run)
    run.recipe_file.write_text(json.dumps(record | {"checksum": ""}))
    with pytest.raises(RunError, match=r"model\.dropout: 0\.1 in the run, 0\.3 now; seed: 4 in the run, 3 now"):
        resume_run(run)


def test_a_checkpoint_of_another_run_of_the_same_recipe_is_passed_over(tmp_path):
    run = train_run(tmp_path / "run", small_recipe(epochs=1))
    other = train_run(tmp_path / "other", small_recipe(epochs=1))
    (run.checkpoints / "step-000007.pt").unlink()
    (run.checkpoints / "step-000007.pt").write_bytes((other.checkpoints / "step-000007.pt").read_bytes())
    lines = resume_run(run)
    assert "step-000007.pt is of another run" in lines[0] and "finished at step 7" in lines[1]
    (run.checkpoints / "latest.pt").unlink()
    (run.checkpoints / "latest.pt").write_bytes((other.checkpoints / "latest.pt").read_bytes())
    (run.checkpoints / "step-000007.pt").unlink()
    lines = resume_run(run)
    assert "latest.pt is of another run" in lines[0] and any("resuming" in line and "step 6" in line for line in lines)


def test_other_data_is_refused(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (9, 9), (number * 20, 0, 0)).save(tmp_path / "images" / label / f"{number}.png")
    recipe = small_recipe(data=Images(images=str(tmp_path / "images")), batch_size=4)
    with pytest.raises(Killed):
        train_run(tmp_path / "run", recipe, die_after_steps=3)
    (tmp_path / "images" / "a" / "0.png").unlink()
    with pytest.raises(RunError, match=r"the data is not what run .* was trained on: 1 image missing, like a/0\.png;"):
        resume_run(RunFolder(tmp_path / "run"))


def test_changed_frozen_weights_are_refused(tmp_path):
    recipe = small_recipe()
    with pytest.raises(Killed):
        train_run(tmp_path / "run", recipe, die_after_steps=3, copy_frozen=True)
    run = RunFolder(tmp_path / "run")
    path = run.frozen / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="are not those of this run: sha256"):
        resume_run(run)


def test_a_rewind_moves_later_files_aside_and_ends_the_same(tmp_path):
    recipe = small_recipe()
    unbroken = train_run(tmp_path / "unbroken", recipe)
    run, _ = start_in(
        tmp_path / "run",
        "test",
        recipe,
        Numerics(),
        Machine("cpu"),
        Settings(save_every_steps=1, keep=20, log_every_steps=1),
        DyingTerminal(),
    )
    (run.checkpoints / "best.pt").unlink()  # a link to a numbered file, which stays good
    (run.checkpoints / "best.pt").write_bytes(b"damaged")
    lines = resume_run(run, from_file=run.checkpoints / "step-000010.pt")
    assert "rewound to step-000010.pt" in lines[0]
    aside = sorted(path.name for path in (run.checkpoints / "superseded").iterdir())
    assert "step-000014.pt" in aside and "latest-step-000014.pt" in aside and "step-000010.pt" not in aside
    assert "best-damaged.pt" in aside
    ours, theirs = read(run), read(unbroken)
    assert torch.equal(ours["model"]["classifier.1.weight"], theirs["model"]["classifier.1.weight"])


def test_init_from_starts_a_new_run_from_anothers_weights(tmp_path):
    first = train_run(tmp_path / "first", small_recipe(), save_every_steps=0)
    second = train_run(
        tmp_path / "second",
        small_recipe(optimizer=Optimizer(lr=1e-4)),
        init_from=f"{first.path}:best",
        save_every_steps=0,
    )
    old, new = read(first, "best.pt")["model"], read(second)["model"]
    assert read(second)["step"] == 14
    # Fourteen AdamW steps of at most 1e-4 from where the first run's best was.
    assert 0 < (old["classifier.1.weight"] - new["classifier.1.weight"]).abs().max() < 14 * 1.1e-4
    assert torch.equal(old["classifier.1.mean"], new["classifier.1.mean"])
    again = RunFolder(tmp_path / "third")
    with pytest.raises(Killed):
        train_run(
            again.path, small_recipe(optimizer=Optimizer(lr=1e-4)), init_from=f"{first.path}:best", die_after_steps=3
        )
    resume_run(again)
    assert torch.equal(read(again)["model"]["classifier.1.weight"], new["classifier.1.weight"])


@pytest.mark.parametrize("when", ["before the validation", pytest.param("in the validation", marks=pytest.mark.slow)])
def test_a_stop_does_not_wait_for_a_validation_and_the_resume_makes_up_for_it(tmp_path, monkeypatch, when):
    recipe = small_recipe()
    unbroken = train_run(tmp_path / "unbroken", recipe, save_every_steps=0)
    run = RunFolder(tmp_path / "run")
    real_tally = ClassificationTask.tally

    with monkeypatch.context() as patched:
        stop = StopRequest("finetune resume RUN")
        terminal = DyingTerminal()
        if when == "in the validation":

            def tally(task, device):
                stop.ask("by a test")
                return real_tally(task, device)

            patched.setattr(ClassificationTask, "tally", tally)
        else:
            terminal.step = lambda step, *_: stop.ask("by a test") if step == 7 else None
        with pytest.raises(StoppedEarly, match="stopped by a test at step 7 of 14, saved"):
            context = RunContext(terminal, run, Settings(log_every_steps=1), stop=stop)
            begin.start(begin.Plan(recipe, Numerics(), Machine("cpu")), context)
    state = read(run)
    assert state["step"] == 7 and state["position_samples"] == 100 and state["metrics"]["validated_step"] == 0
    assert not (run.checkpoints / "best.pt").exists()
    resume_run(run)
    assert_equal_runs(run, unbroken)


def test_a_resume_that_cannot_go_on_moves_and_writes_nothing(tmp_path):
    run = train_run(tmp_path / "run", small_recipe(epochs=1))

    def everything() -> dict[str, bytes]:
        return {
            path.name: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and "lock" not in path.name
        }

    before = everything()
    first = run.checkpoints / "step-000006.pt"
    for wrong in (
        {"from_file": first, "lr": 0.1},
        {"from_file": first, "place": str(tmp_path / "nowhere")},
        {"epochs": 3, "lr": -1.0},
        {"epochs": 3, "lr": float("nan")},
        {"epochs": 3, "lr": 1e-3, "place": str(tmp_path / "nowhere")},
    ):
        with pytest.raises(FinetuneError):
            resume_run(run, **wrong)
        assert everything() == before, wrong
    with pytest.raises(FinetuneError, match="--device toaster"):
        resume_in(run, Machine("toaster"), DyingTerminal(), settings={}, epochs=3, lr=1e-3)
    assert everything() == before


def test_the_same_extension_again_just_goes_on(tmp_path):
    run = train_run(tmp_path / "run", small_recipe(epochs=1))
    with pytest.raises(Killed):
        resume_run(run, epochs=2, lr=1e-3, die_after_steps=9)
    with pytest.raises(Killed):
        resume_run(run, epochs=2, lr=1e-3, die_after_steps=11)
    resume_run(run, epochs=2)
    assert read(run)["step"] == 14 and len(read(run)["scheduler"]["extensions"]) == 1
    assert any("is finished at step 14" in line for line in resume_run(run, epochs=2))


def test_a_second_rewind_overwrites_nothing_that_the_first_set_aside(tmp_path):
    run = train_run(tmp_path / "run", small_recipe(epochs=1))
    first = run.checkpoints / "step-000006.pt"
    resume_run(run, from_file=first)
    resume_run(run, from_file=first)
    aside = sorted(path.name for path in (run.checkpoints / "superseded").iterdir())
    assert [name for name in aside if name.startswith("step-")] == ["step-000007-2.pt", "step-000007.pt"]


def test_a_folder_that_another_process_began_meanwhile_is_not_begun_anew(tmp_path, monkeypatch):
    other, real = train_run(tmp_path / "other", small_recipe(epochs=1)), begin.new_setup

    def slow(plan):
        found = real(plan)
        shutil.copytree(other.path, tmp_path / "run")
        return found

    monkeypatch.setattr(begin, "new_setup", slow)
    with pytest.raises(RunError, match="was begun by another process meanwhile; go on with: finetune resume"):
        train_run(tmp_path / "run", small_recipe(epochs=2))
    run = RunFolder(tmp_path / "run")
    assert read(run)["step"] == 7 and read(run)["status"] == "finished"


def test_a_folder_whose_making_was_interrupted_is_no_strangers(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".begun.tmp", ".recipe.json.1234.tmp"):
        (folder / name).touch()
    assert RunFolder(folder).foreign_files() == []
    assert read(train_run(folder, small_recipe(epochs=1)))["status"] == "finished"
