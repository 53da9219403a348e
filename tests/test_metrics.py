import time

import pytest
import torch

from finetune import Classification, MultiLabel
from finetune.recipe.spec import Regression
from finetune.tasks import metrics
from finetune.tasks.losses import ClassificationTask, MultiLabelTask, all_same, make_task, scale_of, training_loss
from finetune.tasks.metrics import Calibration, Confusion

TARGETS = torch.tensor([0, 0, 0, 1, 1, 2])
PREDICTED = torch.tensor([0, 0, 1, 1, 2, 2])
CPU = torch.device("cpu")


def confusion_of(predicted, targets, class_count, batch_size=64):
    confusion = Confusion(class_count, CPU)
    for some, others in zip(predicted.split(batch_size), targets.split(batch_size), strict=True):
        confusion.add(some, others)
    return confusion


def test_rows_are_true_classes_and_columns_predicted_ones():
    confusion = confusion_of(PREDICTED, TARGETS, 4, batch_size=4)
    assert confusion.matrix.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert confusion.mistakes(10) == [[0, 1, 1], [1, 2, 1]]


def test_counts_by_class_and_mistakes_of_many_classes_are_those_that_a_matrix_would_give(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(30, (5000,), generator=generator)
    predicted = torch.where(torch.rand(5000, generator=generator) < 0.5, targets, (targets * 7 + 3) % 30)
    whole = confusion_of(predicted, targets, 30)
    monkeypatch.setattr(metrics, "WHOLE_MATRIX_CLASSES", 29)
    monkeypatch.setattr(metrics, "WAITING_SAMPLES", 500)
    sparse = confusion_of(predicted, targets, 30)
    assert sparse.matrix is None and sparse.mistakes(100) == whole.mistakes(100)
    for counts in (sparse.counts(), whole.counts()):
        assert torch.equal(counts.hits, whole.matrix.diagonal())
        assert torch.equal(counts.predicted, whole.matrix.sum(0)) and torch.equal(counts.actual, whole.matrix.sum(1))
    monkeypatch.setattr(metrics, "MISTAKE_KINDS", 5)
    few = confusion_of(predicted, targets, 30).mistakes(100)
    assert len(few) == 5 and few[0][:2] == whole.mistakes(1)[0][:2]


def test_a_batch_of_ten_thousand_classes_costs_as_much_more_as_it_has_more_logits_and_no_square_of_that():
    def seconds(class_count):
        tally = ClassificationTask(class_count).tally(CPU)
        logits, targets = torch.zeros(64, class_count), torch.arange(64)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            tally.add(logits, targets)
            times.append(time.perf_counter() - started)
        return min(times)

    assert seconds(10_000) < 200 * seconds(100)  # a hundred times the logits; the square would be ten thousand


def test_figures_worked_out_by_hand():
    counts = confusion_of(PREDICTED, TARGETS, 4).counts()
    assert counts.accuracy() == pytest.approx(4 / 6)
    # Precision 1, 1/2, 1/2 and recall 2/3, 1/2, 1; the fourth class was never met.
    assert counts.precision().tolist() == pytest.approx([1, 0.5, 0.5, 0])
    assert counts.recall().tolist() == pytest.approx([2 / 3, 0.5, 1, 0])
    assert counts.f1().tolist() == pytest.approx([0.8, 0.5, 2 / 3, 0.0])
    assert counts.macro_f1() == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)


def test_the_calibration_error_is_the_mean_gap_between_confidence_and_hits_weighed_by_bin():
    calibration = Calibration(CPU)
    calibration.add(torch.tensor([0.9, 0.9, 0.9, 0.9]), torch.tensor([True, True, True, False]))
    calibration.add(torch.tensor([0.5, 1.0]), torch.tensor([False, True]))
    # Bins: four at 0.9 with 3/4 hits, one at 0.5 with none, one at 1.0 with a hit.
    assert calibration.error() == pytest.approx((4 * 0.15 + 1 * 0.5 + 1 * 0.0) / 6, abs=1e-6)
    assert [row["count"] for row in calibration.table()] == [1, 4, 1]


def test_calibration_counts_on_beyond_what_float32_can_count():
    calibration = Calibration(CPU)
    calibration.sums[14] = torch.tensor([2**25, 2**25 * 990_000, 2**25])
    calibration.add(torch.full((1000,), 0.99), torch.zeros(1000, dtype=torch.bool))
    assert calibration.table()[0]["count"] == 2**25 + 1000
    assert calibration.error() == pytest.approx(abs((2**25 + 1000) * 0.99 - 2**25) / (2**25 + 1000), abs=1e-9)


def test_the_losses_of_parts_add_up_to_torchs_weighted_and_smoothed_mean():
    torch.manual_seed(0)
    logits, weights = torch.randn(6, 3), torch.tensor([1.0, 2.0, 5.0])
    task = ClassificationTask(3, weights)
    whole = torch.nn.functional.cross_entropy(logits, TARGETS, weight=weights)
    torch.testing.assert_close(task.loss_sum(logits, TARGETS) / task.weight(TARGETS), whole)
    smoothed = ClassificationTask(3, None, 0.1).loss_sum(logits, TARGETS) / len(TARGETS)
    torch.testing.assert_close(smoothed, torch.nn.functional.cross_entropy(logits, TARGETS, label_smoothing=0.1))


def test_mixed_targets_that_are_pure_give_the_loss_and_the_weight_of_the_classes_themselves():
    torch.manual_seed(0)
    logits, task = torch.randn(6, 3), ClassificationTask(3, torch.tensor([1.0, 2.0, 5.0]), 0.1)
    pure = torch.nn.functional.one_hot(TARGETS, 3).float()
    torch.testing.assert_close(task.loss_sum(logits, pure), task.loss_sum(logits, TARGETS))
    torch.testing.assert_close(task.weight(pure), task.weight(TARGETS))


