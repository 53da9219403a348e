"""The runs of a rehearsal as processes of their own: started, watched, killed; none is left."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from finetune.base.cache_folders import FOLDER_VARIABLE
from finetune.base.signals import StopRequest

LOOK_SECONDS = 0.02
# To look at all processes takes a moment that the run would miss.
MEMORY_SECONDS = 0.25
# Where worker processes have their sockets, which nobody takes away after a kill.
TEMPORARY_VARIABLES = ("TMPDIR", "TEMP", "TMP")
# With a longer name before it, that of a socket is none (104 bytes on macOS, 108 on Linux).
LONGEST_FOLDER = 104 - len("/pymp-12345678/listener-12345678") - 1
# A file of this name in a run's folder says that it waits to be killed.
WAITS_FILE = "waits-to-be-killed"


@dataclass
class Ended:
    """A process that is over.

    Attributes:
        code: its exit code; negative = the signal that ended it.
        seconds: that it took.
        lines: (seconds since its start, text) of its output.
        peak_bytes: the most memory that it and its children held.
        was_killed: it waited for that.
    """

    code: int = 0
    seconds: float = 0.0
    lines: list[tuple[float, str]] = field(default_factory=list)
    peak_bytes: int = 0
    was_killed: bool = False

    @property
    def failed(self) -> bool:
        return self.code != 0

    @property
    def complaint(self) -> str:
        """What it said was wrong."""
        told = [text.removeprefix("finetune: ") for _, text in self.lines if text.startswith("finetune: ")]
        return told[-1] if told else (self.lines[-1][1] if self.lines else f"exit code {self.code}, without a word")


def environment(folder: Path, kept: Path) -> dict[str, str]:
    """That of the processes: what a killed one leaves lies in `folder`, features are kept in `kept`, nobody is told, no
    bytecode lies about."""
    found = {name: value for name, value in os.environ.items() if name != "FINETUNE_NOTIFY"}
    if len(os.fsencode(folder)) <= LONGEST_FOLDER:
        found |= dict.fromkeys(TEMPORARY_VARIABLES, str(folder))
    return found | {FOLDER_VARIABLE: str(kept), "PYTHONDONTWRITEBYTECODE": "1"}


def start(words: list[str], env: Mapping[str, str]) -> "subprocess.Popen[str]":
    """A `finetune` process at the head of a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "finetune.cli", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=dict(env),
    )


def kill(process: "subprocess.Popen[str]") -> None:
    """End a process and its children at once, whatever they are at."""
    children = []
    if os.name == "nt":
        with suppress(psutil.Error):
            children = psutil.Process(process.pid).children(recursive=True)
    if os.name != "nt":
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    for child in children:
        with suppress(psutil.Error):
            child.kill()
    process.wait()


def carry_out(words: list[str], env: Mapping[str, str], stop: StopRequest, killed_in: Path | None = None) -> Ended:
    """Run a process to its end, or until it waits to be killed.

    Args:
        killed_in: the folder of the run that will wait; None = it will not.

    Raises:
        StoppedEarly: asked for; the process is gone.
    """
    process, started, ended = start(words, env), time.monotonic(), Ended()
    reader = threading.Thread(target=_read, args=(process, started, ended.lines), daemon=True)
    reader.start()
    next_look = 0.0
    try:
        while process.poll() is None and not stop.requested:
            if killed_in is not None and (killed_in / WAITS_FILE).exists():
                ended.was_killed = True
                break
            if time.monotonic() >= next_look:
                ended.peak_bytes = max(ended.peak_bytes, _memory(process.pid))
                next_look = time.monotonic() + MEMORY_SECONDS
            time.sleep(LOOK_SECONDS)
    finally:
        ended.code = process.poll() or 0
        kill(process)  # whatever it leaves behind ends with it
        reader.join()
    ended.seconds = time.monotonic() - started
    if stop.requested:
        raise stop.stopped("in a rehearsal, of which nothing is left")
    return ended


def _read(process: "subprocess.Popen[str]", started: float, lines: list[tuple[float, str]]) -> None:
    assert process.stdout is not None
    with suppress(ValueError, OSError), process.stdout as stream:
        for line in stream:
            lines.append((time.monotonic() - started, line.rstrip()))


def _memory(pid: int) -> int:
    """Bytes that a process and its children hold."""
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += one.memory_info().rss
    return total


class WaitsToBeKilled:
    """A tracker that stops the run's process at a step, until somebody kills it. Nothing of that step is saved.

    Args:
        folder: of the run.
        step: that it waits after.
    """

    def __init__(self, folder: Path, step: int):
        self._folder, self._step, self._parent = folder, step, os.getppid()

    def logged(self, step: int, values: dict[str, float]) -> None:
        if step == self._step:
            (self._folder / WAITS_FILE).touch()
            while os.getppid() == self._parent:  # nobody is waited for who is gone
                time.sleep(LOOK_SECONDS)
            os._exit(1)
