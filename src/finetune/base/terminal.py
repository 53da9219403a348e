"""What a person sees in the terminal while a run goes on. In a pipe: plain lines."""

import html
import io
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Protocol, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune.base.events import Validated
from finetune.base.formatting import megabytes_text, number_text, printable, seconds_text

# Often enough for a bar that moves, seldom enough for a thread that trains.
LOOKS_A_SECOND = 4
SECONDS_BETWEEN_BARS = 0.5
# Of more epochs than that only every second, fifth, tenth ... gets a line.
MOST_EPOCH_LINES = 30
# Below that many columns an epoch's line says the same in less.
WIDE_COLUMNS = 72


def _round_numbers() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50 ..."""
    return (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))


class PatientConsole(Console):
    """A console whose reader may go away: rich's own would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class PatientStream(io.TextIOBase):
    """A stream for what is only to be seen: what it cannot encode is written as an escape code, and when it fails, as
    that of a closed terminal does, it falls silent for good. rich's bar writes from a thread of its own and as it
    ends; none of that may end a run, or hide what ended it."""

    def __init__(self, stream: IO[str]):
        self._stream = stream
        self._is_silent = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        try:
            text.encode(self.encoding)
        except UnicodeError:
            text = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._patiently(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._patiently(self._stream.flush)

    def _patiently(self, action: Callable[[], object]) -> None:
        if not self._is_silent:
            try:
                action()
            except (OSError, ValueError):  # a ValueError: the stream is closed
                self._is_silent = True


def make_console(quiet: bool = False) -> Console:
    """A console on standard output. Where no terminal reads it, on a CI server and with NO_COLOR: plain lines."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    plain = (not is_terminal and not in_notebook()) or bool(os.environ.get("NO_COLOR")) or bool(os.environ.get("CI"))
    width = None if is_terminal else 120
    return PatientConsole(
        quiet=quiet,
        no_color=plain,
        force_terminal=False if plain else None,
        force_interactive=False if plain else None,
        width=width,
        highlight=False,
        soft_wrap=not is_terminal,
    )


def say_aside(text: str) -> None:
    """Where standard output is for the result."""
    print(printable(text), file=sys.stderr)


def in_notebook() -> bool:
    """Whether what is printed is shown in a notebook of Jupyter or Colab."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")


class _Shown(Protocol):
    """What IPython gives to change what is shown."""

    def update(self, shown: object) -> None: ...


class NotebookBar:
    """A bar with a line of figures below it, as HTML that is shown anew in its place."""

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self._html: Callable[[str], object] = HTML
        self._handle: _Shown = display(HTML(""), display_id=True)
        self._shown_at = -math.inf

    def is_due(self) -> bool:
        return time.monotonic() - self._shown_at >= SECONDS_BETWEEN_BARS

    def show(self, label: str, done: int, total: int, figures: str = "") -> None:
        self._shown_at = time.monotonic()
        label, figures = html.escape(label), html.escape(figures)
        self._handle.update(
            self._html(
                f"<div style='font-family:monospace'>{label} <progress value='{done}' max='{max(total, 1)}' "
                f"aria-label='{label}'></progress> {done}/{total}<br>{figures}</div>"
            )
        )

    def end(self) -> None:
        self._handle.update(self._html(""))


