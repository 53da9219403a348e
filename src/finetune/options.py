"""The options of each command, as tyro reads them off dataclasses: a field is an option, the text below it its help."""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from finetune.base.words import without_option
from finetune.errors import UsageError
from finetune.recipe.head_options import AnyTable
from finetune.recipe.spec import Data

# Options that may be left out; without a name of its own, help would show "{None}|INT (default: None)".
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
OptionalStr = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="")]


@dataclass(frozen=True)
class MachineOptions:
    """Options that can also be given at a resume: none changes the result."""

    device: str = "auto"
    """auto (at a resume the kind that the run had, if it is here; else cuda, mps, cpu), or a device of torch."""
    workers: OptionalInt = None
    """Processes that read and augment images ahead; 0 = none; default: for image files one a core, 8 at most."""
    worker_start: Literal["auto", "fork", "forkserver", "spawn"] = "auto"
    """How worker processes start; auto = the platform's way."""
    cache_limit: str = ""
    """How much disk new features may take, like 20GB; default: a quarter of what is free. More = the backbone runs in
    every epoch."""
    notify: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """URL that messages go to (slack://..., mailto://..., 100 more: see apprise); may be given several times. It is not
    saved with the run; FINETUNE_NOTIFY in the environment does the same."""
    quiet: bool = False
    """Print the last line only."""


@dataclass(frozen=True)
class SettingOptions:
    """What is saved with a run and holds at a resume, unless it is given anew."""

    save_every_steps: OptionalInt = None
    """Save also every so many steps; 0 = at the end of each epoch only."""
    save_every_minutes: OptionalFloat = None
    """Save also when so many minutes have passed; 0 = never for that."""
    keep: OptionalInt = None
    """Numbered checkpoints to keep, besides latest.pt and best.pt (2)."""
    track: OptionalStr = None
    """Who else is told: tensorboard, wandb, both with a comma between, or none (tensorboard)."""
    notify_every_epochs: OptionalInt = None
    """Send a message also every so many epochs; 0 = only of start, best, stop, failure, end."""

    def given(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(SettingOptions)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class RunOptions(SettingOptions, MachineOptions):
    """Options that every recipe has."""

    run: str = ""
    """Folder of the run, or s3://BUCKET/RUN, gs://...; default: the next free runs/RECIPE-N."""
    resume: bool = False
    """If the folder already holds this run, go on with it: safe in a loop."""
    init_from: str = ""
    """RUN, RUN:best or RUN:latest: start from that run's weights."""
    new_classes: bool = False
    """With --init-from: the classes may be others; what the head knows of those with the same name is taken over."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the network's arithmetic; fp16 on CUDA only."""
    backbone_precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Of the frozen part alone; default: as --precision. bf16 halves the time and size of its features."""
    tf32: Literal["none", "convolutions", "all"] = "none"
    """What an NVIDIA GPU may compute with 10 of fp32's 23 bits, which is faster: none; convolutions (as torch does by
    itself); all = matrix products too."""
    cache: bool = True
    """Keep what the frozen backbone computes, so that it runs only once."""
    deterministic: bool = True
    """Deterministic algorithms; without them a resume is not exact on CUDA."""
    log_every_steps: int = 10
    """Steps between two lines in metrics.jsonl."""
    report: bool = True
    """Write report.html at the end of the run."""
    frozen: Literal["auto", "copy"] = "auto"
    """copy = keep the frozen weights in the run folder, so that it stands alone."""
    skip_broken: bool = False
    """Look at every image or text first, and leave broken ones out."""


@dataclass(frozen=True)
class RehearseOptions:
    """Options of `finetune rehearse` besides those of the run."""

    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class LookOptions:
    """Options of `finetune look` besides those of the recipe."""

    output: str = "look.html"
    """The page to write; a .csv of the same name is written beside it."""


@dataclass(frozen=True)
class ResumeOptions(SettingOptions, MachineOptions):
    """Options of `finetune resume`."""

    run: Annotated[str, tyro.conf.Positional] = ""
    """The run's folder or URL; default: the newest unfinished below runs/."""
    epochs: int = 0
    """Train to so many epochs in all: the schedule keeps its first horizon, then the rate is constant. After an early
    stop also the number that the run has: it goes on to that end, the patience begun anew."""
    lr: float = 0.0
    """Learning rate of what is added; default: the recipe's final one."""
    from_: Annotated[str, tyro.conf.arg(name="from")] = ""
    """Rewind to this checkpoint first; later ones move to superseded/."""
    images: str = ""
    """Where the same images lie now, if they were moved."""
    texts: str = ""
    """Where the same texts lie now, if they were moved."""


