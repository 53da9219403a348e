"""A training, ready to go: recipe, data, network and machine put together."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from finetune.base.device import TF32_CONVOLUTIONS
from finetune.base.plain import Plain
from finetune.data.contents import Contents
from finetune.data.loader import Loader
from finetune.models.backbones import Backbone
from finetune.models.freeze import FreezeMap
from finetune.models.network import Network
from finetune.recipe.execution import Machine, Numerics, determining_config
from finetune.recipe.spec import Recipe
from finetune.store.state import NetworkFacts
from finetune.tasks.losses import Task, make_task
from finetune.tasks.losses import to_device as task_to_device
from finetune.training.dataset import Data

# So many files are decoded before the first step; of a larger data set the rest in its first epoch.
CHECKED_FILES = 20_000


class Loaders(NamedTuple):
    """Two, because worker processes belong to one; both know the files' contents."""

    train: Loader
    validation: Loader

    def close(self) -> None:
        """End the worker processes of both."""
        for loader in self:
            loader.close()


def make_loaders(data: Data, machine: Machine, device: torch.device, contents: Contents) -> Loaders:
    pin_memory = device.type == "cuda"
    one = partial(Loader, data.pipeline, machine.workers, machine.worker_start, pin_memory, contents)
    return Loaders(one(), one())


@dataclass(frozen=True)
class Setup:
    """A training, ready to go: all that its result depends on, and nothing that it writes.

    Attributes:
        freeze: which modules train, and from which epoch on.
        weights_text, preprocessing_of: where the weights come from, and the preprocessing; for people.
        chosen: values of the recipe that somebody chose; see `recipe.effects`. For people.
    """

    recipe: Recipe
    numerics: Numerics
    machine: Machine
    backbone: Backbone
    network: Network
    freeze: FreezeMap
    data: Data
    loaders: Loaders
    device: torch.device
    weights_text: str
    preprocessing_of: str
    chosen: frozenset[str] = frozenset()

    def config(self) -> Plain:
        """Everything that determines the result, as a checkpoint holds it."""
        return determining_config(self.recipe, self.numerics)

    def tf32_named(self) -> dict[str, str]:
        """What kept features are known by besides, where TF32 changes them. Torch's own way has no name here, for those
        that were kept before there was a choice."""
        numerics = self.numerics
        is_named = self.device.type == "cuda" and numerics.of_backbone == "fp32" and numerics.tf32 != TF32_CONVOLUTIONS
        return {"tf32": numerics.tf32} if is_named else {}

    def network_facts(self) -> NetworkFacts:
        """How to build the network again, as a checkpoint holds it."""
        network = self.network
        return NetworkFacts(network.old_class_count, list(network.new_paths), self.backbone.to_plain())

    def make_task(self) -> Task:
        """The task, on the device."""
        data = self.data
        targets = data.source.targets[data.split.train]
        return task_to_device(make_task(self.recipe.task, data.output_count, data.scale, targets), self.device)
