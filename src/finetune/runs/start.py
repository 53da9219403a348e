"""Starts a run, or goes on with one; holds what was saved against what is found."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from finetune.base.device import pick_device, set_numerics, to_device
from finetune.base.events import Begun
from finetune.base.formatting import best_text
from finetune.base.lock import alone_in_process, hold_lock
from finetune.base.memory import guard_memory
from finetune.base.signals import StopRequest, listen_for_signals
from finetune.base.terminal import Terminal
from finetune.data.contents import Contents
from finetune.data.order import key
from finetune.data.tokens import Tokenization
from finetune.errors import RunError, StoppedEarly, UsageError
from finetune.models.freeze import frozen_tensors
from finetune.models.heads import rescale
from finetune.models.network import store_frozen
from finetune.models.pretrained import new_network, pretrained
from finetune.models.weights import Weights
from finetune.recipe.execution import Machine, Numerics, Settings, check_precision, split_config
from finetune.recipe.spec import Recipe, located
from finetune.runs.resume import extend, find_checkpoint, resumed_job, settings_of, settle
from finetune.runs.startup_table import facts_of
from finetune.store import checkpoint as checkpoints
from finetune.store.restore import network_from_run
from finetune.store.run_folder import RunFolder, fill_folder, next_folder
from finetune.store.state import Progress, progress_from_plain, progress_to_plain, seed_generators
from finetune.tasks.losses import make_task
from finetune.tasks.losses import to_device as task_to_device
from finetune.training.data_check import check_unbroken, leave_out_broken, look
from finetune.training.dataset import open_data
from finetune.training.loop import train
from finetune.training.optimizer import find_optimizer
from finetune.training.phase import Phase, start_phase
from finetune.training.schedule import count_steps
from finetune.training.setup import Job, make_loaders
from finetune.training.teacher import taught
from finetune.watch.trackers import watching
from finetune.watch.watch import Subject, Watch

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
    place: str = "",
    url: str = "",
    command: Sequence[str] = (),
) -> tuple[RunFolder, Progress]:
    """Begin a run in a folder that holds none, or one that died before its first checkpoint.

    Args:
        path: of the run folder; None = the next free one below runs/.
        name: of the recipe.
        code: files to keep with the run: the recipe and what it imported from its own folder.
        init_from: "RUN", "RUN:best" or "RUN:latest": start from that run's weights.
        copy_frozen: copy the frozen weights into the run folder, so that it stands alone.
        skip_broken: look at every sample first, and leave broken ones out.
        place: where the recipe's data lies now, if not where it says.
        url: of the remote folder that `path` is the mirror of, if it is one.
        command: what to type after `finetune` to do the same again; for people, no secrets.

    Raises:
        FinetuneError: see `train`.
    """
    # What can be wrong is looked at before a folder is made, but for the samples themselves: that may take hours, and
    # a run that is killed there is gone on with like any other.
    job, weights = new_job(recipe, numerics, machine, init_from, place)
    record = {
        "name": name,
        "config": job.identity["config"],
        "settings": dataclasses.asdict(settings),
        "init_from": init_from,
        "copy_frozen": copy_frozen,
        "skip_broken": skip_broken,
        "command": list(command),
    }
    run = RunFolder(path or next_folder(name), url)
    with alone_in_process(), made_folder(run), attended(run, machine, settings, terminal) as (stop, watch):
        run_id = lay_out(run, record, code, job, weights)
        job = taught(job, terminal, stop)
        with closing(job.loaders), closing(start_phase(job, 0, terminal, stop)) as phase:
            # Another run's weights come with that run's measured features, and these stay.
            broken = look(job, phase.feed, measure=not init_from, all_files=skip_broken, terminal=terminal, stop=stop)
            job = dataclasses.replace(job, data=leave_out_broken(job.data, broken, skip_broken, terminal))
            job.loaders.train.contents.save(run.contents_file, terminal.say)
            seed_generators(key("train", recipe.seed))
            progress = Progress(history=[{"event": "start", "step": 0, "epoch": 0}])
            return run, run_job(run, run_id, job, phase, progress, None, settings, watch, stop)


def lay_out(run: RunFolder, record: dict[str, Any], code: Sequence[Path], job: Job, weights: Weights | None) -> str:
    """Fill the folder of a new run; returns the run's id."""
    run.clear()
    run_id = fill_folder(run, record, list(code))
    frozen = frozen_tensors(job.network.module, job.network.rules(job.recipe.trainable.rules), 0)
    store_frozen(run.frozen, weights, frozen, copy=record["copy_frozen"], link=not run.url)
    if isinstance(job.backbone.preprocessing, Tokenization):
        job.backbone.preprocessing.write(run.tokenizer)
    return run_id


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
        if run.has_checkpoint():
            raise RunError(f"run {run} was begun by another process meanwhile; go on with: finetune resume {run}")
        try:
            yield
        except StoppedEarly:
            raise
        except Exception:
            if fresh and not checkpoints.step_files(run.checkpoints):
                run.remove()
            raise


