import itertools

import pytest
import torch
from torch import nn

from finetune import UsageError
from finetune.training.optimizer import build_optimizer, load_optimizer_state, optimizer_state
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


@pytest.mark.parametrize("name", ["adamw", "sgd", "RMSprop", "adagrad", "nadam", "rprop"])
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


def test_an_unknown_optimizer_names_the_nearest_and_lbfgs_is_not_offered():
    with pytest.raises(UsageError, match=r"--optimizer adamm: unknown; allowed are .*; did you mean adam"):
        build_optimizer(dict(nn.Linear(1, 1).named_parameters()), "adamm", 1e-3, 0.0, 0.9)
    with pytest.raises(UsageError, match="--optimizer lbfgs: unknown"):
        build_optimizer(dict(nn.Linear(1, 1).named_parameters()), "lbfgs", 1e-3, 0.0, 0.9)
