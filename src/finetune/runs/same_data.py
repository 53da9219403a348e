"""The data of a run, opened again: the same, or what is other about it and what to do."""

import dataclasses
import gzip
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from finetune.base.formatting import counted
from finetune.base.words import typed, without_option
from finetune.data.source import FileSource, Source
from finetune.errors import RunError, UsageError
from finetune.models.backbones import Backbone
from finetune.recipe.spec import Recipe, located
from finetune.store.restore import check_same_config
from finetune.store.run_folder import RunFolder
from finetune.store.state import DataFacts
from finetune.training.dataset import Data, open_data

SHOWN_CLASSES = 3


def keep_names(run: RunFolder, source: Source) -> None:
    """Write down which files the run is trained on, so that later a missing one can be named."""
    if isinstance(source, FileSource):
        content = gzip.compress(json.dumps(source.paths).encode(), mtime=0)
        run.samples_file.write_bytes(content)


def opened_as_before(run: RunFolder, recipe: Recipe, place: str, backbone: Backbone, facts: DataFacts) -> Data:
    """The run's data.

    Args:
        place: where it lies now; "" = where it lay.

    Raises:
        UsageError: there is none.
        RunError: it is other data than the run was trained on.
    """
    with hinting_at_a_move(recipe, place, typed(["finetune", "resume", str(run), recipe.data.option, "PLACE"])):
        data = open_data(located(recipe, place), backbone, facts.skipped)
    # The teacher of a distillation, if there is one, is looked at when it runs.
    was, found = (
        dataclasses.asdict(dataclasses.replace(one, taught_by="", taught_halvings=0, levels=[]))
        for one in (facts, data.facts())
    )
    if was != found and (text := _what_is_other(run, facts, data)):
        raise RunError(
            f"the data is not what run {run} was trained on: {text}; bring back what it was, or train on what it "
            f"is now, from the run's weights on: {_command_from(run, facts, data)}"
        )
    check_same_config(was, found, f"the data is not what run {run} was trained on")
    return data


@contextmanager
def hinting_at_a_move(recipe: Recipe, place: str, command: str) -> Iterator[None]:
    """Within the block data that is not where it was is said to be perhaps moved.

    Args:
        command: what to type then.

    Raises:
        UsageError: as the block does; where the place of old is gone, with that hint.
    """
    try:
        yield
    except UsageError as error:
        if place or os.path.exists(os.path.expanduser(recipe.data.place)):
            raise
        raise UsageError(
            f"{recipe.data.option} {recipe.data.place}: is not there any more; if it was moved: {command}"
        ) from error


def _what_is_other(run: RunFolder, facts: DataFacts, data: Data) -> str:
    """In words; "" = nothing that can be told of samples."""
    source, noun, said = data.source, data.source.noun, list[str]()
    for words, names in (
        ("is new", [name for name in source.classes if name not in facts.classes]),
        ("is gone", [name for name in facts.classes if name not in source.classes]),
    ):
        shown = ", ".join(map(repr, names[:SHOWN_CLASSES])) + (", ..." if len(names) > SHOWN_CLASSES else "")
        said += [f"class {shown} {words}"] if names else []
    before = _names_before(run)
    if before is not None and isinstance(source, FileSource):
        more, gone = sorted(set(source.paths) - before), sorted(before - set(source.paths))
        said += [f"{counted(len(more), noun)} more, like {more[0]}"] if more else []
        said += [f"{counted(len(gone), noun)} missing, like {gone[0]}"] if gone else []
    else:
        change = len(data.split.train) + len(data.split.validation) - facts.train_samples - facts.validation_samples
        said += [f"{counted(abs(change), noun)} {'more' if change > 0 else 'fewer'}"] if change else []
    if not said and source.fingerprint != facts.fingerprint:
        said.append(f"as many {noun}s by the same names, but with other sizes, contents, labels or groups")
    return "; ".join(said)


def _names_before(run: RunFolder) -> set[str] | None:
    try:
        names = json.loads(gzip.decompress(run.samples_file.read_bytes()))
        return set(names) if isinstance(names, list) else None
    except (OSError, ValueError, EOFError, TypeError):  # a run of before, or a damaged file: only numbers are told
        return None


def _command_from(run: RunFolder, facts: DataFacts, data: Data) -> str:
    record = run.read_recipe()
    words = without_option(record.command or [record.name], "--run", "--init-from")
    added = ["--new-classes"] if data.source.classes and list(data.source.classes) != facts.classes else []
    return typed(["finetune", *words, "--init-from", str(run), *added])
