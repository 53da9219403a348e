import itertools

import pytest
import torch
from conftest import assert_equal_runs, small_recipe, train_run, train_with_deaths
from torch import nn

from finetune import Images, Model, Optimizer, Recipe, Schedule, Stop, UsageError
from finetune.models.freeze import FreezeMap, Rule
from finetune.runs.resume import extend
from finetune.store.state import Progress
from finetune.store.steps import count_steps, way_on
from finetune.training.optimizer import build_optimizer, check_optimizer, load_optimizer_state, optimizer_state
from finetune.training.schedule import learning_rate, schedule_factor
from finetune.training.step import optimizer_step
from finetune.training.validation import record_validation

SCHEDULE = {"total_steps": 100, "steps_per_epoch": 10, "final_fraction": 0.01, "step_epochs": 3, "factor": 0.1}


def test_warm_up_rises_to_the_peak_and_cosine_falls_to_its_final_share():
    rates = [schedule_factor("cosine", step, warmup_fraction=0.1, **SCHEDULE) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[54] == pytest.approx(0.505, abs=0.01)


def test_step_and_constant():
    step = [schedule_factor("step", step, warmup_fraction=0.0, **SCHEDULE) for step in (0, 29, 30, 60)]
    assert step == pytest.approx([1, 1, 0.1, 0.01])
    assert schedule_factor("constant", 77, warmup_fraction=0.0, **SCHEDULE) == 1.0


def test_matrices_decay_and_vectors_do_not():
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(dict(model.named_parameters()), "AdamW", 1e-3, 0.1, 0.9)
    assert [(group["names"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (["weight"], 0.1),
        (["bias"], 0.0),
    ]


CLASSES = sorted(
    name for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS")
)  # fmt: skip
# What they cannot train: a head with a bias; anything but an embedding that gives sparse gradients.
REFUSED = {
    "Muon": "--optimizer Muon: cannot train this network: it trains matrices only, and 1 of 2 tensors are none, like "
    "classifier.1.bias; give adamw, sgd",
    "SparseAdam": "--optimizer SparseAdam: cannot train this network: SparseAdam does not support dense gradients",
}


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in REFUSED])
def test_saved_state_is_by_name_plain_and_goes_on_exactly(name):
    def two_steps(model, optimizer):
        for factor in (1.0, 2.0):
            optimizer.zero_grad()
            (model(torch.ones(1, 3)).sum() * factor).backward()
            optimizer.step()

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(dict(model.named_parameters()), name, 1e-2, 0.0, 0.9)
    two_steps(model, optimizer)
    saved = optimizer_state(optimizer)
    assert set(saved["state"]) == {"weight", "bias"}
    twin = nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    # In another order: names decide, not positions.
    reordered = dict(reversed(list(twin.named_parameters())))
    other = build_optimizer(reordered, name, 1e-2, 0.0, 0.9)
    load_optimizer_state(other, saved)
    two_steps(model, optimizer)
    two_steps(twin, other)
    assert torch.equal(model.weight, twin.weight) and torch.equal(model.bias, twin.bias)


@pytest.mark.parametrize(
    "name", [name if name in REFUSED else pytest.param(name, marks=pytest.mark.slow) for name in CLASSES]
)
def test_every_class_of_torch_optim_trains_and_resumes_exactly_or_is_refused_by_name(tmp_path, name):
    recipe = small_recipe(optimizer=Optimizer(name, lr=1e-2), epochs=1, augment="none")
    if name in REFUSED:
        with pytest.raises(UsageError, match=REFUSED[name]):
            train_run(tmp_path / "run", recipe)
        assert not (tmp_path / "run").exists()
        return
    unbroken = train_run(tmp_path / "unbroken", recipe)
    assert_equal_runs(train_with_deaths(tmp_path / "run", recipe, [2, 5]), unbroken)


def test_muon_trains_where_there_are_matrices_only():
    layer = nn.Linear(3, 2, bias=False)
    check_optimizer(dict(layer.named_parameters()), Optimizer("muon"))


def test_an_optimizer_is_tried_on_what_a_thaw_adds_too():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2, bias=False))
    rules = [Rule("1"), Rule("0", from_epoch=3), Rule("*", trainable=False)]
    ever = FreezeMap(model, rules).ever_trains()
    assert list(ever) == ["0.weight", "0.bias", "1.weight"]
    with pytest.raises(UsageError, match=r"1 of 3 tensors are none, like 0\.bias"):
        check_optimizer(ever, Optimizer("muon"))


