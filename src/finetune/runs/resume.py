"""A run goes on as if it had never stopped: what an old run left is held against what is found now."""

import dataclasses
import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from finetune.base.device import module_to_device, pick_device, said_too_late, set_numerics
from finetune.base.files import remove_leftovers
from finetune.data.contents import Contents
from finetune.errors import RunError, UsageError
from finetune.models.pooling import give_deterministic_pools
from finetune.recipe.execution import Machine, Numerics, Settings, check_precision, split_config
from finetune.recipe.serialize import spec_from_plain
from finetune.recipe.spec import Recipe
from finetune.runs.same_data import opened_as_before
from finetune.runs.start import Plan, run_setup, start, surroundings_put_back
from finetune.store.checkpoint import (
    SUPERSEDED,
    newest_good,
    read_checkpoint,
    repair_best,
    repair_names,
    rewind,
)
from finetune.store.finish_state import Finish
from finetune.store.restore import backbone_of_run, check_same_recipe, saved_network
from finetune.store.run_folder import RunRecord
from finetune.store.state import CheckpointState, Extension, Progress, environment_differences
from finetune.store.steps import Steps, count_steps, extension_at, is_cut_short, way_on
from finetune.training.context import RunContext
from finetune.training.data_check import check_unbroken
from finetune.training.phase import start_phase
from finetune.training.schedule import learning_rate
from finetune.training.setup import Setup, make_loaders
from finetune.training.teacher import taught


def resume(
    context: RunContext,
    machine: Machine,
    *,
    settings: Mapping[str, object],
    epochs: int = 0,
    lr: float = 0.0,
    from_file: Path | None = None,
    place: str = "",
) -> Progress:
    """Go on with the run in the context's folder.

    What holds, in this order: 1. the recipe and numerics saved in the run; 2. for what does not change the result
    (`machine`, `settings`, where the data lies), what is given now; 3. for settings not given, those saved.

    Args:
        settings: fields of `Settings` given now.
        epochs: extend the run to so many epochs, at the recipe's final rate or `lr`.
        from_file: rewind to this checkpoint first.
        place: where the same data lies now.

    Raises:
        FinetuneError: see `train`; also when the checkpoint belongs to another model, data or recipe.
    """
    run = context.run
    record = run.read_recipe()
    recipe, numerics = split_config(record.config)
    context.run_id, context.settings = record.id, settings_of(context, record, settings)
    with surroundings_put_back(), context.locked(), context.interruptible():
        found = find_checkpoint(context, record, from_file)
        if found is not None:
            path, state = found
            progress = state.progress
            extended = extend(progress, epochs, lr, recipe, state.data.train_samples)
            over = progress.status != "running"
            # Whatever can be wrong is found before anything on the disk is changed.
            setup = None if over else resumed_setup(context, recipe, numerics, machine, state, place)
            settle(context, path, state, from_file)
            if extended:
                # On disk at once: a run killed before its next save must not forget that it was extended.
                context.save(state, is_best=False)
                context.say(extended)
            if setup is None:
                if context.writes and context.settings.report and not run.report_file.exists():
                    context.watch.report_old(run, place)  # killed after the last step, before it
                words, meaning = way_on(recipe, progress, state.data.train_samples)
                command = " ".join(["finetune", "resume", str(run), *words])
                context.say(f"run {run} is {progress.status} at step {progress.step}; to {meaning}: {command}")
                return progress
            with context.watched():
                return go_on(context, dataclasses.replace(setup, chosen=frozenset(record.chosen)), state)
    if epochs or lr:
        raise UsageError(f"{run} has no checkpoint yet; go on without --epochs and --lr first")
    return start_over(context, record, machine, place)


def start_over(context: RunContext, record: RunRecord, machine: Machine, place: str) -> Progress:
    """Begin a run that was stopped before its first checkpoint, as it was begun then."""
    context.say(f"{context.folder} has no checkpoint yet: starting over")
    recipe, numerics = split_config(record.config)
    plan = Plan(
        recipe,
        numerics,
        machine,
        record.name,
        init_from=record.init_from,
        new_classes=record.new_classes,
        copy_frozen=record.copy_frozen,
        skip_broken=record.skip_broken,
        place=place,
        command=tuple(record.command),
        chosen=frozenset(record.chosen),
    )
    return start(plan, context)


