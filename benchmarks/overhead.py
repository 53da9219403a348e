"""What a loop costs besides the arithmetic: the median step of ours and of the peers over that of a bare loop.

    python benchmarks/overhead.py

Two works, no kept features: a tiny frozen network whose head trains, and a resnet18 at 64 px of which all trains. All
get the same ready batches in memory; only the steps are timed, from the end of one to the end of the next, without
validation and checkpoints.
"""

import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from common import interleaved, median, report, run_itself, train_alone, verdict
from torch import nn
from torch.nn import functional

BATCH, CLASSES, LEARNING_RATE = 64, 10, 1e-3
TARGETS = {"tiny": 1.10, "resnet18": 1.03}
SIZES = {"tiny": 16, "resnet18": 64}
FROZEN = {"tiny": True, "resnet18": False}
# Everything that is watched by default is in "finetune": the log, TensorBoard.
PEERS = ("bare loop", "finetune", "finetune --track none", "Lightning", "HF Trainer", "fastai")
MOST_TRACKING = 1.02


@dataclass
class Options:
    steps: int = 3000
    """Steps of the tiny network, two seconds: fewer are those of a cold process; of resnet18 a hundred and fiftieth."""
    repeats: int = 5
    """Rounds; medians of medians count."""
    only: str = ""
    """Used by the benchmark itself: one competitor, one work, in a process of its own."""
    work: str = ""
    """Used by the benchmark itself."""
    output: str = ""
    """JSON file; default: benchmarks/results/overhead.json."""


def build(work: str) -> nn.Module:
    """A network whose last layer is called fc; frozen parts are frozen and in eval mode."""
    import torchvision

    torch.manual_seed(0)
    if work == "resnet18":
        return torchvision.models.resnet18(num_classes=CLASSES).to(memory_format=torch.channels_last)
    from collections import OrderedDict

    stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    model = nn.Sequential(OrderedDict(stem=stem, fc=nn.Linear(128, CLASSES)))
    model.stem.requires_grad_(False)
    return model.to(memory_format=torch.channels_last)


def batches(work: str, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    size, generator = SIZES[work], torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    return [(images, torch.randint(CLASSES, (BATCH,), generator=generator)) for _ in range(count)]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def set_modes(model: nn.Module, work: str) -> None:
    model.train()
    if FROZEN[work]:
        model.stem.eval()


class Stopwatch:
    """Notes the end of each step."""

    def __init__(self):
        self.ends: list[float] = []

    def lap(self) -> None:
        self.ends.append(time.perf_counter())

    def milliseconds(self) -> dict[str, float]:
        """Without the first few: the median step; and the mean one, in which the steps that are logged count, without
        the slowest in fifty: the machine is not ours alone."""
        steps = sorted((after - before) * 1e3 for before, after in itertools.pairwise(self.ends[5:]))
        counted = steps[: len(steps) - len(steps) // 50]
        return {"median": median(steps), "mean": sum(counted) / len(counted)}


def bare_loop(work: str, count: int) -> dict[str, float]:
    model, watch = build(work), Stopwatch()
    optimizer = optimizer_of(model)
    set_modes(model, work)
    for images, targets in batches(work, count):
        loss = functional.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.lap()
    return watch.milliseconds()


def finetune(work: str, count: int, is_tracked: bool = True) -> dict[str, float]:
    """Our own loop, `train.train`, fed with the same ready batches."""
    from finetune.base.events import Begun
    from finetune.base.terminal import Terminal, make_console
    from finetune.data.batch import Batch, Request
    from finetune.data.contents import Contents
    from finetune.data.source import ArraySource
    from finetune.models.freeze import Rule
    from finetune.recipe import Images, Model, Optimizer, Recipe, Schedule, Trainable
    from finetune.recipe.execution import Settings
    from finetune.store.run_folder import RunFolder
    from finetune.training.context import RunContext
    from finetune.training.phase import Feed

    ready = batches(work, count)

    class Ready:
        def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
            for _request, (images, targets) in zip(requests, itertools.cycle(ready), strict=False):
                yield Batch(images, targets, targets, targets, [])

    stopwatch = Stopwatch()

    class Timed(Terminal):
        def step(self, step: int, epoch: int, epochs: int, samples: int) -> None:
            super().step(step, epoch, epochs, samples)
            stopwatch.lap()

    model = build(work)
    rules = (Rule("fc"), Rule("*", trainable=not FROZEN[work]))
    recipe = Recipe(
        Model("none"), Images("none"), trainable=Trainable(batchnorm=True), optimizer=Optimizer(lr=LEARNING_RATE),
        schedule=Schedule("constant", warmup_fraction=0.0), epochs=1, batch_size=BATCH,
    )  # fmt: skip
    samples = count * BATCH
    source = ArraySource(torch.zeros(samples, 1), torch.zeros(samples, dtype=torch.int64), list("0123456789"), "")
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "run")
        settings = Settings(track="tensorboard" if is_tracked else "none")
        context = RunContext(Timed(make_console(quiet=True)), run, settings)
        with context.watched():
            begun = Begun("", "run", run.path, {}, {}, 0, count, 1, False, "loss")
            context.watch.begin(begun, torch.device("cpu"))
            train_alone(
                recipe, model, rules, Feed(model, Ready(), Ready()), Contents(source), torch.arange(samples),
                torch.arange(BATCH), context,
            )  # fmt: skip
    return stopwatch.milliseconds()


def lightning(work: str, count: int) -> dict[str, float]:
    import lightning as L

    watch, model = Stopwatch(), build(work)

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, _number):
            return functional.cross_entropy(self.model(batch[0]), batch[1])

        def on_train_start(self):
            set_modes(model, work)

        def on_train_batch_end(self, *_arguments):
            watch.lap()

        def configure_optimizers(self):
            return optimizer_of(model)

    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(batches(work, count), batch_size=None))
    return watch.milliseconds()


