"""Signals: a polite one lets the step finish and saves; a second Ctrl-C leaves at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from finetune.errors import StoppedEarly

EXIT_STOPPED = 75
# Slurm warns with SIGUSR1, a closing terminal with SIGHUP, Ctrl-Break on Windows is SIGBREAK.
POLITE_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGBREAK")


class StopRequest:
    """A request to stop a run, once somebody asks, and why. Any thread may ask; the run saves and stops after its step.

    Args:
        go_on: what to type to go on; "" = nothing was saved.
    """

    def __init__(self, go_on: str = ""):
        self.reason = ""
        self.go_on = go_on

    @property
    def requested(self) -> bool:
        return bool(self.reason)

    def ask(self, reason: str) -> None:
        """Take note of a reason, like "by SIGTERM"; the first one counts."""
        self.reason = self.reason or reason or "on request"

    @contextmanager
    def in_run(self, go_on: str) -> Iterator[None]:
        """Say what to type to go on with the run that the block is."""
        before, self.go_on = self.go_on, go_on
        try:
            yield
        finally:
            self.go_on = before

    def stopped(self, where: str) -> StoppedEarly:
        """Make the error that ends the run."""
        hint = f"; go on with: {self.go_on}" if self.go_on else ""
        return StoppedEarly(f"stopped {self.reason} {where}{hint}")


def _polite_signals() -> list[signal.Signals]:
    """Those that this system has and that nobody has set to be ignored, as `nohup` does."""
    found = [getattr(signal, name) for name in POLITE_SIGNALS if hasattr(signal, name)]
    return [number for number in found if signal.getsignal(number) != signal.SIG_IGN]


def exit_on_signals() -> None:
    """Outside of a run nothing is lost by leaving at once; the exit code still says: on purpose, call again."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        os.write(2, f"finetune: stopped by {signal.Signals(number).name}; the same command goes on\n".encode())
        os._exit(EXIT_STOPPED)

    if threading.current_thread() is threading.main_thread():
        for number in _polite_signals():
            if number != signal.SIGINT:  # Python's own way tells where
                signal.signal(number, on_signal)


@contextmanager
def listen_for_signals(go_on: str, request: StopRequest | None = None) -> Iterator[StopRequest]:
    """Turn polite signals into a request while the block runs. Outside the main thread: no signals, no request.

    Args:
        go_on: what to type to go on.
        request: the one to ask, which others may ask too; None = a new one.
    """
    request = request or StopRequest()
    with request.in_run(go_on):
        yield from _listening(request)


def _listening(request: StopRequest) -> Iterator[StopRequest]:
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    seen: set[str] = set()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and name in seen:
            # Files are written atomically, so leaving here costs at most the steps since the last checkpoint.
            os._exit(EXIT_STOPPED)
        seen.add(name)
        request.ask(f"by {name}")

    previous = {number: signal.signal(number, on_signal) for number in _polite_signals()}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
