"""A recipe as a Python file of one's own, every value of it plain to see and to change. No import of torch."""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator

from finetune.recipe.heads import LEAST_STEPS
from finetune.recipe.spec import Images, Recipe, Texts, Trainable

# What is written of each part, besides what is not as usual: choices that people make. The rest keeps its default.
SHOWN = {
    "model": ("backbone", "weights", "head", "head_width", "dropout", "pooling", "unit_rows"),
    "trainable": ("rules", "batchnorm"),
    "data": (
        "image_column", "text_column", "label_column", "split_column", "separator", "group_by", "image_size",
        "max_length", "augment", "mixup", "cutmix", "views", "validation_fraction", "train_samples",
    ),
    "task": ("label_smoothing", "class_weights", "thresholds"),
    "optimizer": ("name", "weight_decay", "momentum", "clip_norm", "accumulate"),
    "schedule": ("name", "warmup_fraction", "final_fraction"),
    "stop": ("metric", "patience"),
    "finish": ("way", "rows", "calibrate"),
}  # fmt: skip
ABOUT_PARTS = {
    "model": "The network: a pretrained backbone, and the new head.",
    "trainable": "What trains, by the paths that `finetune summary` shows: the first rule that matches wins.",
    "data": "The samples: which, how split, how prepared.",
    "task": "What is learnt: Classification(...); or, of several labels a sample, MultiLabel(...) and a separator.",
    "optimizer": "How weights move.",
    "schedule": "How the learning rate goes from step to step.",
    "stop": "Which epoch is best, and when to stop early.",
    "finish": "After the epochs: the head is solved, and the better of the two ships.",
}
WIDTH = 100
# Of what does not belong to the other kind of data.
ONLY_TEXTS = ("pooling",)
ONLY_TEXTS_TASK = "Of numbers: Regression()."


def is_one_call(text: str) -> bool:
    """Whether a recipe's file is a signature and one call, as the shipped ones for a new head are."""
    return re.search(r"return (image|text)_head\(\*\*locals\(\)\)", text) is not None


def recipe_file(recipe: Recipe, name: str, file: str) -> str:
    """The text of a Python file whose `recipe` function makes this very recipe, with options for what people change
    most.

    Args:
        name: of the recipe that it was made of.
        file: that it is to be written to, as a shell takes it.
    """
    place, name, file = recipe.data.kind, _in_docstring(name), _in_docstring(file)
    parts = {one.name: getattr(recipe, one.name) for one in dataclasses.fields(recipe) if one.name in SHOWN}
    names = sorted({type(part).__name__ for part in parts.values()} | {"Recipe"})
    body = "\n".join(line for part, value in parts.items() for line in _part(part, value, recipe))
    return f'''\
"""A recipe of my own, made of {name}. Train it:

    finetune {file}
    finetune {file} --{place} MY_{place.upper()} --lr 1e-3

Every value below can be changed. What stands in the signature is an option of the command line, too: move others there.
"""

from finetune import {", ".join(names)}


def recipe(
    {place}: str = {_literal(recipe.data.place)},
    epochs: int = 0,
    batch_size: int = {recipe.batch_size},
    lr: float = {recipe.optimizer.lr!r},
    seed: int = {recipe.seed},
    train_samples: int = {recipe.data.train_samples},
) -> Recipe:
    """A recipe of my own, made of {name}.

    Args:
        {place}: {_wrapped(_attributes(type(recipe.data))[place], 12)}
        epochs: passes over the data; 0 = {recipe.epochs}, or as many as {LEAST_STEPS} steps take, whichever is more.
        batch_size: samples an optimizer step.
        lr: learning rate at its peak.
        seed: of the split, the order, the head's first weights, dropout and augmentation.
        train_samples: train on so many only, each class in its share; 0 = all.
    """
    return Recipe(
{body}
        epochs=epochs or {recipe.epochs},
        least_steps=0 if epochs else {recipe.least_steps},
        batch_size=batch_size,
        # Validate also every so many steps; 0 = at the end of each epoch only.
        validate_every_steps={recipe.validate_every_steps},
        seed=seed,
    )
'''


def _part(name: str, value: object, recipe: Recipe) -> Iterator[str]:
    """Lines that make a part of the recipe."""
    assert dataclasses.is_dataclass(value)
    about_part = ABOUT_PARTS[name]
    if name == "task" and recipe.data.kind == "texts":
        about_part += f"\n{ONLY_TEXTS_TASK}"
    for line in about_part.splitlines():
        yield f"        # {line}"
    yield f"        {name}={type(value).__name__}("
    about = _attributes(type(value))
    if isinstance(value, Texts):  # what is as of images is documented there
        about = _attributes(Images) | {key: text for key, text in about.items() if not text.startswith("as of images")}
    options = {recipe.data.kind, "lr", "train_samples"}
    for one in dataclasses.fields(value):
        if not one.init:
            continue
        if one.name in options:
            yield f"            {one.name}={one.name},"
        elif _is_shown(name, one, value, recipe):
            yield from _commented(about.get(one.name, ""), 12)
            yield from _field(one.name, getattr(value, one.name), value)
    yield "        ),"


def _is_shown(part: str, one: "dataclasses.Field[object]", value: object, recipe: Recipe) -> bool:
    is_usual = getattr(value, one.name) == one.default
    other_kind = recipe.data.kind == "images" and one.name in ONLY_TEXTS
    return not is_usual or (one.name in SHOWN[part] and not other_kind)


def _field(name: str, found: object, part: object) -> Iterator[str]:
    if not isinstance(part, Trainable) or name != "rules":
        yield f"            {name}={_literal(found)},"
        return
    yield "            rules=("
    for rule in part.rules:
        yield f"                ({', '.join(map(_literal, rule))}),"
    yield "            ),"


def _in_docstring(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _literal(value: object) -> str:
    """As people write it: texts between double quotes."""
    if isinstance(value, str):
        inner = repr(value)[1:-1]
        return '"' + inner.replace("\\'", "'").replace('"', '\\"') + '"' if repr(value)[0] == "'" else repr(value)
    return repr(value)


def _attributes(kind: type) -> dict[str, str]:
    """What the docstring of a part says of each of its values."""
    text = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", textwrap.indent(textwrap.dedent(text), "    ")):
        names, _, meaning = " ".join(entry.split()).partition(": ")
        found |= dict.fromkeys(names.split(", "), meaning)
    return found


def _commented(text: str, indent: int) -> Iterator[str]:
    """Lines of comment; nothing where there is nothing to say."""
    capital = text[:1].upper() + text[1:]
    for line in textwrap.wrap(capital, WIDTH - indent):
        yield f"{' ' * indent}# {line}"


def _wrapped(text: str, indent: int) -> str:
    return f"\n{' ' * indent}".join(textwrap.wrap(text, WIDTH - indent))
