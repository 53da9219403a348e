"""A folder of runs that are compared with each other: which command goes on with all of them."""

from contextlib import suppress
from pathlib import Path

from finetune.base.files import make_folders, read_json, write_json
from finetune.base.plain import Fields

COMPARISON_FILE = "comparison.json"


def is_comparison(folder: Path) -> bool:
    return (folder / COMPARISON_FILE).is_file()


def note_comparison(folder: Path, words: list[str]) -> None:
    """Make the folder, and note what to type after `finetune` to do the same again."""
    make_folders(folder)
    write_json(folder / COMPARISON_FILE, {"command": words})


def forget_comparison(folder: Path) -> None:
    """Of one in which nothing was begun: the folder goes, unless there is something in it."""
    (folder / COMPARISON_FILE).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def words_to_go_on(folder: Path) -> list[str]:
    """What to type after `finetune` to go on with it.

    Raises:
        BadFile: that is not what `note_comparison` wrote.
    """
    what = str(folder / COMPARISON_FILE)
    words = Fields(read_json(folder / COMPARISON_FILE, "comparison"), what).items("command", str)
    return [*words, "--run", str(folder), "--resume"]
