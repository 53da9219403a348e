"""What is minimised, as one loss a sample."""

from torch import Tensor
from torch.nn import functional


def balanced_class_weights(counts: Tensor) -> Tensor:
    """(classes,) float32: each class's samples together weigh the same; the mean over samples is 1."""
    return counts.sum() / (len(counts) * counts.clamp(min=1)).float()


def classification_losses(
    logits: Tensor, targets: Tensor, class_weights: Tensor | None, label_smoothing: float
) -> Tensor:
    """Weighted cross-entropy without the final mean, so that parts of a batch can be added up.

    Label smoothing is Szegedy et al.'s ("Rethinking the Inception architecture", CVPR 2016).

    Args:
        logits: (batch, classes).
        targets: (batch,) int64.
        class_weights: (classes,) or None.

    Returns:
        The weighted losses (batch,). A batch's loss is their sum over the sum of its samples' class weights.
    """
    return functional.cross_entropy(
        logits.float(), targets, weight=class_weights, reduction="none", label_smoothing=label_smoothing
    )
