"""What `finetune RECIPE` does: a run; of several backbones a run each, and a table."""

import dataclasses
import shlex
from pathlib import Path

from finetune.base.terminal import say_aside
from finetune.base.words import with_option
from finetune.commands.training import check_asked, finish, make_terminal, train
from finetune.errors import StoppedEarly, UsageError
from finetune.options import ResumeOptions, RunOptions, given_options, refuse
from finetune.recipe.effects import chosen
from finetune.recipe.scripts import local_modules
from finetune.recipe.spec import Recipe
from finetune.store.comparison import forget_comparison, is_comparison, note_comparison, words_to_go_on
from finetune.store.run_folder import RunFolder, newest_unfinished, next_folder

BACKBONE = "--backbone"


def train_recipe(path: Path, recipe: Recipe, options: RunOptions, words: list[str], usual: Recipe | None) -> int:
    """`finetune RECIPE`; `words`: to repeat it; `usual`: the recipe without options."""
    from finetune.models.backbones import names_of

    code = tuple(local_modules(path))
    names = names_of(recipe.model.backbone)
    if len(names) > 1:
        return compare_backbones(path.stem, code, recipe, names, options, words, usual)
    train(path.stem, code, recipe, options, words, finish, usual=usual)
    return 0


def compare_backbones(
    name: str,
    code: tuple[Path, ...],
    recipe: Recipe,
    backbones: list[str],
    options: RunOptions,
    words: list[str],
    usual: Recipe | None,
) -> int:
    """`finetune RECIPE --backbone A,B`. Returns 1 if one of them failed, else 0."""
    from finetune.runs.compare import Candidate, compare, find_candidates, show

    check_asked(recipe, options, chosen(recipe, usual))
    refuse(options, ["init_from"], "with several backbones, which begin from their own weights")
    folder, terminal = Path(options.run), make_terminal(options.quiet)
    _check_folder(folder, options)
    candidates = find_candidates(recipe, backbones)
    folder = folder if options.run else next_folder(name)
    is_new = not is_comparison(folder)
    if is_new:
        note_comparison(folder, words)

    def train_one(one: Candidate) -> Path:
        run = RunFolder(folder / one.folder)
        given = dataclasses.replace(options, run=str(run), resume=options.resume and run.exists())
        own_words = with_option(words, BACKBONE, one.name)
        try:
            train(name, code, one.recipe, given, own_words, lambda *_: None, usual=usual)
        except StoppedEarly as stopped:
            again = shlex.join(["finetune", *words_to_go_on(folder)])
            raise StoppedEarly(f"{stopped.args[0]}; the comparison goes on with: {again}") from None
        note_comparison(folder, words)  # of one that goes on with more backbones than it began with
        return run.path

    try:
        rows = compare(candidates, train_one, terminal.say, say_aside)
    except UsageError:
        if is_new:
            forget_comparison(folder)
        raise
    note_comparison(folder, words, is_finished=True)
    show(rows, with_option(words, BACKBONE, rows[0].candidate.name), terminal.console)
    print(folder)
    return int(any(row.failed for row in rows))


def with_run(options: ResumeOptions) -> ResumeOptions:
    """The options with the folder that they mean: without one the newest that is unfinished.

    Raises:
        UsageError: nothing is to be resumed.
    """
    return options if options.run else dataclasses.replace(options, run=str(newest_unfinished()))


def words_of_comparison(options: ResumeOptions) -> list[str]:
    """What to type after `finetune` to go on with the comparison that is to be resumed; [] = it is a run of its own.

    Raises:
        UsageError: other options are given, which a comparison takes with its own.
    """
    folder = Path(options.run)
    if "://" in options.run or not is_comparison(folder):
        return []
    words = words_to_go_on(folder)
    if set(given_options(options)) - {"run"}:
        line = shlex.join(["finetune", *words])
        raise UsageError(f"finetune resume {folder}: is a comparison, whose options stand behind its own words: {line}")
    return words


def _check_folder(folder: Path, options: RunOptions) -> None:
    """Raises: UsageError: nothing can be compared there."""
    what = f"--run {options.run}"
    if "://" in options.run:
        raise UsageError(f"{what}: several backbones are compared in a folder on this machine; give one")
    if not options.run or not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{what}: is a file; give a folder")
    if not any(folder.iterdir()):
        return
    if not is_comparison(folder):
        raise UsageError(f"{what}: holds something else than a comparison; give another folder")
    if not options.resume:
        raise UsageError(f"{what}: already holds a comparison; add --resume to go on with it, or give another folder")
