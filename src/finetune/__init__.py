"""finetune: train a new head on a frozen, pretrained backbone; lose nothing when the machine dies."""

from finetune.errors import FinetuneError, RunError, StoppedEarly, UsageError
from finetune.head_recipes import ImageTable, ImageTraining, TextTable, Training, image_head, text_head
from finetune.recipe import (
    Classification,
    Distillation,
    Images,
    Model,
    MultiLabel,
    Optimizer,
    Recipe,
    Regression,
    Schedule,
    Stop,
    Texts,
    Trainable,
)

__version__ = "0.1.0"
__all__ = [
    "Classification",
    "Distillation",
    "FinetuneError",
    "ImageTable",
    "ImageTraining",
    "Images",
    "Model",
    "MultiLabel",
    "Optimizer",
    "Recipe",
    "Regression",
    "RunError",
    "Schedule",
    "Stop",
    "StoppedEarly",
    "TextTable",
    "Texts",
    "Trainable",
    "Training",
    "UsageError",
    "image_head",
    "load",
    "text_head",
]


def load(path):
    """The model of an export, rebuilt and in eval mode; see `finetune.exported.load`. Imports torch when called."""
    from finetune.exported import load as load_export

    return load_export(path)
