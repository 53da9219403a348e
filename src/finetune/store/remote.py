"""A run folder that lives elsewhere: s3://, gs://, whatever fsspec knows. Written here first, uploaded behind the run.

On this machine such a run is an ordinary folder (a mirror), and everything else works on that. A thread of its own
carries over what has changed; it never holds the run up, however long the network is gone. What waits is the set of
files that differ, so it cannot grow beyond the folder itself.
"""

import hashlib
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from finetune.base.files import TEMPORARY_SUFFIX, link_or_copy, sync_folder
from finetune.base.lock import LOCK_FILE, OWNER_FILE, is_held
from finetune.errors import RunError, StoppedEarly, UsageError, one_line
from finetune.store.checkpoint import BEST, LATEST, STEP_FILE, SUPERSEDED, newest_good, step_files
from finetune.store.remote_fs import Lease, RemoteFolder
from finetune.store.run_folder import RECIPE_FILE, RunFolder

SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
SECONDS_BETWEEN_LINES = 10.0
MB = 1_000_000
NUMBERED = re.compile(r"checkpoints/step-(\d+)\.pt")


# A drive has one letter.
ONE_SLASH = re.compile(r"[a-z][a-z0-9+.-]+:/(?!/)")


def is_remote(run: str) -> bool:
    """Whether a run's name is a URL."""
    return re.match(r"[a-z][a-z0-9+.-]+://", run) is not None


def mirror_folder(url: str) -> Path:
    """Where a remote run lies on this machine."""
    name = re.sub(r"[^\w.-]+", "-", url.rstrip("/").rsplit("/", 1)[-1])
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:12]
    return Path(platformdirs.user_data_dir("finetune")) / "remote" / f"{name}-{digest}"


@dataclass(frozen=True)
class _Stamp:
    """A file's identity and content, as far as the file system tells without reading it."""

    inode: int
    size_bytes: int
    changed_ns: int


def _local_files(folder: Path) -> dict[str, _Stamp]:
    """Relative names of what belongs to a run: no lock, no half-written file."""
    found = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.endswith(TEMPORARY_SUFFIX)]
        for name in names:
            path = Path(place) / name
            if name in (LOCK_FILE, OWNER_FILE) or name.endswith(TEMPORARY_SUFFIX):
                continue
            with suppress(FileNotFoundError):  # pruned while we look
                state = path.stat()
                stamp = _Stamp(state.st_ino, state.st_size, state.st_mtime_ns)
                found[path.relative_to(folder).as_posix()] = stamp
    return found


# ---- Up ------------------------------------------------------------------------------------------------------------