class Terminal:
    """A table at the start, a bar while training, a line after each validation. To show them can never stop a run."""

    def __init__(self, console: Console):
        self.console = console
        self.console.file = cast(IO[str], PatientStream(console.file))
        self._live: Live | None = None
        self._notebook_bar: NotebookBar | None = None
        self._started = self._last_saved = time.monotonic()
        self._step = self._first_step = self._total_steps = 0
        self._epoch = self._epochs = 0
        self._samples = 0
        self._values: dict[str, float] = {}
        self._metric: tuple[str, float] | None = None

    def say(self, text: str) -> None:
        self.console.print(Text("\n".join(map(printable, text.split("\n")))))

    # ---- Before the training -----------------------------------------------------------------------------------------

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar for something that comes before the training; yields what is called with each advance."""
        if self.console.is_jupyter and not self.console.quiet:
            yield from self._track_in_notebook(what, total)
            return
        if not self.console.is_terminal or self.console.quiet:
            yield lambda count: None
            return
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
        with Progress(*columns, TimeRemainingColumn(compact=True), console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)

    @staticmethod
    def _track_in_notebook(what: str, total: int) -> Iterator[Callable[[int], None]]:
        bar, done = NotebookBar(), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if bar.is_due():
                bar.show(what, done, total)

        try:
            yield advance
        finally:
            bar.end()

    def begin(self, facts: dict[str, str], step: int, total_steps: int) -> None:
        """Show the facts of the run, and then the bar.

        Args:
            facts: label to text, in order.
            step: steps done.
        """
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in facts.items():
            table.add_row(label, Text("\n".join(map(printable, text.split("\n")))))
        self.console.print(Padding(table, (1, 0)))
        self._step = self._first_step = step
        self._total_steps = total_steps
        self._started = self._last_saved = time.monotonic()
        if self.console.is_jupyter and not self.console.quiet:
            self._notebook_bar = NotebookBar()
        elif self.console.is_terminal and not self.console.quiet:
            self._live = Live(
                get_renderable=self._bar, console=self.console, transient=True, refresh_per_second=LOOKS_A_SECOND
            )
            self._live.start()

    # ---- While it goes on --------------------------------------------------------------------------------------------

    def step(self, step: int, epoch: int, epochs: int, samples: int) -> None:
        """After each optimizer step: nothing that makes a device wait."""
        self._step, self._epoch, self._epochs = step, epoch, epochs
        self._samples += samples
        if self._notebook_bar is not None and self._notebook_bar.is_due():
            label = f"epoch {epoch}/{epochs}"
            self._notebook_bar.show(label, step, self._total_steps, "  ".join(self._figures()))

    def logged(self, values: dict[str, float]) -> None:
        self._values = values

    def validated(self, validated: Validated) -> None:
        name, value = validated.best["metric"], validated.values[f"val/{validated.best['metric']}"]
        self._metric = name, value
        every = next(n for n in _round_numbers() if validated.epochs <= n * MOST_EPOCH_LINES)
        if validated.epoch % every and validated.epoch not in (1, validated.epochs):
            return
        is_wide = self.console.width >= WIDE_COLUMNS
        number = f"{validated.epoch:>{len(str(validated.epochs))}}/{validated.epochs}"
        parts = [f"epoch {number}" if is_wide else number]
        for key, value in validated.values.items():
            label = {"train/epoch_loss": "loss", "val/loss": "val loss" if is_wide else "val"}.get(key)
            parts.append(f"{label or key.rpartition('/')[2]} {number_text(value, 4 if is_wide else 3)}")
        parts += ["best"] if validated.is_best else []
        line = "  ".join(parts)
        self.console.print(Text(line if len(line) <= self.console.width else " ".join(parts)))

    def saved(self) -> None:
        self._last_saved = time.monotonic()

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._notebook_bar is not None:
            self._notebook_bar.end()
            self._notebook_bar = None

    def _bar(self) -> RenderableType:
        """Called by rich's own thread: reads what is there, changes nothing."""
        if not self._epoch:
            return Text("starting")
        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        steps = f"{self._step}/{self._total_steps}  {self._left_text()}"
        bar = ProgressBar(total=max(self._total_steps, 1), completed=self._step)
        row.add_row(f"epoch {self._epoch}/{self._epochs}", bar, steps)
        return Group(row, Text("  ".join(self._figures())))

    def _left_text(self) -> str:
        steps_a_second = (self._step - self._first_step) / max(time.monotonic() - self._started, 1e-9)
        return f"{seconds_text((self._total_steps - self._step) / steps_a_second)} left" if steps_a_second else ""

    def _figures(self) -> list[str]:
        now, values = time.monotonic(), self._values
        rate = self._samples / max(now - self._started, 1e-9)
        parts = [f"loss {number_text(values['train/loss'])}"] if "train/loss" in values else []
        if self._metric is not None:
            parts.append(f"val {self._metric[0]} {number_text(self._metric[1])}")
        parts.append(f"{rate:,.0f} samples/s")
        if "memory/process_mb" in values:
            parts.append(f"memory {megabytes_text(values['memory/process_mb'])}")
        if "device/cuda_used_mb" in values:
            use = f" {values['device/cuda_percent']:.0f} %" if "device/cuda_percent" in values else ""
            parts.append(f"GPU{use} {megabytes_text(values['device/cuda_used_mb'])}")
        elif "memory/mps_mb" in values:
            parts.append(f"GPU {megabytes_text(values['memory/mps_mb'])}")
        return [*parts, f"saved {seconds_text(now - self._last_saved)} ago"]
