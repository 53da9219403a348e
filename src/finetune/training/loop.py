"""The training loop, top to bottom. Helpers are leaf functions; what survives a restart is in `state.Progress`."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from finetune.base.device import to_device
from finetune.base.events import Validated
from finetune.base.signals import StopRequest
from finetune.data.batch import Batch, Request
from finetune.data.contents import Contents
from finetune.data.order import batches_from, reading_order
from finetune.errors import RunError
from finetune.models.freeze import (
    Rule,
    changeable_tensors,
    frozen_tensors,
    hash_tensors,
    learning_statistics,
    phase_of,
    set_modes,
)
from finetune.recipe.execution import Settings
from finetune.recipe.spec import Recipe
from finetune.store.checkpoint import check_room, write_checkpoint
from finetune.store.metrics_log import MetricsFile
from finetune.store.run_folder import RunFolder
from finetune.store.state import (
    Progress,
    capture_generators,
    numeric_environment,
    progress_to_plain,
    restore_generators,
)
from finetune.tasks.losses import Task
from finetune.training.dataset import Data
from finetune.training.nan_guard import Losses
from finetune.training.optimizer import (
    learning_rates,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from finetune.training.phase import Phase
from finetune.training.schedule import count_steps, learning_rate
from finetune.training.step import free_memory, gradient_norm, gradients, in_halves, optimizer_step
from finetune.training.validation import record_validation, validate
from finetune.watch.watch import Watch


def train(
    run: RunFolder,
    recipe: Recipe,
    identity: dict[str, Any],
    model: nn.Module,
    rules: tuple[Rule, ...],
    phase: Phase,
    next_phase: Callable[[int], Phase],
    contents: Contents,
    data: Data,
    task: Task,
    progress: Progress,
    resumed: dict[str, Any] | None,
    device: torch.device,
    precision: str,
    settings: Settings,
    watch: Watch,
    stop: StopRequest,
) -> Progress:
    """Train from where `progress` stands to the end.

    Args:
        identity: what a checkpoint belongs to: config, data, network; a resume refuses others.
        phase: the one to begin in; of a resumed run, that of its checkpoint.
        next_phase: epoch -> the phase that begins there.
        contents: what the image files held when they were first read.
        resumed: the checkpoint to go on from, already loaded into `model`, or None for a fresh start.

    Raises:
        StoppedEarly: a signal asked for it; the state is saved.
        RunError: the loss is not finite, memory or disk do not suffice, or frozen tensors changed.
    """
    samples = len(data.split.train)
    steps_per_epoch, horizon_steps, end_step = count_steps(recipe, samples, progress)
    epochs = math.ceil(end_step / steps_per_epoch)
    batchnorm, every = recipe.trainable.batchnorm, recipe.validate_every_steps
    spec = recipe.optimizer
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    last_saved = time.monotonic()
    train_samples, validation_samples = (reading_order(part, samples) for part in data.split[:2])

    if resumed:
        load_optimizer_state(phase.optimizer, resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])

    def state_now() -> dict[str, Any]:
        return (
            identity
            | progress_to_plain(progress)
            | {
                "model": {
                    k: v.detach().cpu().clone() for k, v in changeable_tensors(model, rules, phase.epoch).items()
                },
                "frozen": phase.to_plain(model),
                "optimizer": optimizer_state(phase.optimizer),
                "scaler": scaler.state_dict(),
                "rng": capture_generators(),
                "metrics_file": metrics_file.mark(),
                "retention": {"keep": settings.keep},
                "trackers": {},
                "versions": numeric_environment(device),
            }
        )

    def save(is_best: bool) -> None:
        nonlocal last_saved
        losses.check()
        state = state_now()
        losses.check_weights(state["model"])
        contents.save(run.contents_file, watch.say)
        watch.saving()
        write_checkpoint(run.checkpoints, state, is_best=is_best, keep=settings.keep)
        last_saved = time.monotonic()
        watch.saved()

    def ran_out_of_memory(text: str) -> None:
        free_memory(device)
        watch.say(text)

    def validation_is_due() -> bool:
        at_end = progress.position_samples >= samples or progress.step >= end_step
        due = at_end or bool(every and progress.step % every == 0)
        return due and progress.validated_step < progress.step

    def run_validation() -> bool:
        """Validate, record, and say whether it is the best so far. A stop leaves it due."""
        losses.check()
        epoch_loss = progress.epoch_loss()
        size = recipe.batch_size * 4

        validate_all = partial(validate, model, phase.feed, validation_samples, size, task, device, precision, stop)
        attempt = partial(validate_all, watch.layer)
        outcomes, progress.halvings = in_halves(attempt, size, progress.halvings, ran_out_of_memory)
        set_modes(model, rules, batchnorm, phase.epoch)
        if outcomes is None:
            return False
        epoch = math.ceil(progress.step / steps_per_epoch)
        figures = outcomes.figures()
        best = record_validation(recipe, progress, figures, epoch)
        values = {"train/epoch_loss": epoch_loss} | figures
        metrics_file.write({"step": progress.step, "epoch": epoch} | values)
        watch.validated(Validated(progress.step, epoch, epochs, values, progress.best, best), outcomes)
        return best

    def conclude_step(save_is_due: bool) -> None:
        """What follows a step: validation, the end of an epoch or of the run, a save, a stop. A stop does not wait for
        a validation: whoever resumes begins with it."""
        due = validation_is_due()
        is_best = run_validation() if due and not stop.requested else False
        if not validation_is_due():
            if due and 0 < recipe.stop.patience <= progress.validations_without_best:
                progress.status = "stopped early"
            elif progress.step >= end_step:
                progress.status = "finished"
            if progress.position_samples >= samples:
                progress.epoch, progress.position_samples = progress.epoch + 1, 0
                progress.loss_sum, progress.loss_samples = torch.zeros(()), 0
        if due or save_is_due or stop.requested:
            save(is_best)
        if stop.requested and progress.status == "running":
            raise stop.stopped(f"at step {progress.step} of {end_step}, saved")

    def batches_of_epoch() -> Iterator[Batch]:
        order = data.epoch_samples(recipe.seed, progress.epoch, recipe.batch_size, train_samples)
        batches = batches_from(order, recipe.batch_size, progress.position_samples)
        batches = itertools.islice(batches, end_step - progress.step)
        view = progress.epoch % recipe.data.views if recipe.data.views else progress.epoch
        augment_epoch = view if recipe.data.views or not phase.feed.is_kept else None
        return phase.feed.train.batches(Request(batch.tolist(), augment_epoch) for batch in batches)

    mark = resumed["metrics_file"] if resumed else None
    metrics_file = MetricsFile(run.metrics_file, watch.say, mark, progress.step)
    losses = Losses(run.bad_batch_file, contents.source.name)

    try:
        free_memory(device)
        # Most optimizers hold two numbers a weight from their first step on.
        weights_bytes = sum(p.nbytes for group in phase.optimizer.param_groups for p in group["params"])
        check_room(run.checkpoints, state_now(), settings.keep, 0 if resumed else 2 * weights_bytes)
        # Last of all: whatever was built above may have drawn random numbers.
        if resumed:
            restore_generators(resumed["rng"])
        if validation_is_due():
            conclude_step(save_is_due=False)

        while progress.step < end_step and progress.status == "running":
            # ---- Thaw -------------------------------------------------------------------------------------------
            if phase_of(rules, progress.epoch) != phase.number:
                carried = optimizer_state(phase.optimizer)
                phase.close()
                phase = next_phase(progress.epoch)
                load_optimizer_state(phase.optimizer, carried)
                progress.history.append({"event": "thaw", "step": progress.step, "epoch": progress.epoch})
                watch.say(f"epoch {progress.epoch + 1}: thawed, {len(phase.trainable)} tensors train now")

            optimizer = phase.optimizer
            set_modes(model, rules, batchnorm, phase.epoch)
            statistics = learning_statistics(model)
            for batch in batches_of_epoch():
                # ---- One optimizer step -------------------------------------------------------------------------
                inputs, targets = to_device(batch.inputs, device), batch.targets.to(device, non_blocking=True)
                set_learning_rate(optimizer, learning_rate(recipe, progress, steps_per_epoch, horizon_steps))
                batch_samples, halvings = len(targets), progress.halvings
                attempt = partial(
                    gradients, phase.feed.forward, task, inputs, targets, spec.accumulate, optimizer, scaler, precision
                )
                at_once = math.ceil(batch_samples / spec.accumulate)
                batch_loss, progress.halvings = in_halves(attempt, at_once, halvings, ran_out_of_memory, statistics)
                norm = gradient_norm(optimizer, scaler) if (progress.step + 1) % settings.log_every_steps == 0 else None
                watch.take_gradients()
                optimizer_step(optimizer, scaler, spec.clip_norm)

                # ---- Where we are now ---------------------------------------------------------------------------
                progress.step += 1
                progress.position_samples += batch_samples
                progress.loss_sum = progress.loss_sum.to(device).add(batch_loss, alpha=batch_samples)
                progress.loss_samples += batch_samples
                losses.note(progress.step, batch.indices, batch_loss)
                watch.step(progress.step, progress.epoch + 1, epochs, batch_samples)
                if norm is not None:
                    losses.check()
                    values = {"train/loss": batch_loss.item(), "train/gradient_norm": norm.item()}
                    values |= learning_rates(optimizer) | watch.measure()
                    metrics_file.write({"step": progress.step, "epoch": progress.epoch + 1} | values)
                    watch.logged(progress.step, values)

                # ---- Validate and save: on step boundaries only ---------------------------------------------------
                minutes = (time.monotonic() - last_saved) / 60
                save_is_due = bool(settings.save_every_steps and progress.step % settings.save_every_steps == 0)
                save_is_due |= bool(settings.save_every_minutes and minutes >= settings.save_every_minutes)
                save_is_due |= progress.halvings != halvings  # not to be found out again
                conclude_step(save_is_due)
                if progress.status != "running":
                    break
        if hash_tensors(frozen_tensors(model, rules, phase.epoch)) != phase.frozen_sha256:
            raise RunError("frozen tensors changed while training; this is a fault of finetune: please report it")
    finally:
        metrics_file.close()
        phase.close()
    return progress
