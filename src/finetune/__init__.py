"""finetune: train a new head on a frozen, pretrained backbone; lose nothing when the machine dies."""

from finetune.errors import FinetuneError, RunError, StoppedEarly, UsageError
from finetune.recipe import (
    Classification,
    Images,
    ImageTable,
    Model,
    MultiLabel,
    Optimizer,
    Recipe,
    Schedule,
    Stop,
    Trainable,
    Training,
    image_head,
)

__version__ = "0.1.0"
__all__ = [
    "Classification",
    "FinetuneError",
    "ImageTable",
    "Images",
    "Model",
    "MultiLabel",
    "Optimizer",
    "Recipe",
    "RunError",
    "Schedule",
    "Stop",
    "StoppedEarly",
    "Trainable",
    "Training",
    "UsageError",
    "image_head",
    "load",
]


def load(path):
    """The model of an export, rebuilt and in eval mode; see `finetune.export.load`. Imports torch when called."""
    from finetune.export import load as load_export

    return load_export(path)
