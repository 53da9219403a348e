"""The training loop, top to bottom. What it does between two steps is in `session`; what survives a restart, in
`store.state`."""

import math
from functools import partial

from finetune.base.device import autocast
from finetune.base.halves import freeing, in_halves
from finetune.models.freeze import learning_statistics
from finetune.store.state import CheckpointState, Progress
from finetune.training.context import RunContext
from finetune.training.last_stage import solve_head
from finetune.training.optimizer import set_learning_rates
from finetune.training.phase import Phase
from finetune.training.schedule import learning_rate
from finetune.training.session import Session
from finetune.training.setup import Setup
from finetune.training.step import gradient_norm, gradients, optimizer_step

# Of a batch that is computed in more parts than before.
PARTS_NOTE = "; BatchNorm learns from each part by itself, so this is not quite the step of the whole batch"


def train(
    setup: Setup, context: RunContext, phase: Phase, progress: Progress, resumed: CheckpointState | None = None
) -> Progress:
    """Train from where `progress` stands to the end.

    Args:
        context: where it is written, and who is told.
        phase: the one to begin in, closed in the end; of a resumed run, that of its checkpoint.
        resumed: the checkpoint to go on from, already loaded into the network; None for a fresh start.

    Raises:
        StoppedEarly: it was asked for; the state is saved.
        RunError: the loss is not finite, memory or disk do not suffice, or frozen tensors changed.
    """
    recipe, spec, device = setup.recipe, setup.recipe.optimizer, setup.device
    watch, log_every = context.watch, context.settings.log_every_steps
    session, free = Session(setup, context, phase, progress, resumed), freeing(device, context.watch.say)
    try:
        session.begin()
        while session.goes_on:
            # ---- Thaw, if it is time ---------------------------------------------------------------------------------
            session.thaw()
            phase, optimizer, scaler = session.phase, session.phase.optimizer, session.scaler
            phase.freeze.modes()
            statistics = learning_statistics(setup.network.module)
            in_twos = bool(statistics) and recipe.folds
            least = 2 if in_twos else 1
            # What it finds to leave is the same at every step: to ask once is a hundredth of a small one.
            arithmetic = autocast(device, setup.numerics.precision)
            for batch in session.batches():
                # ---- One optimizer step ------------------------------------------------------------------------------
                targets = batch.targets.to(device, non_blocking=True)
                set_learning_rates(optimizer, learning_rate(recipe, progress, session.steps), session.warmth)
                attempt = partial(
                    gradients, phase.feed.forward, session.task, batch.inputs, targets, spec.accumulate, optimizer,
                    scaler, arithmetic, in_twos,
                )  # fmt: skip
                at_once, halvings = math.ceil(len(targets) / spec.accumulate), progress.halvings
                loss, progress.halvings = in_halves(
                    attempt, at_once, halvings, free, statistics, least, PARTS_NOTE if statistics else ""
                )
                session.check_touched()
                norm = gradient_norm(optimizer, scaler) if (progress.step + 1) % log_every == 0 else None
                watch.take_gradients()
                moved = optimizer_step(optimizer, scaler, spec.clip_norm)

                # ---- Where we are now --------------------------------------------------------------------------------
                session.advance(batch, loss, moved)
                if norm is not None:
                    session.log(loss, norm)

                # ---- Validate and save: on step boundaries only ------------------------------------------------------
                was_halved = progress.halvings != halvings  # not to be found out again
                session.conclude_step(session.save_is_due or was_halved)
                if not session.goes_on:
                    break
        solve_head(session)
        session.check_frozen()
    finally:
        session.close()
    return progress
