"""Archives of a data set: not read in place, for each sample is read again in every epoch; the line unpacks them."""

import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from finetune.base.formatting import printable
from finetune.base.words import typed

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
# Names that are looked at to know whether all lies in one folder.
LOOKED_AT = 10_000


def is_archive(path: Path) -> bool:
    """Whether a file is called like an archive, and is there."""
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def how_to_unpack(path: Path, option: str) -> str:
    """What is wrong with naming an archive, and what to type instead.

    Args:
        option: that named it, as in "--images".
    """
    stem = next(path.name[: -len(suffix)] for suffix in SUFFIXES if path.name.lower().endswith(suffix))
    target = path.with_name(stem)
    # tarfile by itself would write wherever the archive says.
    module = ["zipfile"] if path.name.lower().endswith(".zip") else ["tarfile", "--filter", "data"]
    inside = _only_folder(path)
    place = target / inside if inside else target
    unpack = typed(["python", "-m", *module, "-e", str(path), str(target)])
    return f"is an archive: unpack it by {unpack} and give {typed([option, str(place)])}"


def _only_folder(path: Path) -> str:
    """The folder in an archive that all of it lies in; "" = there is none, or it cannot be read."""
    try:
        if path.name.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()[:LOOKED_AT]
        else:
            with tarfile.open(path) as archive:
                names = [member.name for member, _ in zip(archive, range(LOOKED_AT), strict=False)]
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError):
        return ""
    parts = [PurePosixPath(name).parts for name in names]
    first = {one[0] for one in parts if one and one[0] != "__MACOSX"}
    # A single class, or train/ alone, is the data itself.
    depth = max((len(one) for one in parts), default=0)
    name = first.pop() if len(first) == 1 and depth > 2 else ""
    return name if name not in ("", "..", "/") and printable(name) == name else ""
