"""Recipe files: found by path or name, run, called; and what of them is kept with a run. Imports no torch."""

import ast
import difflib
import functools
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, cast

from finetune.errors import UsageError
from finetune.recipe.spec import Recipe

# Of the kit itself: recipes lie in it where it is installed, beside src/ in a checkout.
PACKAGE = Path(__file__).resolve().parents[1]

# A recipe for each kind of data.
RECIPE_OF_KIND = {"images": "photo_head", "texts": "bert_head"}
# What other programs call what needs no word here.
TRAINING_WORDS = ("finetune", "fit", "run", "start", "train")


class RecipeFunction(Protocol):
    """What a recipe file defines: its typed, documented parameters are the options."""

    __name__: str

    def __call__(self, **options: object) -> Recipe: ...


def shipped_recipes() -> dict[str, Path]:
    """Name to file of the recipes that come with the kit."""
    inside = PACKAGE / "recipes"
    folder = inside if inside.is_dir() else PACKAGE.parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def summary_of(path: Path) -> str:
    """The first sentence of a recipe file; nothing of it is run."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n\n")[0].replace("\n", " ")


def find_recipe_file(name: str, other_names: Iterable[str] = ()) -> Path:
    """The file that RECIPE means: a path, or the name of a shipped recipe.

    Args:
        other_names: further words that the user may have meant (commands), for the error.

    Raises:
        UsageError: neither; names the nearest.
    """
    shipped = shipped_recipes()
    path = Path(name)
    if path.is_file():
        return path
    if name in shipped:
        return shipped[name]
    if name.startswith("-"):
        recipe = RECIPE_OF_KIND.get(name.partition("=")[0].removeprefix("--"), "vgg_head")
        raise UsageError(f"{name}: a recipe or a command comes first, as in: finetune {recipe} {name} ...")
    if name in TRAINING_WORDS:
        raise UsageError(f"{name}: is no command; to train, name the recipe: finetune vgg_head ...")
    nearest = difflib.get_close_matches(path.stem, [*shipped, *other_names], n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else "give a recipe file or one of those"
    raise UsageError(f"{name}: no such file, command or recipe; shipped recipes are {', '.join(shipped)}; {hint}")


def load_recipe_function(path: Path) -> RecipeFunction:
    """Run a recipe file and return its `recipe` function. Modules beside the file can be imported by it.

    Raises:
        UsageError: the file fails, or defines no such function.
    """
    path = path.resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"recipe {path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file raises is the file's fault, and said so
        where = _last_line_in(error, path)
        raise UsageError(f"recipe {path}{where}: {type(error).__name__}: {error}; mend the file") from error
    finally:
        sys.path.remove(str(path.parent))
    function = getattr(module, "recipe", None)
    if not inspect.isfunction(function):
        raise UsageError(f"recipe {path}: defines no function 'recipe(...) -> Recipe'; add one, or see 'finetune new'")
    return cast(RecipeFunction, function)


def _last_line_in(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f", line {error.lineno}"
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f", line {line}" if line else ""


def call_recipe(function: RecipeFunction, options: dict[str, object], path: Path) -> Recipe:
    """Call a recipe function and check what it returns.

    Raises:
        UsageError: it returns something else than a Recipe, or fails.
    """
    try:
        recipe = function(**options)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # see load_recipe_function
        where = _last_line_in(error, path.resolve())
        raise UsageError(f"recipe {path}{where}: {type(error).__name__}: {error}; mend the file") from error
    if not isinstance(recipe, Recipe):
        raise UsageError(
            f"recipe {path}: returned {type(recipe).__name__}, not a Recipe; return image_head(...) or Recipe(...)"
        )
    return recipe


def local_modules(path: Path) -> list[Path]:
    """The recipe file and every module that it imported from its own folder or below."""
    folder = path.resolve().parent
    files = {path.resolve()}
    # Thousands of modules lie in a few hundred folders.
    is_below = functools.cache(lambda parent: Path(parent).resolve().is_relative_to(folder))
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(module, types.ModuleType) and file:
            # torch gives some of its inner modules a relative name that is no file at all.
            if not os.path.isabs(file) or not is_below(os.path.dirname(file)) or not os.path.isfile(file):
                continue
            file_path = Path(file).resolve()
            inside = file_path.is_relative_to(folder) and file_path.suffix == ".py"
            if inside and "site-packages" not in file_path.relative_to(folder).parts:
                files.add(file_path)
    return sorted(file for file in files if file == path.resolve() or not file.is_relative_to(PACKAGE))
