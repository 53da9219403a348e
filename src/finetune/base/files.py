"""Bytes on disk: atomic writes, checksums in what is written, hard links. What must not be lost comes here."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from finetune.errors import RunError

# The trailer stands behind the payload in the same file: magic, then 64 hexadecimal digits. Zip readers look for
# their directory from the end of the file and skip what follows it, so `torch.load` still reads such a file.
TRAILER_MAGIC = b"\nfinetune-sha256:"
TRAILER_BYTES = len(TRAILER_MAGIC) + 64
TEMPORARY_SUFFIX = ".tmp"
READ_BLOCK_BYTES = 1 << 20
LARGEST_HEADER_BYTES = 1 << 24
# In a JSON file: over all its other keys.
CHECKSUM_KEY = "checksum"


class BadFile(RunError):
    """A file whose content is not what was written."""


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Sink(Protocol):
    """A stream that can only be written to."""

    def write(self, data: bytes, /) -> int: ...

    def flush(self) -> None: ...


class _HashingWriter:
    """A write-only stream that hashes what passes through, so that a large file is not read again for its checksum."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes, /) -> int:
        self.sha256.update(data)
        try:
            return self.stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.stream.flush()


def write_atomically(path: Path, write: Callable[[Sink], object], *, trailer: bool = False) -> str:
    """Write a file so that `path` holds either the old content or the whole new one, whatever happens in between.

    Args:
        path: the file; its folder must exist.
        write: called with a binary stream (write and flush only), writes the payload.
        trailer: whether to append the checksum trailer that `verify_trailer` checks.

    Returns:
        The sha256 of the payload, in hexadecimal.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as stream:
            hashing = _HashingWriter(stream)
            try:
                write(hashing)
            except RuntimeError:
                # torch.save tells of a full disk in words of its own.
                if hashing.error is not None:
                    raise hashing.error from None
                raise
            digest = hashing.sha256.hexdigest()
            if trailer:
                stream.write(TRAILER_MAGIC + digest.encode())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)
    return digest


def make_folders(folder: Path) -> None:
    """Make a folder and those above it, so that they survive a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_folder(path.parent)


def _json_checksum(value: dict[str, object]) -> str:
    plain = {key: entry for key, entry in value.items() if key != CHECKSUM_KEY}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: dict[str, object]) -> None:
    """Write an object with a checksum of its own."""
    text = json.dumps(value | {CHECKSUM_KEY: _json_checksum(value)}, indent=2) + "\n"
    write_atomically(path, lambda stream: stream.write(text.encode()))


def read_json(path: Path, what: str) -> dict[str, object]:
    """What `write_json` wrote. Who changes it by hand can say so by an empty checksum.

    Raises:
        RunError: there is no such file.
        BadFile: it is not what was written.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{what} {path} does not exist; check the path") from None
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{what} {path} is damaged ({error}); restore it from a copy") from None
    if not isinstance(value, dict) or CHECKSUM_KEY not in value:
        raise BadFile(f"{what} {path} is damaged (it holds no checksum); restore it from a copy")
    found = value.pop(CHECKSUM_KEY)
    if found not in ("", _json_checksum(value)):
        raise BadFile(
            f"{what} {path} is damaged: its content does not match its checksum; restore it from a copy, or, if you "
            f'changed it on purpose, set "{CHECKSUM_KEY}" to ""'
        )
    return value


def read_safetensors_header(path: Path) -> dict[str, object]:
    """What a safetensors file says of its tensors; nothing else is read.

    Raises:
        ValueError: not such a file.
    """
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(length, LARGEST_HEADER_BYTES)))
    if not isinstance(header, dict):
        raise ValueError(f"{path} has no header")
    return header


def link_or_copy(source: Path, path: Path) -> None:
    """Make `path` the same file as `source` atomically: a hard link where the file system can, else a copy."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    with suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(source, temporary)
    except OSError:
        copy_file(source, path)
        return
    # Renaming one hard link onto another of the same file does nothing and leaves both names: remove ours.
    os.replace(temporary, path)
    with suppress(FileNotFoundError):
        temporary.unlink()
    sync_folder(path.parent)


def copy_file(source: Path, path: Path) -> None:
    def write(stream: Sink) -> None:
        with open(source, "rb") as original:
            while block := original.read(READ_BLOCK_BYTES):
                stream.write(block)

    write_atomically(path, write)


def _hash_blocks(blocks: Iterable[bytes]) -> str:
    sha256 = hashlib.sha256()
    for block in blocks:
        sha256.update(block)
    return sha256.hexdigest()


def _read_blocks(stream: BinaryIO, size_bytes: int) -> Iterable[bytes]:
    while size_bytes > 0:
        block = stream.read(min(READ_BLOCK_BYTES, size_bytes))
        if not block:
            return
        size_bytes -= len(block)
        yield block


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as stream:
        return _hash_blocks(_read_blocks(stream, os.fstat(stream.fileno()).st_size))


def verify_trailer(path: Path) -> None:
    """Check the checksum behind the payload.

    Raises:
        BadFile: the trailer is missing or does not match.
    """
    with open(path, "rb") as stream:
        payload_bytes = os.fstat(stream.fileno()).st_size - TRAILER_BYTES
        if payload_bytes <= 0:
            raise BadFile(f"{path} is truncated: {payload_bytes + TRAILER_BYTES} bytes")
        digest = _hash_blocks(_read_blocks(stream, payload_bytes))
        trailer = stream.read(TRAILER_BYTES)
    if not trailer.startswith(TRAILER_MAGIC):
        raise BadFile(f"{path} has no checksum at its end: truncated, or not a checkpoint of this kit")
    if trailer[len(TRAILER_MAGIC) :] != digest.encode():
        raise BadFile(f"{path} is damaged: its content does not match its checksum")


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process had begun to write in `folder`. Call it with the run's lock held."""
    for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        with suppress(OSError):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
