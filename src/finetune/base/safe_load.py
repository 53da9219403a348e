"""Reading what torch wrote, though somebody else may have written it: nothing in it is run, nothing blows up."""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path

import torch

from finetune.base.files import BadFile
from finetune.base.formatting import printable
from finetune.base.stand_ins import what_stands_in
from finetune.errors import one_line

# Of what torch wrote before it wrote zip files.
PICKLE_START = b"\x80"
# What training scripts keep beside tensors: settings, paths, figures. None of it is wanted, or made: what stands in for
# each is a class of ours that takes whatever it is given, and does nothing.
HARMLESS = (
    "_codecs.encode", "argparse.Namespace", "builtins.bool", "builtins.dict", "builtins.float", "builtins.int",
    "builtins.list", "builtins.object", "builtins.str", "builtins.tuple", "collections.defaultdict",
    "collections.deque", "datetime.date", "datetime.datetime", "datetime.timedelta",
    "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar", "numpy.dtype", "numpy.ndarray", "pathlib.Path", "pathlib.PosixPath",
    "pathlib.PurePath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath", "pathlib.WindowsPath",
    "pathlib._local.Path", "pathlib._local.PosixPath", "pathlib._local.PurePosixPath",
    "pathlib._local.PureWindowsPath", "pathlib._local.WindowsPath", "types.SimpleNamespace", "typing.Any",
    "typing.Dict", "typing.List", "typing.Union", "uuid.UUID",
)  # fmt: skip
# Packages whose objects in such files are settings, logs and figures.
HARMLESS_PACKAGES = (
    "addict", "easydict", "fvcore", "lightning", "lightning_fabric", "mmcv", "mmengine", "omegaconf",
    "pytorch_lightning", "torchmetrics", "transformers.trainer_utils", "transformers.training_args", "yacs",
)  # fmt: skip
# Torch puts entries into dicts of its own kinds only.
LIKE_DICTS = ("Dict", "dict", "CfgNode")
SHOWN_GLOBALS = 3


def _starts_with(path: Path, start: bytes) -> bool:
    with open(path, "rb") as stream:
        return stream.read(len(start)) == start


class _Aside:
    """Stands in for an object that is not wanted."""

    def __new__(cls, *_args: object, **_kwargs: object) -> "_Aside":
        return super().__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object):
        pass

    def __setstate__(self, _state: object) -> None:
        pass


class _AsideDict:
    """Stands in for a kind of dict."""

    def __new__(cls, *_args: object, **_kwargs: object) -> OrderedDict[object, object]:  # type: ignore[misc]
        return OrderedDict()


@cache
def _stand_in(full_name: str) -> type:
    """A class that torch takes for the one of that name."""
    module, _, name = full_name.rpartition(".")
    kind = _AsideDict if name.endswith(LIKE_DICTS) and module != "builtins" else _Aside
    return type(name, (kind,), {"__module__": module, "__qualname__": name})


@contextmanager
def _leaving_aside(path: Path, is_zip: bool) -> Iterator[None]:
    """Within the block such objects are left aside, not refused."""
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
    packages = tuple(f"{package}." for package in HARMLESS_PACKAGES)
    harmless = [*HARMLESS, *(name for name in named if name.startswith(packages))]
    with torch.serialization.safe_globals([_stand_in(name) for name in dict.fromkeys(harmless)]):
        yield


def load_plain(path: Path, *, mapped: bool = False, of_others: bool = False) -> object:
    """Tensors and plain values out of a .pt or .pth.

    Args:
        mapped: leave tensors on the disk.
        of_others: a training script of somebody else wrote it: settings and the like beside tensors are left aside.

    Raises:
        BadFile: it cannot be read, or would run code.
        FileNotFoundError: there is no such file.
    """
    is_zip = check_archive(path)
    try:
        with _leaving_aside(path, is_zip) if of_others else nullcontext():
            found: object = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        return found
    except pickle.UnpicklingError:
        if not is_zip and not _starts_with(path, PICKLE_START):
            instead = what_stands_in(path) or "cannot be read (it is no file of torch); restore it"
            raise BadFile(f"{path} {instead}") from None
        raise BadFile(
            f"{path} is refused: it holds more than plain tensors{_more_than_tensors(path, is_zip)}, which could run "
            "code; give a .safetensors file, or a .pt that holds a state dict: torch.save(model.state_dict(), FILE)"
        ) from None
    except FileNotFoundError:
        raise
    except Exception as error:  # a file made to do harm can make the reader fail in any way
        raise BadFile(f"{path} cannot be read ({one_line(error)}); restore it") from None


def _more_than_tensors(path: Path, is_zip: bool) -> str:
    """What else a file holds, in words; "" = not known."""
    with suppress(Exception):  # of a file made to do harm
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        if any(name.startswith("torch.nn.modules.") for name in names):
            return " (a whole model, with its code's names)"
        shown = ", ".join(names[:SHOWN_GLOBALS]) + (", ..." if len(names) > SHOWN_GLOBALS else "")
        return f" ({printable(shown)})" if shown else ""
    return ""


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
