"""What the commands that train do, once their options are parsed: a recipe, resume, rehearse."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from finetune.base.formatting import json_line, parse_size, printable
from finetune.base.signals import StopRequest, listen_for_signals
from finetune.base.terminal import Terminal, make_console
from finetune.errors import UsageError, reader_is_gone
from finetune.options import (
    MachineOptions,
    ResumeOptions,
    RunOptions,
    check_machine,
    check_place,
    check_run,
    check_workers,
    refuse,
)
from finetune.recipe.effects import chosen
from finetune.recipe.execution import Machine, Numerics, Settings, asked_config, split_config
from finetune.recipe.scripts import local_modules
from finetune.recipe.serialize import differences
from finetune.recipe.spec import Distillation, Recipe
from finetune.store.run_folder import newest_unfinished, peek
from finetune.watch.remote_trackers import check_notify_urls, check_services, notify_urls

if TYPE_CHECKING:
    from finetune.rehearse.part import Part
    from finetune.store.state import Progress
    from finetune.training.context import RunContext

Result = TypeVar("Result")
Conclude = Callable[["RunContext", "Progress"], Result]


def make_terminal(quiet: bool) -> Terminal:
    return Terminal(make_console(quiet))


def make_machine(options: MachineOptions) -> Machine:
    if options.cache_limit:
        parse_size(options.cache_limit)
    return Machine(options.device, check_workers(options.workers), options.worker_start, options.cache_limit)


def checked_notify_urls(options: MachineOptions) -> tuple[str, ...]:
    """Where messages go, if they can."""
    urls = notify_urls(options.notify)
    check_services(["notify"] if urls else [])
    check_notify_urls(urls)
    return urls


def check_asked(recipe: Recipe, options: RunOptions, names: frozenset[str]) -> tuple[str, ...]:
    """Check what is asked of a run, before its data is opened.

    Args:
        names: see `recipe.effects.chosen`.

    Returns:
        Where messages go.

    Raises:
        UsageError: the first that is wrong.
    """
    from finetune.base.device import pick_device

    check_run(options, names, pick_device(options.device).type, keeps_features=isinstance(recipe.task, Distillation))
    make_machine(options)
    check_services(_settings(options).trackers)
    notify = checked_notify_urls(options)
    check_machine(options, bool(notify))
    return notify


def _settings(options: RunOptions) -> Settings:
    given = {"track": "tensorboard"} | options.given()
    return Settings(**given, log_every_steps=options.log_every_steps, report=options.report)


def train(
    name: str,
    code: tuple[Path, ...],
    recipe: Recipe,
    options: RunOptions,
    words: Sequence[str],
    conclude: Conclude[Result],
    *,
    usual: Recipe | None = None,
    trackers: Sequence[object] = (),
    stop: StopRequest | None = None,
) -> Result:
    """Begin a run, or go on with it if `options.resume` is given and there is one.

    Args:
        name: of the recipe.
        code: files to keep with the run.
        words: to type after `finetune` to repeat it.
        conclude: told how it ended; what it returns is returned.
        usual: the recipe with its options left out.
        trackers, stop: see `RunContext`.
    """
    from finetune.runs.context import open_context
    from finetune.runs.resume import resume as resume_in
    from finetune.runs.start import Plan, start

    names = chosen(recipe, usual)
    notify = check_asked(recipe, options, names)
    numerics = Numerics(
        options.precision, options.deterministic, options.backbone_precision or "", options.cache, options.tf32
    )
    given, machine, terminal = options.given(), make_machine(options), make_terminal(options.quiet)
    settings = _settings(options)
    with open_context(options.run, terminal, settings, notify, trackers, stop) as context:
        run = context.folder
        if run is not None and run.exists() and options.resume:
            record = run.read_recipe().config
            found = differences(record, asked_config(recipe, numerics, record))
            if found:
                raise UsageError(
                    f"--run {run} --resume: holds another run: {'; '.join(found)}; "
                    "give its own values, or another --run"
                )
            return conclude(context, resume_in(context, machine, settings=given))
        if run is not None and run.exists() and run.has_checkpoint():
            raise UsageError(f"--run {run}: already holds a run; add --resume to go on with it, or give another folder")
        plan = Plan(
            recipe,
            numerics,
            machine,
            name,
            code=code,
            init_from=options.init_from,
            new_classes=options.new_classes,
            copy_frozen=options.frozen == "copy",
            skip_broken=options.skip_broken,
            command=tuple(words),
            chosen=names,
        )
        return conclude(context, start(plan, context))


def rehearse_recipe(
    path: Path, recipe: Recipe, options: RunOptions, words: Sequence[str], usual: Recipe | None, as_json: bool
) -> int:
    """`finetune rehearse`. Returns 1 if the resumed run is not the same, else 0."""
    from finetune.base.device import pick_device
    from finetune.rehearse.extent import Asked, extent_of
    from finetune.rehearse.rehearsal import rehearse
    from finetune.rehearse.show import plan_text, show, to_plain, verdict

    names, machine, device_type = chosen(recipe, usual), make_machine(options), pick_device(options.device).type
    check_run(options, names, device_type, keeps_features=isinstance(recipe.task, Distillation))
    terminal = make_terminal(options.quiet or as_json)
    given = {name: value for name, value in dataclasses.asdict(machine).items() if value not in (None, "", "auto")}
    asked = Asked(
        recipe=recipe,
        words=words,
        machine_words=[f"--{name.replace('_', '-')}={value}" for name, value in given.items()],
        code=local_modules(path),
        place=options.run,
        keep=options.keep or Settings.keep,
        cache_limit=options.cache_limit,
        is_free=not options.deterministic and device_type == "cuda",
    )
    with listen_for_signals("") as stop:
        extent = extent_of(recipe, names)
        terminal.say(plan_text(path.stem, extent))
        found = rehearse(asked, extent, stop, terminal.console.status, terminal.say)
    if as_json:
        print(json_line(to_plain(found)))
    elif options.quiet:
        print(printable(verdict(found)))
    else:
        show(found, terminal.console)
    return 0 if found.is_same else 1


def rehearse_part(path: Path, recipe: Recipe, options: RunOptions, part: "Part", usual: Recipe | None) -> int:
    """One of the runs that a rehearsal is made of, in its own process."""
    from finetune.rehearse.process import WaitsToBeKilled

    changed = dataclasses.replace(
        options, run=part.run, resume=part.resume, save_every_steps=part.save_step, save_every_minutes=None, keep=1,
        track="none", notify=(), notify_every_epochs=None, report=False, log_every_steps=1, quiet=False,
    )  # fmt: skip
    waits = [WaitsToBeKilled(Path(part.run), part.wait_step)] if part.wait_step else []
    usual = part.shortened(usual) if usual is not None else None
    code = tuple(local_modules(path))
    return train(path.stem, code, part.shortened(recipe), changed, [], lambda *_: 0, usual=usual, trackers=waits)


def resume_run(options: ResumeOptions) -> int:
    """`finetune resume`."""
    resume(options, finish)
    return 0


def resume(
    options: ResumeOptions,
    conclude: Conclude[Result],
    *,
    trackers: Sequence[object] = (),
    stop: StopRequest | None = None,
) -> Result:
    """Go on with a run; see `train`."""
    from finetune.runs.context import open_context
    from finetune.runs.resume import resume as resume_in

    run = options.run or str(newest_unfinished())
    machine, terminal, notify = make_machine(options), make_terminal(options.quiet), checked_notify_urls(options)
    check_machine(options, bool(notify))
    with open_context(run, terminal, Settings(), notify, trackers, stop) as context:
        recipe, numerics = split_config(context.run.read_recipe().config)
        if not numerics.cache and not isinstance(recipe.task, Distillation):
            refuse(options, ["cache_limit"], "on a run with --no-cache, which keeps nothing")
        progress = resume_in(
            context,
            machine,
            settings=options.given(),
            epochs=options.epochs,
            lr=options.lr,
            from_file=Path(options.from_) if options.from_ else None,
            place=check_place(options, recipe.data),
        )
        return conclude(context, progress)


def finish(context: "RunContext", progress: "Progress") -> None:
    """Say how it ended and what to type next. The last line is the run folder, for scripts."""
    from finetune.store.finish_state import outcome_text
    from finetune.store.steps import way_on

    run, terminal = context.run, context.terminal
    terminal.say(f"\n{progress.status}: {outcome_text(progress.best, progress.finish)}")
    terminal.say("\nnext:")
    recipe, _ = split_config(run.read_recipe().config)
    words, meaning = way_on(recipe, progress, peek(run.latest).data.train_samples)
    hints = {}
    if run.report_file.exists():
        hints[str(run.report_file)] = "how it went and how good it is: open it in a browser"
    hints |= {
        f"finetune export {run}": "weights that other programs load",
        f"finetune evaluate {run}": "figures by class, confusion matrix",
        " ".join(["finetune resume", str(run), *words]): f"{meaning}; after a crash, without {words[0]}",
    }
    if recipe.data.place == "digits":
        hints["finetune photo_head --images FOLDER"] = "your own photos, one sub-folder a class"
    if recipe.data.place == "messages":
        hints["finetune bert_head --texts FILE"] = "your own texts: a csv with a text and a label in each row"
    width = max(map(len, hints))
    fits = width + 4 + max(map(len, hints.values())) <= terminal.console.width
    for command, meaning in hints.items():
        terminal.say(f"  {command:<{width}}  {meaning}" if fits else f"  {command}\n      {meaning}")
    terminal.say("")
    try:
        print(run)
    except OSError as error:
        if not reader_is_gone(error):
            raise
