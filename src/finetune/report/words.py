"""What figures are called."""

from finetune.base.formatting import printable

METRICS = {
    "accuracy": "accuracy",
    "f1": "macro F1",
    "loss": "loss",
    "mae": "mean absolute error",
    "r2": "R², variance explained",
    "cosine": "cosine to the teacher",
}


def metric_text(name: str) -> str:
    return METRICS.get(name, printable(name))


def capitalised(text: str) -> str:
    """With its first letter large, all others as they are."""
    return text[:1].upper() + text[1:]
