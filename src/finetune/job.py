"""A training, ready to go: recipe, data, network and machine put together; and what a person is told of it."""

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from finetune.build import Numerics, determining_config
from finetune.data.contents import Contents
from finetune.data.loader import Loader
from finetune.data.source import ArraySource, FileSource, Source
from finetune.data.texts import TextPipeline, repeated
from finetune.dataset import Data
from finetune.models.backbones import Backbone
from finetune.models.freeze import frozen_tensors
from finetune.models.network import Network
from finetune.recipe import Recipe
from finetune.run import RunFolder

# To start a process takes about as long as to decode this many small files.
WORTH_WORKERS_FILES = 500
MOST_WORKERS = 8
# So many files are decoded before the first step; of a larger data set the rest in its first epoch.
CHECKED_FILES = 20_000


@dataclass(frozen=True)
class Machine:
    """Choices that may differ at a resume: they do not change the result on the same kind of machine.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        workers: processes that fetch batches ahead; None = as many as there are cores to decode image files, up to 8.
        worker_start: how they start.
        cache_limit: how much of the disk new features may take, as in "20GB"; "" = a quarter of what is free.
    """

    device: str = "auto"
    workers: int | None = None
    worker_start: str = "auto"
    cache_limit: str = ""


class Loaders(NamedTuple):
    """Two, because worker processes belong to one; both know the files' contents."""

    train: Loader
    validation: Loader


def make_loaders(data: Data, machine: Machine, device: torch.device, contents: Contents) -> Loaders:
    pin_memory = device.type == "cuda"
    workers = count_workers(data.source) if machine.workers is None else machine.workers
    return Loaders(*(Loader(data.pipeline, workers, machine.worker_start, pin_memory, contents) for _ in range(2)))


def count_workers(source: Source) -> int:
    """How many processes are worth their start: none for images in memory, or few of them."""
    if isinstance(source, FileSource) and len(source.paths) >= WORTH_WORKERS_FILES:
        return min(os.cpu_count() or 1, MOST_WORKERS)
    return 0


@dataclass(frozen=True)
class Job:
    """A training, ready to go."""

    recipe: Recipe
    numerics: Numerics
    machine: Machine
    backbone: Backbone
    network: Network
    data: Data
    loaders: Loaders
    device: torch.device
    weights_text: str
    preprocessing_of: str

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint belongs to."""
        return {
            "config": determining_config(self.recipe, self.numerics),
            "data": self.data.facts(),
            "network": {
                "old_class_count": self.network.old_class_count,
                "new_paths": list(self.network.new_paths),
                "backbone": self.backbone.to_plain(),
            },
        }


def describe(run: RunFolder, job: Job) -> dict[str, str]:
    """The facts of a run for the table at its start."""
    recipe, data = job.recipe, job.data
    train, validation, test = map(len, data.split)
    parts = [f"{train:,} to train on", f"{validation:,} to validate", *([f"{test:,} to test"] if test else [])]
    unread = isinstance(data.source, FileSource) and not data.skipped and train + validation + test > CHECKED_FILES
    if not isinstance(data.source, ArraySource) and data.source.ignored:
        parts.append(f"{data.source.ignored:,} other files ignored")
    if data.skipped:
        parts.append(f"{len(data.skipped):,} left out as broken")
    if data.class_count:
        several = f", several a {data.source.noun}" if recipe.data.separator else ""
        parts.append(f"{data.class_count} classes{several}")
    return {
        "backbone": recipe.model.full_name,
        "weights": job.weights_text,
        "data": f"{recipe.data.place}: {', '.join(parts)}"
        + (f"; {CHECKED_FILES:,} files were looked at, the others are in the first epoch" if unread else ""),
        f"{data.source.noun}s": _prepared(job),
        "training": (
            f"{recipe.optimizer.name}, lr {recipe.optimizer.lr:g}, batch {recipe.batch_size}, seed {recipe.seed}"
        ),
        "device": f"{job.device}, {job.numerics.precision}, {torch.get_num_threads()} threads",
        "run folder": str(run),
    }


def _prepared(job: Job) -> str:
    """How samples become the network's input, in words."""
    how = f"{job.backbone.preprocessing.text} (as of {job.preprocessing_of})"
    spec, data = job.recipe.data, job.data
    if isinstance(data.pipeline, TextPipeline):
        used = torch.cat(data.split)
        truncated = int(data.pipeline.table.truncated[used.numpy()].sum())
        share = f"{truncated:,} of {len(used):,} are longer and cut off" if truncated else "none is longer"
        twice = repeated(data.source, data.split.train, data.split.validation)
        also = f"; {twice:,} of those that validate are also trained on" if twice else ""
        return f"{how}, {share}; pooling {job.backbone.options['pooling']}{also}"
    mixed = [f"{name} {alpha:g}" for name, alpha in (("mixup", spec.mixup), ("cutmix", spec.cutmix)) if alpha]
    return ", ".join([how, f"augment {spec.augment}", *mixed])


def describe_freeze(job: Job, epoch: int) -> list[tuple[str, int, str]]:
    """(modules, parameters, what becomes of them) in the network's order: frozen ones by their uppermost module."""
    rules = job.network.rules(job.recipe.trainable.rules)
    frozen = frozen_tensors(job.network.module, rules, epoch)
    rows: dict[tuple[str, bool], int] = {}
    for name, parameter in job.network.module.named_parameters():
        path = name.partition(".")[0] if name in frozen else name.rpartition(".")[0]
        rows[path, name in frozen] = rows.get((path, name in frozen), 0) + parameter.numel()
    if all(not is_frozen for _, is_frozen in rows):
        return [("all modules", sum(rows.values()), "trains")]
    return [(path, count, "frozen, in eval mode" if held else "trains") for (path, held), count in rows.items()]
