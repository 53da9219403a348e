"""Starts a run, or goes on with one; holds what was saved against what is found."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from finetune import checkpoint as checkpoints
from finetune.build import (
    Data,
    Numerics,
    check_same_config,
    determining_config,
    find_pretrained,
    load_from_run,
    new_network,
    open_data,
    saved_network,
    split_config,
)
from finetune.data.contents import Contents
from finetune.data.loader import Loader
from finetune.data.order import key
from finetune.data.source import FileSource, class_counts
from finetune.device import check_precision, pick_device, set_numerics
from finetune.errors import UsageError
from finetune.files import hold_lock, remove_leftovers
from finetune.guard import listen_for_signals
from finetune.look import CHECKED_FILES, leave_out_broken, look
from finetune.models.backbones import Backbone, backbone_from_plain
from finetune.models.freeze import frozen_tensors
from finetune.models.network import Network, store_frozen
from finetune.optim import find_optimizer
from finetune.recipe import Recipe
from finetune.run import RunFolder, make_folder, next_folder
from finetune.state import Progress, environment_differences, progress_from_plain, progress_to_plain, seed_generators
from finetune.tasks import make_task
from finetune.tasks import to_device as task_to_device
from finetune.train import Settings, count_steps, learning_rate, train
from finetune.watch.progress import Terminal


@dataclass(frozen=True)
class Machine:
    """Choices that may differ at a resume: they do not change the result on the same kind of machine.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        workers: processes that fetch batches ahead.
        worker_start: how they start.
    """

    device: str = "auto"
    workers: int = 0
    worker_start: str = "auto"


class Loaders(NamedTuple):
    """Two, because worker processes belong to one; both know the files' contents."""

    train: Loader
    validation: Loader


def make_loaders(data: Data, machine: Machine, device: torch.device, contents: Contents) -> Loaders:
    pin_memory = device.type == "cuda"
    return Loaders(
        *(Loader(data.pipeline, machine.workers, machine.worker_start, pin_memory, contents) for _ in range(2))
    )


@dataclass(frozen=True)
class Job:
    """A training, ready to go."""

    recipe: Recipe
    numerics: Numerics
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
                "backbone": self.backbone.to_plain(),
            },
        }


# ---- A new run ---------------------------------------------------------------------------------------------------


def start(
    path: Path | None,
    name: str,
    recipe: Recipe,
    numerics: Numerics,
    machine: Machine,
    settings: Settings,
    terminal: Terminal,
    *,
    code: tuple[Path, ...] = (),
    init_from: str = "",
    copy_frozen: bool = False,
    skip_broken: bool = False,
) -> tuple[RunFolder, Progress]:
    """Begin a run in a folder that holds none, or one that died before its first checkpoint.

    Args:
        path: of the run folder; None = the next free one below runs/.
        name: of the recipe.
        code: files to keep with the run: the recipe and what it imported from its own folder.
        init_from: "RUN", "RUN:best" or "RUN:latest": start from that run's weights.
        copy_frozen: copy the frozen weights into the run folder, so that it stands alone.
        skip_broken: look at every image first, and leave broken ones out.

    Raises:
        FinetuneError: see `train`.
    """
    # Everything that can be wrong is looked at before a folder is made.
    device = pick_device(machine.device)
    check_precision(numerics.precision, device)
    find_optimizer(recipe.optimizer.name)
    set_numerics(numerics.deterministic)
    backbone, weights = find_pretrained(recipe)
    data = open_data(recipe, backbone)
    network = new_network(recipe, backbone, weights, data.class_count)
    if init_from:
        load_from_run(network, init_from, data.source.classes)
    text = weights.text if weights else "random: nothing is pretrained"
    if init_from:
        text = f"from {init_from}"
    preprocessing_of = weights.preprocessing_of if weights else "its default weights"
    network.module.to(device, memory_format=torch.channels_last)
    contents = Contents(data.source)
    loaders = make_loaders(data, machine, device, contents)
    # Another run's weights come with that run's measured features: looked at, they stay.
    broken = look(
        data, loaders.train, network.module, device, measure=not init_from, all_files=skip_broken, terminal=terminal
    )
    data = leave_out_broken(data, broken, skip_broken, terminal)
    job = Job(recipe, numerics, backbone, network, data, loaders, device, text, preprocessing_of)
    record = {
        "name": name,
        "config": job.identity["config"],
        "settings": dataclasses.asdict(settings),
        "init_from": init_from,
        "copy_frozen": copy_frozen,
        "skip_broken": skip_broken,
    }
    run = RunFolder(path or next_folder(name))
    run.make()
    with hold_lock(run.path):
        shutil.rmtree(run.frozen, ignore_errors=True)
        make_folder(run, record, list(code))
        frozen = frozen_tensors(network.module, network.rules(recipe.trainable.rules), 0)
        store_frozen(run.frozen, None if init_from else weights, frozen, copy_frozen)
        contents.save(run.contents_file)
        seed_generators(key("train", recipe.seed))
        progress = Progress(history=[{"event": "start", "step": 0, "epoch": 0}])
        return run, run_job(run, job, progress, None, settings, terminal)


