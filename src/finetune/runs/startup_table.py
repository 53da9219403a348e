"""What a person is told of a run before it begins: the facts, label by label."""

import torch

from finetune.data.source import ArraySource, FileSource
from finetune.data.texts import TextPipeline
from finetune.models.stock import exports_text
from finetune.recipe.serialize import flatten, to_plain
from finetune.recipe.spec import ALL, Distillation, Recipe
from finetune.training.advice import counts_text
from finetune.training.dataset import without_r2
from finetune.training.finish import reason_against, rows_to_use
from finetune.training.phase import Phase
from finetune.training.setup import CHECKED_FILES, Setup
from finetune.training.thaws import thaws_text

# A longer list of modules says how many more there are.
SHOWN_MODULES = 6


def facts_of(run: str, setup: Setup, phase: Phase) -> dict[str, str]:
    """The facts of a run by label, in order."""
    recipe, why_not = setup.recipe, phase.feed.why_not
    return {
        "backbone": recipe.model.full_name,
        "weights": setup.weights_text,
        **_frozen_and_trained(setup, phase),
        **({"thaw": thawed} if (thawed := thaws_text(recipe.trainable)) else {}),
        "features": f"not kept, because {why_not}" if why_not else "kept, the frozen part runs once",
        "data": _data(setup),
        f"{setup.data.source.noun}s": _prepared(setup),
        "training": (
            f"{recipe.optimizer.name}, lr {recipe.optimizer.lr:g}{_rates(recipe)}, batch {recipe.batch_size}, seed "
            f"{recipe.seed}"
        ),
        **_last_stage(setup, phase),
        **({"options": options} if (options := _options(setup)) else {}),
        "exports": exports_text(recipe, setup.backbone),
        "device": f"{setup.device}, {_arithmetic(setup)}, {torch.get_num_threads()} threads",
        **({"run folder": run} if run else {}),
        **({"note": "\n".join(notes)} if (notes := notes_on(setup)) else {}),
    }


def _rates(recipe: Recipe) -> str:
    """Of what is not new, in words."""
    spec, rates = recipe.optimizer, list[str]()
    if spec.lr_backbone != 1:
        rates.append(f"of the backbone {spec.lr * spec.lr_backbone:g}")
    if spec.lr_decay != 1:
        rates.append(f"of each block further from the head {spec.lr_decay:g} of that")
    return f" ({', '.join(rates)})" if rates else ""


def _last_stage(setup: Setup, phase: Phase) -> dict[str, str]:
    """Whether the head will be solved; nothing where nobody asked, or where it is not known yet."""
    recipe = setup.recipe
    thaws = any(epoch for _, _, epoch in recipe.trainable.rules)
    if recipe.finish.way == "none" or isinstance(recipe.task, Distillation) or thaws:
        return {}
    why_not = reason_against(setup, phase.feed)
    phase.freeze.modes()
    if why_not:
        return {"last stage": f"the head is not solved, because {why_not}"}
    return {"last stage": f"the head is solved after the epochs, on {len(rows_to_use(setup)):,} labels"}


# Named in another row of the table, or where the data is from.
NAMED_ELSEWHERE = {
    "model.backbone", "model.weights", "model.revision", "data.images", "data.texts", "data.image_size",
    "data.max_length", "data.augment", "data.mixup", "data.cutmix", "data.separator", "optimizer.name", "optimizer.lr",
    "batch_size", "seed", "epochs", "least_steps", "task.kind", "trainable.rules", "optimizer.lr_backbone",
    "optimizer.lr_decay",
}  # fmt: skip


def _options(setup: Setup) -> str:
    """What else was chosen."""
    values = flatten(to_plain(setup.recipe))
    names = sorted(setup.chosen - NAMED_ELSEWHERE)
    return ", ".join(f"{_label(name)} {_value_text(values[name])}" for name in names)


def _label(name: str) -> str:
    """As its option is called: of "schedule.name" the schedule, of "stop.metric" both words."""
    words = name.removesuffix(".name").replace("stop.metric", "stop_metric")
    return words.rpartition(".")[2].replace("_", " ")