def test_an_unknown_optimizer_names_the_nearest_and_lbfgs_is_not_offered():
    with pytest.raises(UsageError, match=r"--optimizer adamm: unknown; allowed are .*; did you mean adam"):
        build_optimizer(dict(nn.Linear(1, 1).named_parameters()), "adamm", 1e-3, 0.0, 0.9)
    with pytest.raises(UsageError, match="--optimizer lbfgs: unknown"):
        build_optimizer(dict(nn.Linear(1, 1).named_parameters()), "lbfgs", 1e-3, 0.0, 0.9)


# ---- fp16 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_step_that_fp16_skips_says_so(clip_norm):
    layer, scaler = nn.Linear(2, 1), torch.amp.GradScaler("cpu")
    optimizer, before = torch.optim.SGD(layer.parameters(), 0.1), layer.weight.clone()
    moved = []
    for value in (1.0, float("inf"), 2.0, float("nan")):
        scaler.scale(layer(torch.full((1, 2), value)).sum()).backward()
        moved.append(optimizer_step(optimizer, scaler, clip_norm))
    assert moved == [True, False, True, False] and not torch.equal(layer.weight, before)
    assert layer.weight.isfinite().all()


# ---- A run made longer ----------------------------------------------------------------------------------------------

SAMPLES = 100  # seven steps an epoch


def a_recipe(**changes) -> Recipe:
    values = {"optimizer": Optimizer(lr=1.0), "schedule": Schedule(final_fraction=0.01), "epochs": 2, "batch_size": 16}
    return Recipe(Model("bundled/vgg"), Images("digits"), **values | changes)


def rates(recipe: Recipe, progress: Progress) -> list[float]:
    """Of every step of a run."""
    steps = count_steps(recipe, SAMPLES, progress)
    found = []
    for progress.step in range(steps.end):
        found.append(learning_rate(recipe, progress, steps))
    progress.step = steps.end
    return found


