"""A training under way: where it stands, and what the loop does between two steps."""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from finetune.base.events import Validated
from finetune.base.halves import free_memory, freeing, in_halves
from finetune.data.batch import Batch, Request
from finetune.data.order import batches_from, reading_order
from finetune.errors import RunError
from finetune.models.freeze import Freeze
from finetune.store.metrics_log import PASS_SECONDS
from finetune.store.state import (
    CheckpointState,
    FrozenFacts,
    LogMark,
    Progress,
    capture_generators,
    numeric_environment,
    restore_generators,
)
from finetune.store.steps import count_steps
from finetune.tasks.losses import Task
from finetune.training.advice import CurveAdvice
from finetune.training.context import RunContext
from finetune.training.data_check import check_unbroken
from finetune.training.finish import (
    reason_against,
)
from finetune.training.nan_guard import Losses
from finetune.training.optimizer import learning_rates, load_optimizer_state, optimizer_state
from finetune.training.phase import Phase, start_phase
from finetune.training.reference import keep_reference, wants_reference
from finetune.training.schedule import warmth
from finetune.training.setup import Setup
from finetune.training.validation import adjustments, record_validation, validate

# Of a phase, on which each tensor that trains must get a gradient; some encoders skip layers by chance.
LOOKED_BATCHES = 8
SHOWN_NAMES = 5
# A validation needs no gradients, so more samples fit at once.
VALIDATION_BATCHES = 4


def capture_state(
    setup: Setup,
    freeze: Freeze,
    frozen: FrozenFacts,
    progress: Progress,
    optimizer: dict[str, object],
    scaler: dict[str, object],
    mark: LogMark,
    run_id: str = "",
    keep: int = 0,
) -> CheckpointState:
    """Take down all that survives a restart, as it is now.

    Args:
        frozen: what `freeze` holds still.
        optimizer, scaler: their plain states.
        mark: of the log.
        keep: numbered checkpoints that the run keeps.
    """
    return CheckpointState(
        run_id=run_id,
        config=setup.config(),
        data=setup.data.facts(),
        network=setup.network_facts(),
        progress=progress,
        model={name: value.detach().cpu().clone() for name, value in freeze.changeable().items()},
        frozen=frozen,
        optimizer=optimizer,
        scaler=scaler,
        rng=capture_generators(setup.device),
        metrics_file=mark,
        keep=keep,
        trackers={},
        versions=numeric_environment(setup.device, setup.backbone.libraries),
    )


