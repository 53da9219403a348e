import itertools

import pytest
import torch
from conftest import assert_equal_runs, small_recipe, train_run, train_with_deaths
from torch import nn

from finetune import Optimizer, UsageError
from finetune.models.freeze import FreezeMap, Rule
from finetune.training.optimizer import build_optimizer, check_optimizer, load_optimizer_state, optimizer_state
from finetune.training.schedule import schedule_factor

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
