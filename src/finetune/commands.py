"""What each command does, once its options are parsed. Imported late: this is where torch comes in."""

import json
import sys
from pathlib import Path
from typing import Any

from finetune import checkpoint as checkpoints
from finetune import launch
from finetune.build import Numerics, determining_config
from finetune.cache import parse_size
from finetune.errors import UsageError
from finetune.job import Machine
from finetune.plain import differences
from finetune.recipe import Recipe
from finetune.recipe_files import local_modules
from finetune.run import RunFolder, newest_unfinished
from finetune.state import Progress
from finetune.train import Settings
from finetune.watch.progress import Terminal, make_console


def make_terminal(quiet: bool) -> Terminal:
    return Terminal(make_console(quiet))


def check_saving(saving: dict[str, Any]) -> dict[str, Any]:
    """Refuse values of the saving options that mean nothing."""
    if saving.get("keep", 1) < 1:
        raise UsageError(f"--keep {saving['keep']}: not allowed; give 1 or more")
    for name in ("save_every_steps", "save_every_minutes"):
        if saving.get(name, 0) < 0:
            raise UsageError(f"--{name.replace('_', '-')} {saving[name]}: not allowed; give 0 (off) or more")
    return saving


def check_workers(workers: int | None) -> int | None:
    if workers is not None and workers < 0:
        raise UsageError(f"--workers {workers}: not allowed; give 0 (none) or more")
    return workers


def make_machine(options: Any) -> Machine:
    if options.cache_limit:
        parse_size(options.cache_limit)
    return Machine(options.device, check_workers(options.workers), options.worker_start, options.cache_limit)


def train_recipe(path: Path, recipe: Recipe, options: Any) -> int:
    """`finetune RECIPE`."""
    terminal = make_terminal(options.quiet)
    numerics = Numerics(options.precision, options.deterministic, options.backbone_precision or "", options.cache)
    if options.log_every_steps < 1:
        raise UsageError(f"--log-every-steps {options.log_every_steps}: not allowed; give 1 or more")
    saving = check_saving(options.given())
    machine = make_machine(options)
    folder = Path(options.run) if options.run else None
    if folder is not None and RunFolder(folder).exists():
        run = RunFolder(folder)
        record = run.read_recipe()
        has_checkpoint = (
            bool(checkpoints.step_files(run.checkpoints)) or (run.checkpoints / checkpoints.LATEST).exists()
        )
        if options.resume:
            found = differences(record["config"], determining_config(recipe, numerics))
            if found:
                raise UsageError(
                    f"--run {folder} --resume: holds another run: {'; '.join(found)}; "
                    "give its own values, or another --run"
                )
            return finish(run, launch.resume(run, machine, terminal, settings=saving), terminal)
        if has_checkpoint:
            raise UsageError(
                f"--run {folder}: already holds a run; add --resume to go on with it, or give another folder"
            )
    settings = Settings(log_every_steps=options.log_every_steps, **saving)
    run, progress = launch.start(
        folder,
        path.stem,
        recipe,
        numerics,
        machine,
        settings,
        terminal,
        code=tuple(local_modules(path)),
        init_from=options.init_from,
        copy_frozen=options.frozen == "copy",
        skip_broken=options.skip_broken,
    )
    return finish(run, progress, terminal)


def resume_run(options: Any) -> int:
    """`finetune resume`."""
    run = RunFolder(Path(options.run)) if options.run else newest_unfinished()
    terminal = make_terminal(options.quiet)
    progress = launch.resume(
        run,
        make_machine(options),
        terminal,
        settings=check_saving(options.given()),
        epochs=options.epochs,
        lr=options.lr,
        from_file=Path(options.from_) if options.from_ else None,
        images=options.images,
    )
    return finish(run, progress, terminal)


def finish(run: RunFolder, progress: Progress, terminal: Terminal) -> int:
    """Say how it ended and what to type next. The last line is the run folder, for scripts."""
    best = progress.best
    if best:
        terminal.say(
            f"\n{progress.status}: best validation {best['metric']} {best['value']:.4f} in epoch {best['epoch']}"
        )
    terminal.say("\nnext:")
    longer = 2 * max(progress.epoch, 1)
    hints = {
        f"finetune export {run.path}": "weights that other programs load",
        f"finetune evaluate {run.path}": "figures by class, confusion matrix",
        f"finetune resume {run.path} --epochs {longer}": "train longer; after a crash, without --epochs",
    }
    if run.read_recipe()["config"]["data"]["images"] == "digits":
        hints["finetune vgg_head --images FOLDER"] = "your own images, one sub-folder a class"
    width = max(map(len, hints))
    for command, meaning in hints.items():
        terminal.say(f"  {command:<{width}}  {meaning}")
    terminal.say("")
    print(run.path)
    return 0


def export_run(options: Any) -> int:
    """`finetune export`."""
    from finetune.export import FORMATS, copy_checkpoint, export

    run = RunFolder(Path(options.run))
    if not options.weights_only:
        print(copy_checkpoint(run, options.from_, Path(options.output) if options.output else None))
        return 0
    output = Path(options.output) if options.output else run.path / f"model.{options.format or 'pt'}"
    allowed = [f".{options.format}"] if options.format else FORMATS
    if output.suffix not in allowed:
        raise UsageError(f"--output {output}: must end in {' or '.join(allowed)}")
    report = export(run, options.from_, output)
    print(report.text(), file=sys.stderr)
    print(output)
    return 0


def predict_files(options: Any) -> int:
    """`finetune predict`."""
    from finetune.predict import predict

    if not options.inputs:
        raise UsageError("finetune predict: nothing to predict; give images, folders or a csv")
    return predict(
        Path(options.file),
        options.inputs,
        top_k=options.top_k,
        batch_size=options.batch_size,
        device_name=options.device,
        image_column=options.image_column,
        as_csv=options.csv,
    )


def evaluate_run(options: Any) -> int:
    """`finetune evaluate`."""
    from finetune.evaluate import evaluate, show

    run, workers = RunFolder(Path(options.run)), check_workers(options.workers)
    figures = evaluate(run, options.from_, options.images, options.table, options.device, workers)
    if options.json:
        print(json.dumps(figures, ensure_ascii=False))
    else:
        show(figures, make_console())
    return 0


def summarise(recipe: Recipe) -> int:
    """`finetune summary`."""
    from finetune.summary import summary_text

    print(summary_text(recipe))
    return 0
