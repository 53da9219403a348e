import pytest
import torch

from finetune.losses import balanced_class_weights, classification_losses
from finetune.metrics import accuracy, confusion_matrix, macro_f1, per_class_f1

TARGETS = torch.tensor([0, 0, 0, 1, 1, 2])
PREDICTED = torch.tensor([0, 0, 1, 1, 2, 2])


def test_rows_are_true_classes_and_columns_predicted_ones():
    confusion = confusion_matrix(PREDICTED, TARGETS, 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_figures_worked_out_by_hand():
    confusion = confusion_matrix(PREDICTED, TARGETS, 4)
    assert accuracy(confusion) == pytest.approx(4 / 6)
    # Precision 1, 1/2, 1/2 and recall 2/3, 1/2, 1; the fourth class was never met.
    assert per_class_f1(confusion).tolist() == pytest.approx([0.8, 0.5, 2 / 3, 0.0])
    assert macro_f1(confusion) == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)


def test_the_losses_of_parts_add_up_to_torchs_weighted_and_smoothed_mean():
    torch.manual_seed(0)
    logits, weights = torch.randn(6, 3), torch.tensor([1.0, 2.0, 5.0])
    losses = classification_losses(logits, TARGETS, weights, 0.0)
    whole = torch.nn.functional.cross_entropy(logits, TARGETS, weight=weights)
    torch.testing.assert_close(losses.sum() / weights[TARGETS].sum(), whole)
    smoothed = classification_losses(logits, TARGETS, None, 0.1)
    torch.testing.assert_close(smoothed.mean(), torch.nn.functional.cross_entropy(logits, TARGETS, label_smoothing=0.1))


def test_balanced_weights_make_every_class_weigh_the_same():
    counts = torch.tensor([90, 9, 1])
    weights = balanced_class_weights(counts)
    torch.testing.assert_close(weights * counts, torch.full((3,), 100 / 3))
