"""One run, one writer: a lock in the run's folder, and who holds it. One process, one training."""

import datetime
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from filelock import FileLock, Timeout

from finetune.errors import RunError

LOCK_FILE, OWNER_FILE = "lock", "lock.owner"
# Worker processes of a killed run hold its lock until they notice that their parent is gone, at most this long.
STALE_LOCK_WAIT_SECONDS = 15.0
# Who only asks whether a run is in use has its lock for a moment.
BRIEF_LOCK_WAIT_SECONDS = 0.5


@dataclass(frozen=True)
class Owner:
    """A process, as far as another one can tell.

    Attributes:
        boot: which start of that machine or container; "" where the system does not tell. Machines may share a name.
        since: local time, to the second.
    """

    pid: int
    host: str
    boot: str
    since: str

    def is_dead(self) -> bool:
        """Whether that is certain: of a process on another host nothing is."""
        if (self.host, self.boot) != (socket.gethostname(), boot_id()) or os.name == "nt":
            return False  # on Windows os.kill(pid, 0) ends the process; the lock itself is released with its holder
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        return False

    def __str__(self) -> str:
        host = "" if self.host == socket.gethostname() else f" on {self.host}"
        return f"process {self.pid}{host}, since {self.since}"


def boot_id() -> str:
    try:
        # Containers of one machine share its start, but not their numbering of processes.
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def this_process() -> Owner:
    return Owner(os.getpid(), socket.gethostname(), boot_id(), datetime.datetime.now().isoformat(" ", "seconds"))


def owner_to_text(owner: Owner) -> str:
    return json.dumps(asdict(owner))


def owner_from_text(text: str) -> Owner | None:
    """None where it says nothing."""
    try:
        found = json.loads(text)
        owner = Owner(*(found[field.name] for field in fields(Owner)))
        return owner if isinstance(owner.pid, int) else None
    except (ValueError, KeyError, TypeError):
        return None


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder's lock just now."""
    if not (folder / LOCK_FILE).exists():
        return False
    try:
        with FileLock(folder / LOCK_FILE).acquire(timeout=0):
            return False
    except Timeout:
        return True


@contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: one run, one writer. A lock whose holder is dead is taken over.

    Raises:
        RunError: another live process holds it.
    """
    lock = FileLock(folder / LOCK_FILE)
    owner_file = folder / OWNER_FILE
    started = time.monotonic()
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            try:
                owner = owner_from_text(owner_file.read_text(errors="replace"))
            except OSError:
                owner = None
            is_alive = owner is not None and not owner.is_dead()
            if time.monotonic() - started > (BRIEF_LOCK_WAIT_SECONDS if is_alive else STALE_LOCK_WAIT_SECONDS):
                raise RunError(
                    f"run {folder} is in use by {owner or 'another process'}; wait for it, or stop it first"
                ) from None
            time.sleep(0.1)
    try:
        # Only to be read by people; a disk that is full is met where it matters.
        with suppress(OSError):
            owner_file.write_text(owner_to_text(this_process()))
        yield
    finally:
        with suppress(OSError):
            owner_file.unlink()
        lock.release()


_training = threading.Lock()


@contextmanager
def alone_in_process() -> Iterator[None]:
    """Torch's random generators and its number of threads are one for all threads of a process.

    Raises:
        RunError: another thread trains.
    """
    if not _training.acquire(blocking=False):
        raise RunError("another thread of this process trains; wait for it, or start a process of its own")
    try:
        yield
    finally:
        _training.release()
