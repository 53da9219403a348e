"""A run folder that lives elsewhere: s3://, gs://, whatever fsspec knows. Written here first, uploaded behind the run.

On this machine such a run is an ordinary folder (a mirror), and everything else works on that. A thread of its own
carries over what has changed; it never holds the run up, however long the network is gone. What waits is the set of
files that differ, so it cannot grow beyond the folder itself.
"""

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs

from finetune.checkpoint import BEST, LATEST, STEP_FILE, newest_good
from finetune.errors import RunError, UsageError, one_line
from finetune.files import TEMPORARY_SUFFIX, make_folders, sync_folder
from finetune.lock import LOCK_FILE, OWNER_FILE, owner_from_text, owner_to_text, this_process
from finetune.run import RECIPE_FILE, RunFolder

SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
# A process that holds a remote run says so this often; silent for so long, it is taken for dead.
HEARTBEAT_SECONDS, SILENCE_SECONDS = 60.0, 180.0
SECONDS_BETWEEN_LINES = 10.0
MB = 1_000_000


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
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            if name in (LOCK_FILE, OWNER_FILE) or name.endswith(TEMPORARY_SUFFIX):
                continue
            with suppress(FileNotFoundError):  # pruned while we look
                state = path.stat()
                stamp = _Stamp(state.st_ino, state.st_size, state.st_mtime_ns)
                found[path.relative_to(folder).as_posix()] = stamp
    return found


