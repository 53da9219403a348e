"""Starts a run, or goes on with one; holds what was saved against what is found."""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from finetune import checkpoint as checkpoints
from finetune.build import (
    Numerics,
    check_precision,
    check_same_config,
    find_pretrained,
    network_from_run,
    new_network,
    open_data,
    saved_network,
    split_config,
)
from finetune.data.contents import Contents
from finetune.data.order import key
from finetune.data.source import class_counts
from finetune.device import pick_device, set_numerics
from finetune.errors import RunError, StoppedEarly, UsageError
from finetune.files import remove_leftovers
from finetune.guard import StopRequest, listen_for_signals
from finetune.job import Job, Machine, describe, describe_freeze, make_loaders
from finetune.lock import hold_lock
from finetune.look import check_unbroken, leave_out_broken, look
from finetune.memory import guard_memory
from finetune.models.backbones import backbone_from_plain
from finetune.models.freeze import frozen_tensors
from finetune.models.network import store_frozen
from finetune.models.weights import Weights
from finetune.optim import find_optimizer
from finetune.phase import Phase, start_phase
from finetune.recipe import Recipe
from finetune.run import RunFolder, fill_folder, next_folder
from finetune.state import Progress, environment_differences, progress_from_plain, progress_to_plain, seed_generators
from finetune.tasks import make_task
from finetune.tasks import to_device as task_to_device
from finetune.train import Settings, count_steps, learning_rate, train
from finetune.watch.progress import Terminal

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
    images: str = "",
    url: str = "",
) -> tuple[RunFolder, Progress]:
    """Begin a run in a folder that holds none, or one that died before its first checkpoint.

    Args:
        path: of the run folder; None = the next free one below runs/.
        name: of the recipe.
        code: files to keep with the run: the recipe and what it imported from its own folder.
        init_from: "RUN", "RUN:best" or "RUN:latest": start from that run's weights.
        copy_frozen: copy the frozen weights into the run folder, so that it stands alone.
        skip_broken: look at every image first, and leave broken ones out.
        images: where the recipe's images lie now, if not where it says.
        url: of the remote folder that `path` is the mirror of, if it is one.

    Raises:
        FinetuneError: see `train`.
    """
    # What can be wrong is looked at before a folder is made, but for the images themselves: that may take hours, and
    # a run that is killed there is gone on with like any other.
    job, weights = new_job(recipe, numerics, machine, init_from, images)
    record = {
        "name": name,
        "config": job.identity["config"],
        "settings": dataclasses.asdict(settings),
        "init_from": init_from,
        "copy_frozen": copy_frozen,
        "skip_broken": skip_broken,
    }
    run = RunFolder(path or next_folder(name), url)
    with made_folder(run), listen_for_signals(f"finetune resume {run}") as stop, guard_memory(stop):
        shutil.rmtree(run.frozen, ignore_errors=True)
        run_id = fill_folder(run, record, list(code))
        frozen = frozen_tensors(job.network.module, job.network.rules(recipe.trainable.rules), 0)
        store_frozen(run.frozen, weights, frozen, copy=copy_frozen, link=not url)
        with closing(start_phase(job, 0, terminal, stop)) as phase:
            # Another run's weights come with that run's measured features, and these stay.
            broken = look(job, phase.feed, measure=not init_from, all_files=skip_broken, terminal=terminal)
            job = dataclasses.replace(job, data=leave_out_broken(job.data, broken, skip_broken, terminal))
            job.loaders.train.contents.save(run.contents_file, terminal.say)
            seed_generators(key("train", recipe.seed))
            progress = Progress(history=[{"event": "start", "step": 0, "epoch": 0}])
            return run, run_job(run, run_id, job, phase, progress, None, settings, terminal, stop)


@contextmanager
def made_folder(run: RunFolder) -> Iterator[None]:
    """The run's folder, made and locked. If the run fails before there is anything to go on from, it goes again.

    Raises:
        UsageError: it cannot be made, or holds files that are not of a run.
        RunError: another process uses it.
    """
    if run.foreign_files():
        raise UsageError(f"--run {run}: holds other files ({run.foreign_files()[0]}); give a new folder")
    run.make()
    with hold_lock(run.path):
        fresh = not run.exists()
        try:
            yield
        except StoppedEarly:
            raise
        except Exception:
            if fresh and not checkpoints.step_files(run.checkpoints):
                run.remove()
            raise


def located(recipe: Recipe, images: str) -> Recipe:
    """The recipe with its images where they lie now; "" = where it says."""
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, images=images)) if images else recipe


