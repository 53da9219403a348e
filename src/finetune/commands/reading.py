"""What the commands that only read do, once their options are parsed: export, predict, evaluate, report, ..."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.base.formatting import json_line
from finetune.base.terminal import make_console, say_aside
from finetune.errors import UsageError
from finetune.options import (
    EvaluateOptions,
    ExportOptions,
    PredictOptions,
    ReportOptions,
    RunOptions,
    RunsOptions,
    check_place,
    check_workers,
    given_options,
    refuse,
)
from finetune.recipe.effects import chosen
from finetune.recipe.execution import Numerics, split_config
from finetune.recipe.scripts import shipped_recipes, summary_of
from finetune.recipe.spec import Recipe


def export_run(options: ExportOptions) -> int:
    """`finetune export`."""
    from finetune.export.hf_folder import export_folder
    from finetune.export.weights import FORMATS, SUFFIXES, copy_checkpoint, export
    from finetune.store.remote import open_run
    from finetune.store.restore import shipped

    if not options.weights_only:
        refuse(options, ["format", "half"], "with --no-weights-only, which copies the checkpoint as it is")
    with open_run(options.run, say_aside) as run:
        which = shipped(run, options.from_)
        if not options.weights_only:
            print(copy_checkpoint(run, which, Path(options.output) if options.output else None))
            return 0
        if options.format == "hf":
            output = Path(options.output) if options.output else run.path / "hf"
            print(export_folder(run, which, output, options.half).text(), file=sys.stderr)
            print(output)
            return 0
        if options.half:
            raise UsageError("--half: goes with --format hf only; other files hold the numbers as they were trained")
        suffix = SUFFIXES[options.format or "pt"]
        output = Path(options.output) if options.output else run.path / f"model{suffix}"
        allowed = [suffix] if options.format else FORMATS
        if output.suffix not in allowed:
            raise UsageError(f"--output {output}: must end in {' or '.join(allowed)}")
        print(export(run, which, output).text(), file=sys.stderr)
        print(output)
        return 0


def predict_files(options: PredictOptions) -> int:
    """`finetune predict`."""
    from finetune.base.table_names import is_table
    from finetune.export.predict import predict

    if not any(is_table(Path(name)) for name in options.inputs):
        refuse(options, ["image_column", "text_column", "quotes"], "where no table is given")
    if not options.inputs:
        raise UsageError("finetune predict: nothing to predict; give images, texts, folders or a csv")
    return predict(
        Path(options.file),
        options.inputs,
        top_k=options.top_k,
        batch_size=options.batch_size,
        device_name=options.device,
        image_column=options.image_column,
        text_column=options.text_column,
        quotes=options.quotes,
        encoding=options.encoding,
        allow_outside=options.allow_outside,
        as_csv=options.csv,
        unsure_below=options.unsure_below,
    )


def evaluate_run(options: EvaluateOptions) -> int:
    """`finetune evaluate`."""
    from finetune.runs.evaluate import evaluate, show
    from finetune.store.remote import open_run
    from finetune.store.restore import shipped

    workers = check_workers(options.workers)
    with open_run(options.run, say_aside, writes=False) as run:
        recipe, _ = split_config(run.read_recipe().config)
        place = check_place(options, recipe.data)
        other = "image_column" if recipe.data.kind == "texts" else "text_column"
        refuse(options.table, [other], f"on a run on {recipe.data.kind}")
        if not place:
            names = [field.name for field in dataclasses.fields(options.table)]
            refuse(options.table, names, f"on the run's own data; for other data give {recipe.data.option} as well")
        figures = evaluate(run, shipped(run, options.from_), place, options.table, options.device, workers, say_aside)
    if options.json:
        print(json_line(figures))
    else:
        show(figures, make_console())
    return 0


def write_report_of_run(options: ReportOptions) -> int:
    """`finetune report`."""
    from finetune.report.page import report_run
    from finetune.store.remote import open_run

    if options.output and Path(options.output).suffix.lower() != ".html":
        raise UsageError(f"--output {options.output}: must end in .html")
    with open_run(options.run, say_aside, writes=not options.output) as run:
        output = Path(options.output) if options.output else run.report_file
        recipe, _ = split_config(run.read_recipe().config)
        report_run(run, output, check_place(options, recipe.data), say_aside)
    print(output)
    return 0


def summarise(recipe: Recipe, options: RunOptions, usual: Recipe | None) -> int:
    """`finetune summary`."""
    refuse(options, list(given_options(options)), "on a summary, which runs nothing")
    from finetune.runs.summary import summary_text

    print(summary_text(recipe, chosen(recipe, usual)))
    return 0


def look_at_data(
    path: Path, recipe: Recipe, options: RunOptions, usual: Recipe | None, output: str, words: Sequence[str]
) -> int:
    """`finetune look`."""
    from finetune.base.signals import listen_for_signals
    from finetune.commands.training import make_machine, make_terminal
    from finetune.report.look_page import write_look
    from finetune.runs.look import look_at, show_look
    from finetune.runs.start import Plan

    allowed = {"device", "workers", "worker_start", "quiet", "backbone_precision", "precision", "tf32", "skip_broken"}
    refuse(options, [name for name in given_options(options) if name not in allowed], "on a look, which runs nothing")
    page = Path(output)
    if page.suffix.lower() != ".html":
        raise UsageError(f"--output {output}: must end in .html")
    numerics = Numerics(options.precision, options.deterministic, options.backbone_precision or "", True, options.tf32)
    terminal, names = make_terminal(options.quiet), chosen(recipe, usual)
    plan = Plan(recipe, numerics, make_machine(options), path.stem, command=tuple(words), chosen=names)
    plan = dataclasses.replace(plan, skip_broken=options.skip_broken)
    with listen_for_signals("") as stop:
        found = look_at(plan, terminal, stop)
    table = write_look(found, page)
    if not options.quiet:
        show_look(found, terminal.console)
        marks = f"; {table}: what was found, to mark and leave out with --without" if found.findings else ""
        terminal.say(f"{page}: all of it with pictures, open it in a browser{marks}")
    print(page)
    return 0


def list_recipes() -> int:
    """`finetune recipes`."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    for name, path in shipped_recipes().items():
        table.add_row(name, Text(summary_of(path)))
    make_console().print(table)
    return 0