@dataclass(frozen=True)
class ExportOptions:
    """Options of `finetune export`."""

    run: Annotated[str, tyro.conf.Positional]
    """The run's folder."""
    weights_only: bool = True
    """Weights for stock loading; --no-weights-only copies the whole checkpoint instead."""
    from_: Annotated[Literal["auto", "best", "latest", "final"], tyro.conf.arg(name="from")] = "auto"
    """Which checkpoint; auto = the better of best (of the loop) and final (the solved head)."""
    output: str = ""
    """The file to write; default: RUN/model.pt."""
    format: Literal["pt", "safetensors", "onnx", "torch-export", "hf"] | None = None
    """Of the file; default: as --output ends, else pt. torch-export = a .pt2 that plain torch loads and runs; hf = a
    folder that transformers' from_pretrained, or sentence-transformers, loads."""
    half: bool = False
    """With --format hf: numbers of 16 bits, half the size."""


@dataclass(frozen=True)
class PredictOptions:
    """Options of `finetune predict`."""

    file: Annotated[str, tyro.conf.Positional]
    """The export: its .json must lie beside it. Or a run's folder: its model.pt."""
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Images, folders of them, and tables that name them; or texts as they are, .txt files, folders of them, and tables
    that hold them. A table is a csv, tsv, jsonl or parquet file."""
    top_k: int = 3
    """Classes to list for each image or text."""
    unsure_below: float = 0.0
    """Give no label where its probability is below this, or where a sample is like nothing that the model was trained
    on."""
    csv: bool = False
    """Print csv instead of JSON lines."""
    image_column: str = ""
    """Column of a csv that holds the image's path; default: image, path, file, ..."""
    text_column: str = ""
    """Column of a csv that holds the text; default: text, sentence, message, ..."""
    quotes: Literal["", "auto", "none", "standard"] = ""
    """What a quote means in a csv or tsv, as at the training; default: as there."""
    encoding: str = "utf-8"
    """Of a table or of .txt files that are not in UTF-8: windows-1252, utf-16, shift_jis, ..."""
    allow_outside: bool = False
    """Read files outside the folders too: behind links, paths with .. or from the root."""
    batch_size: int = 64
    """Images or texts computed at once."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a device of torch."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `finetune evaluate`."""

    run: Annotated[str, tyro.conf.Positional]
    """The run's folder."""
    images: str = ""
    """Other images with the same classes; default: the run's own test part, else its validation part."""
    texts: str = ""
    """Other texts with the same classes, or with numbers to predict."""
    table: Annotated[AnyTable, tyro.conf.OmitArgPrefixes] = AnyTable()
    from_: Annotated[Literal["auto", "best", "latest", "final"], tyro.conf.arg(name="from")] = "auto"
    """Which checkpoint; auto = the better of best (of the loop) and final (the solved head)."""
    json: bool = False
    """Print one JSON object instead of tables."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a device of torch."""
    workers: OptionalInt = None
    """Processes that read images ahead; 0 = none; default: for image files one a core, 8 at most."""


@dataclass(frozen=True)
class ReportOptions:
    """Options of `finetune report`."""

    run: Annotated[str, tyro.conf.Positional]
    """The run's folder or URL."""
    output: str = ""
    """The .html file to write; default: RUN/report.html."""
    images: str = ""
    """Where the run's images lie now, if they were moved."""
    texts: str = ""
    """Where the run's texts lie now, if they were moved."""