class Session:
    """What the functions of the loop share. All that survives a restart is in `progress`.

    Args:
        phase: the one to begin in; of a resumed run, that of its checkpoint.
        resumed: the checkpoint to go on from, already loaded into the network, or None for a fresh start.

    Attributes:
        steps: per epoch, of the schedule's horizon, and of the run's end.
        epochs: in all.
        samples: to train on, in an epoch.
        best_model: what trains, of the best validation; {} where that was in a process before.
    """

    def __init__(
        self, setup: Setup, context: RunContext, phase: Phase, progress: Progress, resumed: CheckpointState | None
    ):
        self.setup, self.context, self.phase, self.progress = setup, context, phase, progress
        self.recipe, self.device = setup.recipe, setup.device
        self.task: Task = setup.make_task()
        self.samples = len(setup.data.split.train)
        self.steps = count_steps(setup.recipe, self.samples, progress)
        self.epochs = self.steps.epochs
        if not 0 <= progress.position_samples <= self.samples:
            raise RunError(
                f"the checkpoint stands at sample {progress.position_samples} of an epoch of {self.samples}; go on "
                "from another: --from FILE"
            )
        self.scaler = torch.amp.GradScaler(setup.device.type, enabled=setup.numerics.precision == "fp16")
        if resumed is not None:
            load_optimizer_state(phase.optimizer, resumed.optimizer)
            self.scaler.load_state_dict(resumed.scaler)
        self._resumed = resumed
        self._train, self._validation = (reading_order(part, self.samples) for part in setup.data.split[:2])
        self._contents = setup.loaders.train.contents
        self.losses = Losses(context.bad_batch_file, self._contents.source.name)
        self._advice = CurveAdvice(setup.recipe)
        self._last_saved = time.monotonic()
        self.best_model: dict[str, Tensor] = {}
        self._untouched, self._looked_batches = set(phase.trainable), 0
        self._log = context.open_log(resumed.metrics_file if resumed else None, progress.step)

    # ---- The two ends -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """See that there is room for checkpoints; put back what was saved; make up for a validation that is due."""
        free_memory(self.device)
        # Most optimizers hold two numbers a weight from their first step on.
        weights_bytes = sum(p.nbytes for group in self.phase.optimizer.param_groups for p in group["params"])
        self.context.check_room(self.state(), 0 if self._resumed else 2 * weights_bytes)
        # Last of all: whatever was built above may have drawn random numbers.
        if self._resumed is not None:
            restore_generators(self._resumed.rng, self.device)
        if self._validation_is_due() or self._outcome():
            self.conclude_step(save_is_due=False)

    @property
    def goes_on(self) -> bool:
        progress = self.progress
        return progress.step < self.steps.end and progress.status == "running" and not progress.finish.status

    def check_frozen(self) -> None:
        """Raises: RunError: frozen tensors are not what they were."""
        if self.phase.freeze.sha256() != self.phase.frozen_sha256:
            raise RunError("frozen tensors changed while training; this is a fault of finetune: please report it")

    def close(self) -> None:
        self._log.close()
        self.phase.close()

    def write_log(self, values: dict[str, float]) -> None:
        """A line of what is told of the step that was done last."""
        epoch = math.ceil(self.progress.step / self.steps.per_epoch)
        self._log.write({"step": self.progress.step, "epoch": epoch} | values)

    # ---- Before an epoch --------------------------------------------------------------------------------------------

    def thaw(self) -> None:
        """Enter the next phase, if one begins in this epoch: its new optimizer takes over the old one's state."""
        progress, setup = self.progress, self.setup
        if progress.plateaus:
            freeze = setup.network.freeze_map(self.recipe.trainable, progress.plateaus)
            setup = self.setup = dataclasses.replace(setup, freeze=freeze)
        if setup.freeze.at(progress.epoch).number == self.phase.freeze.number:
            return
        carried, before = optimizer_state(self.phase.optimizer), set(self.phase.trainable)
        self.phase.close()
        self.phase = start_phase(self.setup, progress.epoch, self.context, halvings=self.phase.feed.halvings)
        check_unbroken(self.setup.data, self.phase.feed)
        load_optimizer_state(self.phase.optimizer, carried)
        if self.recipe.stop.anew:
            progress.validations_without_best = 0
        self._untouched, self._looked_batches = set(self.phase.trainable), 0
        progress.history.append({"event": "thaw", "step": progress.step, "epoch": progress.epoch})
        added = [name for name in self.phase.trainable if name not in before]
        what = ", ".join(setup.network.names_of_blocks(added))
        self.context.watch.say(
            f"epoch {progress.epoch + 1}: thawed {what}, {len(self.phase.trainable)} tensors train now"
        )

    def warmth(self, since: int) -> float:
        """See `schedule.warmth`."""
        return warmth(self.recipe, self.progress.step, self.steps, since)

    def check_touched(self) -> None:
        """See that each tensor that is to train gets a gradient, on the first batches of a phase.

        Raises:
            RunError: some never did.
        """
        if not self._untouched or not self.recipe.trainable.checked:
            return
        parameters = dict(self.setup.network.module.named_parameters())
        self._untouched -= {name for name in self._untouched if parameters[name].grad is not None}
        self._looked_batches += 1
        if self._untouched and self._looked_batches >= LOOKED_BATCHES:
            names = sorted(self._untouched)
            more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
            raise RunError(
                f"{len(names)} tensor(s) that are to train had no gradient in {self._looked_batches} batches: "
                f"{', '.join(names[:SHOWN_NAMES])}{more}; the network's outputs do not depend on them: leave them out "
                "of --train and --thaw, or give all, which does"
            )

    def batches(self) -> Iterator[Batch]:
        """The rest of the epoch: an order that depends on seed and epoch alone, from the position on."""
        recipe, progress = self.recipe, self.progress
        order = self.setup.data.epoch_samples(recipe.seed, progress.epoch, recipe.batch_size, self._train)
        batches = batches_from(order, recipe.batch_size, progress.position_samples, recipe.folds)
        batches = itertools.islice(batches, self.steps.end - progress.step)
        view = progress.epoch % recipe.data.views if recipe.data.views else progress.epoch
        augment_epoch = view if recipe.data.views or not self.phase.feed.is_kept else None
        return self.phase.feed.train.batches(Request(batch.tolist(), augment_epoch) for batch in batches)

    # ---- After a step -----------------------------------------------------------------------------------------------

    def advance(self, batch: Batch, batch_loss: Tensor, moved: bool) -> None:
        """Count a step, and whether it moved anything. Nothing here waits for the device."""
        progress, count = self.progress, len(batch.targets)
        progress.step += 1
        progress.skipped_steps += not moved
        progress.position_samples += count
        if progress.loss_sum.device != batch_loss.device:
            progress.loss_sum = progress.loss_sum.to(batch_loss.device)
        progress.loss_sum = progress.loss_sum.add(batch_loss, alpha=count)
        progress.loss_samples += count
        self.losses.note(progress.step, batch.indices, batch_loss)
        self.context.watch.step(progress.step, progress.epoch + 1, self.epochs, count)

    def log(self, batch_loss: Tensor, norm: Tensor) -> None:
        """A line in metrics.jsonl, also for those who watch. Waits for the device."""
        self.losses.check()
        progress, watch = self.progress, self.context.watch
        values = {"train/loss": batch_loss.item(), "train/gradient_norm": norm.item()}
        if self.scaler.is_enabled():
            values["train/skipped_steps"] = progress.skipped_steps
        values |= learning_rates(self.phase.optimizer) | watch.measure()
        self._log.write({"step": progress.step, "epoch": progress.epoch + 1} | values)
        watch.logged(progress.step, values)

    @property
    def seconds_since_save(self) -> float:
        return time.monotonic() - self._last_saved

    @property
    def save_is_due(self) -> bool:
        """By the count of steps, or by the clock, which changes no number."""
        settings, minutes = self.context.settings, self.seconds_since_save / 60
        by_count = bool(settings.save_every_steps) and self.progress.step % settings.save_every_steps == 0
        return by_count or bool(settings.save_every_minutes and minutes >= settings.save_every_minutes)

    def conclude_step(self, save_is_due: bool) -> None:
        """What follows a step: validation, the end of an epoch or of the run, a save, a stop. A stop does not wait for
        a validation: whoever resumes begins with it.

        Raises:
            StoppedEarly: asked for; the state is saved.
        """
        progress, stop = self.progress, self.context.stop
        due = self._validation_is_due()
        is_best = self._validate() if due and not stop.requested else False
        outcome = ""
        if not self._validation_is_due():
            if progress.position_samples >= self.samples:
                progress.epoch, progress.position_samples = progress.epoch + 1, 0
                progress.loss_sum, progress.loss_samples = torch.zeros(()), 0
            if outcome := self._outcome():
                is_best = progress.best.get("step") == progress.step  # also where a process before has validated it
                self._keep_reference(is_best)
                self._end(outcome)
        if due or outcome or save_is_due or stop.requested:
            self.save(is_best)
        if stop.requested and progress.status == "running":
            saved = ", saved" if self.context.writes else ""
            raise stop.stopped(f"at step {progress.step} of {self.steps.end}{saved}")

    def _outcome(self) -> str:
        """How the loop ends where it stands; "" = it goes on, or has ended."""
        progress = self.progress
        if progress.status != "running" or progress.finish.status:
            return ""
        thaws_next = bool(progress.plateaus) and progress.plateaus[-1] > self.phase.freeze.epoch
        if 0 < self.recipe.stop.patience <= progress.validations_without_best and not thaws_next:
            return "stopped early"
        return "finished" if progress.step >= self.steps.end else ""

    def _keep_reference(self, is_best: bool) -> None:
        """Before the save that ends the loop: after it a kill would lose it.

        Raises:
            StoppedEarly: asked for; the state is saved, and whoever resumes begins with this.
        """
        setup, phase, context = self.setup, self.phase, self.context
        if not context.writes:
            return
        if not wants_reference(setup, phase):
            context.save_novelty(b"")
            return
        if not phase.feed.is_kept:  # it takes as long as an epoch, or a part of it
            self.save(is_best)
        keep_reference(setup, phase, context, self.best_model, is_best=is_best)

    def _end(self, status: str) -> None:
        """The loop is over; the run is, too, unless its head is still to be solved."""
        finish = self.progress.finish
        if reason_against(self.setup, self.phase.feed):
            self.progress.status = status
        elif not finish.status:
            finish.status, finish.ended = "due", status
        self.phase.freeze.modes()

    # ---- Validation -------------------------------------------------------------------------------------------------
    def _validation_is_due(self) -> bool:
        progress, every = self.progress, self.recipe.validate_every_steps
        at_end = progress.position_samples >= self.samples or progress.step >= self.steps.end
        due = at_end or bool(every and progress.step % every == 0)
        return due and progress.validated_step < progress.step

    def _validate(self) -> bool:
        """Validate, record, and say whether it is the best so far. A stop leaves it due."""
        self.losses.check()
        setup, progress, watch = self.setup, self.progress, self.context.watch
        epoch_loss = progress.epoch_loss()
        size = self.recipe.batch_size * VALIDATION_BATCHES
        setup.network.module.eval()
        attempt = partial(
            validate, self.phase.feed, self._validation, size, self.task, self.device, setup.numerics.precision,
            self.context.stop, watch.layer,
        )  # fmt: skip
        # Its batches are larger than those that train, which stay as they are when one of these does not fit.
        halvings, free = max(progress.halvings, progress.validation_halvings), freeing(self.device, watch.say)
        evaluation, progress.validation_halvings = in_halves(attempt, size, halvings, free, note=" in validations")
        self.phase.freeze.modes()
        if evaluation is None:
            return False
        epoch = math.ceil(progress.step / self.steps.per_epoch)
        figures = evaluation.figures()
        best = record_validation(self.recipe, progress, figures, epoch, evaluation.samples)
        if best:
            progress.best |= adjustments(self.recipe, evaluation)
        if best and self.recipe.finish.way != "none":
            own = self.phase.freeze.changeable()
            self.best_model = {name: value.detach().cpu().clone() for name, value in own.items()}
        values, features = {"train/epoch_loss": epoch_loss} | figures, self.phase.feed.features
        times = {PASS_SECONDS: round(features.pass_seconds, 3)} if features is not None and epoch == 1 else {}
        self.write_log(values | times)
        rate = learning_rates(self.phase.optimizer)["lr"]
        for line in self._advice.after(epoch, epoch_loss, figures["val/loss"], rate):
            watch.say(line)
        watch.validated(Validated(progress.step, epoch, self.epochs, values, progress.best, best), evaluation)
        return best

    # ---- Checkpoints ------------------------------------------------------------------------------------------------

    def state(self) -> CheckpointState:
        """The checkpoint of this moment."""
        optimizer, scaler = optimizer_state(self.phase.optimizer), self.scaler.state_dict()
        frozen, mark = self.phase.facts(), self._log.mark()
        run_id, keep = self.context.run_id, self.context.settings.keep
        return capture_state(
            self.setup, self.phase.freeze, frozen, self.progress, optimizer, scaler, mark, run_id, keep
        )

    def save(self, is_best: bool) -> None:
        """Raises: RunError: a loss or a weight is no number; nothing is saved then."""
        self.losses.check()
        state = self.state()
        self.losses.check_weights(state.model)
        self.context.save_contents(self._contents)
        self.context.save(state, is_best=is_best)
        self._last_saved = time.monotonic()