class Uploader:
    """Carries a mirror's changes over, in an order in which each moment leaves a run to resume from.

    Args:
        lease: of the remote folder, taken.
        known: what is there already, by name.
        say: told once that the network fails, and once that it is back.
    """

    def __init__(
        self, remote: RemoteFolder, lease: Lease, folder: Path, known: dict[str, _Stamp], say: Callable[[str], None]
    ):
        self.remote, self.lease, self.folder, self.say = remote, lease, folder, say
        self._there = known
        self._failing = False
        self._over = threading.Event()
        self.taken_over = ""
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _work(self) -> None:
        pause = SECONDS_BETWEEN_LOOKS
        while not self._over.wait(pause):
            pause = SECONDS_BETWEEN_LOOKS if self.attempt() else min(2 * pause, LONGEST_PAUSE_SECONDS)

    def attempt(self) -> bool:
        """Carry over what has changed, and say once what fails. Whether all is there now."""
        if self.taken_over:
            return False
        try:
            owner = self.lease.renew()
            if owner is not None:
                self.taken_over = str(owner)
                self.say(
                    f"{self.remote.url} is used by {owner} now, as nothing was heard of this process for too long: "
                    f"this run goes on in {self.folder} and uploads nothing any more"
                )
                return False
            self._carry_over()
        except Exception as error:  # whatever a network and its libraries can raise: the run goes on
            if not self._failing:
                self._failing = True
                self.say(
                    f"{self.remote.url} cannot be written just now ({one_line(error)}): the run goes on, "
                    "uploads wait and are caught up"
                )
            return False
        if self._failing:
            self._failing = False
            self.say(f"{self.remote.url} can be written again: all is caught up")
        return True

    def _carry_over(self) -> None:
        # The listing comes first: a log that is carried over after it holds every line up to the listed checkpoints.
        found = _local_files(self.folder)
        changed = [name for name, stamp in found.items() if self._there.get(name) != stamp]
        new = any(name.startswith("checkpoints/") or name not in self._there for name in changed)
        if not new and not self._over.is_set():
            return  # a log that only grew waits for the next checkpoint
        for name in sorted(changed, key=_upload_order):
            self._carry(name, found)
        # Only what this run itself removes: a mirror that somebody deletes must not take the run with it.
        pruned = f"checkpoints/{LATEST}" in found
        nothing_to_lose = not any(name.startswith("checkpoints/") for name in self._there)
        for name in [name for name in self._there if name not in found]:
            if nothing_to_lose or (pruned and name.startswith("checkpoints/")):
                self.remote.delete(name)
                del self._there[name]

    def _carry(self, name: str, found: dict[str, _Stamp]) -> None:
        """One file; where the same bytes are there under another name, they are copied there."""
        stamp = found[name]
        twin = next((other for other, there in self._there.items() if there == stamp and other != name), None)
        copied = False
        if twin is not None and name.startswith("checkpoints/"):
            try:
                self.remote.copy(twin, name)
                copied = True
            except Exception:  # not every file system can, and the twin may be gone from there
                pass
        if not copied:
            try:
                self.remote.upload(self.folder / name, name)
            except FileNotFoundError:
                if (self.folder / name).exists():
                    raise  # it is the other side that is gone
                return  # pruned meanwhile
        self._there[name] = stamp

    def waiting_bytes(self) -> int:
        """How much is not carried over yet."""
        found = _local_files(self.folder)
        return sum(stamp.size_bytes for name, stamp in found.items() if self._there.get(name) != stamp)

    def finish(self, pending: BaseException | None) -> None:
        """Wait until everything is there, and say how much is left. A Ctrl-C leaves the rest on this machine.

        Args:
            pending: the error that the run ended with, told after the wait; if there is one, none of ours is raised.

        Raises:
            StoppedEarly: not all is uploaded; says where the rest lies.
        """
        self._over.set()
        said = -math.inf
        try:
            self._thread.join()
            while not (self.attempt() and self._is_whole()):
                left = self.waiting_bytes() / MB
                if self.taken_over or not left:
                    break
                if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                    if pending is not None and said < 0:
                        self.say(str(pending))
                    said = time.monotonic()
                    self.say(f"{left:,.1f} MB wait to be uploaded to {self.remote.url} (Ctrl-C: later)")
                time.sleep(SECONDS_BETWEEN_LOOKS)
        except KeyboardInterrupt:
            left = self.waiting_bytes() / MB
            text = (
                f"{left:,.1f} MB are not uploaded to {self.remote.url}; they lie in {self.folder}, and "
                f"finetune resume {self.remote.url} on this machine uploads them"
            )
            if pending is None:
                raise StoppedEarly(text) from None
            self.say(text)
        if self.taken_over and pending is None:
            raise RunError(
                f"run {self.remote.url} was taken over by {self.taken_over}; what this process computed since lies in "
                f"{self.folder}"
            )
        with suppress(Exception):
            self.lease.give_back()

    def _is_whole(self) -> bool:
        """Whether what should be there is: storage may have come back without what it had taken."""
        try:
            sizes = self.remote.list()
        except Exception:  # as in `attempt`
            return False
        for name, stamp in list(self._there.items()):
            if sizes.get(name) != stamp.size_bytes:
                del self._there[name]
        return not self.waiting_bytes()


def _upload_order(name: str) -> tuple[int, int, str]:
    """What a checkpoint needs comes first; then what was set aside; then numbered ones, oldest first; then the names
    that move; the recipe, by which a run is known to be one, before any of them."""
    numbered = NUMBERED.fullmatch(name)
    if not name.startswith("checkpoints/"):
        return (1 if name == RECIPE_FILE else 0), 0, name
    if numbered:
        return 3, int(numbered[1]), name
    return {f"checkpoints/{BEST}": 4, f"checkpoints/{LATEST}": 5}.get(name, 2), 0, name


# ---- Down ----------------------------------------------------------------------------------------------------------


def _newest_step(folder: Path, run_id: str) -> int:
    try:
        found = newest_good(folder, run_id)
    except RunError:
        return -1
    return found[1].progress.step if found else -1


