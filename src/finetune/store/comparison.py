"""A folder of runs that are compared with each other: which command goes on with all of them."""

from contextlib import suppress
from pathlib import Path

from finetune.base.files import BadFile, make_folders, read_json, write_json
from finetune.base.plain import Fields

COMPARISON_FILE = "comparison.json"


def is_comparison(folder: Path) -> bool:
    return (folder / COMPARISON_FILE).is_file()


def note_comparison(folder: Path, words: list[str], *, is_finished: bool = False) -> None:
    """Make the folder, and note what to type after `finetune` to do the same again."""
    make_folders(folder)
    write_json(folder / COMPARISON_FILE, {"command": words, "is_finished": is_finished})


def forget_comparison(folder: Path) -> None:
    """Of one in which nothing was begun: the folder goes, unless there is something in it."""
    (folder / COMPARISON_FILE).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def is_unfinished(folder: Path) -> bool:
    """Whether there is a comparison that was begun and has not come to its end; not of one whose file is damaged."""
    try:
        return is_comparison(folder) and not _read(folder).take("is_finished", bool)
    except BadFile:
        return False


def words_to_go_on(folder: Path) -> list[str]:
    """What to type after `finetune` to go on with it.

    Raises:
        BadFile: that is not what `note_comparison` wrote.
    """
    return [*_read(folder).items("command", str), "--run", str(folder), "--resume"]


def _read(folder: Path) -> Fields:
    path = folder / COMPARISON_FILE
    return Fields(read_json(path, "comparison"), str(path))