def go_on(context: RunContext, setup: Setup, state: CheckpointState) -> Progress:
    """Train from a checkpoint on, in a run whose lock is held."""
    progress, run = state.progress, context.run
    if progress.best and context.writes:
        problem = repair_best(run.checkpoints, progress.best["step"], context.run_id)
        if problem:
            context.say(f"{problem}: best starts anew")
            progress.best = {}
    where = f"step {progress.step} (epoch {progress.epoch + 1}, sample {progress.position_samples})"
    context.say(f"resuming {run} at {where}")
    _say_old_rate(context, progress)
    progress.history.append({"event": "resume", "step": progress.step, "epoch": progress.epoch})
    setup = taught(setup, context.terminal, context.stop, state.data.taught_by, state.data.taught_halvings)
    with (
        closing(setup.loaders),
        closing(start_phase(setup, state.frozen.epoch, context, state.frozen)) as phase,
    ):
        check_unbroken(setup.data, phase.feed)
        return run_setup(setup, context, phase, progress, state)


def _say_old_rate(context: RunContext, progress: Progress) -> None:
    """Say at which rate an extension goes on that an older version recorded with another one."""
    if not progress.extensions:
        return
    newest, holds = progress.extensions[-1], extension_at(progress, progress.extensions[-1]["from_step"])
    if holds is not None and holds["lr"] != newest["lr"]:
        rates = [f"{one['lr']:g}" if one["lr"] else "the recipe's final rate" for one in (holds, newest)]
        context.say(
            f"up to epoch {newest['epochs']} at {rates[0]}, not at {rates[1]}: an older version began it so; another "
            "rate: extend it further, with --epochs and --lr"
        )


# ---- What the run left ----------------------------------------------------------------------------------------------


def settings_of(context: RunContext, record: RunRecord, given: Mapping[str, object]) -> Settings:
    """Those of the run's recipe.json, but for what is given now."""
    unknown = set(record.settings) - {one.name for one in dataclasses.fields(Settings)}
    try:
        if unknown:
            raise TypeError(f"unknown are {', '.join(sorted(unknown))}")
        return spec_from_plain(Settings, record.settings | dict(given))
    except TypeError as error:
        raise RunError(f"{context.run.recipe_file}: its settings are none ({error}); restore it from a copy") from None


def find_checkpoint(
    context: RunContext, record: RunRecord, from_file: Path | None
) -> tuple[Path, CheckpointState] | None:
    """The checkpoint to go on from, of a run whose lock is held; None if there never was one.

    Args:
        record: the run's recipe.json; the checkpoint's id and config must equal its.
        from_file: this one; None = the newest good one.

    Raises:
        RunError: no good one, or one of another recipe.
    """
    run = context.run
    if from_file is not None:
        path, state = from_file, read_checkpoint(from_file, record.id)
    else:
        found = newest_good(run.checkpoints, record.id)
        if found is None:
            return None
        path, state, bad = found
        for line in bad:
            context.say(f"skipped: {line}")
    check_same_recipe(record.config, state.config, f"{path} is not of the recipe in {run.recipe_file}")
    return path, state


def settle(context: RunContext, path: Path, state: CheckpointState, from_file: Path | None) -> None:
    """Make the checkpoint in `path` the newest of its run; what a killed process left goes."""
    if not context.writes:
        return
    run = context.run
    remove_leftovers(run.checkpoints)
    remove_leftovers(run.path)
    if from_file is None:
        repair_names(run.checkpoints, path, state.progress)
    else:
        rewind(run.checkpoints, path, context.run_id)
        context.say(f"rewound to {path.name}; later checkpoints are in {run.checkpoints / SUPERSEDED}")


