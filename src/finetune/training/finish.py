"""The last stage of a run: a linear head on kept rows is solved, and held against the loop's best.

The rows are those of every label that may be trained on; how strongly the head is held back is found by
cross-validation on them. The two heads are compared on the samples that validate, which neither saw: of the solved
ones those of the folds that held them out.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.base.formatting import number_text
from finetune.data.order import fold_numbers
from finetune.models.heads import StandardisedLinear
from finetune.recipe.spec import Classification, MultiLabel, Regression
from finetune.store.finish_state import Finish, Judged, Tried
from finetune.tasks.calibration import LARGEST_TEMPERATURE, sample_losses, temperature_that_helps
from finetune.tasks.evaluation import Evaluation
from finetune.tasks.losses import Classifying, Task, make_task
from finetune.tasks.thresholds import best_cuts, cross_fitted_of, is_honest
from finetune.training.phase import Feed
from finetune.training.regularisation import Held
from finetune.training.setup import Setup
from finetune.training.solver import Loss, Span, prepared

# rows x features x classes: a minute or two.
MOST_WORK = 6_000_000_000
MOST_FOLDS, LEAST_FOLDS = 5, 2
# Up to so many rows every fold is held out in turn; of more a part chooses the strength: so many, one fold of which is
# held out.
MOST_ROWS_IN_FOLDS, CHOOSING_ROWS = 10_000, 25_000
READ_ROWS = 8_192
CHECKED_ROWS = 4
KINDS = {Classification: "classification", MultiLabel: "multilabel", Regression: "regression"}


def reason_against(setup: Setup, feed: Feed) -> str:
    """Why the head of this run is not solved; "" = it will be."""
    recipe = setup.recipe
    if recipe.finish.way == "none":
        return "of --finish none"
    if type(recipe.task) not in KINDS:
        return "there is nothing to solve in a distillation"
    if feed.features is None or recipe.data.views:
        return "features are not kept as they are"
    layer = setup.network.last_layer()
    own = {} if layer is None else dict(layer.named_parameters())
    trains = [value for value in setup.network.module.parameters() if value.requires_grad]
    if recipe.model.head != "linear" or not isinstance(layer, StandardisedLinear) or layer.bias is None:
        return "the head is not one linear layer"
    if {id(value) for value in trains} != {id(value) for value in own.values()}:
        return "more than the head trains"
    if not _is_all_that_follows(feed, setup, layer):
        return "something follows the linear layer"
    samples, groups = rows_to_use(setup), setup.data.source.groups
    if len(samples) < LEAST_FOLDS or (groups is not None and len(groups[samples].unique()) < LEAST_FOLDS):
        return "all samples belong together, so none can be held out"
    work = len(samples) * layer.in_features * layer.out_features
    if work > MOST_WORK:
        return f"rows x features x outputs are {work:,}, more than {MOST_WORK:,}"
    return ""


@torch.no_grad()
def _is_all_that_follows(feed: Feed, setup: Setup, layer: StandardisedLinear) -> bool:
    assert feed.features is not None
    setup.network.module.eval()
    rows = feed.features.read(setup.data.split.train[:CHECKED_ROWS], None).float().to(setup.device)
    try:
        outputs = feed.forward(rows)
        same = isinstance(outputs, Tensor) and torch.equal(outputs, layer(rows))
    except (RuntimeError, ValueError):  # rows of another shape than the layer takes
        same = False
    return same


def rows_to_use(setup: Setup) -> Tensor:
    """Sorted samples that the solved head is trained on in the end."""
    data, recipe = setup.data, setup.recipe
    brings_its_own = data.source.parts is not None and bool((data.source.parts == 1).any())
    if recipe.finish.rows == "train" or brings_its_own or recipe.data.train_samples:
        return data.split.train
    return torch.cat([data.split.train, data.split.validation]).sort().values


@dataclass(frozen=True)
class Stage:
    """What is solved.

    Attributes:
        samples: (rows,) int64, in the order of the rows.
        held: rows, losses, folds to choose the strength by.
    """

    samples: Tensor
    held: Held


def gather(setup: Setup, feed: Feed, task: Task) -> Stage:
    """Read the rows, those that are held out together side by side."""
    samples, folds, choosing = _in_folds(setup, rows_to_use(setup))
    layer = setup.network.last_layer()
    assert isinstance(layer, StandardisedLinear)
    rows = torch.empty(len(samples), layer.in_features)
    # In the order of the file: by fold each read would go through all of it.
    for places in samples.argsort().split(READ_ROWS):
        rows[places] = _read(setup, feed, samples[places])
    targets, kind = _targets(setup, samples), KINDS[type(setup.recipe.task)]
    weights, class_weights = torch.ones(len(samples), 1), None
    own_weights = task.class_weights.cpu() if isinstance(task, Classifying) and task.class_weights is not None else None
    if own_weights is not None and kind == "classification":
        weights = (targets @ own_weights).unsqueeze(1)
    elif own_weights is not None:
        class_weights = own_weights
    offset = task.log_prior.cpu() if isinstance(task, Classifying) and task.log_prior is not None else None
    wanted = targets
    if isinstance(task, Classifying) and task.label_smoothing:
        spread = task.label_smoothing / (targets.shape[1] if kind == "classification" else 2)
        wanted = targets * (1 - task.label_smoothing) + spread
    loss = Loss(wanted, weights, kind, class_weights, offset)
    return Stage(samples, Held(prepared(rows), loss, targets, folds, choosing))


def _read(setup: Setup, feed: Feed, samples: Tensor) -> Tensor:
    """(samples, features) float32, as the head standardises them."""
    layer = setup.network.last_layer()
    assert feed.features is not None and isinstance(layer, StandardisedLinear)
    return layer.by_feature(feed.features.read(samples, None).float())


def _targets(setup: Setup, samples: Tensor) -> Tensor:
    """(samples, outputs) float32."""
    targets = setup.data.source.targets[samples]
    if isinstance(setup.recipe.task, Classification):
        return torch.zeros(len(samples), setup.data.output_count).scatter_(1, targets.unsqueeze(1), 1.0)
    return targets.float().view(len(samples), -1)


def _in_folds(setup: Setup, samples: Tensor) -> tuple[Tensor, list[Span], Span]:
    """Order samples by the fold that holds them out.

    Args:
        samples: sorted int64.

    Returns:
        All samples; the places of each fold; the places of those that choose the strength.
    """
    source, seed = setup.data.source, setup.recipe.seed

    def dealt(members: Tensor, count: int) -> Tensor:
        groups = None if source.groups is None else source.groups[members]
        return fold_numbers(source.targets[members], groups, max(count, 1), seed)

    count = MOST_FOLDS
    if isinstance(setup.recipe.task, Classification):
        fewest = int(source.targets[samples].bincount(minlength=setup.data.output_count).min())
        count = min(max(fewest, LEAST_FOLDS), MOST_FOLDS)
    if source.groups is not None:
        count = min(count, max(len(source.groups[samples].unique()), LEAST_FOLDS))
    numbers = dealt(samples, count)
    if len(samples) <= MOST_ROWS_IN_FOLDS:
        parts = [samples[numbers == number] for number in range(count)]
        parts = [part for part in parts if len(part)]
        return torch.cat(parts), _places(parts), Span(0, len(samples))
    validates = torch.isin(samples, setup.data.split.validation)
    if validates.any():
        numbers = torch.where(validates, 0, 1)
    held_out, others = samples[numbers == 0], samples[numbers != 0]
    held_rows = CHOOSING_ROWS // MOST_FOLDS
    chosen = held_out[dealt(held_out, round(len(held_out) / held_rows)) == 0]
    learnt = others[dealt(others, round(len(others) / (CHOOSING_ROWS - held_rows))) == 0]
    rest = samples[~torch.isin(samples, torch.cat([chosen, learnt]))]
    return torch.cat([chosen, learnt, rest]), _places([chosen]), Span(0, len(chosen) + len(learnt))


def _places(parts: list[Tensor]) -> list[Span]:
    """Where each lies when they are put together."""
    ends = list(itertools.accumulate(map(len, parts)))
    return [Span(end - len(part), end) for end, part in zip(ends, parts, strict=True)]


# ---- Which of the two is better -------------------------------------------------------------------------------------


def judge(
    setup: Setup, feed: Feed, task: Task, stage: Stage, finish: Finish, solved: Tensor, loop: dict[str, Tensor]
) -> tuple[Judged, Evaluation]:
    """Judge both heads on the samples that validate.

    Args:
        solved: (outputs, directions + 1), of all rows of the stage.
        loop: weight, bias, mean and deviation of the loop's best.

    Returns:
        The losses of both, and what the solved one makes of the samples.
    """
    held, validation = stage.held, setup.data.split.validation
    kind, temperature = held.loss.kind, temperature_of_head(setup, finish)
    outputs = held.outputs_held_out(finish.best_weights)
    samples, wanted = held.held_out.of(stage.samples), held.held_out.of(held.targets)
    cuts = cross_fitted_of(setup.recipe.task, outputs / temperature, wanted)
    if torch.isin(validation, stage.samples).any():  # it is trained on in the end: what the folds said of it counts
        here = torch.isin(samples, validation)
        samples, outputs, cuts = samples[here], outputs[here], None if cuts is None else cuts[here]
    else:
        if cuts is not None:
            cuts = best_cuts(outputs / temperature, wanted, honest=is_honest(setup.recipe.task))
            cuts = cuts.expand(len(validation), -1)
        weight, bias = held.rows.head(solved)
        samples, outputs = (
            validation,
            _outputs(setup, feed, validation, weight, bias, held.rows.mean, held.rows.deviation),
        )
    targets = _targets(setup, samples)
    mean, deviation = loop["mean"].double(), loop["deviation"].double()
    theirs = _outputs(setup, feed, samples, loop["weight"].double(), loop["bias"].double(), mean, deviation)
    if setup.recipe.finish.calibrate:
        shares = None
        if kind == "classification" and isinstance(task, Classifying) and task.class_weights is not None:
            shares = targets.double() @ task.class_weights.cpu().double()
        theirs /= temperature_that_helps(theirs, targets, kind, shares, held.loss.offset)
    solved_losses, loop_losses = (
        sample_losses(one, targets, kind, held.loss.offset) for one in (outputs / temperature, theirs)
    )
    judged = Judged(
        solved=solved_losses.mean().item(),
        loop=loop_losses.mean().item(),
        samples=len(samples),
        error=((solved_losses - loop_losses).std(correction=0) / max(len(samples), 1) ** 0.5).item(),
        optimism=_optimism(finish.tried),
    )
    data, cpu = setup.data, torch.device("cpu")
    evaluation = Evaluation(make_task(setup.recipe.task, data.output_count, data.scale), cpu, len(samples))
    evaluation.add(samples, outputs / temperature, data.source.targets[samples], cuts)
    judged["figures"] = {name.removeprefix("val/"): value for name, value in evaluation.figures().items()}
    return judged, evaluation


def _outputs(
    setup: Setup, feed: Feed, samples: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, deviation: Tensor | float
) -> Tensor:
    parts = samples.split(READ_ROWS)
    found = [(_read(setup, feed, part).double() - mean) / deviation @ weight.T + bias for part in parts]
    return torch.cat(found).float()


def _optimism(tried: list[Tried]) -> float:
    """By how much the loss of the chosen strength looks better than it is, as it was chosen by it: R. J. Tibshirani and
    R. Tibshirani, "A bias correction for the minimum error rate in cross-validation", Annals of Applied Statistics 3,
    2009."""
    best = min(tried, key=lambda one: one["log_loss"])
    folds = range(len(best["fold_losses"]))
    gains = [best["fold_losses"][fold] - min(one["fold_losses"][fold] for one in tried) for fold in folds]
    return sum(gains) / len(gains)


def temperature_of_head(setup: Setup, finish: Finish) -> float:
    """What the solved head's outputs are divided by."""
    return finish.best["temperature"] if setup.recipe.finish.calibrate else 1.0