def _value_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _arithmetic(setup: Setup) -> str:
    numerics = setup.numerics
    if numerics.reduced(setup.device.type) != "tf32":
        return numerics.precision
    return f"{numerics.precision} ({numerics.tf32 if numerics.tf32 == 'convolutions' else 'all of it'} in tf32)"


def notes_on(setup: Setup) -> list[str]:
    """What a person should know before it trains, a sentence each."""
    source = setup.data.source
    return [] if isinstance(source, ArraySource) else list(source.notes)


def _data(setup: Setup) -> str:
    recipe, data = setup.recipe, setup.data
    train, validation, test = map(len, data.split)
    parts = [f"{train:,} to train on", f"{validation:,} to validate", *([f"{test:,} to test"] if test else [])]
    unread = isinstance(data.source, FileSource) and not data.skipped and train + validation + test > CHECKED_FILES
    if data.skipped:
        parts.append(f"{len(data.skipped):,} left out")
    if data.class_count:
        several = f", several a {data.source.noun}" if recipe.task.kind == "multi-label" else ""
        parts.append(f"{data.class_count} classes{several}, {counts_text(data)}")
    if data.levels:
        parts.append(f"{len(data.levels)} levels from {data.levels[0]:g} to {data.levels[-1]:g}")
    later = f"; {CHECKED_FILES:,} files were looked at, the others are in the first epoch" if unread else ""
    left = "" if isinstance(data.source, ArraySource) or not data.source.left else f"; left aside: {data.source.left}"
    why = without_r2(data, recipe)
    return f"{recipe.data.place}: {', '.join(parts)}{left}{later}{f'; no R2, for {why}' if why else ''}"


def _prepared(setup: Setup) -> str:
    """How samples become the network's input, in words."""
    how = f"{setup.backbone.preprocessing.text} (as of {setup.preprocessing_of})"
    spec, data = setup.recipe.data, setup.data
    if isinstance(data.pipeline, TextPipeline):
        used = torch.cat(data.split)
        truncated = int(data.pipeline.table.truncated[used.numpy()].sum())
        share = f"{truncated:,} of {len(used):,} are longer and cut off" if truncated else "none is longer"
        return f"{how}, {share}; pooling {setup.backbone.options['pooling']}"
    mixed = [f"{name} {alpha:g}" for name, alpha in (("mixup", spec.mixup), ("cutmix", spec.cutmix)) if alpha]
    return ", ".join([how, f"augment {spec.augment}", *mixed])


def _frozen_and_trained(setup: Setup, phase: Phase) -> dict[str, str]:
    """Which modules are frozen, by the uppermost, and which train; parameters, and modules in eval mode."""
    module = setup.network.module
    frozen = phase.freeze.frozen()
    counts: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for name, parameter in module.named_parameters():
        path = name.partition(".")[0] if name in frozen else name.rpartition(".")[0]
        counts[name in frozen][path] = counts[name in frozen].get(path, 0) + parameter.numel()

    def words(modules: dict[str, int]) -> str:
        more = f" and {len(modules) - SHOWN_MODULES} more" if len(modules) > SHOWN_MODULES else ""
        return f"{', '.join(list(modules)[:SHOWN_MODULES])}{more}: {sum(modules.values()):,} parameters"

    if not counts[True]:
        return {"frozen": "nothing", "trains": f"everything: {sum(counts[False].values()):,} parameters"}
    modules = sum(1 for path, _ in module.named_modules() if path)
    held = f"{len(phase.held_in_eval)} of {modules} modules in eval mode"
    is_of_all = any(pattern == ALL for pattern, *_ in setup.recipe.trainable.rules)
    if is_of_all and (unread := setup.network.unread):
        held += f"; no output depends on {', '.join(unread)}"
    return {
        "frozen": f"{words(counts[True])}, sha256 {phase.frozen_sha256[:12]}; {held}",
        "trains": words(counts[False]),
    }