# ---- An old run --------------------------------------------------------------------------------------------------


def resume(
    run: RunFolder,
    machine: Machine,
    terminal: Terminal,
    *,
    settings: dict[str, Any],
    epochs: int = 0,
    lr: float = 0.0,
    from_file: Path | None = None,
    images: str = "",
) -> Progress:
    """Go on with a run as if it had never stopped.

    What holds, in this order: 1. the recipe and numerics saved in the run; 2. for what does not change the result
    (`machine`, `settings`, where the data lies), what is given now; 3. for settings not given, those saved.

    Args:
        settings: fields of `Settings` given now.
        epochs: extend the run to so many epochs, at the recipe's final rate or `lr`.
        from_file: rewind to this checkpoint first.
        images: where the same data lies now.

    Raises:
        FinetuneError: see `train`; also when the checkpoint belongs to another model, data or recipe.
    """
    record = run.read_recipe()
    recipe, numerics = split_config(record["config"])
    run_settings = Settings(**record["settings"] | settings)
    with hold_lock(run.path):
        state = find_checkpoint(run, record["config"], from_file, terminal)
        if state is not None:
            progress = progress_from_plain(state)
            if extend(progress, epochs, lr, recipe, state["data"]["train_samples"]):
                # On disk at once: a run killed before its next save must not forget that it was extended.
                state |= progress_to_plain(progress)
                checkpoints.write_checkpoint(run.checkpoints, state, is_best=False, keep=run_settings.keep)
            if progress.status != "running":
                terminal.say(
                    f"run {run.path} is {progress.status} at step {progress.step}; to train longer: --epochs N"
                )
                return progress
            job = resumed_job(run, recipe, numerics, machine, state, images, terminal)
            if progress.best and not (run.checkpoints / checkpoints.BEST).exists():
                terminal.say(f"the best checkpoint (step {progress.best['step']}) is gone: best starts anew")
                progress.best = {}
            where = f"step {progress.step} (epoch {progress.epoch + 1}, sample {progress.position_samples})"
            terminal.say(f"resuming {run.path} at {where}")
            progress.history.append({"event": "resume", "step": progress.step, "epoch": progress.epoch})
            return run_job(run, job, progress, state, run_settings, terminal)
    terminal.say(f"{run.path} has no checkpoint yet: starting over")
    _, progress = start(
        run.path,
        record["name"],
        recipe,
        numerics,
        machine,
        run_settings,
        terminal,
        init_from=record["init_from"],
        copy_frozen=record["copy_frozen"],
        skip_broken=record["skip_broken"],
    )
    return progress


def find_checkpoint(
    run: RunFolder, config: dict[str, Any], from_file: Path | None, terminal: Terminal
) -> dict[str, Any] | None:
    """The newest good checkpoint of a run whose lock is held, its names put right; None if there never was one.

    Args:
        config: of the run's recipe.json; the checkpoint's must equal it.
        from_file: rewind to this one first.

    Raises:
        RunError: no good one, or one of another recipe.
    """
    remove_leftovers(run.checkpoints)
    remove_leftovers(run.path)
    if from_file is not None:
        checkpoints.rewind(run.checkpoints, from_file)
        aside = run.checkpoints / checkpoints.SUPERSEDED
        terminal.say(f"rewound to {from_file.name}; later checkpoints are in {aside}")
    found = checkpoints.newest_good(run.checkpoints)
    if found is None:
        return None
    path, state, bad = found
    for line in bad:
        terminal.say(f"skipped: {line}")
    check_same_config(config, state["config"], f"{path} is not of the recipe in {run.recipe_file}")
    checkpoints.repair_names(run.checkpoints, path, state)
    return state


