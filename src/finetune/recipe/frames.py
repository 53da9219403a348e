"""A DataFrame as the data of a recipe: written down once, as a table that a resume finds again."""

import datetime
import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from finetune.base.table_names import as_file_name
from finetune.errors import UsageError


class Frame(Protocol):
    """A DataFrame, as far as it is needed here."""

    @property
    def columns(self) -> Iterable[object]: ...


def place_of(data: "str | os.PathLike[str] | Frame", option: str, path_column: str = "") -> str:
    """Where data lies: as it is given; of a DataFrame, of pandas or polars, the file that it is written to, below the
    user's data, called by its content.

    Args:
        option: that it is given for, as in "texts".
        path_column: of a DataFrame, holds paths, which are from the current folder on; "" = none does.

    Raises:
        UsageError: it is none of that, has no rows, or cannot be written.
    """
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    if not is_frame(data):
        raise UsageError(f"{option}: {type(data).__name__} is no path and no DataFrame; give one of them")
    columns = [str(name) for name in data.columns]
    if repeated := sorted({name for name in columns if columns.count(name) > 1}):
        raise UsageError(f"{option}: the DataFrame has several columns called {repeated[0]!r}; rename all but one")
    import platformdirs  # only where there is a DataFrame: recipes are read without any library

    method, given = ("to_dicts", ()) if hasattr(data, "to_dicts") else ("to_dict", ("records",))
    rows: list[dict[object, object]] = getattr(data, method)(*given)
    if not rows:
        raise UsageError(f"{option}: the DataFrame has no rows; give one with a row a sample")
    lines = []
    for row in rows:
        plain = {str(name): _plain(value, f"{option}: column {name!r} of the DataFrame") for name, value in row.items()}
        path = as_file_name(plain.get(path_column))
        if path_column and isinstance(path, str):
            plain[path_column] = os.path.abspath(os.path.expanduser(path))
        lines.append(json.dumps(plain))
    content = "\n".join(lines).encode()
    folder = platformdirs.user_data_path("finetune", appauthor=False) / "tables"
    file = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.jsonl"
    try:
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_bytes(content)
            os.replace(temporary, file)
    except OSError as error:
        raise UsageError(f"{option}: the DataFrame cannot be written to {file} ({error.strerror})") from None
    return str(file)


def is_frame(data: object) -> bool:
    """Whether it is a DataFrame: it has columns, and gives its rows as dicts."""
    return hasattr(data, "columns") and (hasattr(data, "to_dicts") or hasattr(data, "to_dict"))


def column_of_paths(frame: Frame, given: str, candidates: tuple[str, ...]) -> str:
    """The column with paths of images: that which is given, or by its name; "" = there is none."""
    plain = {str(name).strip().lower(): str(name) for name in frame.columns}
    return given or next((plain[name] for name in candidates if name in plain), "")


def _plain(value: object, where: str) -> object:
    """As JSON has it.

    Raises:
        UsageError: it is a picture, or bytes.
    """
    has_bytes = isinstance(value, dict) and isinstance(value.get("bytes"), bytes)
    if has_bytes or isinstance(value, bytes | bytearray) or type(value).__module__.startswith("PIL."):
        raise UsageError(
            f"{where} holds pictures themselves; give their paths, or write it to a parquet file, and give that"
        )
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "shape", None) == ():  # a number of numpy
        value = item()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, list | tuple | set):
        return [_plain(one, where) for one in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), where)
    if isinstance(value, dict):
        return {str(name): _plain(one, where) for name, one in value.items()}
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, datetime.date | Path):
        return str(value)
    return str(value)