def new_job(
    recipe: Recipe, numerics: Numerics, machine: Machine, init_from: str, images: str = ""
) -> tuple[Job, Weights | None]:
    """The job of a new run, and the file that its frozen tensors are of, if it is one.

    Raises:
        FinetuneError: whatever is wrong with the recipe, the data, the weights or the device.
    """
    device = pick_device(machine.device)
    check_precision(numerics, device)
    find_optimizer(recipe.optimizer.name)
    set_numerics(numerics.deterministic)
    if init_from:
        backbone, network, classes = network_from_run(recipe, init_from)
        weights, weights_text, preprocessing_of = None, f"from {init_from}", init_from
        data = open_data(located(recipe, images), backbone)
        if data.source.classes != classes:
            raise RunError(
                f"--init-from {init_from}: trained on other classes ({len(classes)}, here {data.class_count})"
            )
    else:
        backbone, weights = find_pretrained(recipe)
        weights_text = weights.text if weights else "random: nothing is pretrained"
        preprocessing_of = weights.preprocessing_of if weights else "its default weights"
        data = open_data(located(recipe, images), backbone)
        network = new_network(recipe, backbone, weights, data.class_count)
    network.module.to(device, memory_format=torch.channels_last)
    loaders = make_loaders(data, machine, device, Contents(data.source))
    job = Job(recipe, numerics, machine, backbone, network, data, loaders, device, weights_text, preprocessing_of)
    return job, weights


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
    with hold_lock(run.path), listen_for_signals(f"finetune resume {run}") as stop, guard_memory(stop):
        state = find_checkpoint(run, record, from_file, terminal)
        if state is not None:
            progress = progress_from_plain(state)
            if extend(progress, epochs, lr, recipe, state["data"]["train_samples"]):
                # On disk at once: a run killed before its next save must not forget that it was extended.
                state |= progress_to_plain(progress)
                checkpoints.write_checkpoint(run.checkpoints, state, is_best=False, keep=run_settings.keep)
            if progress.status != "running":
                terminal.say(f"run {run} is {progress.status} at step {progress.step}; to train longer: --epochs N")
                return progress
            job = resumed_job(run, recipe, numerics, machine, state, images, terminal)
            return go_on(run, record["id"], job, progress, state, run_settings, terminal, stop)
    if epochs or lr:
        raise UsageError(f"{run} has no checkpoint yet; go on without --epochs and --lr first")
    terminal.say(f"{run} has no checkpoint yet: starting over")
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
        images=images,
        url=run.url,
    )
    return progress


def go_on(
    run: RunFolder,
    run_id: str,
    job: Job,
    progress: Progress,
    state: dict[str, Any],
    settings: Settings,
    terminal: Terminal,
    stop: StopRequest,
) -> Progress:
    """Train from a checkpoint on, in a run whose lock is held."""
    if progress.best:
        problem = checkpoints.repair_best(run.checkpoints, progress.best["step"], run_id)
        if problem:
            terminal.say(f"{problem}: best starts anew")
            progress.best = {}
    where = f"step {progress.step} (epoch {progress.epoch + 1}, sample {progress.position_samples})"
    terminal.say(f"resuming {run} at {where}")
    progress.history.append({"event": "resume", "step": progress.step, "epoch": progress.epoch})
    with closing(start_phase(job, state["frozen"]["epoch"], terminal, stop, state["frozen"])) as phase:
        check_unbroken(job.data, phase.feed)
        return run_job(run, run_id, job, phase, progress, state, settings, terminal, stop)


def find_checkpoint(
    run: RunFolder, record: dict[str, Any], from_file: Path | None, terminal: Terminal
) -> dict[str, Any] | None:
    """The newest good checkpoint of a run whose lock is held, its names put right; None if there never was one.

    Args:
        record: the run's recipe.json; the checkpoint's id and config must equal its.
        from_file: rewind to this one first.

    Raises:
        RunError: no good one, or one of another recipe.
    """
    remove_leftovers(run.checkpoints)
    remove_leftovers(run.path)
    if from_file is not None:
        checkpoints.rewind(run.checkpoints, from_file, record["id"])
        aside = run.checkpoints / checkpoints.SUPERSEDED
        terminal.say(f"rewound to {from_file.name}; later checkpoints are in {aside}")
    found = checkpoints.newest_good(run.checkpoints, record["id"])
    if found is None:
        return None
    path, state, bad = found
    for line in bad:
        terminal.say(f"skipped: {line}")
    check_same_config(record["config"], state["config"], f"{path} is not of the recipe in {run.recipe_file}")
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
    check_precision(numerics, device)
    set_numerics(numerics.deterministic)
    backbone = backbone_from_plain(state["network"]["backbone"])
    data = open_data(located(recipe, images), backbone, state["data"]["skipped"])
    check_same_config(state["data"], data.facts(), f"the data is not what run {run} was trained on")
    network = saved_network(run, recipe, state)
    # Last: which libraries the network needs is known once it is built.
    for line in environment_differences(state["versions"], device):
        terminal.say(f"not bit for bit from here on: {line}")
    network.module.to(device, memory_format=torch.channels_last)
    loaders = make_loaders(data, machine, device, Contents(data.source, run.contents_file))
    if loaders.train.contents.damaged:
        terminal.say(f"{run.contents_file} is damaged: image files are compared with what they are from now on")
    kept = f"as kept in {run.frozen}"
    return Job(recipe, numerics, machine, backbone, network, data, loaders, device, kept, "the run")


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
    run_id: str,
    job: Job,
    phase: Phase,
    progress: Progress,
    resumed: dict[str, Any] | None,
    settings: Settings,
    terminal: Terminal,
    stop: StopRequest,
) -> Progress:
    """Show what is about to happen, then train."""
    data, recipe = job.data, job.recipe
    counts = class_counts(data.source.targets[data.split.train], data.class_count)
    task = task_to_device(make_task(recipe.task, counts, len(data.split.train)), job.device)
    rules = job.network.rules(recipe.trainable.rules)
    _, _, end_step = count_steps(recipe, len(data.split.train), progress)
    epoch = resumed["frozen"]["epoch"] if resumed else 0

    def next_phase(epoch: int) -> Phase:
        begun = start_phase(job, epoch, terminal, stop)
        try:
            check_unbroken(data, begun.feed)
        except RunError:
            begun.close()
            raise
        return begun

    terminal.begin(describe(run, job), describe_freeze(job, epoch), progress.step, end_step)
    return train(
        run,
        recipe,
        {"run_id": run_id} | job.identity,
        job.network.module,
        rules,
        phase,
        next_phase,
        job.loaders.train.contents,
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
