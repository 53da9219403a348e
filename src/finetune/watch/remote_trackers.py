"""Weights & Biases and messages, as the run sees them: a process of its own is told, and nothing comes back.

Whatever those services do (hang, crash, draw random numbers, catch signals, fill memory) happens over there. And as the
pipe to that process ends with the run, it is the one that can tell when a run dies without a word.
"""

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.base.events import Begun, Ended, Pictures, Validated
from finetune.errors import UsageError, one_line
from finetune.watch.pipe import Closed, Logged, Queue, Told, encode, scheme_of, scrub, secrets_of, to_line

if TYPE_CHECKING:  # nothing here needs it
    from torch import Tensor

URLS_VARIABLE = "FINETUNE_NOTIFY"
URLS_LIST = "https://github.com/caronc/apprise/wiki"
# Which library each service is reached by.
LIBRARIES = {"wandb": "wandb", "notify": "apprise"}
# -P: what lies in the folder that finetune is called in must not be taken for a library.
SERVICE_COMMAND = [sys.executable, "-P", "-m", "finetune.watch.service"]
FINISHED_PATIENCE_SECONDS, STOPPED_PATIENCE_SECONDS, SILENT_SECONDS = 20, 1, 2
CHECK_SECONDS = 60
# What is told meanwhile goes out together: a thread that woke up for each would take its time from the one that trains.
BATCH_SECONDS = 0.02


# ---- Before a run ----------------------------------------------------------------------------------------------------


def notify_urls(given: Sequence[str]) -> tuple[str, ...]:
    """The URLs that messages go to: those that are given, then those of the environment."""
    return tuple(dict.fromkeys([*given, *os.environ.get(URLS_VARIABLE, "").split()]))


def check_services(names: Sequence[str]) -> None:
    """Look whether the libraries are there that these services need; none is imported.

    Args:
        names: of "wandb" and "notify"; others need nothing.

    Raises:
        UsageError: one is not installed.
    """
    for name in names:
        library = LIBRARIES.get(name)
        if library and importlib.util.find_spec(library) is None:
            option = "--notify" if name == "notify" else f"--track {name}"
            raise UsageError(f"{option}: {library} is not installed; install it with: pip install {library}")


def check_notify_urls(urls: Sequence[str]) -> None:
    """Look whether messages can go to these URLs; nothing is sent.

    Raises:
        UsageError: one is of an unknown kind, or incomplete. The URL itself is not named: it may hold a password.
    """
    if not urls:
        return
    try:
        done = subprocess.run(
            [*SERVICE_COMMAND, "check"],
            input=json.dumps(list(urls)).encode(),
            capture_output=True,
            timeout=CHECK_SECONDS,
            env=_environment(),
        )
        good = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return  # no reason not to train; what cannot be sent is said later
    for number, (url, is_good) in enumerate(zip(urls, good, strict=True), 1):
        if not is_good:
            raise UsageError(
                f"--notify: URL {number} ({scheme_of(url)}) is none that messages can go to; "
                f"how each kind is written: {URLS_LIST}"
            )


def _environment() -> dict[str, str]:
    """What the other process gets: URLs come to it by its pipe alone."""
    return {name: value for name, value in os.environ.items() if name != URLS_VARIABLE}


# ---- During a run ----------------------------------------------------------------------------------------------------


