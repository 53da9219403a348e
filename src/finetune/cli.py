"""The command line. Parsing imports no torch; `finetune --help` answers in a quarter of a second."""

import atexit
import gc
import importlib
import inspect
import io
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from finetune.base.formatting import printable
from finetune.base.signals import exit_on_signals
from finetune.errors import (
    FinetuneError,
    StoppedEarly,
    UsageError,
    in_words,
    is_out_of_memory,
    one_line,
    os_error_text,
    reader_is_gone,
    say_nothing_of_large_images,
)
from finetune.options import (
    BackbonesOptions,
    CacheOptions,
    DoctorOptions,
    EvaluateOptions,
    ExportOptions,
    LookOptions,
    PredictOptions,
    RehearseOptions,
    ReportOptions,
    ResumeOptions,
    RunsOptions,
    repeatable,
)
from finetune.parsing import parse, parse_recipe
from finetune.recipe.scripts import RECIPE_OF_KIND, find_recipe_file, load_recipe_function, shipped_recipes, summary_of
from finetune.recipe.written import is_one_call, recipe_file
from finetune.rehearse.part import OPTION as PART_OPTION
from finetune.rehearse.part import Part

HELP = """\
finetune: a new head on a frozen, pretrained backbone; killed, it resumes bit for bit.

  finetune RECIPE [options]              train; RECIPE is a file or a shipped recipe: {recipes}
  finetune photo_head --images FOLDER    the one for photos; --backbone A,B compares several on your own data
  finetune RECIPE --help                 the recipe's own options, with their documentation
  finetune look RECIPE [options]         see the data before any training: samples, classes, copies, broken files
  finetune rehearse RECIPE [options]     try kill and resume on a sample of the data; time, memory, disk of it all
  finetune resume [RUN] [--epochs N]     go on; without RUN: the newest unfinished below runs/
  finetune export RUN                    weights that stock torchvision, timm, transformers load, and a JSON
  finetune predict FILE INPUT...         classify images, texts, folders or a csv with an export: JSON lines, or --csv
  finetune evaluate RUN                  loss, accuracy, F1 by class, confusion matrix, calibration
  finetune report RUN                    all that is known of a run as one HTML page: curves, figures, worst samples
  finetune summary RECIPE [options]      layers, what trains, the size of a checkpoint
  finetune runs [FOLDER]                 the runs in a folder (runs/); of two runs: side by side
  finetune recipes                       the shipped recipes, a sentence each
  finetune backbones [WORD]              pretrained networks: size, what is to fetch, accuracy on ImageNet
  finetune cache [clear]                 features that frozen backbones computed: list, or delete
  finetune doctor                        versions, devices, memory, disk: what is missing or wrong on this machine
  finetune new NAME FILE                 a shipped recipe as a file of your own, every value in it to change
  finetune COMMAND --help                a command's options
  finetune COMMAND ... --debug           where an error came from

Which value holds: the recipe's default, then the command line. At a resume the run's saved values hold; only what
does not change the result can be given anew (--device, --workers, how often to save, where the data lies).
Exit codes: 0 done, 2 wrong usage or recipe, 1 failed, 75 stopped early on purpose and worth calling again.
"""


def import_commands(name: str, with_torch: bool = True) -> ModuleType:
    """The module that does the work; and first torch, where it takes that: some million objects, none of them
    garbage."""
    if with_torch:
        importlib.import_module("finetune.runs.start")
        if not gc.isenabled():  # see `run`
            gc.freeze()
            gc.enable()
    return importlib.import_module(f"finetune.commands.{name}")


# ---- Commands ------------------------------------------------------------------------------------------------------


def command_train(name: str, arguments: Sequence[str]) -> int:
    path, recipe, options, usual, _ = parse_recipe(name, arguments, COMMANDS)
    return import_commands("comparing").train_recipe(path, recipe, options, repeatable([name, *arguments]), usual)


def command_resume(arguments: Sequence[str]) -> int:
    options = parse(ResumeOptions, "resume", "Go on with a run, or a comparison of backbones.", arguments)
    comparing = import_commands("comparing")
    options = comparing.with_run(options)
    if words := comparing.words_of_comparison(options):
        return command_train(words[0], words[1:])
    return import_commands("training").resume_run(options)


