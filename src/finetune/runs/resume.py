"""What an old run left: its settings, the checkpoint to go on from, and whether all is as it was."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from finetune.base.device import pick_device, set_numerics
from finetune.base.files import remove_leftovers
from finetune.base.terminal import Terminal
from finetune.data.contents import Contents
from finetune.errors import RunError, UsageError
from finetune.recipe.execution import Machine, Numerics, Settings, check_precision
from finetune.recipe.spec import Recipe, located
from finetune.store import checkpoint as checkpoints
from finetune.store.restore import backbone_of_run, check_same_config, saved_network
from finetune.store.run_folder import RunFolder
from finetune.store.state import Progress, environment_differences
from finetune.training.dataset import open_data
from finetune.training.schedule import count_steps, learning_rate
from finetune.training.setup import Job, make_loaders


def settings_of(run: RunFolder, record: dict[str, Any], given: dict[str, Any]) -> Settings:
    """Those of the run's recipe.json, but for what is given now."""
    try:
        return Settings(**record["settings"] | given)
    except TypeError as error:
        raise RunError(f"{run.recipe_file}: its settings are none ({error}); restore it from a copy") from None


def find_checkpoint(
    run: RunFolder, record: dict[str, Any], from_file: Path | None, terminal: Terminal
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, of a run whose lock is held; None if there never was one.

    Args:
        record: the run's recipe.json; the checkpoint's id and config must equal its.
        from_file: this one; None = the newest good one.

    Raises:
        RunError: no good one, or one of another recipe.
    """
    if from_file is not None:
        path, state = from_file, checkpoints.read_checkpoint(from_file, record["id"])
    else:
        found = checkpoints.newest_good(run.checkpoints, record["id"])
        if found is None:
            return None
        path, state, bad = found
        for line in bad:
            terminal.say(f"skipped: {line}")
    check_same_config(record["config"], state["config"], f"{path} is not of the recipe in {run.recipe_file}")
    return path, state


def settle(
    run: RunFolder, run_id: str, path: Path, state: dict[str, Any], from_file: Path | None, terminal: Terminal
) -> None:
    """Make the checkpoint in `path` the newest of its run; what a killed process left goes."""
    remove_leftovers(run.checkpoints)
    remove_leftovers(run.path)
    if from_file is None:
        checkpoints.repair_names(run.checkpoints, path, state)
    else:
        checkpoints.rewind(run.checkpoints, path, run_id)
        terminal.say(f"rewound to {path.name}; later checkpoints are in {run.checkpoints / checkpoints.SUPERSEDED}")


def resumed_job(
    run: RunFolder,
    recipe: Recipe,
    numerics: Numerics,
    machine: Machine,
    state: dict[str, Any],
    place: str,
    terminal: Terminal,
) -> Job:
    """The job of a checkpoint, its data and environment compared with what they were.

    Raises:
        RunError: other data, or a network that does not fit.
    """
    device = pick_device(machine.device)
    check_precision(numerics, device.type)
    set_numerics(numerics.deterministic)
    backbone = backbone_of_run(run, state)
    data = open_data(located(recipe, place), backbone, state["data"]["skipped"])
    # The teacher of a distillation, if there is one, is looked at when it runs.
    check_same_config(state["data"] | {"taught_by": ""}, data.facts(), f"the data is not what run {run} was trained on")
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
    """Record `--epochs N` as a phase of its own behind the schedule's first horizon.

    Returns:
        False when nothing new was asked: the same command again, after a kill, just goes on.

    Raises:
        UsageError: fewer epochs than the run has already, a rate without epochs, or no rate at all.
    """
    if lr and not 0 < lr < math.inf:
        raise UsageError(f"--lr {lr}: not allowed; give more than 0")
    if not epochs:
        if lr:
            raise UsageError(
                f"--lr {lr}: at a resume only together with --epochs; for other rates: --init-from RUN:best"
            )
        return False
    steps_per_epoch, horizon_steps, end_step = count_steps(recipe, train_samples, progress)
    extension = {"from_step": end_step, "epochs": epochs, "lr": lr}
    latest = progress.extensions[-1] if progress.extensions else {"epochs": recipe.epochs, "lr": 0.0}
    if (epochs, lr) in ((latest["epochs"], latest["lr"]), (latest["epochs"], 0.0)):
        return False
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
