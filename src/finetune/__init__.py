"""finetune: train a new head on a frozen, pretrained backbone; lose nothing when the machine dies."""

from typing import TYPE_CHECKING

from finetune.base.signals import StopRequest
from finetune.errors import FinetuneError, RunError, StoppedEarly, UsageError
from finetune.recipe.head_options import ImageTable, ImageTraining, TextTable, Training
from finetune.recipe.heads import image_head, text_head
from finetune.recipe.spec import (
    Classification,
    Distillation,
    Finish,
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

if TYPE_CHECKING:
    from finetune.api import FinishedRun as FinishedRun
    from finetune.api import LoadedModel as LoadedModel
    from finetune.api import Prediction as Prediction
    from finetune.api import fit, load, resume

__version__ = "0.1.0"
__all__ = [
    "Classification",
    "Distillation",
    "FinetuneError",
    "Finish",
    "FinishedRun",
    "ImageTable",
    "ImageTraining",
    "Images",
    "LoadedModel",
    "Model",
    "MultiLabel",
    "Optimizer",
    "Prediction",
    "Recipe",
    "Regression",
    "RunError",
    "Schedule",
    "Stop",
    "StopRequest",
    "StoppedEarly",
    "TextTable",
    "Texts",
    "Trainable",
    "Training",
    "UsageError",
    "fit",
    "image_head",
    "load",
    "resume",
    "text_head",
]

# These import torch when they are first asked for, not before.
_FROM_API = ("FinishedRun", "LoadedModel", "Prediction", "fit", "load", "resume")


def __getattr__(name: str) -> object:
    if name not in _FROM_API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import random

    state = random.getstate()
    from finetune import api

    random.setstate(state)  # some of what is imported draws from these numbers, which are the caller's
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FROM_API})
