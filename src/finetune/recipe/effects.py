"""What somebody chose and has no effect in the recipe at hand is refused before anything is done. Imports no torch."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path

from finetune.base.table_names import table_suffix
from finetune.errors import UsageError
from finetune.recipe.serialize import flatten, to_plain
from finetune.recipe.spec import Distillation, Images, Recipe, Regression

# Of values whose option is not called like their field.
OPTIONS = {"finish.rows": "final", "finish.way": "finish", "finish.calibrate": "no-calibrate"}
# Data that ships with the kit lies in one place, where nothing leads out of.
SHIPPED_DATA = ("digits", "glyphs", "messages")


def chosen(recipe: Recipe, usual: Recipe | None = None) -> frozenset[str]:
    """Names of the values that somebody chose: those that are neither the default of their field nor what the recipe
    gives when nothing is asked of it.

    Args:
        usual: the recipe with all of its options left out; None = there is no such thing.

    Returns:
        Like "optimizer.weight_decay".
    """
    given, defaults = flatten(to_plain(recipe)), flatten(_defaults(recipe))
    own = flatten(to_plain(usual)) if usual is not None else {}
    return frozenset(
        name
        for name, value in given.items()
        if name in defaults and value != defaults[name] and not (name in own and value == own[name])
    )


def _defaults(spec: object) -> dict[str, object]:
    """The defaults of a spec's fields, of the specs in it those of their own."""
    assert dataclasses.is_dataclass(spec)
    found: dict[str, object] = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = _defaults(value)
        elif field.default is not dataclasses.MISSING:
            found[field.name] = json.loads(json.dumps(field.default))  # as plain values: lists for tuples
    return found


def check_effects(recipe: Recipe, names: Collection[str]) -> None:
    """Refuse what was chosen and changes nothing in this recipe.

    Args:
        names: see `chosen`.

    Raises:
        UsageError: the first of them: the option, its value, and why.
    """
    given = flatten(to_plain(recipe))
    for name, has_none, why in _rules(recipe):
        if has_none and name in names:
            field = OPTIONS.get(name, name.rpartition(".")[2])
            value = "" if isinstance(given[name], bool) else f" {given[name]}"
            said = f"--{field.replace('_', '-')}{value}"
            raise UsageError(f"{said}: has no effect {why}; leave it out")


def _rules(recipe: Recipe) -> list[tuple[str, bool, str]]:
    """(value, whether it has no effect here, why)."""
    model, data = recipe.model, recipe.data
    of_images, distils = isinstance(data, Images), isinstance(recipe.task, Distillation)
    of_texts_only = "on a backbone that reads images"
    is_shipped = data.place in SHIPPED_DATA
    is_table_of_texts = not of_images and bool(Path(data.place).suffix) and not Path(data.place).is_dir()
    suffix = "" if is_shipped or Path(data.place).is_dir() else table_suffix(Path(data.place))
    whole = "where the network is a part of its teacher"
    rules = [
        ("model.revision", of_images, f"{of_texts_only}: write hf:OWNER/NAME@REVISION for --backbone"),
        ("model.pooling", of_images, of_texts_only),
        ("model.weights", distils, whole),
        ("model.pooling", distils, whole),
        ("model.dropout", model.head == "none", "without a head"),
        ("data.decode", is_shipped, f"on {data.place}, which lies in memory"),
        ("data.allow_outside", is_shipped, f"on {data.place}, which ships with the kit"),
        ("data.allow_outside", is_table_of_texts, "on a table of texts, which names no files"),
        ("data.label_column", distils, "in a distillation, which reads no labels"),
        ("data.quotes", suffix not in (".csv", ".tsv"), f"on {data.place}: it is of a .csv or .tsv"),
        ("data.encoding", is_shipped or suffix in (".parquet", ".xlsx"), f"on {data.place}: it says itself what it is"),
        ("data.encoding", of_images and not suffix, f"on {data.place}: it is of a table, or of texts"),
        ("data.missing_labels", not suffix, f"on {data.place}: it is of a table"),
        ("data.missing_labels", distils, "in a distillation, which reads no labels"),
        ("data.group_by", is_shipped, f"on {data.place}, which ships with the kit"),
        ("data.drop_duplicates", data.place in ("digits", "glyphs"), f"on {data.place}, which ships with the kit"),
        ("data.fonts", data.place != "glyphs", f"with --images {data.place}: it is of glyphs"),
        ("finish.rows", recipe.finish.way == "none", "with --finish none"),
        ("finish.rows", model.head != "linear", f"with --head {model.head}, which is not solved"),
        ("finish.calibrate", isinstance(recipe.task, Regression | Distillation), "where nothing has a probability"),
        ("data.train_samples", data.place == "glyphs", "on glyphs, which are split by font"),
    ]
    return rules


def idle_lines(recipe: Recipe, names: Collection[str], steps_per_epoch: int, end_step: int) -> list[str]:
    """What was chosen and never comes to pass in a run of this length, one line each. No reason to stop: whoever tries
    a command out shortens it, and leaves the rest.

    Args:
        names: see `chosen`.
        end_step: the run's last step.
    """
    lines = []
    every, patience, views = recipe.validate_every_steps, recipe.stop.patience, recipe.data.views
    epochs = -(-end_step // steps_per_epoch)
    ends = {*range(steps_per_epoch, end_step + 1, steps_per_epoch), end_step}
    validations = len(ends | set(range(every, end_step + 1, every)) if every else ends)
    if "validate_every_steps" in names and every > end_step:
        lines.append(f"--validate-every-steps {every}: does not come in this run of {end_step:,} steps")
    if "stop.patience" in names and patience >= validations:
        lines.append(f"--patience {patience}: cannot stop this run early, which validates {validations} time(s)")
    if "data.views" in names and views > epochs:
        lines.append(f"--views {views}: only the first {epochs} are ever seen in {epochs} epoch(s)")
    return lines
