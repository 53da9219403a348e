"""Train a new head on a frozen, pretrained text encoder.

    finetune recipes/bert_head.py
    finetune bert_head --texts reviews.csv --backbone sentence-transformers/all-MiniLM-L6-v2

Expected on the customer messages that ship with the kit, with the defaults: 84.8 % (the loop's best epoch: 85.8 %) in
8 s on two cores, and in 7 s once the features are kept.
"""

from typing import Literal

from finetune import Recipe, TextTable, Training, text_head


def recipe(
    texts: str = "messages",
    backbone: str = "bundled/bert",
    revision: str = "",
    weights: Literal["default", "none"] = "default",
    pooling: Literal["auto", "stock", "mean", "cls"] = "auto",
    max_length: int = 0,
    task: Literal["classification", "regression"] = "classification",
    head: Literal["linear", "mlp", "append"] = "linear",
    dropout: float = 0.2,
    epochs: int = 0,
    batch_size: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    table: TextTable = TextTable(),
    training: Training = Training(),
) -> Recipe:
    """A new head on a frozen BERT; `text_head` documents the options."""
    return text_head(**locals())
