"""Messages to one URL, through apprise. Runs in the process that talks to the outside."""

import logging
import re
import shlex
import socket
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import PurePath
from typing import Any

from finetune.base.events import Begun, Best, Validated
from finetune.base.formatting import number_text, printable
from finetune.errors import one_line
from finetune.watch.pipe import Ended, Told, scheme_of

# Before each try.
PAUSES_SECONDS = (0, 1, 4)
TRY_SECONDS = 10
SECONDS_BETWEEN_BESTS = 60
TEXT_CHARACTERS = 500

# What apprise logs while it sends; it hands contexts on to threads of its own.
_complaints: ContextVar[list[str] | None] = ContextVar("complaints", default=None)
_listening = threading.Lock()
# All but the last part of a path from the root, like "/home/me/photos/cat.jpg" or "C:\Users\me\cat.jpg"; not of an URL.
_PATH = re.compile(r"""(?<![\w:/\\.~-])(?:[A-Za-z]:)?(?:[/\\][^\s/\\:;,'"()]+)+[/\\](?=[^\s/\\])""")


class _Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complaints = _complaints.get()
        if complaints is not None:
            complaints.append(record.getMessage())


def _listen_to_apprise() -> None:
    with _listening:
        logger = logging.getLogger("apprise")
        if not any(isinstance(handler, _Listener) for handler in logger.handlers):
            logger.addHandler(_Listener(logging.WARNING))


def _instantiate(url: str) -> Any:
    """apprise's own object for an URL; None where it does not understand it."""
    import apprise

    return apprise.Apprise.instantiate(url, asset=apprise.AppriseAsset(async_mode=False, app_id="finetune"))


def can_be_used(url: str) -> bool:
    try:
        return _instantiate(url) is not None
    except Exception:  # whatever a plugin raises
        return False


def without_paths(text: str, run: str) -> str:
    """A text in which a path from the root is only its last part: messages go to others. The run stays as it is."""
    return run.join(_PATH.sub("", part) for part in text.split(run)) if run else _PATH.sub("", text)


