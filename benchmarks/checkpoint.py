"""What a save costs: bytes, and how long training waits; the head of a VGG-16, against `torch.save` of everything.

    python benchmarks/checkpoint.py

Both end on the disk: fsync of the file, a rename, fsync of the folder.
"""

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import median, report, verdict, workplace
from torch import nn

from finetune import Images, Model, Recipe
from finetune.base.files import sync_folder
from finetune.base.terminal import Terminal, make_console
from finetune.models.backbones import find_backbone
from finetune.recipe.execution import Machine, Numerics, Settings
from finetune.runs.start import Plan, start
from finetune.store.run_folder import RunFolder
from finetune.training.context import RunContext

TARGETS = {"bytes": 1 / 500, "time": 1 / 20}


@dataclass
class Options:
    backbone: str = "vgg16"
    """A model of torchvision."""
    saves: int = 10
    """How many; medians count."""
    output: str = ""
    """JSON file; default: benchmarks/results/checkpoint.json."""


class Stopwatch(Terminal):
    """Times each save: from the end of the step to the end of the save, nothing else lies between."""

    def __init__(self):
        super().__init__(make_console(quiet=True))
        self.milliseconds: list[float] = []
        self.last_step = 0.0

    def step(self, step: int, epoch: int, epochs: int, samples: int) -> None:
        self.last_step = time.perf_counter()

    def validated(self, *_arguments) -> None:
        self.last_step = time.perf_counter()  # a validation is no part of the save

    def saved(self) -> None:
        self.milliseconds.append((time.perf_counter() - self.last_step) * 1e3)


def ours(backbone: str, folder: Path, saves: int) -> tuple[int, list[float]]:
    recipe = Recipe(
        model=Model(backbone, weights="none"),
        data=Images("digits", image_size=64, train_samples=10 * (saves + 2)),
        batch_size=10,
        epochs=1,
    )
    stopwatch, settings = Stopwatch(), Settings(save_every_steps=1)
    run = RunFolder(folder / "run")
    start(Plan(recipe, Numerics(), Machine("cpu", 0), "save"), RunContext(stopwatch, run, settings))
    return (run.checkpoints / "latest.pt").stat().st_size, stopwatch.milliseconds[1:]


def everything(backbone: str, folder: Path, saves: int) -> tuple[int, list[float]]:
    model: nn.Module = find_backbone(backbone).build(10)
    *_, head = (module for module in model.modules() if isinstance(module, nn.Linear))
    optimizer = torch.optim.AdamW(head.parameters())
    sum(parameter.sum() for parameter in head.parameters()).backward()
    optimizer.step()
    milliseconds = []
    path, temporary = folder / "all.pt", folder / "all.pt.tmp"
    for step in range(saves):
        started = time.perf_counter()
        with open(temporary, "wb") as stream:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(folder)
        milliseconds.append((time.perf_counter() - started) * 1e3)
    return path.stat().st_size, milliseconds


def disk_alone(folder: Path, size_bytes: int, saves: int) -> list[float]:
    """As many bytes, and nothing but write, fsync, rename, fsync of the folder."""
    content, milliseconds = os.urandom(size_bytes), []
    for _ in range(saves):
        started = time.perf_counter()
        with open(folder / "bytes.tmp", "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(folder / "bytes.tmp", folder / "bytes")
        sync_folder(folder)
        milliseconds.append((time.perf_counter() - started) * 1e3)
    return milliseconds


def main(options: Options) -> None:
    with workplace() as folder:
        our_bytes, our_times = ours(options.backbone, folder, options.saves)
        all_bytes, all_times = everything(options.backbone, folder, options.saves)
        disk_times = disk_alone(folder, our_bytes, options.saves)
    rows = [
        {"": name, "bytes": f"{size:,}", "ms a save": round(median(times), 1), "lowest": round(min(times), 1)}
        for name, size, times in (
            ("finetune", our_bytes, our_times),
            ("everything, torch.save", all_bytes, all_times),
            ("the disk alone, our bytes", our_bytes, disk_times),
        )
    ]
    targets = {
        "bytes": verdict(our_bytes / all_bytes, TARGETS["bytes"]),
        "time": verdict(median(our_times) / median(all_times), TARGETS["time"]),
    }
    title = f"One save of the head of {options.backbone}"
    report("checkpoint", title, rows, options.output, options=dataclasses.asdict(options), targets=targets)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
