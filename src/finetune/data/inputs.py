"""What `predict` is asked about: image files or texts, wherever they stand, in batches of network inputs."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor

from finetune.base.memory import usable_cores
from finetune.base.table_names import KNOWN, TEXT_COLUMNS, is_table
from finetune.data.decode import Picture, picture_tensor
from finetune.data.preprocess import Preprocessing
from finetune.data.source import Reading, check_inside
from finetune.data.table import Columns, image_paths, sample_rows
from finetune.data.texts import TEXT_SUFFIXES, read_text, text_of
from finetune.data.tokens import Tokenization
from finetune.data.walk import IMAGES, TEXTS, Kind, files_below
from finetune.errors import RunError, UsageError


class Inputs(NamedTuple):
    """A batch.

    Attributes:
        where: of each sample, what says where it is from.
        errors: of each, what is wrong with it, or "".
        inputs: of those that are good, on the CPU; None where none is.
    """

    where: list[dict[str, object]]
    errors: list[str]
    inputs: Tensor | None


def _files_of(folder: Path, kind: Kind, wanted: str, say: Callable[[str], None]) -> list[str]:
    """`files_below`; says what is left aside.

    Raises:
        UsageError: there are none of what is `wanted`.
    """
    found, left = files_below(folder, kind)
    aside = [f"left aside: {left.text}", *left.notes] if left.text else []
    if not found:
        raise UsageError("; ".join([f"folder {folder}: holds no {wanted}", *aside]))
    for line in aside:
        say(f"folder {folder}: {line}")
    return found


def _parts(count: int, batch_size: int, first_samples: int) -> Iterator[slice]:
    """Of so many samples those of each batch."""
    start, size = 0, min(first_samples, batch_size) or batch_size
    while start < count:
        yield slice(start, start + size)
        start, size = start + size, batch_size


# ---- Images -------------------------------------------------------------------------------------------------------


def image_files(
    inputs: Iterable[str],
    image_column: str = "",
    allow_outside: bool = False,
    say: Callable[[str], None] = print,
    reading: Reading = Reading(),
) -> list[Path]:
    """The files meant: a file as it stands, a folder with every image below it in the order of their names, a csv, tsv
    or jsonl with the images that it names, relative to its own folder.

    Args:
        say: told what of a folder is no image.

    Raises:
        UsageError: an input that does not exist, a folder without images, a table that cannot be read, or one of both
            that leads out of its folder, unless `allow_outside`.
    """

    def below(folder: Path, found: list[str], what: str) -> list[Path]:
        if not allow_outside:
            check_inside(folder, found, what)
        return [folder / file for file in found]

    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files += below(path, _files_of(path, IMAGES, "images", say), f"folder {path}")
        elif is_table(path):
            folder, names, said = image_paths(path, image_column, reading)
            files += below(folder, names, str(path))
            if said:
                say(f"{path}: {said}")
        elif path.exists():
            files.append(path)
        else:
            raise UsageError(f"{path}: no such file or folder; give images, folders, or a csv that names them")
    return files


@dataclass(frozen=True)
class ImageInputs:
    """Images, prepared for the network."""

    images: Sequence[Picture]
    preprocessing: Preprocessing
    noun: ClassVar[str] = "image"
    fields: ClassVar[list[str]] = ["file"]

    @property
    def count(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int, first_samples: int = 0) -> Iterator[Inputs]:
        """In order; the next batch is decoded while one is computed.

        Args:
            first_samples: of the first batch; 0 = as of the others.
        """

        def read(image: Picture) -> Tensor | RunError:
            try:
                return self.preprocessing.resize(picture_tensor(image, self.preprocessing.decoding)).float()
            except RunError as error:
                return error

        with ThreadPoolExecutor(usable_cores()) as pool:
            parts = list(_parts(len(self.images), batch_size, first_samples))
            ahead = [pool.submit(read, image) for part in parts[:1] for image in self.images[part]]
            for part, following in itertools.zip_longest(parts, parts[1:], fillvalue=slice(0, 0)):
                ready, images = ahead, self.images[part]
                ahead = [pool.submit(read, image) for image in self.images[following]]
                found = [future.result() for future in ready]
                good = [image for image in found if isinstance(image, Tensor)]
                yield Inputs(
                    [{"file": str(image)} if isinstance(image, Path) else {} for image in images],
                    ["" if isinstance(image, Tensor) else str(image) for image in found],
                    self.preprocessing.normalise(torch.stack(good)) if good else None,
                )


# ---- Texts --------------------------------------------------------------------------------------------------------


class TextInput(TypedDict):
    """A text, and the file and line that it is from; "" where there is none. Where it cannot be read, why."""

    file: str
    line: int | str
    text: str
    error: NotRequired[str]


def texts_in(
    inputs: Iterable[str],
    text_column: str = "",
    allow_outside: bool = False,
    say: Callable[[str], None] = print,
    reading: Reading = Reading(),
    *,
    are_files: bool = False,
) -> list[TextInput]:
    """The texts meant: of a table the rows, of a folder every .txt file below it, a .txt file as a whole; anything else
    is a text itself.

    Args:
        say: told what of a folder is no text.
        are_files: they are paths, and none is a text.

    Returns:
        Of each its "text", and the "file" and "line" that it is from.

    Raises:
        UsageError: a file that does not exist or cannot be read, or a folder without texts.
    """
    found: list[TextInput] = []
    for name in inputs:
        path, is_name = Path(name), are_files or len(name.split()) == 1
        suffix = path.suffix.lower()
        if _is(Path.is_dir, name):
            files = _files_of(path, TEXTS, ".txt files", say)
            if not allow_outside:
                check_inside(path, files, f"folder {path}", "text")
            for file in files:
                one: TextInput = {"file": str(path / file), "line": "", "text": ""}
                try:
                    one["text"] = read_text(path / file, reading.encoding)
                except UsageError as error:
                    one["error"] = str(error)
                found.append(one)
        elif is_table(path) and (is_name or _is(Path.exists, name)):
            columns = Columns(content=text_column)
            rows = sample_rows(path, columns, TEXT_COLUMNS, "--text-column", labelled=False, reading=reading)
            found += [{"file": name, "line": row.line, "text": text_of(row.content, row.where)} for row in rows]
        elif suffix in TEXT_SUFFIXES and (is_name or _is(Path.exists, name)):
            found.append({"file": name, "line": "", "text": read_text(path, reading.encoding)})
        elif are_files or _is(Path.exists, name) or (is_name and name.endswith(("/", os.sep))):
            known = ", ".join([KNOWN, *TEXT_SUFFIXES])
            raise UsageError(
                f"{name}: is no folder, and no file of texts ({known}); rename it, or give the text itself"
            )
        else:
            found.append({"file": "", "line": "", "text": name})
    return found


def _is(what: Callable[[Path], bool], name: str) -> bool:
    """Whether something of that name is there; a text may be none that a file could have."""
    try:
        return bool(name.strip()) and what(Path(name))
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class TextInputs:
    """Texts, prepared for the network."""

    texts: list[TextInput]
    tokenization: Tokenization
    noun: ClassVar[str] = "text"
    fields: ClassVar[list[str]] = ["file", "line", "text"]

    @property
    def count(self) -> int:
        return len(self.texts)

    def batches(self, batch_size: int, first_samples: int = 0) -> Iterator[Inputs]:
        """In order. See `ImageInputs.batches`."""
        for part in _parts(len(self.texts), batch_size, first_samples):
            chunk = self.texts[part]
            errors = [one.get("error") or ("" if one["text"].strip() else "is empty; write a text") for one in chunk]
            good = [one["text"] for one, error in zip(chunk, errors, strict=True) if not error]
            tokens = self.tokenization.tokenize(good).batch(list(range(len(good)))) if good else None
            where = [{k: value for k, value in one.items() if k != "error" and value != ""} for one in chunk]
            yield Inputs(where, errors, tokens)
