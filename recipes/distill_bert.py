"""Distil a sentence encoder into a small BERT: everything trains, from a part of the teacher's own weights.

    finetune distill_bert --teacher FOLDER --texts FILE
    finetune export runs/distill_bert-1 --format hf --half --output small-bert

How the BERT that ships with the kit was made; its card holds the exact command and what came of it. FILE is a .txt file
with a text a line, or a table with a text column; no labels are needed. The folder that the export writes is a
`--backbone` for `bert_head`, and loads in transformers and sentence-transformers.
"""

from finetune import Distillation, Model, Optimizer, Recipe, Schedule, Texts, Trainable


def recipe(
    teacher: str = "sentence-transformers/all-MiniLM-L6-v2",
    texts: str = "messages",
    text_column: str = "",
    layers: int = 2,
    vocabulary_size: int = 5_500,
    max_length: int = 128,
    epochs: int = 4,
    batch_size: int = 64,
    lr: float = 5e-4,
    weight_decay: float = 1e-2,
    seed: int = 0,
) -> Recipe:
    """A small encoder that gives of each text the embedding that its teacher gives.

    Args:
        teacher: a sentence encoder: a folder, or a name on the hub.
        texts: a .txt file with a text a line, or a csv, tsv, jsonl or parquet file; the more kinds of text, the better.
        text_column: of such a table; default: text, sentence, message, ...
        layers: of the teacher that the student begins with; 0 = all.
        vocabulary_size: tokens that the student knows: the most frequent ones; 0 = all.
        max_length: tokens of a text; what is longer is cut off.
        epochs: passes over the texts.
        batch_size: texts an optimizer step.
        lr: learning rate at its peak.
        weight_decay: for weight matrices; biases and normalisation layers get none.
        seed: of the split and the order.
    """
    return Recipe(
        model=Model(backbone=teacher, head="none"),
        data=Texts(texts=texts, text_column=text_column, max_length=max_length, validation_fraction=0.02),
        task=Distillation(teacher=teacher, layers=layers, vocabulary_size=vocabulary_size),
        trainable=Trainable(rules=(("*", "trainable", 0),)),
        optimizer=Optimizer(name="adamw", lr=lr, weight_decay=weight_decay, clip_norm=1.0),
        schedule=Schedule(name="cosine", warmup_fraction=0.05, final_fraction=0.0),
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
    )
