"""Signals: a polite one lets the step finish and saves; a second Ctrl-C leaves at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from finetune.errors import StoppedEarly

EXIT_STOPPED = 75
POLITE_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")


class StopRequest:
    """Whether somebody asked the run to stop, and how.

    Args:
        go_on: what to type to go on.
    """

    def __init__(self, go_on: str = ""):
        self.signal_name = ""
        self.go_on = go_on

    @property
    def requested(self) -> bool:
        return bool(self.signal_name)

    def stopped(self, where: str) -> StoppedEarly:
        """The error that ends the run."""
        return StoppedEarly(f"stopped by {self.signal_name} {where}; go on with: {self.go_on}")


@contextmanager
def listen_for_signals(go_on: str) -> Iterator[StopRequest]:
    """Turn polite signals into a request while the block runs. Outside the main thread: no signals, no request."""
    request = StopRequest(go_on)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(number, _frame):
        name = signal.Signals(number).name
        if request.signal_name == name == "SIGINT":
            # Files are written atomically, so leaving here costs at most the steps since the last checkpoint.
            os._exit(EXIT_STOPPED)
        request.signal_name = name

    previous = {}
    for name in POLITE_SIGNALS:
        if hasattr(signal, name):
            previous[getattr(signal, name)] = signal.signal(getattr(signal, name), on_signal)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
