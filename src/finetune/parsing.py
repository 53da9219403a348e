"""Words to values: a recipe's signature as options, parsed by tyro, its errors in one line. Imports no torch."""

import dataclasses
import inspect
import io
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr, suppress
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import docstring_parser
import tyro

from finetune.base.words import typed
from finetune.errors import UsageError
from finetune.options import RunOptions
from finetune.recipe.heads import image_head, text_head
from finetune.recipe.scripts import RECIPE_OF_KIND, call_recipe, find_recipe_file, load_recipe_function
from finetune.recipe.spec import Recipe

# What tyro says of an option that may be left out.
INSTANTIATED = re.compile(
    r"Error parsing (--[\w-]+): no type matching \{None\}\|(.+?) could be instantiated from \[(.*?)\]\.?.*"
)
# The same in the words of our own errors: option, value, what is allowed.
_WRONG = r"Error parsing (--[\w-]+): "
REWORDED = {
    _WRONG + r"invalid literal for int\(\) with base 10: '(.*)'": r"\1 \2: is no whole number",
    _WRONG + r"could not convert string to float: '(.*)'": r"\1 \2: is no number",
    _WRONG + r"'(.*)' is no INT": r"\1 \2: is no whole number",
    _WRONG + r"'(.*)' is no FLOAT": r"\1 \2: is no number",
    r"Missing value for argument '(--[\w-]+)'\. Expected 1 values": r"\1: needs a value",
}
ADDRESS = re.compile(r"([A-Za-z][\w+.-]*://)[^\s;,]+")


def _documentation(function: Callable) -> dict[str, str]:
    parsed = docstring_parser.parse(inspect.getdoc(function) or "")
    return {param.arg_name: (param.description or "").replace("\n", " ") for param in parsed.params}


def options_class(function: Callable[..., Recipe]) -> type:
    """A dataclass with one field a parameter of the recipe, documented by its docstring, else by that of
    the function that makes such recipes.

    Raises:
        UsageError: a parameter without a type or a default, or of the name of an option that every run has.
    """
    shared = text_head if "texts" in inspect.signature(function).parameters else image_head
    documentation = _documentation(shared) | _documentation(function)
    fields = []
    taken = {field.name for field in dataclasses.fields(RunOptions)}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in taken:
            raise UsageError(f"recipe parameter {name!r}: every run has an option of that name; give it another")
        if parameter.annotation is inspect.Parameter.empty or parameter.default is inspect.Parameter.empty:
            raise UsageError(f"recipe parameter {name!r}: needs a type and a default, as in {name}: int = 3")
        markers: list[Any] = [tyro.conf.arg(help=documentation[name])] if name in documentation else []
        if dataclasses.is_dataclass(parameter.annotation):
            markers = [tyro.conf.OmitArgPrefixes]
        kind = parameter.annotation
        for marker in markers:
            kind = Annotated[kind, marker]
        fields.append((name, kind, dataclasses.field(default=parameter.default)))
    return dataclasses.make_dataclass("RecipeOptions", fields, frozen=True)


class Parsed(NamedTuple):
    """A recipe with its options and those of the run.

    Attributes:
        path: of its file.
        usual: the recipe with its options left out; None where it needs some.
        also: options of the command itself.
    """

    path: Path
    recipe: Recipe
    options: RunOptions
    usual: Recipe | None
    also: Any = None


def parse_recipe(
    name: str, arguments: Sequence[str], commands: Collection[str] = (), also: type | None = None, command: str = ""
) -> Parsed:
    """Load a recipe and parse its and the run's options.

    Args:
        commands: what might have been meant instead.
        also: options of the command itself.
        command: its name; "" = the recipe is trained.
    """
    path = find_recipe_file(name, commands)
    function = load_recipe_function(path)
    _check_kind(name, function, arguments)
    groups = {"recipe": options_class(function), "run": RunOptions} | ({"also": also} if also else {})
    recipe_class = groups["recipe"]
    fields = [
        (name, Annotated[group, tyro.conf.OmitArgPrefixes], dataclasses.field(default=group()))
        for name, group in groups.items()
    ]
    all_options = dataclasses.make_dataclass("Options", fields, frozen=True)
    summary = docstring_parser.parse(inspect.getdoc(function) or "").short_description or ""
    parsed = parse(all_options, f"{command} {name}".strip(), summary, arguments)
    options = {field.name: getattr(parsed.recipe, field.name) for field in dataclasses.fields(recipe_class)}
    recipe, usual = call_recipe(function, options, path), None
    with suppress(UsageError):
        usual = call_recipe(function, {name: getattr(recipe_class(), name) for name in options}, path)
    return Parsed(path, recipe, parsed.run, usual, getattr(parsed, "also", None))


def _check_kind(name: str, function: Callable[..., Recipe], arguments: Sequence[str]) -> None:
    """Raises: UsageError: data of the other kind is named; names a recipe that reads it."""
    known = inspect.signature(function).parameters
    reads = next((kind for kind in RECIPE_OF_KIND if kind in known), "")
    for number, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        kind = option.removeprefix("--")
        if option.startswith("--") and kind in RECIPE_OF_KIND and kind not in known and reads:
            place = value if equals else next(iter(arguments[number + 1 :]), "")
            other = typed(["finetune", RECIPE_OF_KIND[kind], option, *([place] if place else [])])
            raise UsageError(f"{option}: {name} reads {reads}; for {kind}: {other}")


def parse(options: type, command: str, description: str, arguments: Sequence[str]) -> Any:
    """Options of a dataclass from the command line.

    Raises:
        UsageError: they cannot be parsed; in one line what tyro says in a box.
        SystemExit: help was asked for, and printed.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(options, prog=f"finetune {command}", description=description, args=list(arguments))
    except SystemExit as end:
        if not end.code:
            raise
    from rich.text import Text

    # The first paragraph between the box's rules is what is wrong, the second what was perhaps meant. In a terminal
    # tyro colours it, wherever it goes.
    plain = Text.from_ansi(said.getvalue()).plain
    lines = [line.strip("│ ") for line in plain.splitlines() if line.strip() and not line.startswith(("╭", "╰"))]
    groups = groupby(lines, lambda line: not line.strip("─-"))
    paragraphs = [" ".join(group).rstrip(".") for is_rule, group in groups if not is_rule]
    if "╭" not in plain:  # where standard output is ASCII the box has a title above its first rule
        del paragraphs[0]
    meant = [words for words in paragraphs[1:] if words.startswith("Perhaps you meant")]
    paragraphs[:1] = [_reworded(text) for text in paragraphs[:1]]
    text = "; ".join([*paragraphs[:1], *meant, f"all options: finetune {command} --help"])
    raise UsageError(ADDRESS.sub(r"\1...", text))  # an address may hold a password


def _reworded(text: str) -> str:
    text = INSTANTIATED.sub(r"Error parsing \1: \3 is no \2", text)
    for pattern, words in REWORDED.items():
        text = re.sub(pattern, words, text)
    return text
