"""finetune: train a new head on a frozen, pretrained backbone; lose nothing when the machine dies."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.base.signals import StopRequest
from finetune.errors import FinetuneError, RunError, StoppedEarly, UsageError
from finetune.recipe.heads import ImageTable, ImageTraining, TextTable, Training, image_head, text_head
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
    from pathlib import Path

    from torch import nn

    from finetune.api import FinishedRun

__version__ = "0.1.0"
__all__ = [
    "Classification",
    "Distillation",
    "FinetuneError",
    "Finish",
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

# What follows imports torch when it is called, not before.


def _import_unnoticed() -> None:
    """Import what is needed: some of it draws from Python's random numbers, which are the caller's."""
    import random

    state = random.getstate()
    from finetune import api  # noqa: F401

    random.setstate(state)


def load(path: "str | Path") -> "nn.Module":
    """The model of an export, rebuilt and in eval mode; see `finetune.export.load.load`."""
    from finetune.export.load import load as load_export

    return load_export(path)


def fit(
    recipe: Recipe,
    run: "str | Path" = "",
    *,
    name: str = "notebook",
    trackers: Sequence[object] = (),
    stop: StopRequest | None = None,
    **options: object,
) -> "FinishedRun":
    """Train a recipe; see `finetune.api.fit`."""
    _import_unnoticed()
    from finetune import api

    return api.fit(recipe, run, name=name, trackers=trackers, stop=stop, **options)


def resume(
    run: "str | Path" = "", *, trackers: Sequence[object] = (), stop: StopRequest | None = None, **options: object
) -> "FinishedRun":
    """Go on with a run; see `finetune.api.resume`."""
    _import_unnoticed()
    from finetune import api

    return api.resume(run, trackers=trackers, stop=stop, **options)
