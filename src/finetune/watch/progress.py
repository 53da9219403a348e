"""What a person sees in the terminal while a run goes on. In a pipe: plain lines."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from finetune.text import printable


class PatientConsole(Console):
    """A console whose reader may go away: rich's own would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def make_console(quiet: bool = False) -> Console:
    """A console on standard output; without colour and width limit where no terminal reads it."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    width = None if sys.stdout.isatty() else 120
    return PatientConsole(quiet=quiet, no_color=plain, width=width, highlight=False, soft_wrap=not sys.stdout.isatty())


class Terminal:
    """A table at the start, a bar while training, a line after each validation."""

    def __init__(self, console: Console):
        self.console = console
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.started = self.last_saved = time.monotonic()
        self.samples = 0

    def _print(self, what: RenderableType) -> None:
        """Print, or fall silent for good when nobody reads any more: showing can never stop a run."""
        try:
            self.console.print(what)
        except OSError:
            self.console.quiet = True

    def begin(self, facts: dict[str, str], modules: list[tuple[str, int, str]], step: int, total_steps: int) -> None:
        """Show the facts of the run and what of the network is frozen.

        Args:
            facts: label to text, in order.
            modules: (path, parameters, state) rows.
        """
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in facts.items():
            table.add_row(label, Text(printable(text)))
        self._print(table)
        self._print(self._freeze_table(modules))
        if self.console.is_terminal and not self.console.quiet:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
                transient=True,
                expand=True,
            )
            self.task = self.bar.add_task("starting", total=total_steps, completed=step, figures="")
            self.bar.start()
        self.started = time.monotonic()

    @staticmethod
    def _freeze_table(modules: list[tuple[str, int, str]]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("module", overflow="fold")
        table.add_column("parameters", justify="right")
        table.add_column("state")
        for path, count, state in modules:
            table.add_row(Text(printable(path)), f"{count:,}", state)
        return table

    def say(self, text: str) -> None:
        self._print(Text("\n".join(map(printable, text.split("\n")))))

    def step(self, step: int, epoch: int, epochs: int, samples: int) -> None:
        """After each optimizer step: nothing that makes a device wait."""
        self.samples += samples
        if self.bar is not None and self.task is not None:
            seconds = time.monotonic() - self.started
            rate, age_seconds = self.samples / max(seconds, 1e-9), time.monotonic() - self.last_saved
            figures = f"{rate:.0f} samples/s, saved {age_seconds:.0f} s ago"
            self.bar.update(self.task, completed=step, description=f"epoch {epoch}/{epochs}", figures=figures)

    def validated(self, epoch: int, epochs: int, values: dict[str, Any], is_best: bool) -> None:
        parts = [f"epoch {epoch:>{len(str(epochs))}}/{epochs}"]
        parts += [f"{name} {value:.4f}" for name, value in values.items()]
        self._print(Text("  ".join(parts) + ("  best" if is_best else "")))

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar for something that comes before the training; yields what is called with each advance."""
        if not self.console.is_terminal or self.console.quiet:
            yield lambda count: None
            return
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
        with Progress(*columns, TimeRemainingColumn(compact=True), console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)

    def saved(self) -> None:
        self.last_saved = time.monotonic()

    def end(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