class Outside:
    """Tells services outside of this machine; no method waits for them, but `end`, and that one has a deadline.

    Args:
        services: "wandb", "notify" or both.
        notify_urls: where messages go; they are given to the other process alone, by its standard input.
        notify_every_epochs: a message that often; 0 = never for that.
        state_folder: where it is kept what the services know already.
        say: for a person; called from another thread, and never again once `end` or `close` has returned.
        run: as a person names it and types it; default: the folder.

    Attributes:
        process: the other one; None if it could not be started.
    """

    def __init__(
        self,
        services: Sequence[str],
        notify_urls: Sequence[str],
        notify_every_epochs: int,
        state_folder: Path,
        say: Callable[[str], None],
        run: str = "",
    ):
        self.name = " and ".join(services)
        self.process: subprocess.Popen[bytes] | None = None
        self._say, self._said, self._secrets = say, set[str](), secrets_of(notify_urls)
        self._saying = threading.Lock()
        self._left = dict.fromkeys(services)
        self._queue: Queue[bytes] = Queue()
        self._threads: list[threading.Thread] = []
        hello = {
            "services": list(services),
            "notify_urls": list(notify_urls),
            "notify_every_epochs": notify_every_epochs,
            "state_folder": str(state_folder.resolve()),
            "run": run or str(state_folder),
            "pid": os.getpid(),
        }
        self._queue.put(to_line(hello))
        try:
            # Unbuffered: a worker process forked from this one must not hold, and write, a part of what is told.
            # A group (session) of its own: Ctrl-C in the terminal is for the run.
            self.process = subprocess.Popen(
                SERVICE_COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=_environment(),
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
                | getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            self._queue.close()
            self._say_once(f"{self.name}: cannot be started ({one_line(error)}); the run goes on without it")
            return
        for work in (self._write, self._listen):
            thread = threading.Thread(target=work, name=f"outside {work.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)

    # ---- What the run tells ----------------------------------------------------------------------------------------

    def begin(self, begun: Begun) -> None:
        self._tell(begun)

    def logged(self, step: int, values: dict[str, float]) -> None:
        self._tell(Logged(step, values))

    def validated(self, validated: Validated) -> None:
        self._tell(validated)

    def histograms(self, step: int, weights: "dict[str, Tensor]", gradients: "dict[str, Tensor]") -> None:
        """Too much for a pipe."""

    def draw(self, pictures: Pictures) -> None:
        """They are for TensorBoard; the worst samples come with the end."""

    def flush(self) -> None:
        """What was told is on its way already; a checkpoint does not wait for it."""

    def end(self, ended: Ended) -> None:
        """Tell how it ended, and wait a little until the services know: longer after a finished run. The other process
        then goes on by itself."""
        self._tell(ended)
        is_done = ended.status in ("finished", "stopped early")
        self._leave(FINISHED_PATIENCE_SECONDS if is_done else STOPPED_PATIENCE_SECONDS)

    def close(self) -> None:
        """There is nothing to tell any more, not even an end."""
        self._tell(Closed())
        self._leave(STOPPED_PATIENCE_SECONDS)

    def _tell(self, told: Told) -> None:
        self._queue.put(encode(told), can_be_spared=isinstance(told, Logged))

    def _leave(self, patience_seconds: int) -> None:
        self._queue.close()
        if self._threads:
            listener = self._threads[-1]
            listener.join(min(patience_seconds, SILENT_SECONDS))
            if listener.is_alive() and patience_seconds > SILENT_SECONDS:
                rest = patience_seconds - SILENT_SECONDS
                if self._left:  # else all is told, and the process is just about to end
                    names = " and ".join(self._left)
                    self._say_once(f"waiting for {names}, {rest} s at most; what is left goes on by itself")
                listener.join(rest)
        if self._queue.dropped:
            self._say_once(f"{self.name}: {self._queue.dropped} logged steps were left out, it did not keep up")
        with self._saying:
            self._say = lambda text: None

    # ---- The other end of the pipes --------------------------------------------------------------------------------

    def _write(self) -> None:
        assert self.process is not None and self.process.stdin is not None
        with suppress(OSError), self.process.stdin as pipe:
            while lines := self._queue.take():
                data = memoryview(b"".join(lines))
                while data:
                    data = data[pipe.write(data) :]
                time.sleep(BATCH_SECONDS)
        self._queue.close()  # nobody takes anything any more

    def _listen(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        with self.process.stdout as pipe:
            for line in pipe:
                with suppress(ValueError, KeyError, TypeError):
                    heard = json.loads(line)
                    if "problem" in heard:
                        self._say_once(f"{heard['service']}: {scrub(heard['problem'], self._secrets)}")
                    else:
                        self._left.pop(heard["service"], None)
        code = self.process.wait()
        if self._left:
            names = " and ".join(self._left)
            self._say_once(f"{names}: the process that tells it has ended ({code}); the run goes on without it")

    def _say_once(self, text: str) -> None:
        with self._saying:
            if text not in self._said:
                self._said.add(text)
                with suppress(Exception):  # whatever showing it raises: this thread must go on listening
                    self._say(text)
