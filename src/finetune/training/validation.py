"""A validation, and what is taken down of it."""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from finetune.base.events import Best
from finetune.base.signals import StopRequest
from finetune.data.batch import Batch, Request
from finetune.data.order import batches_from
from finetune.recipe.spec import AT_PLATEAU, LOWER_IS_BETTER, Classification, MultiLabel, Recipe, Regression
from finetune.store.state import Progress
from finetune.store.steps import extension_at
from finetune.tasks.conformal import half_width_of
from finetune.tasks.evaluation import Evaluation, evaluate
from finetune.tasks.losses import MultiLabelTask, Task, make_task
from finetune.tasks.thresholds import thresholds_of
from finetune.training.phase import Feed


def validate(
    feed: Feed,
    indices: Tensor,
    batch_size: int,
    task: Task,
    device: torch.device,
    precision: str,
    stop: StopRequest,
    watched: nn.Module | None,
    halvings: int = 0,
) -> Evaluation | None:
    """What comes of the samples `indices`, everything in eval mode; the batch halved so many times.

    Args:
        watched: the layer whose input some are to see.

    Returns:
        None when a stop was asked for before the end.
    """
    requests = (Request(batch.tolist()) for batch in batches_from(indices, max(1, batch_size >> halvings)))

    def batches() -> Iterator[Batch]:
        for batch in feed.validation.batches(requests):
            if stop.requested:
                return
            yield batch

    found = evaluate(feed.forward, batches(), task, device, precision, samples=len(indices), watched=watched)
    return None if found.samples < len(indices) else found


def is_better(metric: str, value: float, best: Best) -> bool:
    if not best or not math.isfinite(best["value"]):
        return True
    return value < best["value"] if metric in LOWER_IS_BETTER else value > best["value"]


def breaks_tie(value: float, loss: float, best: Best) -> bool:
    """Whether a validation is as good as the best one so far, at a lower loss: few samples tie often."""
    before = best.get("loss", -math.inf)
    return bool(best) and value == best["value"] and (loss < before or (math.isnan(before) and not math.isnan(loss)))


def adjustments(recipe: Recipe, evaluation: Evaluation) -> Best:
    """What is done to what the network gives, where it ships: see `Best`."""
    found = Best()
    if isinstance(recipe.task, Regression):
        outputs, targets = evaluation.given()
        if width := half_width_of(outputs.squeeze(1).double() - targets.double()):
            found["half_width"] = width
    if not isinstance(recipe.task, Classification | MultiLabel):
        return found
    temperature = 1.0
    if recipe.finish.calibrate:
        temperature = found["temperature"] = evaluation.temperature()
    outputs, targets = evaluation.given()
    outputs, task = outputs / temperature, make_task(recipe.task, outputs.shape[1])
    if thresholds := thresholds_of(recipe.task, outputs, targets):
        found["thresholds"] = thresholds
        assert isinstance(task, MultiLabelTask)
        task = dataclasses.replace(task, cuts=torch.tensor(thresholds).logit())
    elif not recipe.finish.calibrate:  # it ships as it is
        return found
    shipped = Evaluation(task, outputs.device, len(outputs))
    shipped.add(torch.arange(len(outputs)), outputs, targets)
    found["figures"] = {name.removeprefix("val/"): value for name, value in shipped.figures().items()}
    return found


def _thaws_next(recipe: Recipe, progress: Progress) -> bool:
    """Whether this validation is the end of a plateau, and something waits for one."""
    if progress.validations_without_best < recipe.schedule.patience:
        return False
    waiting = sum(state == AT_PLATEAU for _, state, _ in recipe.trainable.rules) - len(progress.plateaus)
    is_about_to = bool(progress.plateaus) and progress.plateaus[-1] > progress.epoch
    return waiting > 0 and not is_about_to


def record_validation(recipe: Recipe, progress: Progress, values: dict[str, float], epoch: int, samples: int) -> bool:
    """Take down a validation's figures; whether they are the best so far. Patience and the plateau schedule count the
    metric alone: a tie at a lower loss is no new best to them."""
    metric, loss = recipe.best_metric, values["val/loss"]
    value = values[f"val/{metric}"]
    improved = is_better(metric, value, progress.best)
    by_loss = recipe.stop.ties == "loss"
    best = improved or (by_loss and breaks_tie(value, loss, progress.best))
    progress.last_validation, progress.validated_step = values, progress.step
    if best:
        progress.best = {"metric": metric, "value": value, "step": progress.step, "epoch": epoch}
        if by_loss:
            progress.best |= {"loss": loss, "samples": samples}
    if improved:
        progress.validations_without_best = 0
    else:
        progress.validations_without_best += 1
        if _thaws_next(recipe, progress):
            progress.plateaus.append(progress.epoch + 1)
        elif recipe.schedule.name == "plateau" and progress.validations_without_best % recipe.schedule.patience == 0:
            # A rate of an extension's own is no step of the schedule, which may come back behind it.
            extension = extension_at(progress, progress.step - 1)
            if extension is None or not (extension["lr"] and extension.get("own_rate", False)):
                progress.reductions += 1
    return best
