"""The last stage: a linear head solved after the loop, exactly, honestly, and killed at any moment to the same bits."""

import json
from pathlib import Path

import pytest
import torch
from conftest import DyingTerminal, Killed, assert_equal_runs, read, resume_in, small_recipe, start_in
from PIL import Image
from torch.nn import functional

from finetune import Classification, Finish, Images, Stop
from finetune.cli import main
from finetune.data.digits import load_digits
from finetune.data.order import fold_numbers
from finetune.recipe.execution import Machine, Numerics, Settings, completed, determining_config, split_config
from finetune.recipe.heads import AnyTable
from finetune.runs.evaluate import evaluate
from finetune.store.finish_state import Finish as State
from finetune.store.restore import shipped
from finetune.store.run_folder import RunFolder
from finetune.tasks.calibration import sample_losses, temperature_of
from finetune.tasks.evaluation import Evaluation
from finetune.tasks.losses import ClassificationTask
from finetune.training import session as session_module
from finetune.training.finish import which_ships
from finetune.training.regularisation import Held, next_strength, solve_all, try_next
from finetune.training.solver import Loss, Span, prepared, solve

MACHINE = Machine("cpu", workers=0)


def rows_like_features(samples: int, features: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Few directions hold most of what varies, as of a pretrained network; and their classes."""
    generator = torch.Generator().manual_seed(seed)
    inner = min(features, 12)
    basis = torch.randn(inner, features, generator=generator) * torch.logspace(0, -1.5, inner).unsqueeze(1)
    centres, labels = torch.randn(classes, inner, generator=generator), torch.arange(samples) % classes
    found = (centres[labels] + torch.randn(samples, inner, generator=generator)) @ basis
    return found + 0.1 * torch.randn(samples, features, generator=generator) + 3, labels


def targets_of(labels: torch.Tensor, kind: str, classes: int) -> torch.Tensor:
    one_hot = functional.one_hot(labels, classes).float()
    if kind == "multilabel":
        return (one_hot + one_hot.roll(1, 0)).clamp(max=1)
    return labels.float().sub(labels.float().mean()).unsqueeze(1) if kind == "regression" else one_hot


def objective(rows: torch.Tensor, targets: torch.Tensor, kind: str, strength: float):
    """In float64, of weight and bias on rows that are centred and have one deviation: what is to be minimised."""
    rows, targets = rows.double(), targets.double()
    rows = rows - rows.mean(0)
    rows = rows / rows.square().mean().sqrt()

    def value(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        outputs = rows @ weight.T + bias
        if kind == "classification":
            loss = -(targets * outputs.log_softmax(1)).sum(1)
        elif kind == "multilabel":
            loss = functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)
        else:
            loss = (outputs - targets).square().sum(1)
        return loss.mean() + strength / 2 * weight.square().sum()

    return value


# ---- The optimum ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "features"), [(200, 30), (40, 90)])
@pytest.mark.parametrize("kind", ["classification", "multilabel", "regression"])
def test_the_minimum_is_that_of_an_optimizer_in_float64(kind, samples, features):
    raw, labels = rows_like_features(samples, features, 4)
    targets, strength = targets_of(labels, kind, 4), 1e-2
    value = objective(raw, targets, kind, strength)
    rows = prepared(raw.clone())
    start = torch.zeros(targets.shape[1], rows.rows.shape[1] + 1, dtype=torch.float64)
    ours = rows.head(solve(rows, Loss(targets, torch.ones(samples, 1), kind), strength, start, 1e-12))
    weight = torch.zeros(targets.shape[1], features, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(targets.shape[1], dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.LBFGS(
        [weight, bias], max_iter=2_000, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        theirs.zero_grad()
        loss = value(weight, bias)
        loss.backward()
        return loss

    theirs.step(closure)
    assert value(*ours).item() == pytest.approx(value(weight, bias).item(), abs=1e-8)


def test_an_offset_is_what_the_head_need_not_give():
    raw, labels = rows_like_features(150, 20, 3)
    labels = torch.where(torch.arange(150) < 110, 0, labels)
    targets, prior = targets_of(labels, "classification", 3), labels.bincount().div(150).log()
    rows = prepared(raw.clone())
    start = torch.zeros(3, rows.rows.shape[1] + 1, dtype=torch.float64)
    plain = solve(rows, Loss(targets, torch.ones(150, 1), "classification"), [Span(0, 150)], 0.1, start, 1e-12)
    without = solve(
        rows, Loss(targets, torch.ones(150, 1), "classification", offset=prior), [Span(0, 150)], 0.1, start, 1e-12
    )
    # Nothing holds the bias back: it takes up all of the offset, but for what all classes have in common.
    apart = (plain - without)[:, -1] - prior
    assert torch.allclose(plain[:, :-1], without[:, :-1], atol=1e-4)
    assert torch.allclose(apart - apart.mean(), torch.zeros(3, dtype=torch.float64), atol=1e-4)


def test_rows_that_are_held_out_do_not_count():
    raw, labels = rows_like_features(120, 20, 3)
    targets, ones = targets_of(labels, "classification", 3), torch.ones(120, 1)
    rows, kept = prepared(raw.clone()), [Span(0, 30), Span(60, 120)]
    start = torch.zeros(3, rows.rows.shape[1] + 1, dtype=torch.float64)
    one = solve(rows, Loss(targets, ones, "classification"), kept, 0.1, start, 1e-12)
    changed = targets.clone()
    changed[30:60] = changed[30:60].roll(1, 1)
    assert torch.equal(one, solve(rows, Loss(changed, ones, "classification"), kept, 0.1, start, 1e-12))
    assert not torch.equal(one, solve(rows, Loss(targets, ones, "classification"), [Span(0, 120)], 0.1, start, 1e-12))


def held(samples: int = 150, classes: int = 3, kind: str = "classification") -> Held:
    raw, labels = rows_like_features(samples, 24, classes)
    targets = targets_of(labels, kind, classes)
    folds = [Span(start, start + samples // 5) for start in range(0, samples, samples // 5)]
    return Held(prepared(raw), Loss(targets, torch.ones(samples, 1), kind), targets, folds, Span(0, samples))


def searched(data: Held, workers: int) -> State:
    state = State()
    while next_strength(state) is not None:
        try_next(state, data, workers)
    return state


def test_the_bits_do_not_depend_on_how_many_folds_are_solved_at_once():
    threads = torch.get_num_threads()
    one, three = searched(held(), 1), searched(held(), 3)
    assert one.tried == three.tried and torch.equal(one.best_weights, three.best_weights)
    assert torch.equal(solve_all(held(), one), solve_all(held(), three))
    assert torch.get_num_threads() == threads


def test_the_search_ends_behind_the_minimum_and_keeps_its_heads():
    state = searched(held(), 1)
    losses = [one["log_loss"] for one in state.tried]
    place = losses.index(min(losses))
    assert 0 < place == len(losses) - 3 and losses[-1] > losses[place] < losses[0]
    outputs = held().outputs_held_out(state.best_weights)
    again = sample_losses(outputs / state.best["temperature"], held().targets, "classification")
    assert again.mean().item() == pytest.approx(state.best["log_loss"], rel=1e-6)


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_a_temperature_is_that_of_the_least_loss(kind):
    generator = torch.Generator().manual_seed(1)
    outputs, labels = torch.randn(300, 4, generator=generator) * 5, torch.randint(4, (300,), generator=generator)
    outputs[torch.arange(300), labels] += 3
    targets = targets_of(labels, kind, 4)
    found = temperature_of(outputs, targets, kind)
    targets = targets * (1 - 1 / 302) + 1 / 302 / (4 if kind == "classification" else 2)
    tried = torch.linspace(0.5, 40, 4_001, dtype=torch.float64)
    losses = torch.stack([sample_losses(outputs / one, targets, kind).mean() for one in tried])
    assert found == pytest.approx(tried[losses.argmin()].item(), abs=0.02)


def test_where_every_sample_is_right_a_temperature_stays_above_zero():
    outputs, targets = torch.eye(4)[torch.arange(40) % 4] * 3, torch.eye(4)[torch.arange(40) % 4]
    found = temperature_of(outputs, targets, "classification")
    assert 0.3 < found < 1 and (outputs / found).softmax(1).max() < 0.99


def test_folds_have_each_class_in_its_share_and_groups_whole():
    targets = torch.cat([torch.zeros(52, dtype=torch.int64), torch.ones(13, dtype=torch.int64)])
    folds = fold_numbers(targets, None, 5, 3)
    counts = torch.stack([torch.bincount(targets[folds == fold], minlength=2) for fold in range(5)])
    assert (counts.max(0).values - counts.min(0).values <= 1).all() and counts.sum() == 65
    groups = torch.arange(65) // 4
    folds = fold_numbers(targets, groups, 5, 3)
    assert all(len(folds[groups == group].unique()) == 1 for group in groups.unique())
    assert (torch.bincount(folds, minlength=5) >= 8).all()


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
    strengths = [one["finish/strength"] for one in lines if "finish/strength" in one]
    assert strengths == [one["strength"] for one in finish.tried] and "finish/accuracy" in lines[-1]
    # The loop's own checkpoints are what they were.
    assert set(read(run)["model"]) == set(final_of(run)["model"])
    assert not torch.equal(read(run)["model"]["classifier.1.weight"], final_of(run)["model"]["classifier.1.weight"])


def test_a_loop_that_is_better_ships(few, tmp_path, monkeypatch):
    evaluation = Evaluation(ClassificationTask(10), torch.device("cpu"), 2)
    evaluation.add(torch.arange(2), torch.eye(10)[:2], torch.arange(2))
    judged = {"solved": 2.0, "loop": 1.0, "samples": 2, "error": 0.5, "optimism": 0.0}
    monkeypatch.setattr(session_module, "judge", lambda *_: (judged, evaluation))
    assert which_ships(judged) == "best" and which_ships(judged | {"error": 1.5}) == "final"
    run = run_in(tmp_path / "run", recipe(few))
    assert shipped(run, "auto") == "best" and "is_solved" in json.loads(run.validation_file.read_text())
    assert json.loads(run.validation_file.read_text())["is_solved"] is False


@pytest.mark.parametrize("moment", [0, 1, 4, "solved", "saved"])
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
            patched.setattr(session_module, "solve_all", dying(solve_all, 0))
        elif moment == "saved":
            patched.setattr(session_module, "finish_text", dying(session_module.finish_text, 0))
        else:
            patched.setattr(session_module, "try_next", dying(try_next, moment))
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
    words = ["vgg_head", "--images", few, "--head", "mlp", "--epochs", "6", "--track", "none", "--no-report"]
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
