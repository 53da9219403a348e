"""What somebody hands to `predict` in Python: paths, texts and pictures in memory, alone, in lists and in columns."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image
from torch import Tensor

from finetune.base.table_names import is_table
from finetune.data.decode import Picture
from finetune.data.inputs import TextInput, image_files, texts_in
from finetune.data.source import Reading
from finetune.errors import FinetuneError, UsageError


class _Given(NamedTuple):
    """What was handed over.

    Attributes:
        values: of a list or a column what it holds; else the one thing.
        is_column: whether they are a column of a table, or an array of such values.
        is_list: whether they are a list, or the like.
    """

    values: list[Any]
    is_column: bool
    is_list: bool


def images_given(
    inputs: object, allow_outside: bool, say: Callable[[str], None], reading: Reading
) -> tuple[list[Picture], bool]:
    """The images that are meant, and whether it is a single one. In a list a path that leads nowhere keeps its place.

    Raises:
        UsageError: nothing that could be an image.
    """
    given, found = _given(inputs, "a path, a picture of PIL or an array"), list[Picture]()
    for value in given.values:
        if not isinstance(value, str | os.PathLike):
            found.append(value)
        elif not given.is_column and (not given.is_list or _holds_many(value)):
            found += image_files([os.fspath(value)], allow_outside=allow_outside, say=say, reading=reading)
        else:
            found.append(Path(value))
    return found, _is_one(given)


def texts_given(
    inputs: object, allow_outside: bool, say: Callable[[str], None], reading: Reading
) -> tuple[list[TextInput], bool]:
    """The texts that are meant, and whether it is a single one. In a list or a column a str is a text, whatever it
    looks like; a `Path` is a file or a folder, and one that cannot be read has an error in its place.

    Raises:
        UsageError: nothing that could be a text.
    """
    given, found = _given(inputs, "a text or a path"), list[TextInput]()
    for value in given.values:
        if isinstance(value, os.PathLike):
            try:
                found += texts_in([os.fspath(value)], "", allow_outside, say, reading, are_files=True)
            except FinetuneError as error:
                if not given.is_list:
                    raise
                found.append({"file": os.fspath(value), "line": "", "text": "", "error": str(error)})
        elif isinstance(value, str) and not given.is_list:
            found += texts_in([value], "", allow_outside, say, reading)
        elif isinstance(value, str) or given.is_column:  # what is missing there is a number, or None
            found.append({"file": "", "line": "", "text": value if isinstance(value, str) else ""})
        else:
            raise UsageError(f"predict: {type(value).__name__} is no text; give texts, or paths of files of them")
    return found, _is_one(given)


def _given(inputs: object, what: str) -> _Given:
    if isinstance(inputs, str | os.PathLike | Image.Image | Tensor) or _is_picture(inputs):
        return _Given([inputs], False, False)
    name = type(inputs).__name__
    if hasattr(inputs, "columns"):
        columns = [str(one) for one in cast(Any, inputs).columns]
        first = repr(columns[0] if columns else "text")
        raise UsageError(
            f"predict: a {name} of the columns {', '.join(columns[:8])}: which of them is meant is not clear; give one "
            f"column, as in predict(table[{first}])"
        )
    if isinstance(inputs, bytes | dict) or not isinstance(inputs, Iterable):
        raise UsageError(f"predict: {name} is nothing to predict; give {what}, or a list of such")
    # What can be turned into a list is a column of a DataFrame, or an array.
    return _Given(list(inputs), hasattr(inputs, "tolist"), True)


def _is_picture(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "uifb"


def _holds_many(value: object) -> bool:
    """Whether it is the path of a folder or of a table."""
    if not isinstance(value, str | os.PathLike):
        return False
    return os.path.isdir(value) or (os.path.isfile(value) and is_table(Path(value)))


def _is_one(given: _Given) -> bool:
    return not given.is_list and not _holds_many(given.values[0])