def _is_ahead(run: RunFolder, sizes: dict[str, int]) -> bool:
    """Whether a mirror holds all that is remote, or more: the network failed in the end.

    A rewind moves files to superseded/, and none ever goes from there: who has more of them knows of a later rewind.
    """
    aside = f"checkpoints/{SUPERSEDED}/"
    there, here = ({name for name in names if name.startswith(aside)} for names in (sizes, _local_files(run.path)))
    if there != here:
        return there < here
    numbers = [int(match[1]) for name in sizes if (match := NUMBERED.fullmatch(name))]
    return _newest_step(run.checkpoints, run.read_recipe().id) >= max(numbers, default=-1)


def fetch(remote: RemoteFolder, folder: Path, begun: bool, say: Callable[[str], None]) -> dict[str, _Stamp]:
    """Make `folder` the mirror of what is remote, unless it is ahead of it.

    Args:
        begun: whether a process of ours was there before, and was perhaps killed before the recipe was.

    Returns:
        What is remote already, as it lies here.

    Raises:
        UsageError: what is remote is no run.
    """
    sizes = {name: size for name, size in remote.list().items() if name not in (LOCK_FILE, OWNER_FILE)}
    run = RunFolder(folder)
    if RECIPE_FILE not in sizes:
        if run.exists():
            say(f"{remote.url} holds no run; what lies in {folder} is uploaded")
        elif sizes and not begun:
            raise UsageError(f"--run {remote.url}: holds other files ({min(sizes)}); give a new folder")
        return {}
    if run.exists() and remote.read(RECIPE_FILE) == run.recipe_file.read_bytes() and _is_ahead(run, sizes):
        # What never changes need not go there again; of the rest a size says nothing.
        stable = {name for name in sizes if name.startswith(("frozen/", "code/")) or STEP_FILE.search(name)}
        here = _local_files(folder)
        return {name: here[name] for name in stable & set(here) if here[name].size_bytes == sizes[name]}
    # Beside it first: half of a run must not be taken for one.
    fetched = folder.with_name(f"{folder.name}{TEMPORARY_SUFFIX}")
    shutil.rmtree(fetched, ignore_errors=True)
    numbered = any(NUMBERED.fullmatch(name) for name in sizes)
    # With numbered checkpoints there, the newest is `latest.pt`.
    wanted = [name for name in sizes if not (numbered and name == f"checkpoints/{LATEST}")]
    say(f"fetching {sum(sizes[name] for name in wanted) / MB:,.1f} MB from {remote.url}")
    for name in sorted(wanted, key=_upload_order):
        remote.download(name, fetched / name)
    if folder.exists():
        aside = folder.with_name(f"{folder.name}-{time.time_ns()}")
        folder.rename(aside)
        say(f"what lay in {folder} is of another time; it is now {aside}")
    fetched.rename(folder)
    sync_folder(folder.parent)
    known = {name: stamp for name, stamp in _local_files(folder).items() if sizes.get(name) == stamp.size_bytes}
    for _, newest in step_files(run.checkpoints)[-1:]:
        link_or_copy(newest, run.checkpoints / LATEST)
    return known


@contextmanager
def open_run(run: str, say: Callable[[str], None], *, writes: bool = True) -> Iterator[RunFolder]:
    """The folder of a run: itself, or the mirror of a remote one, whose changes are uploaded while the block runs.

    Args:
        writes: whether the block changes anything there; else another process may use the run meanwhile.

    Raises:
        UsageError: a URL of an unknown kind.
        RunError: another process uses the remote run, or it cannot be reached to begin with.
    """
    if ONE_SLASH.match(run):
        raise UsageError(f"--run {run}: neither a folder nor a URL; give {run.replace(':/', '://', 1)}, or a folder")
    if not is_remote(run):
        yield RunFolder(Path(run))
        return
    remote, folder = RemoteFolder(run), mirror_folder(run)
    lease = Lease(remote)
    try:
        if not writes and is_held(folder):
            known = {}  # a process of this machine writes there just now: nothing is fresher
        else:
            begun = remote.read(OWNER_FILE) is not None
            if writes:
                lease.take()
            known = fetch(remote, folder, begun, say)
    except (RunError, UsageError):
        if writes:
            with suppress(Exception):
                lease.give_back()
        raise
    except Exception as error:  # whatever a network and its libraries can raise
        raise RunError(
            f"{run} cannot be reached or written ({one_line(error)}); check the address, the network, your rights"
        ) from None
    if not writes:
        yield RunFolder(folder, run)
        return
    uploader = Uploader(remote, lease, folder, known, say)
    uploader.start()
    pending: BaseException | None = None
    try:
        yield RunFolder(folder, run)
    except BaseException as error:
        pending = error
        raise
    finally:
        uploader.finish(pending)