def new_job(
    recipe: Recipe, numerics: Numerics, machine: Machine, init_from: str, place: str = ""
) -> tuple[Job, Weights | None]:
    """The job of a new run, and the file that its frozen tensors are of, if it is one.

    Raises:
        FinetuneError: whatever is wrong with the recipe, the data, the weights or the device.
    """
    device = pick_device(machine.device)
    check_precision(numerics, device.type)
    find_optimizer(recipe.optimizer.name)
    set_numerics(numerics.deterministic)
    if init_from:
        backbone, network, other = network_from_run(recipe, init_from)
        weights, weights_text, preprocessing_of = None, f"from {init_from}", init_from
        data = open_data(located(recipe, place), backbone)
        if data.source.classes != other["classes"]:
            count = len(other["classes"])
            raise RunError(f"--init-from {init_from}: trained on other classes ({count}, here {data.class_count})")
        if data.scale:
            tensors = network.module.state_dict()
            rescale(tensors, network.last_layer_path, other["scale"], data.scale)
            network.module.load_state_dict(tensors)
    else:
        recipe_here = located(recipe, place)
        backbone, weights, tensors = pretrained(recipe_here)
        weights_text = weights.text if weights else "random: nothing is pretrained"
        preprocessing_of = weights.preprocessing_of if weights else "its default weights"
        data = open_data(recipe_here, backbone)
        network = new_network(recipe, backbone, weights, data.output_count, tensors)
        if tensors is not None:  # a part of the file is not the file
            weights, weights_text = None, f"begins as a part of {weights_text}"
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
    place: str = "",
) -> Progress:
    """Go on with a run as if it had never stopped.

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
    record = run.read_recipe()
    recipe, numerics = split_config(record["config"])
    run_settings = settings_of(run, record, settings)
    with (
        alone_in_process(),
        hold_lock(run.path),
        listen_for_signals(f"finetune resume {run}") as stop,
        guard_memory(stop),
    ):
        found = find_checkpoint(run, record, from_file, terminal)
        if found is not None:
            path, state = found
            progress = progress_from_plain(state)
            extended = extend(progress, epochs, lr, recipe, state["data"]["train_samples"])
            over = progress.status != "running"
            # Whatever can be wrong is found before anything on the disk is changed.
            job = None if over else resumed_job(run, recipe, numerics, machine, state, place, terminal)
            settle(run, record["id"], path, state, from_file, terminal)
            if extended:
                # On disk at once: a run killed before its next save must not forget that it was extended.
                state |= progress_to_plain(progress)
                checkpoints.write_checkpoint(run.checkpoints, state, is_best=False, keep=run_settings.keep)
            if job is None:
                if run_settings.report and not run.report_file.exists():  # killed after the last step, before it
                    Watch(terminal).report_old(run, place)
                terminal.say(f"run {run} is {progress.status} at step {progress.step}; to train longer: --epochs N")
                return progress
            with watching_run(run, machine, run_settings, terminal) as watch:
                return go_on(run, record["id"], job, progress, state, run_settings, watch, stop)
    if epochs or lr:
        raise UsageError(f"{run} has no checkpoint yet; go on without --epochs and --lr first")
    return start_over(run, record, machine, run_settings, terminal, place)


def start_over(
    run: RunFolder, record: dict[str, Any], machine: Machine, settings: Settings, terminal: Terminal, place: str
) -> Progress:
    """Begin a run that was stopped before its first checkpoint, as it was begun then."""
    terminal.say(f"{run} has no checkpoint yet: starting over")
    recipe, numerics = split_config(record["config"])
    _, progress = start(
        run.path,
        record["name"],
        recipe,
        numerics,
        machine,
        settings,
        terminal,
        init_from=record["init_from"],
        copy_frozen=record["copy_frozen"],
        skip_broken=record["skip_broken"],
        place=place,
        url=run.url,
        command=record.get("command", ()),
    )
    return progress


def go_on(
    run: RunFolder,
    run_id: str,
    job: Job,
    progress: Progress,
    state: dict[str, Any],
    settings: Settings,
    watch: Watch,
    stop: StopRequest,
) -> Progress:
    """Train from a checkpoint on, in a run whose lock is held."""
    terminal = watch.terminal
    if progress.best:
        problem = checkpoints.repair_best(run.checkpoints, progress.best["step"], run_id)
        if problem:
            terminal.say(f"{problem}: best starts anew")
            progress.best = {}
    where = f"step {progress.step} (epoch {progress.epoch + 1}, sample {progress.position_samples})"
    terminal.say(f"resuming {run} at {where}")
    progress.history.append({"event": "resume", "step": progress.step, "epoch": progress.epoch})
    job = taught(job, terminal, stop, state["data"]["taught_by"])
    epoch = state["frozen"]["epoch"]
    with closing(job.loaders), closing(start_phase(job, epoch, terminal, stop, state["frozen"])) as phase:
        check_unbroken(job.data, phase.feed)
        return run_job(run, run_id, job, phase, progress, state, settings, watch, stop)


# ---- Both --------------------------------------------------------------------------------------------------------


@contextmanager
def attended(
    run: RunFolder, machine: Machine, settings: Settings, terminal: Terminal
) -> Iterator[tuple[StopRequest, Watch]]:
    """While the block runs signals are heard, memory is guarded, and who watches is told how it ends."""
    with (
        listen_for_signals(f"finetune resume {run}") as stop,
        guard_memory(stop),
        watching_run(run, machine, settings, terminal) as watch,
    ):
        yield stop, watch


def watching_run(
    run: RunFolder, machine: Machine, settings: Settings, terminal: Terminal
) -> AbstractContextManager[Watch]:
    return watching(run, settings.trackers, machine.notify, settings.notify_every_epochs, terminal)


def run_job(
    run: RunFolder,
    run_id: str,
    job: Job,
    phase: Phase,
    progress: Progress,
    resumed: dict[str, Any] | None,
    settings: Settings,
    watch: Watch,
    stop: StopRequest,
) -> Progress:
    """Show what is about to happen, then train."""
    data, recipe = job.data, job.recipe
    targets = data.source.targets[data.split.train]
    task = task_to_device(make_task(recipe.task, data.output_count, data.scale, targets), job.device)
    rules = job.network.rules(recipe.trainable.rules)

    def next_phase(epoch: int) -> Phase:
        begun = start_phase(job, epoch, watch.terminal, stop)
        try:
            check_unbroken(data, begun.feed)
        except RunError:
            begun.close()
            raise
        return begun

    tell_of_beginning(watch, run, run_id, job, phase, progress, settings, is_resumed=resumed is not None)
    progress = train(
        run,
        recipe,
        {"run_id": run_id} | job.identity,
        job.network.module,
        rules,
        phase,
        next_phase,
        job.loaders.train.contents,
        data,
        task,
        progress,
        resumed,
        job.device,
        job.numerics.precision,
        settings,
        watch,
        stop,
    )
    watch.end(progress.status, f"{progress.status}: {best_text(progress.best)}")
    return progress


def tell_of_beginning(
    watch: Watch,
    run: RunFolder,
    run_id: str,
    job: Job,
    phase: Phase,
    progress: Progress,
    settings: Settings,
    is_resumed: bool,
) -> None:
    """Show the facts, and tell everybody who watches what is about to be trained."""
    data, network, recipe = job.data, job.network, job.recipe
    steps_per_epoch, _, end_step = count_steps(recipe, len(data.split.train), progress)
    facts = facts_of(run, job, phase)
    watch.terminal.begin(facts, progress.step, end_step)
    watch.subject = Subject(
        run, run_id, data.source.classes, data.source, facts, network.module, network.head(), network.last_layer(),
        to_device(job.backbone.preprocessing.example(1), job.device), settings.report,
    )  # fmt: skip
    begun = Begun(
        run_id, str(run), run.path, job.identity["config"], facts, progress.step, end_step,
        math.ceil(end_step / steps_per_epoch), is_resumed, recipe.best_metric, progress.best,
    )  # fmt: skip
    watch.begin(begun, job.device)
