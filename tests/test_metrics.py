import pytest
import torch

from finetune import Classification, MultiLabel
from finetune.tasks.losses import ClassificationTask, MultiLabelTask, make_task, training_loss
from finetune.tasks.metrics import Calibration, ClassCounts, accuracy, confusion_matrix

TARGETS = torch.tensor([0, 0, 0, 1, 1, 2])
PREDICTED = torch.tensor([0, 0, 1, 1, 2, 2])
CPU = torch.device("cpu")


def test_rows_are_true_classes_and_columns_predicted_ones():
    confusion = confusion_matrix(PREDICTED, TARGETS, 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_figures_worked_out_by_hand():
    confusion = confusion_matrix(PREDICTED, TARGETS, 4)
    counts = ClassCounts.of_confusion(confusion)
    assert accuracy(confusion) == pytest.approx(4 / 6)
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