class RemoteFolder:
    """Files below a URL.

    Raises:
        UsageError: a URL of a kind that is not installed, or of none.
    """

    def __init__(self, url: str):
        import fsspec

        self.url = url
        try:
            # Nothing remembered of a listing: another machine writes there too.
            self.file_system, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise UsageError(
                f"--run {url}: needs another package ({one_line(error)}); pip install 'finetune[s3]' or 'finetune[gs]'"
            ) from None
        except (ValueError, OSError) as error:
            raise UsageError(
                f"--run {url}: cannot be used ({one_line(error)}); give s3://BUCKET/RUN, or a folder"
            ) from None
        self.root = root.rstrip("/")

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def list(self) -> dict[str, int]:
        """Sizes in bytes by relative name.

        Raises:
            RunError: a name that would lead out of a folder.
        """
        self.file_system.invalidate_cache()
        try:
            found = self.file_system.find(self.root, detail=True)
        except FileNotFoundError:
            return {}
        names = {}
        for path, about in found.items():
            name = path[len(self.root) :].lstrip("/") if path.startswith(self.root) else path
            parts = PurePosixPath(name).parts
            odd = name.startswith("/") or any(one in name for one in "\\:") or not name.isprintable()
            if odd or not parts or ".." in parts:
                raise RunError(f"{self.url}: holds {name!r}, which is no file of a run; remove it")
            names[name] = int(about["size"])
        return names

    def read(self, name: str) -> bytes | None:
        try:
            return self.file_system.cat_file(self.path(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        self.file_system.pipe_file(self.path(name), content)

    def upload(self, file: Path, name: str) -> None:
        self.file_system.makedirs(self.path(name).rsplit("/", 1)[0], exist_ok=True)
        self.file_system.put_file(os.fspath(file), self.path(name))

    def copy(self, source: str, name: str) -> None:
        self.file_system.cp_file(self.path(source), self.path(name))

    def download(self, name: str, file: Path) -> None:
        make_folders(file.parent)
        temporary = file.with_name(f".{file.name}{TEMPORARY_SUFFIX}")
        self.file_system.get_file(self.path(name), os.fspath(temporary))
        os.replace(temporary, file)
        sync_folder(file.parent)

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.file_system.rm_file(self.path(name))


# ---- Up ------------------------------------------------------------------------------------------------------------


class Uploader:
    """Carries a mirror's changes over, in an order in which each moment leaves a run to resume from.

    Args:
        known: what is there already, by name.
        say: told once that the network fails, and once that it is back.
    """

    def __init__(self, remote: RemoteFolder, folder: Path, known: dict[str, _Stamp], say: Callable[[str], None]):
        self.remote, self.folder, self.say = remote, folder, say
        self._there = known
        self._failing = False
        self._over = threading.Event()
        self._last_heartbeat = 0.0
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _work(self) -> None:
        pause = SECONDS_BETWEEN_LOOKS
        while not self._over.wait(pause):
            pause = SECONDS_BETWEEN_LOOKS if self.attempt() else min(2 * pause, LONGEST_PAUSE_SECONDS)

    def attempt(self) -> bool:
        """Carry over what has changed, and say once what fails. Whether all is there now."""
        try:
            self._beat()
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

    def _beat(self) -> None:
        if time.monotonic() - self._last_heartbeat > HEARTBEAT_SECONDS:
            self.remote.write(OWNER_FILE, f"{owner_to_text(this_process())}\n{time.time()}".encode())
            self._last_heartbeat = time.monotonic()

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
        if twin is not None and name.startswith("checkpoints/"):
            self.remote.copy(twin, name)
        else:
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

    def finish(self) -> None:
        """Wait until everything is there, and say how much is left. A Ctrl-C leaves the rest on this machine.

        Raises:
            RunError: interrupted; says where the rest lies.
        """
        self._over.set()
        said = 0.0
        try:
            self._thread.join()
            while not (self.attempt() and self._is_whole()):
                if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    left = self.waiting_bytes() / MB
                    self.say(f"{left:,.1f} MB wait to be uploaded to {self.remote.url} (Ctrl-C: later)")
                time.sleep(SECONDS_BETWEEN_LOOKS)
        except KeyboardInterrupt:
            left = self.waiting_bytes() / MB
            raise RunError(
                f"{left:,.1f} MB are not uploaded to {self.remote.url}; they lie in {self.folder}, and "
                f"finetune resume {self.remote.url} on this machine uploads them"
            ) from None
        with suppress(Exception):
            self.remote.delete(OWNER_FILE)

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
    """What a checkpoint needs comes first; then numbered ones, oldest first; then the names that move; the recipe, by
    which a run is known to be one, before any of them."""
    base = name.rsplit("/", 1)[-1]
    numbered = STEP_FILE.fullmatch(base)
    if not name.startswith("checkpoints/"):
        return (1 if name == RECIPE_FILE else 0), 0, name
    return (2, int(numbered[1]), name) if numbered else ({LATEST: 3, BEST: 4}.get(base, 5), 0, name)


# ---- Down ----------------------------------------------------------------------------------------------------------


def _refuse_if_in_use(remote: RemoteFolder) -> None:
    content = remote.read(OWNER_FILE)
    if content is None:
        return
    text, _, beat = content.decode(errors="replace").partition("\n")
    owner = owner_from_text(text)
    try:
        silent_seconds = time.time() - float(beat)
    except ValueError:
        return
    if owner is None or owner == this_process() or owner.is_dead() or silent_seconds > SILENCE_SECONDS:
        return
    raise RunError(
        f"run {remote.url} is in use by {owner}, last heard of {silent_seconds:.0f} s ago; wait for it; if that "
        f"process is gone, try again in {SILENCE_SECONDS - silent_seconds:.0f} s"
    )


def _newest_step(folder: Path, run_id: str) -> int:
    try:
        found = newest_good(folder, run_id)
    except RunError:
        return -1
    return found[1]["step"] if found else -1


def fetch(remote: RemoteFolder, folder: Path, say: Callable[[str], None]) -> dict[str, _Stamp]:
    """Make `folder` the mirror of what is remote, unless it is ahead of it: then a network failed in the end.

    Returns:
        What is remote already, as it lies here.
    """
    sizes = {name: size for name, size in remote.list().items() if name not in (LOCK_FILE, OWNER_FILE)}
    run = RunFolder(folder)
    if RECIPE_FILE not in sizes:
        if run.exists():
            say(f"{remote.url} holds no run; what lies in {folder} is uploaded")
        return {}
    if run.exists():
        there, here = remote.read(RECIPE_FILE), run.recipe_file.read_bytes()
        if there == here:
            run_id = run.read_recipe()["id"]
            ahead = _newest_step(run.checkpoints, run_id)
            numbers = [int(match[1]) for name in sizes if (match := STEP_FILE.fullmatch(name.rsplit("/", 1)[-1]))]
            if ahead >= max(numbers, default=-1):
                # What never changes need not go there again; of the rest a size says nothing.
                stable = {name for name in sizes if name.startswith(("frozen/", "code/")) or STEP_FILE.search(name)}
                here = _local_files(folder)
                return {name: here[name] for name in stable & set(here) if here[name].size_bytes == sizes[name]}
        aside = folder.with_name(f"{folder.name}-{time.time_ns()}")
        folder.rename(aside)
        say(f"what lay in {folder} is of another time; it is now {aside}")
    numbered = any(STEP_FILE.fullmatch(name.rsplit("/", 1)[-1]) for name in sizes)
    # With numbered checkpoints there, the newest is `latest.pt`.
    wanted = [name for name in sizes if not (numbered and name == f"checkpoints/{LATEST}")]
    say(f"fetching {sum(sizes[name] for name in wanted) / MB:,.1f} MB from {remote.url}")
    for name in sorted(wanted, key=_upload_order):
        remote.download(name, folder / name)
    here = _local_files(folder)
    return {name: stamp for name, stamp in here.items() if sizes.get(name) == stamp.size_bytes}


@contextmanager
def open_run(run: str, say: Callable[[str], None], *, writes: bool = True) -> Iterator[RunFolder]:
    """The folder of a run: itself, or the mirror of a remote one, whose changes are uploaded while the block runs.

    Args:
        writes: whether the block changes anything there; else another process may use the run meanwhile.

    Raises:
        UsageError: a URL of an unknown kind.
        RunError: another process uses the remote run, or it cannot be reached to begin with.
    """
    if not is_remote(run):
        yield RunFolder(Path(run))
        return
    remote, folder = RemoteFolder(run), mirror_folder(run)
    try:
        if writes:
            _refuse_if_in_use(remote)
        known = fetch(remote, folder, say)
    except (RunError, UsageError):
        raise
    except Exception as error:  # whatever a network and its libraries can raise
        raise RunError(
            f"{run} cannot be reached ({one_line(error)}); check the address, the network, your rights"
        ) from None
    if not writes:
        yield RunFolder(folder, run)
        return
    uploader = Uploader(remote, folder, known, say)
    uploader.start()
    try:
        yield RunFolder(folder, run)
    finally:
        uploader.finish()