def resumed_job(
    run: RunFolder,
    recipe: Recipe,
    numerics: Numerics,
    machine: Machine,
    state: dict[str, Any],
    images: str,
    terminal: Terminal,
) -> Job:
    """The job of a checkpoint, its data and environment compared with what they were.

    Raises:
        RunError: other data, or a network that does not fit.
    """
    device = pick_device(machine.device)
    check_precision(numerics.precision, device)
    set_numerics(numerics.deterministic)
    located = dataclasses.replace(recipe.data, images=images or recipe.data.images)
    backbone = backbone_from_plain(state["network"]["backbone"])
    data = open_data(dataclasses.replace(recipe, data=located), backbone, state["data"]["skipped"])
    check_same_config(state["data"], data.facts(), f"the data is not what run {run.path} was trained on")
    for line in environment_differences(state["versions"], device):
        terminal.say(f"not bit for bit from here on: {line}")
    network = saved_network(run, recipe, state)
    network.module.to(device, memory_format=torch.channels_last)
    loaders = make_loaders(data, machine, device, Contents(data.source, run.contents_file))
    return Job(recipe, numerics, backbone, network, data, loaders, device, f"as kept in {run.frozen}", "the run")


def extend(progress: Progress, epochs: int, lr: float, recipe: Recipe, train_samples: int) -> bool:
    """Record `--epochs N` as a phase of its own behind the schedule's first horizon. False when nothing was asked.

    Raises:
        UsageError: fewer epochs than the run has already, a rate without epochs, or no rate at all.
    """
    if not epochs:
        if lr:
            raise UsageError(
                f"--lr {lr}: at a resume only together with --epochs; for other rates: --init-from RUN:best"
            )
        return False
    steps_per_epoch, horizon_steps, end_step = count_steps(recipe, train_samples, progress)
    extension = {"from_step": end_step, "epochs": epochs, "lr": lr}
    progress.extensions.append(extension)
    _, _, new_end = count_steps(recipe, train_samples, progress)
    if new_end <= end_step:
        raise UsageError(f"--epochs {epochs}: the run has {-(-end_step // steps_per_epoch)} already; give more")
    at_the_end = dataclasses.replace(progress, step=end_step)
    if learning_rate(recipe, at_the_end, steps_per_epoch, horizon_steps) == 0:
        raise UsageError(f"--epochs {epochs}: the recipe's final rate is 0, so nothing would train; give --lr as well")
    progress.status = "running"
    progress.validations_without_best = 0
    progress.history.append({"event": "extend", "step": progress.step, "epoch": progress.epoch} | extension)
    return True


# ---- Both --------------------------------------------------------------------------------------------------------


def run_job(
    run: RunFolder,
    job: Job,
    progress: Progress,
    resumed: dict[str, Any] | None,
    settings: Settings,
    terminal: Terminal,
) -> Progress:
    """Show what is about to happen, then train."""
    data, recipe = job.data, job.recipe
    counts = class_counts(data.source.targets[data.split.train], data.class_count)
    task = task_to_device(make_task(recipe.task, counts, len(data.split.train)), job.device)
    rules = job.network.rules(recipe.trainable.rules)
    _, _, end_step = count_steps(recipe, len(data.split.train), progress)
    epoch = resumed["frozen"]["epoch"] if resumed else 0
    terminal.begin(describe(run, job), describe_freeze(job, epoch), progress.step, end_step)
    with listen_for_signals() as stop:
        return train(
            run,
            recipe,
            job.identity,
            job.network.module,
            rules,
            *job.loaders,
            data.split.train,
            data.split.validation,
            task,
            progress,
            resumed,
            job.device,
            job.numerics.precision,
            settings,
            terminal,
            stop,
        )


def describe(run: RunFolder, job: Job) -> dict[str, str]:
    """The facts of a run for the table at its start."""
    recipe, data = job.recipe, job.data
    train, validation, test = map(len, data.split)
    parts = [f"{train:,} to train on", f"{validation:,} to validate", *([f"{test:,} to test"] if test else [])]
    unread = isinstance(data.source, FileSource) and not data.skipped and train + validation + test > CHECKED_FILES
    if data.skipped:
        parts.append(f"{len(data.skipped):,} left out as broken")
    parts.append(f"{data.class_count} classes" + (", several an image" if recipe.data.separator else ""))
    changes = [f"augment {recipe.data.augment}"]
    changes += [
        f"{name} {alpha:g}" for name, alpha in (("mixup", recipe.data.mixup), ("cutmix", recipe.data.cutmix)) if alpha
    ]
    return {
        "backbone": recipe.model.backbone,
        "weights": job.weights_text,
        "data": f"{recipe.data.images}: {', '.join(parts)}"
        + (f"; {CHECKED_FILES:,} files were looked at, the others are in the first epoch" if unread else ""),
        "images": f"{job.backbone.preprocessing.text} (as of {job.preprocessing_of}), {', '.join(changes)}",
        "training": (
            f"{recipe.optimizer.name}, lr {recipe.optimizer.lr:g}, batch {recipe.batch_size}, seed {recipe.seed}"
        ),
        "device": f"{job.device}, {job.numerics.precision}, {torch.get_num_threads()} threads",
        "run folder": str(run.path),
    }


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
