"""The process that talks to the outside: told through its standard input what a run does, until that ends.

That comes with a word, or without one: then the run has died. What fails here is written to standard output, a line of
JSON each: {"service", "problem"}; and {"service"} alone when a service has nothing left to do. Nothing heavy is
imported but by the services themselves.
"""

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from finetune.base.signals import POLITE_SIGNALS
from finetune.errors import one_line
from finetune.watch.notify_service import NotifyService, can_be_used
from finetune.watch.pipe import Closed, Ended, Logged, Queue, Told, decode, scrub, secrets_of, to_line
from finetune.watch.wandb_service import WandbService

# After the run has ended, however it did.
DEADLINE_SECONDS = 600
# How often to look whether the run is still there, and how long its last words may take once it is not.
LOOK_SECONDS, LAST_WORDS_SECONDS = 1.0, 0.2
WANDB_KEY_VARIABLE = "WANDB_API_KEY"


class Service(Protocol):
    """What a thread of its own tells to the outside. What it raises ends it, and is said."""

    name: str

    def tell(self, told: list[Told]) -> None:
        """What came since the last time, the oldest first; an `Ended` of status "died" is our own."""


class Report:
    """What the run is to say of the services; every secret is hidden."""

    def __init__(self, pipe: BinaryIO, secrets: list[str]):
        self._pipe, self._secrets = pipe, secrets
        self._lock = threading.Lock()

    def problem(self, service: str, text: str) -> None:
        self._send({"service": service, "problem": scrub(text, self._secrets)})

    def done(self, service: str) -> None:
        self._send({"service": service})

    def _send(self, value: dict[str, str]) -> None:
        with self._lock, suppress(OSError):  # the run may be gone
            self._pipe.write(to_line(value))


class Workers:
    """A thread and a queue for each service: none waits for another."""

    def __init__(self, services: list[Service], report: Report):
        self._report = report
        self._left = Counter(service.name for service in services)
        self._lock = threading.Lock()
        self.queues: list[Queue[Told]] = [Queue() for _ in services]
        self._threads = [
            threading.Thread(target=self._work, args=pair, daemon=True)
            for pair in zip(services, self.queues, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, service: Service, queue: Queue[Told]) -> None:
        try:
            while told := queue.take():
                service.tell(told)
        except Exception as error:  # whatever these libraries raise: the others go on
            queue.close()
            text = f"{type(error).__name__}: {one_line(error)}; the run goes on without it"
            self._report.problem(service.name, text)
        with self._lock:
            self._left[service.name] -= 1
            if not self._left[service.name]:
                self._report.done(service.name)

    def put(self, told: Told) -> None:
        for queue in self.queues:
            queue.put(told, can_be_spared=isinstance(told, Logged))

    def finish(self) -> None:
        for queue in self.queues:
            queue.close()
        for thread in self._threads:
            thread.join()


def follow(lines: Iterable[bytes], run_pid: int, workers: Workers) -> None:
    """Pass on what is told until the run ends, or has ended without saying so."""
    is_over, has_ended = threading.Event(), threading.Event()

    def read() -> None:
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):  # half a line, of a run that died
                told = decode(line)
                workers.put(told)
                if isinstance(told, Ended | Closed):
                    has_ended.set()
                    break
        is_over.set()

    threading.Thread(target=read, daemon=True).start()
    # Processes forked from the run hold its end of the pipe too, and may outlive it.
    while not is_over.wait(LOOK_SECONDS):
        if os.name == "posix" and os.getppid() != run_pid:
            is_over.wait(LAST_WORDS_SECONDS)
            break
    if not has_ended.is_set():
        workers.put(Ended("died", ""))


def _own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output for ourselves alone: no library, and no process that it starts, gets them."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(nothing, number)
    return incoming, outgoing


def _give_up() -> None:
    time.sleep(DEADLINE_SECONDS)
    os._exit(1)


def main() -> None:
    # Whoever stops the run (a scheduler, a terminal) may signal us as well; we end when it does.
    for name in POLITE_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    incoming, outgoing = _own_pipes()
    if sys.argv[1:] == ["check"]:
        outgoing.write(json.dumps([can_be_used(url) for url in json.loads(incoming.read())]).encode())
        return
    hello = json.loads(incoming.readline() or b"null")
    if hello is None:  # the run was gone before we came
        return
    report = Report(outgoing, secrets_of([*hello["notify_urls"], os.environ.get(WANDB_KEY_VARIABLE, "")]))
    services: list[Service] = []
    if "wandb" in hello["services"]:
        services.append(WandbService(Path(hello["state_folder"]), hello["pid"], report.problem))
    if "notify" in hello["services"]:
        every = hello["notify_every_epochs"]
        services += [NotifyService(url, every, hello["run"], report.problem) for url in hello["notify_urls"]]
    workers = Workers(services, report)
    follow(incoming, hello["pid"], workers)
    # What hangs now hangs at most that long. A daemon thread still runs while the interpreter calls exit handlers.
    threading.Thread(target=_give_up, daemon=True).start()
    workers.finish()


if __name__ == "__main__":
    main()