def command_export(arguments: Sequence[str]) -> int:
    options = parse(ExportOptions, "export", "Weights that stock libraries load.", arguments)
    return import_commands("reading").export_run(options)


def command_predict(arguments: Sequence[str]) -> int:
    options = parse(PredictOptions, "predict", "Classify images or texts with an export.", arguments)
    return import_commands("reading").predict_files(options)


def command_evaluate(arguments: Sequence[str]) -> int:
    options = parse(EvaluateOptions, "evaluate", "How good a run is.", arguments)
    return import_commands("reading").evaluate_run(options)


def command_report(arguments: Sequence[str]) -> int:
    options = parse(ReportOptions, "report", "All that is known of a run as one HTML page.", arguments)
    return import_commands("reading").write_report_of_run(options)


def _with_recipe_for_help(arguments: Sequence[str]) -> list[str]:
    """Words for a command that needs a recipe: asked for help alone, it shows that for a usual one."""
    return ["photo_head", "--help"] if arguments and arguments[0] in ("-h", "--help") else list(arguments)


def command_summary(arguments: Sequence[str]) -> int:
    words = _with_recipe_for_help(arguments)
    if not words or words[0].startswith("-"):
        raise UsageError("finetune summary: needs a recipe, as in: finetune summary vgg_head")
    _, recipe, options, usual, _ = parse_recipe(words[0], words[1:], COMMANDS, command="summary")
    return import_commands("reading").summarise(recipe, options, usual)


def command_rehearse(arguments: Sequence[str]) -> int:
    part, words = None, _with_recipe_for_help(arguments)
    if words[:1] == [PART_OPTION] and len(words) > 1:
        part, words = Part.from_text(words[1]), words[2:]
    if not words or words[0].startswith("-"):
        raise UsageError(
            "finetune rehearse: needs a recipe, and the options of its run, as in: finetune rehearse vgg_head"
        )
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # nothing is left behind, not beside the recipe either
    try:
        path, recipe, options, usual, also = parse_recipe(words[0], words[1:], COMMANDS, RehearseOptions, "rehearse")
    finally:
        sys.dont_write_bytecode = before
    if part is not None:
        return import_commands("training").rehearse_part(path, recipe, options, part, usual)
    return import_commands("training").rehearse_recipe(path, recipe, options, words, usual, also.json)


def command_look(arguments: Sequence[str]) -> int:
    words = _with_recipe_for_help(arguments)
    if not words or words[0].startswith("-"):
        kinds = {word.partition("=")[0] for word in words} & {f"--{kind}" for kind in RECIPE_OF_KIND}
        if len(kinds) != 1:
            raise UsageError(
                "finetune look: needs a recipe, or data, as in: finetune look --images FOLDER; --texts FILE for texts"
            )
        words.insert(0, RECIPE_OF_KIND[kinds.pop().removeprefix("--")])
    path, recipe, options, usual, also = parse_recipe(words[0], words[1:], COMMANDS, LookOptions, "look")
    return import_commands("reading").look_at_data(path, recipe, options, usual, also.output, words)


def command_cache(arguments: Sequence[str]) -> int:
    options = parse(CacheOptions, "cache", "Kept features of frozen backbones.", arguments)
    from finetune.features.cache_command import list_or_clear

    return list_or_clear(options.action, options.entries)


def command_runs(arguments: Sequence[str]) -> int:
    options = parse(RunsOptions, "runs", "The runs in a folder, or two runs side by side.", arguments)
    return import_commands("reading", with_torch=False).list_or_compare(options.folders, options.sort, options.json)


def command_recipes(arguments: Sequence[str]) -> int:
    if arguments:
        raise UsageError(f"finetune recipes: takes no words, but was given {' '.join(arguments)}; leave them out")
    return import_commands("reading", with_torch=False).list_recipes()


def command_backbones(arguments: Sequence[str]) -> int:
    options = parse(BackbonesOptions, "backbones", "What there is to begin from.", arguments)
    return import_commands("reading").list_backbones(options.word, options.json)