@dataclass(frozen=True)
class CacheOptions:
    """Options of `finetune cache`."""

    action: Annotated[Literal["list", "clear"], tyro.conf.Positional] = "list"
    """list what is kept, or clear it; what a run uses just now stays."""
    entries: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Only entries whose names begin so; default: all."""


@dataclass(frozen=True)
class RunsOptions:
    """Options of `finetune runs`."""

    folders: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[FOLDER ...]")] = ("runs",)
    """Folders that hold runs. Of two runs: the two side by side."""
    sort: str = "changed"
    """name, state, best, time, size, changed or epochs; the best, longest, largest or newest comes first."""
    json: bool = False
    """Print JSON: an array of runs; of two runs side by side, one object."""


@dataclass(frozen=True)
class BackbonesOptions:
    """Options of `finetune backbones`."""

    word: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[WORD]")] = ""
    """Only those whose name or sentence holds it, or that read it: images, texts."""
    json: bool = False
    """Print JSON: an array of backbones."""


@dataclass(frozen=True)
class DoctorOptions:
    """Options of `finetune doctor`."""

    deep: bool = False
    """Import every package that is installed, to find those that cannot be used: takes some twenty seconds."""
    json: bool = False
    """Print one JSON object."""


# ---- What has no effect is refused ---------------------------------------------------------------------------------


def option_text(name: str, value: object) -> str:
    """An option as it was typed."""
    option = f"--{name.strip('_').replace('_', '-')}"
    if isinstance(value, bool):
        return option if value else f"--no-{option.removeprefix('--')}"
    return f"{option} {value}"


def given_options(options: object) -> dict[str, object]:
    """The options of a dataclass that are not its defaults, by name."""
    assert dataclasses.is_dataclass(options)
    return {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.default is not dataclasses.MISSING and getattr(options, field.name) != field.default
    }


def refuse(options: object, names: Collection[str], why: str) -> None:
    """Refuse options that were given and have no effect.

    Raises:
        UsageError: one of `names` was given.
    """
    for name, value in given_options(options).items():
        if name in names:
            raise UsageError(f"{option_text(name, value)}: has no effect {why}; leave it out")


def check_workers(workers: int | None) -> int | None:
    """Refuse a number of workers that cannot be."""
    if workers is not None and workers < 0:
        raise UsageError(f"--workers {workers}: not allowed; give 0 (none) or more")
    return workers


def check_machine(options: RunOptions | ResumeOptions, notifies: bool) -> None:
    """Refuse options of how a run is run of which one makes the other void.

    Args:
        notifies: whether messages go anywhere.
    """
    if options.workers == 0:
        refuse(options, ["worker_start"], "with --workers 0, which starts none")
    if not notifies and options.notify_every_epochs:
        refuse(options, ["notify_every_epochs"], "without --notify URL (or FINETUNE_NOTIFY): nobody is told")


def check_run(options: RunOptions, recipe_chosen: Collection[str], device_type: str, *, keeps_features: bool) -> None:
    """Refuse options of a run that have no effect together.

    Args:
        recipe_chosen: see `recipe.effects.chosen`.
        device_type: "cpu", "cuda" or "mps".
        keeps_features: whether some are, with --no-cache too: those of a teacher.
    """
    if not options.run:
        refuse(options, ["resume"], "without --run DIR, as a run without a name gets the next free folder")
    if not options.cache and not keeps_features:
        refuse(options, ["cache_limit"], "with --no-cache, which keeps nothing")
    if "fp32" not in (options.precision, options.backbone_precision):
        refuse(options, ["tf32"], f"with --precision {options.precision}, which keeps fewer bits anyway")
    if device_type != "cuda":
        refuse(options, ["tf32"], f"on {device_type}: only NVIDIA's GPUs have it")
    if not options.init_from:
        refuse(options, ["new_classes"], "without --init-from RUN, whose classes would be taken over")
    if options.init_from and "model.weights" in recipe_chosen:
        raise UsageError(
            f"--weights: has no effect with --init-from {options.init_from}, which brings its own; leave one out"
        )


def check_place(options: object, data: Data) -> str:
    """Where the data of a run lies now, as `--images` or `--texts` says; "" = neither was given.

    Raises:
        UsageError: it is the one for the other kind of data.
    """
    other = "texts" if data.kind == "images" else "images"
    refuse(options, [other], f"on a run on {data.kind}")
    place: str = getattr(options, data.kind)
    return place


# ---- What was typed -----------------------------------------------------------------------------------------------

# Options that say nothing of what is trained; those of the first kind are followed by a value. URLs hold passwords.
ONCE, ONCE_WITHOUT_VALUE = ("--run", "--notify"), ("--resume", "--quiet")


def repeatable(words: Sequence[str]) -> list[str]:
    """What was typed, without what belongs to one run alone: its folder; and without what is secret."""
    return without_option(words, *ONCE, switches=ONCE_WITHOUT_VALUE)
