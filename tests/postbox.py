"""Servers on this machine that messages go to, well-behaved and others; and a run, as those who watch are told of it."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from finetune.base.events import Begun, Validated
from finetune.watch.pipe import to_line
from finetune.watch.remote_trackers import Outside


@dataclass
class Mailbox:
    """What came to a server, and how it is reached."""

    port: int = 0
    status: int = 200
    messages: list[dict[str, Any]] = field(default_factory=list)
    users: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"json://127.0.0.1:{self.port}/box"

    @property
    def titles(self) -> list[str]:
        return [message["title"] for message in self.messages]

    def wait_for(self, count: int, seconds: float = 30) -> None:
        wait_until(lambda: len(self.messages) >= count, seconds)


@contextmanager
def mailbox(status: int = 200) -> Iterator[Mailbox]:
    """A server that answers every message with a status."""
    box = Mailbox(status=status)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kind, _, words = self.headers.get("Authorization", "").partition(" ")
            box.users.append(base64.b64decode(words).decode() if kind == "Basic" else "")
            box.messages.append(json.loads(body))
            self.send_response(box.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    box.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield box
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def bad_server(serve: Callable[[socket.socket], None]) -> Iterator[Mailbox]:
    """A server that does as told with every connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    kept = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            kept.append(connection)
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield Mailbox(port=listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in kept:
            connection.close()


def closed_port() -> int:
    """A port that refuses."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def begun(folder: Path, **changes: Any) -> Begun:
    values: dict[str, Any] = {
        "run_id": "0123456789abcdef",
        "run": f"runs/{folder.name}",
        "folder": folder,
        "config": {"epochs": 30, "model": {"backbone": "bundled/vgg", "layers": (1, 2)}},
        "facts": {"data": "/home/somebody/photos"},
        "step": 0,
        "total_steps": 690,
        "epochs": 30,
        "is_resumed": False,
        "best_metric": "accuracy",
    }
    return Begun(**values | changes)


def validated(step: int, accuracy: float, best: dict[str, Any] | None = None) -> Validated:
    """The end of an epoch of 23 steps; a new best if no best is given."""
    epoch = step // 23
    mine = {"metric": "accuracy", "value": accuracy, "step": step, "epoch": epoch}
    values = {"train/epoch_loss": 1 / step, "val/loss": 0.5, "val/accuracy": accuracy}
    return Validated(step, epoch, 30, values, best or mine, best is None)


@contextmanager
def service(changes: str, hello: dict[str, Any]) -> Iterator[subprocess.Popen]:
    """The process that talks to the outside, on its own, with other constants; it has been greeted."""
    script = f"from finetune.watch import service, wandb_service\n{changes}\nservice.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0
    )
    both = {"notify_urls": [], "notify_every_epochs": 0, "run": "runs/flowers", "pid": os.getpid()}
    process.stdin.write(to_line(both | hello))
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@contextmanager
def outside(folder: Path, *urls: str, services: tuple[str, ...] = ("notify",), every: int = 0, **options: Any):
    """An `Outside` and what it said; its process is gone afterwards."""
    said: list[str] = []
    one = Outside(services, urls, every, folder, said.append, **options)
    try:
        yield one, said
    finally:
        one.close()
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
        wait_until(lambda: not any(thread.is_alive() for thread in one._threads))
