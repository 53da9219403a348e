"""Real `finetune` processes that start in a tenth of a second: forked off one that has imported everything already.

Each is a process of its own, at the head of its own group and with its own exit code: it can be killed, stopped and
waited for like any other. What it does not prove is the start itself; tests of that, and of what is loaded at a start, use
`conftest.finetune(..., is_cold=True)`.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from typing import IO

# Of a request: long enough for all words and the environment.
LARGEST_REQUEST_BYTES = 1 << 20


class Forked:
    """A forked process, with the part of `subprocess.Popen` that tests use.

    Args:
        pid: of the process.
        output: the reading end of its output.
        status: where its exit code arrives, once.
    """

    def __init__(self, pid: int, output: IO[str], status: int):
        self.pid, self.stdout, self.returncode = pid, output, None
        self._status = status

    def poll(self) -> int | None:
        return self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        if self._look(timeout) is None:
            raise subprocess.TimeoutExpired("finetune", timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """All of its output; must end within `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        parts = []
        descriptor = self.stdout.fileno()
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not select.select([descriptor], [], [], left)[0]:
                raise subprocess.TimeoutExpired("finetune", timeout or 0.0, "".join(parts))
            block = os.read(descriptor, 1 << 16)
            if not block:
                break
            parts.append(block.decode(errors="replace"))
        self.stdout.close()
        self.wait(None if deadline is None else max(deadline - time.monotonic(), 1.0))
        return "".join(parts), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(os.read(self._status, 32))
            os.close(self._status)
        return self.returncode


class Warm:
    """Starts processes; itself one that has imported what a training needs."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL
            )
        self._socket = ours

    def start(self, words: list[str], environment: dict[str, str], folder: str) -> Forked:
        reading, writing = os.pipe()
        status, status_writing = os.pipe()
        request = json.dumps([words, environment, folder]).encode()
        socket.send_fds(self._socket, [request], [writing, status_writing])
        os.close(writing)
        os.close(status_writing)
        return Forked(int(self._socket.recv(32)), os.fdopen(reading, "r", errors="replace"), status)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


# ---- The process that has imported everything -----------------------------------------------------------------------


def serve(channel: socket.socket) -> None:
    """Fork a process for each request; its exit code goes where the request says, whoever reads it there."""
    waiting: dict[int, int] = {}
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    while True:
        ready, _, _ = select.select([channel, woken], [], [])
        if woken in ready:
            os.read(woken, 1 << 10)
            for pid in list(waiting):
                found, code = os.waitpid(pid, os.WNOHANG)
                if found:
                    status = waiting.pop(pid)
                    os.write(status, str(os.waitstatus_to_exitcode(code)).encode())
                    os.close(status)
        if channel in ready:
            request, descriptors, _, _ = socket.recv_fds(channel, LARGEST_REQUEST_BYTES, 2)
            if not request:
                return
            output, status = descriptors
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for descriptor in (channel.fileno(), woken, wake, status, *waiting.values()):
                    os.close(descriptor)
                become(output, *json.loads(request))
            os.close(output)
            waiting[pid] = status
            channel.send(str(pid).encode())


def become(output: int, words: list[str], environment: dict[str, str], folder: str) -> None:
    """Be the process that was asked for."""
    from finetune.cli import run

    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.close(output)
        # As Python makes them at its start.
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.argv = ["finetune", *words]
        run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(70)  # `run` ends the process itself


if __name__ == "__main__":
    import finetune.commands.training
    import finetune.runs.resume
    import finetune.watch.tensorboard  # noqa: F401

    serve(socket.socket(fileno=int(sys.argv[1])))