def test_the_schedule_holds_up_to_its_horizon_whatever_the_run_is_extended_by():
    recipe, progress = a_recipe(), Progress()
    own = rates(recipe, progress)
    progress.status = "finished"
    extend(progress, 3, 0.5, recipe, SAMPLES)
    assert rates(recipe, progress)[:14] == own and own[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("chosen", list(itertools.product((0.0, 0.1, 0.5), repeat=3)), ids=str)
@pytest.mark.parametrize("begun", [True, False], ids=["each after the other ended", "all at once"])
def test_of_three_extensions_each_runs_at_its_own_rate(chosen, begun):
    recipe, progress = a_recipe(), Progress()
    for number, lr in enumerate(chosen):
        if begun:
            progress.step, progress.status = 14 + 7 * number, "finished"
        said = extend(progress, 3 + number, lr, recipe, SAMPLES)
        rate = f"{lr:g}" if lr else "0.01, the recipe's final one"
        wanted = f"from step {15 + 7 * number} to {21 + 7 * number} the rate is {rate}"
        assert said == f"extended to {3 + number} epochs: {wanted}"
        assert extend(progress, 3 + number, lr, recipe, SAMPLES) == ""  # the same command again
    found = rates(recipe, progress)
    for number, lr in enumerate(chosen):
        assert found[14 + 7 * number : 21 + 7 * number] == [pytest.approx(lr or 0.01)] * 7


def test_extensions_that_an_older_version_recorded_go_on_at_the_first_ones_rate():
    recipe = a_recipe()
    for first, second in ((0.0, 0.5), (0.5, 0.0), (0.5, 0.1)):
        old = [{"from_step": 14, "epochs": 3, "lr": first}, {"from_step": 21, "epochs": 4, "lr": second}]
        progress = Progress(step=28, status="finished", extensions=old)
        assert rates(recipe, progress)[14:] == [pytest.approx(first or 0.01)] * 14
        extend(progress, 5, 0.2, recipe, SAMPLES)  # by this version: at its own
        assert rates(recipe, progress)[14:] == [pytest.approx(first or 0.01)] * 14 + [0.2] * 7


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_steps": 10},
        {"max_steps": 3},
        {"epochs": 0, "max_steps": 20},
        {"schedule": Schedule(final_fraction=0.0)},
        {"schedule": Schedule(name="step", step_epochs=1)},
        {"epochs": 8, "schedule": Schedule(final_fraction=0.0)},
        {"epochs": 0, "max_steps": 20, "schedule": Schedule(final_fraction=0.0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("status", ["finished", "stopped early"])
def test_what_is_advised_after_the_end_trains_on(changes, status):
    recipe = a_recipe(stop=Stop(patience=2), **changes)
    progress = Progress(status=status, validations_without_best=2)
    for _ in range(3):
        end = count_steps(recipe, SAMPLES, progress).end
        progress.step = end if status == "finished" else end - 1
        progress.epoch = progress.step // 7
        words, meaning = way_on(recipe, progress, SAMPLES)
        assert words[0] == "--epochs" and words[2:3] in ([], ["--lr"])
        assert ("to the end of its" in meaning) == (status == "stopped early")
        said = extend(progress, int(words[1]), float(words[3]) if words[2:] else 0.0, recipe, SAMPLES)
        assert "; the patience of 2 validations without a new best begins anew" in said
        assert progress.status == "running" and progress.validations_without_best == 0
        assert progress.step < count_steps(recipe, SAMPLES, progress).end
        progress.status, progress.validations_without_best = status, 2


def test_the_patience_of_a_run_that_goes_on_is_not_begun_anew_by_an_extension():
    progress = Progress(step=9, validations_without_best=1)
    assert "anew" not in extend(progress, 3, 0.0, a_recipe(stop=Stop(patience=2)), SAMPLES)
    assert progress.validations_without_best == 1


def test_a_run_that_stopped_in_its_last_step_has_nothing_left_of_its_own():
    progress = Progress(step=14, status="stopped early")
    assert extend(progress, 2, 0.0, a_recipe(), SAMPLES) == "" and progress.status == "stopped early"
    assert way_on(a_recipe(), progress, SAMPLES) == (["--epochs", "4"], "train longer")


@pytest.mark.parametrize(
    ("epochs", "lr", "words"),
    [
        (1, 0.0, "--epochs 1: the run stopped early at step 9 of 14; give 2 to go on to its end, or more"),
        (2, 0.1, "goes on by its own schedule up to there, so --lr 0.1 would not be used; leave it out, or give more"),
    ],
)
def test_what_an_early_stop_does_not_allow_is_refused_by_name(epochs, lr, words):
    with pytest.raises(UsageError, match=words):
        extend(Progress(step=9, status="stopped early"), epochs, lr, a_recipe(), SAMPLES)


def test_a_rate_of_an_extensions_own_is_no_step_of_the_plateau():
    recipe = a_recipe(schedule=Schedule(name="plateau", patience=1, warmup_fraction=0), stop=Stop(metric="loss"))
    progress = Progress(step=14, status="finished", best={"metric": "loss", "value": 0.0, "step": 1, "epoch": 1})
    for epochs, lr, reductions in ((3, 0.0, 1), (4, 0.5, 1), (5, 0.0, 2)):
        extend(progress, epochs, lr, recipe, SAMPLES)
        progress.step, progress.status = 7 * epochs, "finished"
        record_validation(recipe, progress, {"val/loss": 1.0}, epochs, 8)
        assert progress.reductions == reductions
