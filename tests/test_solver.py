"""The solver of linear heads: the optimum, its bits, how the strength of the regularisation is found, temperatures."""

import pytest
import torch
from torch.nn import functional

from finetune.data.order import fold_numbers
from finetune.store.finish_state import Finish as State
from finetune.tasks.calibration import sample_losses, temperature_of
from finetune.training.regularisation import LAST_TOLERANCE, Held, next_strength, solve_all, try_next
from finetune.training.solver import Loss, Span, prepared, solve


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
    ours = rows.head(
        solve(rows, Loss(targets, torch.ones(samples, 1), kind), [Span(0, samples)], strength, start, 1e-12)
    )
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


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4])
def test_scipy_finds_no_lower_minimum_at_the_tolerance_of_the_last_head(strength):
    from scipy import optimize

    samples, features, classes = 1_500, 200, 10
    raw, labels = rows_like_features(samples, features, classes)
    targets = targets_of(labels, "classification", classes)
    value, rows = objective(raw, targets, "classification", strength), prepared(raw.clone())
    start = torch.zeros(classes, rows.rows.shape[1] + 1, dtype=torch.float64)
    loss = Loss(targets, torch.ones(samples, 1), "classification")
    ours = rows.head(solve(rows, loss, [Span(0, samples)], strength, start, LAST_TOLERANCE))

    def of_scipy(flat):
        point = torch.from_numpy(flat).view(classes, features + 1).requires_grad_()
        found = value(point[:, :-1], point[:, -1])
        found.backward()
        return found.item(), point.grad.flatten().numpy()

    zeros = torch.zeros(classes * (features + 1), dtype=torch.float64).numpy()
    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 30}
    theirs = optimize.minimize(of_scipy, zeros, jac=True, method="L-BFGS-B", options=options)
    assert value(*ours).item() <= theirs.fun + 1e-8


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