def test_balanced_weights_make_every_class_weigh_the_same():
    counts = torch.tensor([90, 9, 1])
    targets = torch.arange(3).repeat_interleave(counts)
    task = make_task(Classification(class_weights="balanced"), 3, targets=targets)
    torch.testing.assert_close(task.class_weights * counts, torch.full((3,), 100 / 3))


def test_balanced_multi_label_weights_make_yes_and_no_weigh_the_same_within_a_class():
    counts = torch.tensor([90, 50, 1])
    targets = (torch.arange(100)[:, None] < counts).to(torch.uint8)
    task = make_task(MultiLabel(class_weights="balanced"), 3, targets=targets)
    torch.testing.assert_close(task.class_weights * counts, (100 - counts).float())


def test_auxiliary_heads_add_three_tenths_of_their_loss():
    torch.manual_seed(0)
    task, logits = ClassificationTask(3), torch.randn(3, 6, 3)
    together = training_loss(task, (logits[0], logits[1], None, logits[2]), TARGETS)
    main, first, second = (task.loss_sum(part, TARGETS) for part in logits)
    torch.testing.assert_close(together, main + 0.3 * first + 0.3 * second)


def test_multi_label_figures_worked_out_by_hand():
    tally = MultiLabelTask(3).tally(CPU)
    targets = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.uint8)
    logits = torch.tensor([[0.5, -5, -5], [5, -5, -5], [-5, -5, 5]])
    tally.add(logits[:2], targets[:2])
    tally.add(logits[2:], targets[2:])
    figures = tally.figures()
    assert figures["accuracy"] == pytest.approx(1 / 3)  # only the first row is right in every class
    # F1: 1 for the first class; 0 for the second (missed) and the third (wrongly predicted).
    assert figures["f1"] == pytest.approx(1 / 3)
    small, large, unsure = torch.nn.functional.softplus(torch.tensor([-5.0, 5.0, -0.5])).tolist()
    assert figures["loss"] == pytest.approx((6 * small + 2 * large + unsure) / 9, rel=1e-5)
    assert tally.samples() == 3


# ---- Numbers ----------------------------------------------------------------------------------------------------------


def regression_figures(outputs, targets, moments="centred", batch_size=7, scale=(0.0, 1.0)):
    tally = make_task(Regression(moments=moments), 1, scale).tally(CPU)
    for some, others in zip(outputs.split(batch_size), targets.split(batch_size), strict=True):
        tally.add(some[:, None], others)
    return tally.figures()


@pytest.mark.parametrize("away", [0.0, 100.0, 10_000.0])
def test_r2_does_not_depend_on_how_far_from_zero_the_numbers_lie(away):
    torch.manual_seed(0)
    targets = torch.randn(200).round(decimals=1) + away
    outputs = targets + torch.where(torch.arange(200) % 2 == 0, 0.5, -0.5)
    wanted = 1 - 0.25 / targets.double().var(correction=0).item()
    figures = regression_figures(outputs, targets, scale=(3.0, 2.0))
    assert figures["r2"] == pytest.approx(wanted, abs=2e-3) and 0.6 < wanted < 0.8
    assert figures["loss"] == pytest.approx(0.25, rel=5e-3) and figures["mae"] == pytest.approx(1.0, rel=5e-3)


def test_numbers_that_are_all_the_same_have_no_r2_however_many_they_are():
    for number in (4.0, 0.1, 1e9):
        targets = torch.full((100,), number)
        assert set(regression_figures(targets + 1, targets)) == {"loss", "mae"}
    assert set(regression_figures(torch.ones(1), torch.ones(1))) == {"loss", "mae"}
    assert regression_figures(torch.zeros(3), torch.tensor([1.0, 1.0, 1.0 + 2**-20]))["r2"] < 0


def test_a_record_that_names_no_other_way_has_the_figures_that_it_always_had():
    torch.manual_seed(0)
    targets = torch.randn(100) + 10
    outputs = targets + 0.3 * torch.randn(100)
    sums = torch.zeros(4)
    for some, others in zip(outputs[:, None].split(7), targets.split(7), strict=True):
        errors = some.float().squeeze(1) - others
        sums += torch.stack([errors.square().sum(), errors.abs().sum(), others.sum(), others.square().sum()])
    squared, absolute, total, squares = (value / 100 for value in sums.tolist())
    wanted = {"loss": squared, "mae": absolute * 2.0, "r2": 1 - squared / (squares - total**2)}
    assert regression_figures(outputs, targets, "plain", scale=(3.0, 2.0)) == wanted
    assert regression_figures(outputs, targets, scale=(3.0, 2.0)) != wanted
    numbers = torch.full((7,), 0.1, dtype=torch.float64)
    assert scale_of(numbers, "plain") == [float(numbers.numpy().mean()), float(numbers.numpy().std()) or 1.0]


def test_many_of_one_number_have_that_mean_and_a_deviation_of_one():
    for count in (1, 3, 7, 1000):
        numbers = torch.full((count,), 0.1, dtype=torch.float64)
        assert scale_of(numbers) == [0.1, 1.0] and all_same(numbers)
    for size in (1.0, 1e9, 2.0**50, -(2.0**40)):
        assert scale_of(torch.tensor([size, size + 1] * 3, dtype=torch.float64)) == [size + 0.5, 0.5]
    assert scale_of(torch.tensor([1e200, 3e200], dtype=torch.float64)) == pytest.approx([2e200, 1e200])