def resumed_setup(
    context: RunContext, recipe: Recipe, numerics: Numerics, machine: Machine, state: CheckpointState, place: str
) -> Setup:
    """The setup of a checkpoint, its data and environment compared with what they were.

    Raises:
        RunError: other data, or a network that does not fit.
    """
    run, before = context.run, str(state.versions.get("device", ""))
    device = pick_device(machine.device, before)
    if machine.device == "auto" and device.type != (fastest := pick_device("auto")).type:
        context.say(
            f"on {device.type}, as before, for the same bits; --device {fastest.type} is faster and ends otherwise"
        )
    check_precision(numerics, device.type)
    set_numerics(numerics.deterministic, numerics.tf32)
    backbone = backbone_of_run(run, state)
    data = opened_as_before(run, recipe, place, backbone, state.data)
    network = saved_network(run, recipe, state)
    # Last: which libraries the network needs is known once it is built.
    for line in environment_differences(state.versions, device, backbone.libraries):
        context.say(f"not bit for bit from here on: {line}")
    give_deterministic_pools(network.module, device)
    if late := said_too_late(device):
        context.say(late)
    module_to_device(network.module, device)
    loaders = make_loaders(data, machine, device, Contents(data.source, run.contents_file))
    if loaders.train.contents.damaged:
        context.say(f"{run.contents_file} is damaged: image files are compared with what they are from now on")
    freeze = network.freeze_map(recipe.trainable, state.progress.plateaus)
    kept = f"as kept in {run.frozen}"
    return Setup(recipe, numerics, machine, backbone, network, freeze, data, loaders, device, kept, "the run")


def extend(progress: Progress, epochs: int, lr: float, recipe: Recipe, train_samples: int) -> str:
    """Record `--epochs N` as a phase of its own behind the schedule's first horizon; of a run that stopped early also
    that it goes on to its own end.

    Returns:
        What comes of it, for people; "" when nothing new was asked: the same command again, after a kill, just goes on.

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
        return ""
    if progress.finish.status == "due":  # the loop is over
        progress.status = progress.finish.ended
    steps = count_steps(recipe, train_samples, progress)
    wanted, goes_on = epochs * steps.per_epoch, is_cut_short(progress, steps)
    where = {"step": progress.step, "epoch": progress.epoch}
    if wanted == steps.end and lr in (0.0, progress.extensions[-1]["lr"] if progress.extensions else 0.0):
        if not goes_on:
            progress.status = "running" if progress.finish.status == "due" else progress.status
            return ""
        progress.history.append(dict(where, event="patience"))
        return f"stopped early at step {progress.step}, it goes on to step {steps.end}{_begin_anew(recipe, progress)}"
    if wanted <= steps.end:
        raise UsageError(f"--epochs {epochs}: {_why_not_longer(progress, steps, wanted, lr)}")
    extension: Extension = {"from_step": steps.end, "epochs": epochs, "lr": lr, "own_rate": True}
    progress.extensions.append(extension)
    rate = learning_rate(recipe, dataclasses.replace(progress, step=steps.end), steps)
    if rate == 0:
        raise UsageError(f"--epochs {epochs}: the recipe's final rate is 0, so nothing would train; give --lr as well")
    progress.history.append(dict(where, event="extend") | extension)
    own = "" if lr else ", the recipe's final one"
    return (
        f"extended to {epochs} epochs: from step {steps.end + 1} to {wanted} the rate is {rate:g}{own}"
        f"{_begin_anew(recipe, progress)}"
    )


def _why_not_longer(progress: Progress, steps: Steps, wanted: int, lr: float) -> str:
    """Why a run of `steps` is not extended to step `wanted`, and what to do."""
    if not is_cut_short(progress, steps):
        return f"the run has {steps.epochs} already; give more"
    stopped = f"the run stopped early at step {progress.step} of {steps.end}"
    if wanted < steps.end:
        return f"{stopped}; give {steps.epochs} to go on to its end, or more"
    return (
        f"{stopped} and goes on by its own schedule up to there, so --lr {lr:g} would not be used; leave it out, or "
        "give more epochs for it; at another rate from here on: a new run, --init-from RUN:best"
    )


def _begin_anew(recipe: Recipe, progress: Progress) -> str:
    """A run that had ended trains again, its patience begun anew; that in words. One that goes on keeps its count."""
    if progress.status == "running":
        return ""
    progress.finish = Finish()
    progress.status, progress.validations_without_best = "running", 0
    patience = recipe.stop.patience
    return f"; the patience of {patience} validations without a new best begins anew" if patience else ""