def command_doctor(arguments: Sequence[str]) -> int:
    options = parse(DoctorOptions, "doctor", "What is missing or wrong on this machine.", arguments)
    from finetune.doctor.report import examine

    return examine(options.json, options.deep)


NEW_HELP = """\
usage: finetune new RECIPE FILE.py

A recipe of your own: a Python file with every value of RECIPE plain to see and to change, to be trained by
finetune FILE.py. RECIPE is a shipped one, or a file:

"""


def command_new(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(NEW_HELP + "\n".join(f"    {name:<15} {summary_of(path)}" for name, path in shipped_recipes().items()))
        return 0
    if len(arguments) != 2:
        raise UsageError(
            "finetune new: needs the name of a shipped recipe and a file, as in: finetune new vgg_head my.py"
        )
    source, target = find_recipe_file(arguments[0]), Path(arguments[1])
    if target.suffix != ".py":
        raise UsageError(f"finetune new: {target} must end in .py")
    if target.exists():
        raise UsageError(f"finetune new: {target} exists already; give another name")
    text = source.read_text(encoding="utf-8")
    if is_one_call(text):
        function = load_recipe_function(source)
        # What the call hides is what people want to change; but not all is known of it where somebody must say more.
        if all(one.default is not one.empty for one in inspect.signature(function).parameters.values()):
            text = recipe_file(function(), source.stem, shlex.quote(str(target)))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    print(f"finetune {target}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "resume": command_resume,
    "look": command_look,
    "rehearse": command_rehearse,
    "export": command_export,
    "predict": command_predict,
    "evaluate": command_evaluate,
    "report": command_report,
    "summary": command_summary,
    "runs": command_runs,
    "recipes": command_recipes,
    "backbones": command_backbones,
    "cache": command_cache,
    "doctor": command_doctor,
    "new": command_new,
}


def dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP.format(recipes=", ".join(shipped_recipes())), end="")
        return 0 if words else 2
    if words[0] == "--version":
        from finetune import __version__

        print(f"finetune {__version__}")
        return 0
    if words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    return command_train(words[0], words[1:])


def explain(error: BaseException) -> tuple[str, int]:
    """What a person is told of an error, and the exit code."""
    if isinstance(error, FinetuneError):
        return error.args[0], error.exit_code
    if isinstance(error, KeyboardInterrupt):
        # While training, Ctrl-C is a request that saves; here nothing had begun that could be lost.
        return "interrupted before the first step; the same command starts again", StoppedEarly.exit_code
    if isinstance(error, OSError):
        return os_error_text(error), FinetuneError.exit_code
    if is_out_of_memory(error):
        return f"out of memory ({one_line(error)}); close other programs, or give less to do at once", 1
    return (
        f"{in_words(error)}; this is a fault of finetune: please report it with what --debug shows",
        FinetuneError.exit_code,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. What goes wrong is one line; with --debug, where it came from as well."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files and classes may hold what this console or no encoding at all can show.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return dispatch([word for word in words if word != "--debug"])
    except BrokenPipeError:
        # Whoever read our output went away (`finetune --help | head`): that is no failure worth a word.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the interpreter's own flush at exit
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        text, code = explain(error)
        with suppress(OSError):  # nobody may be there to read it any more
            for line in (f"finetune: {text}", *getattr(error, "details", ())):
                print(printable(line), file=sys.stderr)
        return code


def run() -> NoReturn:
    """The `finetune` process, a second quicker than `main`: Python looks for no garbage while torch is imported, and
    torch is not taken apart in the end."""
    gc.disable()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lives
    exit_on_signals()
    say_nothing_of_large_images()
    try:
        code = main()
    except SystemExit as end:  # help was asked for
        code = int(end.code or 0)
    try:
        sys.stdout.flush()
    except OSError as error:
        if not reader_is_gone(error):
            with suppress(OSError):
                text = f"standard output cannot be written ({error.strerror}); give it more room"
                print(f"finetune: {text}", file=sys.stderr)
            code = code or 1
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - exit functions flush
    try:
        with suppress(OSError):
            sys.stderr.flush()
        atexit._run_exitfuncs()  # worker processes end, temporary files go
    finally:
        os._exit(code)


if __name__ == "__main__":
    run()