def which_ships(judged: Judged) -> str:
    """Choose the solved head ("final"), unless the loop's best is better by more than chance ("best"): the one has seen
    more labels than it could show here, the other was chosen by these very samples."""
    return "best" if judged["solved"] - judged["loop"] > judged["error"] else "final"


def head_state(stage: Stage, solved: Tensor, temperature: float, layer: nn.Module) -> dict[str, Tensor]:
    """Weight, bias, mean and deviation of the layer in the run's network, the temperature in them."""
    rows = stage.held.rows
    weight, bias = rows.head(solved / temperature)
    state = {
        "weight": weight,
        "bias": bias,
        "mean": rows.mean,
        "deviation": torch.full_like(rows.mean, rows.deviation),
    }
    own = layer.state_dict()
    # Of one number it does not matter how far the next one is, but to who views it as bytes.
    return {
        name: value.to(own[name].dtype).clone(memory_format=torch.contiguous_format).view_as(own[name])
        for name, value in state.items()
    }


def workers() -> int:
    """Folds that are solved at once: as many as the run has threads. The bits do not depend on it."""
    return max(1, min(MOST_FOLDS, torch.get_num_threads()))


def finish_text(finish: Finish, evaluation: Evaluation) -> str:
    """What came of it, in a line."""
    best, judged, figures = finish.best, finish.judged, evaluation.figures()
    how = f"lambda {best['strength']:.2g} of {len(finish.tried)} tried in {len(best['fold_losses'])} fold(s)"
    names = [name for name in ("accuracy", "f1", "mae") if f"val/{name}" in figures]
    shown = "".join(f", {name} {number_text(figures[f'val/{name}'])}" for name in names)
    losses = f"loss {number_text(judged['solved'])} against {number_text(judged['loop'])} of the loop's best"
    ships = "it ships (final.pt)" if finish.ships == "final" else "the loop's best ships"
    if best["temperature"] >= LARGEST_TEMPERATURE:
        ships += "; it tells nothing: the labels have nothing to do with the features"
    return f"solved head: {how}, {losses}{shown}: {ships}"
