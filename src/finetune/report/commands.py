"""What to type to repeat a run, to go on with it, and to use what it learnt."""

from typing import NamedTuple

from finetune.base.plain import Fields
from finetune.base.words import typed
from finetune.errors import FinetuneError
from finetune.models.backbones import backbone_from_plain
from finetune.models.stock import reason_against_folder
from finetune.recipe.execution import split_config
from finetune.report.data import NOT_AS_WRITTEN, Checkpoint, RunData
from finetune.store.steps import way_on

WITH_KIT = "with this kit, after finetune export"


class Command(NamedTuple):
    """Something to type, and what comes of it."""

    text: str
    meaning: str


def configured(data: RunData, part: str, name: str) -> str:
    """A word of the run's config.

    Raises:
        BadFile: there is none.
    """
    return Fields(data.config, f"config in {data.run.recipe_file}").fields(part).text(name)


def commands_of(data: RunData) -> list[Command]:
    """Repeat, resume; where there is something to judge and to export, also that."""
    run, checkpoint = str(data.run), data.checkpoint
    commands = [Command(*_repeat(data))]
    if checkpoint is not None and checkpoint.progress.status != "running":
        words, meaning = _longer(data, checkpoint)
        commands.append(Command(typed(["finetune", "resume", run, *words]), meaning))
    else:
        commands.append(Command(typed(["finetune", "resume", run]), "go on where it stopped, bit for bit"))
    if not data.best:
        return commands
    predicts = configured(data, "task", "kind") != "distillation"
    if predicts:
        meaning = "figures by class, on the test part if there is one"
        commands.append(Command(typed(["finetune", "evaluate", run]), meaning))
    commands.append(
        Command(
            typed(["finetune", "export", run]),
            "the best weights for stock libraries, a card, a program",
        )
    )
    if _has_folder(data):
        commands.append(Command(typed(["finetune", "export", run, "--format", "hf"]), "a folder for transformers"))
    if predicts:
        inputs = "a text" if configured(data, "data", "kind") == "texts" else "IMAGE_OR_FOLDER"
        words = ["finetune", "predict", str(data.run.path / "model.pt"), inputs]
        commands.append(Command(typed(words), "use the export"))
    return commands


def _longer(data: RunData, checkpoint: Checkpoint) -> tuple[list[str], str]:
    try:
        recipe, _ = split_config(data.config)
    except FinetuneError:  # of another version, or edited
        return ["--epochs", str(2 * max(checkpoint.progress.epoch, 1))], "train longer"
    return way_on(recipe, checkpoint.progress, checkpoint.train_samples)


def _repeat(data: RunData) -> tuple[str, str]:
    """The command of the run, as it was typed; of a run that does not know it, its recipe."""
    words = data.record.command
    if words:
        return typed(["finetune", *words]), "repeat the run"
    file = data.run.code / f"{data.record.name}.py"
    recipe = str(file) if file.is_file() else data.record.name
    return typed(["finetune", recipe]), "repeat the run; options that were given are in recipe.json"


def _has_folder(data: RunData) -> bool:
    """Whether `export --format hf` can be had."""
    if data.checkpoint is None or configured(data, "data", "kind") != "texts":
        return False
    try:
        recipe, _ = split_config(data.config)
        backbone = backbone_from_plain(data.checkpoint.backbone)
        return not reason_against_folder(recipe, backbone, data.checkpoint.apart)
    except (FinetuneError, *NOT_AS_WRITTEN):
        return False


def loading_of(data: RunData) -> list[Command]:
    """Lines of Python that use the export, and what is needed for them. The program for machines without this kit is
    printed by the export, and stands in its card."""
    if data.checkpoint is None or not data.best:
        return []
    file = data.run.path / "model.pt"
    one = '"a text"' if configured(data, "data", "kind") == "texts" else '"photo.jpg"'
    predicts = configured(data, "task", "kind") != "distillation"
    lines = f"import finetune\nmodel = finetune.load({str(file)!r})" + (f"\nmodel.predict({one})" if predicts else "")
    return [Command(lines, WITH_KIT)]