def hf_trainer(work: str, count: int) -> dict[str, float]:
    from peers import WithLoss
    from transformers import Trainer, TrainerCallback, TrainingArguments

    watch, model, ready = Stopwatch(), build(work), batches(work, count)

    class Laps(TrainerCallback):
        def on_step_end(self, *_arguments, **_named):
            watch.lap()

    class Ready(torch.utils.data.IterableDataset):
        def __iter__(self):
            return ({"images": images, "labels": targets} for images, targets in ready)

    class WithReadyBatches(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(Ready(), batch_size=None)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=count, save_strategy="no", logging_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=True, max_grad_norm=0.0,
        )  # fmt: skip
        trainer = WithReadyBatches(
            WithLoss(model),
            arguments,
            train_dataset=Ready(),
            callbacks=[Laps()],
            optimizers=(optimizer_of(model), None),
        )
        trainer.train()
    return watch.milliseconds()


def fastai(work: str, count: int) -> dict[str, float]:
    import fastai.callback.progress  # noqa: F401 - brings no_bar
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    watch, model = Stopwatch(), build(work)

    class Laps(Callback):
        def after_batch(self):
            watch.lap()

    loader = torch.utils.data.DataLoader(batches(work, count), batch_size=None)
    learner = Learner(
        DataLoaders(loader, loader), model, loss_func=nn.CrossEntropyLoss(), cbs=Laps(), train_bn=True,
        opt_func=lambda groups, lr: OptimWrapper(groups, torch.optim.AdamW, lr=lr), lr=LEARNING_RATE,
    )  # fmt: skip
    with learner.no_bar(), learner.no_logging():
        learner.fit(1)
    watch.ends = watch.ends[:count]
    return watch.milliseconds()


untracked = partial(finetune, is_tracked=False)
COMPETITORS = dict(zip(PEERS, (bare_loop, finetune, untracked, lightning, hf_trainer, fastai), strict=True))


def main(options: Options) -> None:
    if options.only:
        print(json.dumps(COMPETITORS[options.only](options.work, options.steps)))
        return
    rows, targets = [], {}
    for work in SIZES:
        steps = options.steps if FROZEN[work] else max(options.steps // 150, 20)
        found = interleaved(
            options.repeats,
            {
                name: partial(run_itself, __file__, "--only", name, "--work", work, "--steps", str(steps))
                for name in COMPETITORS
            },
        )
        times, means = (
            {name: median([value[kind] for value in values]) for name, values in found.items()}
            for kind in ("median", "mean")
        )
        targets[work] = verdict(times["finetune"] / times["bare loop"], TARGETS[work])
        tracking = means["finetune"] / means["finetune --track none"]
        targets[f"{work}, tracking"] = verdict(tracking, MOST_TRACKING)
        what = f"{work} at {SIZES[work]} px, {'head trains' if FROZEN[work] else 'all trains'}"
        rows += [
            {
                "work": what,
                "": name,
                "of bare loop": time / times["bare loop"],
                "ms a step": round(time, 3),
                "mean": round(means[name], 3),
            }
            for name, time in times.items()
        ]
    title = "The median training step, over that of a bare loop"
    report("overhead", title, rows, options.output, options=dataclasses.asdict(options), targets=targets)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
