"""A disk that loses power: records what a program writes, then shows any moment of it as a folder after the power cut.

What the operating system was told but not told to keep (`fsync` of the file, `fsync` of its folder) may be there or not
after the cut, or in part. The model is that of the file systems in common use: a name and the content that it stands for
are kept apart; a name is on the disk once its folder was synced, content once its file was.
"""

import builtins
import contextlib
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# How much of what was not synced is there after the cut: of names, of contents.
ALL, NONE, SOME = "all", "none", "some"
SCENARIOS = {
    "killed": (ALL, ALL),
    "only what was synced": (NONE, NONE),
    "names, no contents": (ALL, NONE),
    "contents, no names": (NONE, ALL),
    "torn": (SOME, SOME),
}


@dataclass
class Operation:
    """One of: write, truncate, sync, sync folder, create, rename, link, unlink, make, remove, saved."""

    kind: str
    file: int = 0
    data: bytes = b""
    path: str = ""
    other: str = ""
    step: int = 0


@dataclass
class Recorder:
    """Notes what happens below `root`, in order."""

    root: Path
    operations: list[Operation] = field(default_factory=list)
    _files: dict[str, int] = field(default_factory=dict)  # path -> number of the content behind it
    _open: dict[int, int] = field(default_factory=dict)  # descriptor -> number
    _next: int = 1

    def note(self, kind: str, **values: Any) -> None:
        self.operations.append(Operation(kind, **values))

    def inside(self, path: Any) -> str | None:
        """Relative to the root, or None for what lies elsewhere."""
        try:
            text = os.path.abspath(os.fspath(path))
        except TypeError:
            return None
        base = str(self.root)
        if text != base and not text.startswith(base + os.sep):
            return None
        name = os.path.relpath(text, base)
        return None if os.path.basename(name).startswith("lock") else name

    @contextlib.contextmanager
    def recording(self) -> Iterator["Recorder"]:
        """While the block runs."""
        replaced: list[tuple[Any, str, Any]] = []

        def replace(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
            original = getattr(owner, name)
            replaced.append((owner, name, original))
            setattr(owner, name, make(original))

        for owner in (builtins, io):
            replace(owner, "open", self._open_file)
        replace(os, "fsync", self._fsync)
        for name in ("replace", "rename"):
            replace(os, name, self._rename)
        replace(os, "link", self._link)
        for name in ("unlink", "remove"):
            replace(os, name, self._unlink)
        replace(os, "mkdir", self._mkdir)
        replace(os, "rmdir", self._rmdir)
        replace(shutil, "rmtree", self._rmtree)
        try:
            yield self
        finally:
            for owner, name, original in reversed(replaced):
                setattr(owner, name, original)

    def _open_file(self, original: Callable) -> Callable:
        def opened(path, mode="r", *rest, **options):
            name = None if isinstance(path, int) or not set(mode) & set("wax+") else self.inside(path)
            stream = original(path, mode, *rest, **options)
            if name is None:
                return stream
            if name not in self._files:
                self._files[name], self._next = self._next, self._next + 1
                self.note("create", file=self._files[name], path=name)
            elif "w" in mode:
                self.note("truncate", file=self._files[name])
            self._open[stream.fileno()] = self._files[name]
            return _Watched(stream, self, self._files[name])

        return opened

    def _fsync(self, original: Callable) -> Callable:
        def fsync(descriptor):
            original(descriptor)
            place = os.readlink(f"/proc/self/fd/{descriptor}")
            if os.path.isdir(place):
                name = self.inside(place) if not str(self.root).startswith(place + os.sep) else ".."
                if name is not None:
                    self.note("sync folder", path=name)
            elif descriptor in self._open and self.inside(place) is not None:
                self.note("sync", file=self._open[descriptor])

        return fsync

    def _rename(self, original: Callable) -> Callable:
        def rename(source, target, **options):
            original(source, target, **options)
            name, other = self.inside(source), self.inside(target)
            if name is None or other is None or self._files.get(name) == self._files.get(other):
                return  # of two names of one file, renaming one onto the other does nothing
            self._files[other] = self._files.pop(name)
            self.note("rename", path=name, other=other)

        return rename

    def _link(self, original: Callable) -> Callable:
        def link(source, target, **options):
            original(source, target, **options)
            name, other = self.inside(source), self.inside(target)
            if other is None:
                return
            if name is None:  # from elsewhere: its content is on the disk already
                number, self._next = self._next, self._next + 1
                self._files[other] = number
                self.note("create", file=number, path=other)
                self.note("write", file=number, data=Path(target).read_bytes())
                self.note("sync", file=number)
            else:
                self._files[other] = self._files[name]
                self.note("link", path=name, other=other)

        return link

    def _unlink(self, original: Callable) -> Callable:
        def unlink(path, **options):
            original(path, **options)
            name = self.inside(path)
            if name in self._files:
                del self._files[name]
                self.note("unlink", path=name)

        return unlink

    def _mkdir(self, original: Callable) -> Callable:
        def mkdir(path, *rest, **options):
            original(path, *rest, **options)
            if (name := self.inside(path)) is not None:
                self.note("make", path=name)

        return mkdir

    def _rmdir(self, original: Callable) -> Callable:
        def rmdir(path, *rest, **options):
            original(path, *rest, **options)
            if (name := self.inside(path)) is not None:
                self.note("remove", path=name)

        return rmdir

    def _rmtree(self, original: Callable) -> Callable:
        def rmtree(path, *rest, **options):
            assert self.inside(path) is None or not os.path.exists(path), "not recorded: say how"
            original(path, *rest, **options)

        return rmtree


class _Watched:
    """A file that notes what is written to it."""

    def __init__(self, stream: Any, recorder: Recorder, number: int):
        self._stream, self._recorder, self._number = stream, recorder, number

    def write(self, data) -> int:
        count = self._stream.write(data)
        self._recorder.note("write", file=self._number, data=bytes(data)[:count])
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._stream.close()


class Disk:
    """What is on the disk, and what only the operating system knows yet."""

    def __init__(self):
        self.contents: dict[int, bytes] = {}
        self.synced_contents: dict[int, bytes] = {}
        # Names of files (-> content) and of folders (-> None), and those changes that no folder's sync has kept yet.
        self.names: dict[str, int | None] = {}
        self.synced_names: dict[str, int | None] = {}
        self.unsynced: list[tuple[str, str, int | None]] = []  # ("set" or "drop", path, content)

    def apply(self, operation: Operation) -> None:
        """One step forward."""
        kind, path, other = operation.kind, operation.path, operation.other
        if kind == "create":
            self.contents[operation.file], self.synced_contents[operation.file] = b"", b""
            self._set(path, operation.file)
        elif kind == "truncate":
            self.contents[operation.file] = b""
        elif kind == "write":
            self.contents[operation.file] += operation.data
        elif kind == "sync":
            self.synced_contents[operation.file] = self.contents[operation.file]
        elif kind == "rename":
            self._set(other, self.names[path])
            self._drop(path)
        elif kind == "link":
            self._set(other, self.names[path])
        elif kind in ("unlink", "remove"):
            self._drop(path)
        elif kind == "make":
            self._set(path, None)
        elif kind == "sync folder":
            kept = [change for change in self.unsynced if (os.path.dirname(change[1]) or ".") == path or (path == ".." and change[1] == ".")]  # fmt: skip
            for change in kept:
                self._replay(self.synced_names, change)
            self.unsynced = [change for change in self.unsynced if change not in kept]

    def _set(self, path: str, file: int | None) -> None:
        self._change(("set", path, file))

    def _drop(self, path: str) -> None:
        self._change(("drop", path, None))

    def _change(self, change: tuple[str, str, int | None]) -> None:
        self._replay(self.names, change)
        self.unsynced.append(change)

    @staticmethod
    def _replay(names: dict[str, int | None], change: tuple[str, str, int | None]) -> None:
        kind, path, file = change
        if kind == "set":
            names[path] = file
        else:
            names.pop(path, None)

    def after_the_cut(self, scenario: str, chance: random.Random) -> dict[str, bytes | None]:
        """Path -> content, or None for a folder."""
        of_names, of_contents = SCENARIOS[scenario]
        names = dict(self.synced_names)
        kept = {ALL: len(self.unsynced), NONE: 0, SOME: chance.randint(0, len(self.unsynced))}[of_names]
        for change in self.unsynced[:kept]:  # the file system's journal keeps them in order
            self._replay(names, change)
        found: dict[str, bytes | None] = {}
        for path, file in names.items():
            if file is None:
                found[path] = None
                continue
            content, synced = self.contents[file], self.synced_contents[file]
            if of_contents == NONE:
                content = synced
            elif of_contents == SOME and content != synced:
                cut = chance.randint(0, len(content))
                zeros = chance.choice([0, len(content) - cut])
                content = (synced if content.startswith(synced) and len(synced) > cut else content[:cut]) + bytes(zeros)
            found[path] = content
        return found


def lay_out(found: dict[str, bytes | None], folder: Path) -> None:
    """Make the folder that a person finds after the cut; what lies in a folder that is gone is gone."""

    def is_there(path: str) -> bool:
        above = os.path.dirname(path) or "."
        return path == "." or (above in found and is_there(above))

    for path, content in found.items():
        if content is None and is_there(path):
            (folder / path).mkdir(parents=True, exist_ok=True)
    for path, content in found.items():
        if content is not None and is_there(path):
            (folder / path).write_bytes(content)
