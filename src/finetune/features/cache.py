"""The folder of kept features: one file an entry, who fills it, who uses it; listed and cleared by `finetune cache`.

An entry is named by a hash of all that its content depends on, so it never has to be brought up to date: other content
is another entry.
"""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from finetune.base.cache_folders import features_folder
from finetune.base.files import BadFile, read_safetensors_header
from finetune.base.plain import Fields
from finetune.base.signals import StopRequest
from finetune.base.terminal import Terminal

SUFFIX = ".safetensors"
FREE_SHARE = 0.25
WAIT_SECONDS = 0.2


def disk_limit(folder: Path) -> int:
    """A quarter of what is free on the folder's disk, bytes.

    Raises:
        OSError: there is no such disk, or its folders cannot be looked into.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return int(shutil.disk_usage(folder).free * FREE_SHARE)


@dataclass(frozen=True)
class Entry:
    """One entry, there or not.

    Attributes:
        path: of its file.
    """

    path: Path

    @property
    def key(self) -> str:
        return self.path.name.removesuffix(SUFFIX)

    def stored_bytes(self) -> int:
        """What it takes on the disk; 0 = not there. A file that is only half filled takes only that."""
        try:
            found = self.path.stat()
        except OSError:
            return 0
        return found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size

    def used_seconds(self) -> float:
        """When it was last used, in seconds of the epoch."""
        return self.path.stat().st_mtime

    def describe(self) -> tuple[str, str]:
        """What it is of, and how many rows; for people."""
        try:
            header = Fields(read_safetensors_header(self.path), str(self.path))
            return header.fields("__metadata__").text("about"), f"{header.fields('rows').items('shape', int)[0]:,}"
        except (OSError, ValueError, LookupError, BadFile):
            return "damaged", ""

    def _fill_lock(self) -> FileLock:
        return FileLock(self.path.with_name(f"{self.key}.fill.lock"))

    def _use_locks(self) -> Iterator[Path]:
        return self.path.parent.glob(f"{self.key}.use-*.lock")

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While the block runs, nobody clears the entry."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(f"{self.key}.use-{uuid.uuid4().hex}.lock"), timeout=0)
        with lock:
            with suppress(FileNotFoundError):
                os.utime(self.path)  # when it was last used
            yield
        with suppress(OSError):
            Path(lock.lock_file).unlink()

    @contextmanager
    def filling(self, waits: Callable[[], None]) -> Iterator[None]:
        """While the block runs, nobody else fills the entry.

        Args:
            waits: called again and again while somebody else does.
        """
        lock = self._fill_lock()
        while True:
            try:
                lock.acquire(timeout=0)
                break
            except Timeout:
                waits()
                time.sleep(WAIT_SECONDS)
        try:
            yield
        finally:
            lock.release()

    def users(self) -> int:
        """How many uses there are, in this process or others. Forgets those of processes that are gone."""
        count = 0
        for path in list(self._use_locks()):
            try:
                with FileLock(path, timeout=0):
                    pass
            except Timeout:
                count += 1
                continue
            with suppress(OSError):
                path.unlink()
        return count

    def clear(self) -> bool:
        """Delete the entry, unless somebody fills or uses it."""
        try:
            with self._fill_lock().acquire(timeout=0):
                if self.users():
                    return False
                with suppress(FileNotFoundError):
                    self.path.unlink()
        except Timeout:
            return False
        return True


def entry(key: str) -> Entry:
    return Entry(features_folder() / f"{key}{SUFFIX}")


def entries() -> list[Entry]:
    """Those that are there; what was used last comes first."""
    paths = list(features_folder().glob(f"*{SUFFIX}"))
    return [Entry(path) for path in sorted(paths, key=lambda path: -path.stat().st_mtime)]


def waiting(terminal: Terminal, stop: StopRequest) -> Callable[[], None]:
    """What to do while another process fills an entry."""
    said: list[bool] = []

    def wait() -> None:
        if not said:
            terminal.say("another process computes the same features: waiting for it")
            said.append(True)
        if stop.requested:
            raise stop.stopped("while waiting for another process's features")

    return wait
