"""Reading what torch wrote, though somebody else may have written it: nothing in it is run, nothing blows up."""

import pickle
import zipfile
from pathlib import Path

import torch

from finetune.base.files import BadFile
from finetune.errors import one_line

# Of what torch wrote before it wrote zip files.
PICKLE_START = b"\x80"


def _starts_with(path: Path, start: bytes) -> bool:
    with open(path, "rb") as stream:
        return stream.read(len(start)) == start


def load_plain(path: Path, *, mapped: bool = False) -> object:
    """Tensors and plain values out of a .pt or .pth.

    Args:
        mapped: leave tensors on the disk.

    Raises:
        BadFile: it cannot be read, or would run code.
        FileNotFoundError: there is no such file.
    """
    is_zip = check_archive(path)
    try:
        found: object = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        return found
    except pickle.UnpicklingError:
        if not is_zip and not _starts_with(path, PICKLE_START):
            raise BadFile(f"{path} cannot be read (it is no file of torch); restore it") from None
        raise BadFile(
            f"{path} is refused: it holds more than plain tensors, which could run code; "
            "give a .safetensors file, or a .pt that holds a state dict"
        ) from None
    except FileNotFoundError:
        raise
    except Exception as error:  # a file made to do harm can make the reader fail in any way
        raise BadFile(f"{path} cannot be read ({one_line(error)}); restore it") from None


def check_archive(path: Path) -> bool:
    """Refuse a zip file that is not as torch writes it: each entry once, and none larger than the file has bytes for.

    One that is compressed, or whose entries lie over each other, could fill the memory out of a few bytes; of one that
    holds a name twice, two readers may read two things.

    Returns:
        Whether it is a zip file at all; torch's format of before 2020 is none.

    Raises:
        BadFile: names what is wrong.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # as above
        raise BadFile(f"{path} cannot be read ({one_line(error)}); restore it") from None
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        raise BadFile(f"{path} is refused: it holds {len(names) - len(set(names))} name(s) twice; give another copy")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise BadFile(f"{path} is refused: it is compressed, which torch never does; save it anew with torch.save")
    size_bytes = path.stat().st_size
    if sum(entry.file_size for entry in entries) > size_bytes:
        raise BadFile(f"{path} is refused: its entries claim more than its {size_bytes:,} bytes; give another copy")
    return True