def list_backbones(word: str, as_json: bool) -> int:
    """`finetune backbones`.

    Raises:
        UsageError: none has that word.
    """
    from finetune.listing.backbones import show, to_plain
    from finetune.models.catalogue import known_backbones
    from finetune.models.timm_models import names_with

    if word == "timm" or word.startswith("timm:"):
        edges = names_with(word.removeprefix("timm").removeprefix(":"))
        if not edges:
            raise UsageError(f"finetune backbones {word}: none; without what follows timm: all are listed")
        if as_json:
            print(json_line([{"name": name, "size": edge} for name, edge in edges.items()]))
        else:
            print("\n".join(f"{name}  {edge} px" for name, edge in edges.items()))
        return 0
    known = known_backbones(word)
    if not known:
        raise UsageError(f"finetune backbones {word}: none; without a word all are listed, and with timm those of timm")
    if as_json:
        print(json_line([to_plain(one) for one in known]))
        return 0
    show(known, make_console())
    if not word:
        print("further: timm:NAME (finetune backbones timm lists them), hf:OWNER/NAME, FOLDER of transformers or timm")
    return 0


def list_or_compare(folders: Sequence[str], sort: str, as_json: bool) -> int:
    """`finetune runs`.

    Raises:
        UsageError: an unknown key to sort by, or a folder without a run.
    """
    from finetune.listing.cells import to_plain
    from finetune.listing.found import find_runs, is_run
    from finetune.listing.table import SORT_KEYS, show

    if sort not in SORT_KEYS:
        raise UsageError(f"--sort {sort}: no such key; give {', '.join(SORT_KEYS)}")
    runs = list(find_runs(folders))
    if len(folders) == 2 and all(is_run(Path(folder)) for folder in folders):
        if sort != RunsOptions.sort:
            raise UsageError(f"--sort {sort}: has no effect on two runs side by side; leave it out")
        from finetune.listing.compared import Comparison

        comparison = Comparison.of(*runs)
        if as_json:
            print(json_line(comparison.to_plain()))
        else:
            comparison.show(make_console())
        return 0
    runs.sort(key=SORT_KEYS[sort])
    if as_json:
        print(json_line([to_plain(run) for run in runs]))
    else:
        show(runs, folders, make_console())
    return 0
