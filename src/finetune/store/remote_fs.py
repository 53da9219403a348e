"""A folder behind a URL, through fsspec, and who uses it just now."""

import math
import os
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath

from finetune.base.files import TEMPORARY_SUFFIX, make_folders, sync_folder
from finetune.base.lock import OWNER_FILE, Owner, owner_from_text, owner_to_text, this_process
from finetune.errors import RunError, UsageError, one_line

# A process that holds a remote run says so this often; silent for so long, it is taken for dead.
HEARTBEAT_SECONDS, SILENCE_SECONDS = 60.0, 180.0
# They know no folders: to make one of theirs could make a bucket.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "r2", "memory"}


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
                f"--run {url}: needs another package ({one_line(error)}); for s3:// pip install s3fs, "
                "for gs:// pip install gcsfs"
            ) from None
        except Exception as error:  # any library may stand behind a URL
            raise UsageError(
                f"--run {url}: cannot be used ({one_line(error)}); give s3://BUCKET/RUN, or a folder"
            ) from None
        self.root = root.rstrip("/")
        kind = self.file_system.protocol
        self._has_folders = OBJECT_STORES.isdisjoint([kind] if isinstance(kind, str) else kind)

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
            content: bytes = self.file_system.cat_file(self.path(name))
            return content
        except FileNotFoundError:
            return None

    def _make_folder_of(self, name: str) -> None:
        if self._has_folders:
            self.file_system.makedirs(self.path(name).rsplit("/", 1)[0], exist_ok=True)

    def write(self, name: str, content: bytes) -> None:
        self._make_folder_of(name)
        self.file_system.pipe_file(self.path(name), content)

    def upload(self, file: Path, name: str) -> None:
        self._make_folder_of(name)
        self.file_system.put_file(os.fspath(file), self.path(name))

    def copy(self, source: str, name: str) -> None:
        self._make_folder_of(name)
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


class Lease:
    """Says in the remote folder, again and again, that this process uses the run; sees when another one does."""

    def __init__(self, remote: RemoteFolder):
        self._remote, self._me = remote, owner_to_text(this_process())
        self._last_heartbeat = -math.inf

    def other(self) -> tuple[Owner, float] | None:
        """Another process that uses the run, as far as can be told, and seconds since it last said so."""
        text, _, beat = (self._remote.read(OWNER_FILE) or b"").decode(errors="replace").partition("\n")
        owner = owner_from_text(text)
        try:
            silent_seconds = time.time() - float(beat)
        except ValueError:
            return None
        is_fresh = -SILENCE_SECONDS < silent_seconds < SILENCE_SECONDS  # clocks differ; nan is not fresh
        if owner is None or text == self._me or owner.is_dead() or not is_fresh:
            return None
        return owner, silent_seconds

    def take(self) -> None:
        """Raises RunError if another process uses the run."""
        self._refuse_other()
        self._say_so()
        self._refuse_other()  # that came between the two

    def _refuse_other(self) -> None:
        found = self.other()
        if found is not None:
            owner, silent_seconds = found
            raise RunError(
                f"run {self._remote.url} is in use by {owner}, last heard of {max(silent_seconds, 0):.0f} s ago; wait "
                f"for it; if that process is gone, try again in {SILENCE_SECONDS - silent_seconds:.0f} s"
            )

    def _say_so(self) -> None:
        self._remote.write(OWNER_FILE, f"{self._me}\n{time.time()}".encode())
        self._last_heartbeat = time.monotonic()

    def renew(self) -> Owner | None:
        """Say so again if it is time to; or return who has taken the run over while this process was not heard of."""
        if time.monotonic() - self._last_heartbeat > HEARTBEAT_SECONDS:
            found = self.other()
            if found is not None:
                return found[0]
            self._say_so()
        return None

    def give_back(self) -> None:
        """Unless it is somebody else's by now."""
        if (self._remote.read(OWNER_FILE) or b"").decode(errors="replace").startswith(self._me):
            self._remote.delete(OWNER_FILE)
