"""The last stage under way: what `finish` computes is logged, saved and told; a kill within it loses nothing."""

import dataclasses
import math

import torch
from torch import Tensor

from finetune.errors import RunError, one_line
from finetune.recipe.spec import Regression
from finetune.tasks.conformal import half_width_of
from finetune.tasks.doubts import find_doubts
from finetune.tasks.thresholds import thresholds_of
from finetune.training.finish import (
    Stage,
    finish_text,
    gather,
    head_state,
    judge,
    temperature_of_head,
    which_ships,
    workers,
)
from finetune.training.regularisation import next_strength, solve_all, try_next
from finetune.training.session import Session

# Between two saves.
SAVE_SECONDS = 5.0


def solve_head(session: Session) -> None:
    """Solve the head of a run whose loop is over, if it can be; the better of the two ships.

    Raises:
        StoppedEarly: asked for; what was tried is saved.
    """
    progress, finish, feed = session.progress, session.progress.finish, session.phase.feed
    if finish.status != "due":
        return
    stage = gather(session.setup, feed, session.task)
    epoch = math.ceil(progress.step / session.steps.per_epoch)
    while next_strength(finish) is not None:
        tried = try_next(finish, stage.held, workers())
        folds = {f"finish/fold/{number}": loss for number, loss in enumerate(tried["fold_losses"])}
        values = {f"finish/{name}": tried[name] for name in ("log_loss", "temperature")}
        values |= {"finish/lambda": tried["strength"]}
        session.write_log(values | folds)
        if session.context.stop.requested:
            session.save(False)
            raise session.context.stop.stopped("while the head was solved; what was tried is kept")
        if session.context.settings.save_every_steps or session.seconds_since_save > SAVE_SECONDS:
            session.save(False)
    solved = solve_all(stage.held, finish)
    loop, is_best = _best_head(session)
    finish.judged, evaluation = judge(session.setup, feed, session.task, stage, finish, solved, loop)
    finish.ships = which_ships(finish.judged) if is_best else "final"
    finish.status, progress.status = "done", finish.ended
    figures, held_out = evaluation.figures(), stage.held.outputs_held_out(finish.best_weights)
    held_out /= temperature_of_head(session.setup, finish)
    _save_final(session, stage, solved, figures, held_out)
    ours = {f"finish/{name.removeprefix('val/')}": value for name, value in figures.items()}
    session.write_log(ours)
    finish.weights = finish.best_weights = torch.zeros(0, dtype=torch.float64)
    text, ships = finish_text(finish, evaluation), finish.ships == "final"
    temperature = temperature_of_head(session.setup, finish) if session.recipe.finish.calibrate else None
    session.context.watch.solved(text, progress.step, epoch, evaluation, temperature, ships=ships)
    _say_doubts(session, stage, held_out)
    session.save(False)


def _say_doubts(session: Session, stage: Stage, outputs: Tensor) -> None:
    """Write labels.csv, and say how many labels are worth a look."""
    source = session.setup.data.source
    doubts = find_doubts(source, session.recipe.task, stage.held.held_out.of(stage.samples), outputs)
    if not doubts:
        return
    session.context.save_labels(doubts, session.setup.data.skipped if session.recipe.data.without else ())
    wrong = [one for one in doubts if one.looks_wrong]
    if wrong and session.context.writes:
        first, count = wrong[0], len(stage.samples)
        of_all = f" that were looked at, of {count:,}," if len(doubts) < count else ""
        session.context.watch.say(
            f"{len(wrong):,} of {len(doubts):,} labels{of_all} look wrong, like {first.name}: {first.label!r}, "
            f"likelier {first.likelier!r}; labels.csv lists them: mark those that are, and train again with --without"
        )


def _best_head(session: Session) -> tuple[dict[str, Tensor], bool]:
    """Tensors of the last layer, of the loop's best; where that is gone, of its last step, and False."""
    path, model, is_best = session.setup.network.last_layer_path, session.best_model, True
    if not model:
        try:
            model = session.context.read_best().model
        except (RunError, FileNotFoundError) as error:
            session.context.watch.say(f"the loop's best is gone ({one_line(error)}): the solved head ships")
            model, is_best = session.phase.freeze.changeable(), False
    head = {name.removeprefix(f"{path}."): value.cpu() for name, value in model.items() if name.startswith(f"{path}.")}
    return head, is_best


def _save_final(session: Session, stage: Stage, solved: Tensor, figures: dict[str, float], outputs: Tensor) -> None:
    """Args: outputs: of the rows that were held out, as they ship."""
    finish, layer = session.progress.finish, session.setup.network.last_layer()
    assert layer is not None
    path, temperature = session.setup.network.last_layer_path, temperature_of_head(session.setup, finish)
    state = session.state()
    found = head_state(stage, solved, temperature, layer)
    state.model = state.model | {f"{path}.{name}": value for name, value in found.items()}
    session.losses.check_weights(state.model)
    held_out = stage.held.held_out
    held = dataclasses.replace(
        finish, weights=finish.weights[:0], best_weights=finish.weights[:0],
        held_samples=held_out.of(stage.samples), held_outputs=outputs,
        thresholds=thresholds_of(session.recipe.task, outputs, held_out.of(stage.held.targets)),
        half_width=_half_width(session, outputs, held_out.of(stage.held.targets)),
    )  # fmt: skip
    state.progress = dataclasses.replace(session.progress, finish=held, last_validation=figures)
    session.context.save_final(state)


def _half_width(session: Session, outputs: Tensor, targets: Tensor) -> float:
    """Of numbers, out of fold; 0 = there are none, or they are too few."""
    if not isinstance(session.recipe.task, Regression):
        return 0.0
    return half_width_of((outputs.double() - targets.double()).squeeze(1))