class NotifyService:
    """Tells people at one URL: start, best, every so many epochs, and the end, whatever it is.

    While a message is on its way the next is only thought about: what has come meanwhile makes one message.

    Args:
        every_epochs: a message that often; 0 = never for that.
        run: as a person names it and types it.
        problem: told what cannot be sent.
    """

    name = "notify"

    def __init__(self, url: str, every_epochs: int, run: str, problem: Callable[[str, str], None]):
        self._url, self._every_epochs, self._run, self._problem = url, every_epochs, run, problem
        self._service: Any = None
        self._has_failed = False
        self._started = time.monotonic()
        self._step, self._epoch, self._epochs, self._told_epoch = 0, 0, 0, 0
        self._validated_step, self._values = 0, dict[str, float]()
        self._best = Best()
        self._has_new_best, self._best_sent = False, -float(SECONDS_BETWEEN_BESTS)

    def tell(self, told: list[Told]) -> None:
        for thing in told:
            if isinstance(thing, Begun):
                self._begin(thing)
            elif isinstance(thing, Validated):
                self._take(thing)
            elif isinstance(thing, Ended):
                return self._end(thing)
            self._step = getattr(thing, "step", self._step)
        return self._say_what_is_due()

    # ---- What is said when -----------------------------------------------------------------------------------------

    def _begin(self, begun: Begun) -> None:
        self._started = time.monotonic()
        self._run, self._epochs, self._best = begun.run, begun.epochs, begun.best
        self._step = begun.step
        self._told_epoch = begun.step * begun.epochs // max(begun.total_steps, 1)
        text = f"{begun.epochs} epochs, {begun.total_steps} steps"
        if begun.is_resumed:
            self._send("goes on", f"from step {begun.step} of {begun.total_steps}")
        else:
            self._send("started", text)

    def _take(self, validated: Validated) -> None:
        self._epoch, self._epochs = validated.epoch, validated.epochs
        self._validated_step, self._values = validated.step, validated.values
        # One that is as good at a lower loss is no news.
        self._has_new_best |= validated.is_best and validated.best.get("value") != self._best.get("value")
        self._best = validated.best

    def _say_what_is_due(self) -> None:
        every, titles = self._every_epochs, []
        if every and self._epoch // every > self._told_epoch // every:
            titles.append(f"epoch {self._epoch}/{self._epochs}")
        if self._has_new_best and time.monotonic() - self._best_sent >= SECONDS_BETWEEN_BESTS:
            titles.append("new best")
            self._best_sent = time.monotonic()
        if titles:
            self._told_epoch = self._epoch
            self._send(", ".join(titles), *self._figures())

    def _end(self, ended: Ended) -> None:
        self._run = ended.run or self._run
        self._best = ended.best or self._best
        go_on = f"go on with: finetune resume {shlex.quote(self._run)}"
        at_step = f"at step {self._step}" if self._step else "before its first step"
        text = without_paths(ended.text, self._run)[:TEXT_CHARACTERS]
        if ended.status == "died":
            line = f"run {self._run} died without a word {at_step}; {go_on}"
            self._send("died", line, *self._figures(), kind="failure")
        elif ended.status == "failed":
            self._send("failed", f"{at_step}: {text}", *self._figures(), kind="failure")
        elif ended.status == "stopped":
            told = [] if "finetune resume" in text else [go_on]
            self._send("stopped", text, *told, *self._figures(), kind="warning")
        else:
            seconds = round(time.monotonic() - self._started)
            took = f"took {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
            export = f"weights: finetune export {shlex.quote(self._run)}"
            self._send(ended.status, *self._figures(), took, export, kind="success")

    def _figures(self) -> list[str]:
        """Where the run is, what the newest validation found, and the best one."""
        lines = []
        if self._values:
            values = ", ".join(f"{name} {number_text(value)}" for name, value in self._values.items())
            lines.append(f"epoch {self._epoch}/{self._epochs}, step {self._validated_step}: {values}")
        if self._best:
            best = self._best
            new = "new best" if self._has_new_best else "best"
            lines.append(f"{new}: {best['metric']} {number_text(best['value'])} in epoch {best['epoch']}")
        return lines

    # ---- Sending ---------------------------------------------------------------------------------------------------

    def _send(self, title: str, *lines: str, kind: str = "info") -> None:
        """Try to get a message out, three times; said once if that fails. The next message is tried all the same."""
        self._has_new_best = False
        name = PurePath(self._run).name
        body = "\n".join(printable(line) for line in (*lines, f"{self._run} on {socket.gethostname()}"))
        reason = ""
        for pause in PAUSES_SECONDS:
            time.sleep(pause)
            reason = self._try(printable(f"{name}: {title}"), body, kind)
            if not reason:
                return
        if not self._has_failed:
            self._has_failed = True
            text = f"{scheme_of(self._url)} did not take a message ({reason}); the run goes on, later ones are tried"
            self._problem(self.name, text)

    def _try(self, title: str, body: str, kind: str) -> str:
        """Why a message could not be sent; "" = it was."""
        outcome: list[str] = []
        thread = threading.Thread(target=lambda: outcome.append(self._deliver(title, body, kind)), daemon=True)
        thread.start()
        thread.join(TRY_SECONDS)
        return outcome[0] if outcome else f"no answer within {TRY_SECONDS} s"

    def _deliver(self, title: str, body: str, kind: str) -> str:
        complaints: list[str] = []
        _complaints.set(complaints)
        try:
            import apprise

            if self._service is None:
                self._service = _instantiate(self._url)
                _listen_to_apprise()
            sender = apprise.Apprise()
            sender.add(self._service)
            if sender.notify(body=body, title=title, notify_type=kind, body_format="text"):
                return ""
        except Exception as error:  # whatever a plugin raises
            complaints.append(f"{type(error).__name__}: {one_line(error)}")
        return " ".join(" ".join(complaints).split())[:TEXT_CHARACTERS] or "no reason given"
