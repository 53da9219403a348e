"""Images that lie in a table themselves, as in the data sets of the Hugging Face hub: a column of {bytes, path}.

They are unpacked once into a folder of the user's cache, known by what they are, and are files from then on.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from finetune.base.cache_folders import unpacked_folder
from finetune.base.files import make_folders
from finetune.data.decode import formats_by_suffix
from finetune.errors import UsageError


def holds_bytes(content: object) -> bool:
    """Whether a row holds an image itself."""
    return isinstance(content, bytes) or (isinstance(content, Mapping) and isinstance(content.get("bytes"), bytes))


def unpacked(rows: Sequence[tuple[str, int, object]]) -> tuple[Path, list[str]]:
    """The folder with the images of a table, and the name of each in it.

    Args:
        rows: of each, where it stands, the number of its line, and what its image column holds.

    Raises:
        UsageError: a row holds no image.
    """
    root = unpacked_folder()
    names, contents, digest = list[str](), list[bytes](), hashlib.sha256()
    for where, line, content in rows:
        given: Mapping[str, object] = content if isinstance(content, Mapping) else {"bytes": content}
        image = given.get("bytes")
        if not isinstance(image, bytes):
            raise UsageError(f"{where}: its image has no bytes, unlike those of other rows; mend or remove it")
        suffix = PurePosixPath(str(given.get("path") or "")).suffix.lower()
        names.append(f"{line:08}{suffix if suffix in formats_by_suffix() else ''}")
        contents.append(image)
        digest.update(f"{names[-1]} {len(image)} ".encode() + image)
    folder = root / digest.hexdigest()[:32]
    if folder.is_dir() and not all((folder / name).is_file() for name in names):
        shutil.rmtree(folder)  # somebody has cleaned up
    if not folder.is_dir():
        make_folders(root)
        with TemporaryDirectory(prefix=".unpacking-", dir=root) as place:
            inside = Path(place) / "images"
            inside.mkdir()
            for name, content in zip(names, contents, strict=True):
                (inside / name).write_bytes(content)
            if not folder.is_dir():
                shutil.move(inside, folder)
    return folder, names
