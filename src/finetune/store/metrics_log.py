"""metrics.jsonl: a JSON line each logged step and validation. A log that cannot be written never stops a run."""

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from finetune.base.files import write_atomically
from finetune.base.formatting import finite
from finetune.errors import one_line
from finetune.store.state import LogMark

# What waits for a disk to have room again; more than that is dropped.
MOST_WAITING_BYTES = 1 << 20
# What the frozen backbone took for the features that a run keeps, in the line of its first validation.
PASS_SECONDS = "time/pass_seconds"


class MetricsFile:
    """Appends lines. What a checkpoint notes of it (`mark`) tells a resume where to cut it, and whether it is whole.

    Args:
        path: the file; None = nothing is written.
        say: told, once, what is wrong with it.
        mark: that of the checkpoint to go on from; None = a new file.
        last_step: of that checkpoint: where the file is not what it was, lines up to there are kept.
    """

    def __init__(self, path: Path | None, say: Callable[[str], None], mark: LogMark | None = None, last_step: int = -1):
        self._say = say
        self._said = False
        self._waiting = b""
        self._stream: io.FileIO | None = None
        self._started = time.monotonic()
        content = b"" if mark is None or path is None else self._content_to_keep(path, mark, last_step)
        self._sha256 = hashlib.sha256(content)
        self._size_bytes = len(content)
        self._path = path
        if path is None:
            return
        try:
            write_atomically(path, lambda stream: stream.write(content))
            self._stream = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
        except OSError as error:
            self._failed(error)

    def _content_to_keep(self, path: Path, mark: LogMark, last_step: int) -> bytes:
        found = path.read_bytes() if path.is_file() else b""
        kept = found[: mark.bytes]
        if hashlib.sha256(kept).hexdigest() == mark.sha256:
            return kept[: kept.rfind(b"\n") + 1]  # a full disk may have torn the last line
        lines = [line + b"\n" for line in found.split(b"\n") if _line_step(line) <= last_step]
        self._say(f"{path} is not what this run wrote: {len(lines)} line(s) that can be read are kept")
        return b"".join(lines)

    def _failed(self, error: OSError) -> None:
        if not self._said:
            self._said = True
            self._say(
                f"{self._path} cannot be written ({one_line(error)}): the run goes on, figures may be missing there"
            )

    def write(self, values: Mapping[str, float]) -> None:
        """Append a line; null stands for what is no finite number."""
        line = dict(values) | {"time/seconds": round(time.monotonic() - self._started, 3)}
        self._waiting += json.dumps(finite(line), allow_nan=False).encode() + b"\n"
        if self._stream is None or len(self._waiting) > MOST_WAITING_BYTES:
            self._waiting = b""
            return
        try:
            while self._waiting:
                count = self._stream.write(self._waiting) or 0
                self._sha256.update(self._waiting[:count])
                self._size_bytes += count
                self._waiting = self._waiting[count:]
        except OSError as error:
            self._failed(error)

    def mark(self) -> LogMark:
        """What a checkpoint notes: size and sha256 of all that is on the disk now: it is never ahead of its lines."""
        if self._stream is not None:
            try:
                os.fsync(self._stream.fileno())
            except OSError as error:
                self._failed(error)
        return LogMark(self._size_bytes, self._sha256.hexdigest())

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def _line_step(line: bytes) -> float:
    """The step of a line; infinite for a torn or empty one, which is thereby dropped."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")
