"""What of a run reaches beyond its computation, in one place: folder, lock, terminal, watchers, signals, memory."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from finetune.base.files import write_atomically
from finetune.base.lock import hold_lock
from finetune.base.memory import guard_memory
from finetune.base.signals import StopRequest, listen_for_signals
from finetune.base.terminal import Terminal, make_console
from finetune.data.contents import Contents
from finetune.errors import UsageError, one_line
from finetune.recipe.execution import Settings
from finetune.store.checkpoint import BEST, check_room, read_checkpoint, write_checkpoint, write_final
from finetune.store.metrics_log import MetricsFile
from finetune.store.run_folder import RunFolder
from finetune.store.state import CheckpointState, LogMark
from finetune.tasks.doubts import Doubt, csv_of, read_doubts
from finetune.watch.trackers import HandedIn, watching
from finetune.watch.watch import Watch


@dataclass
class RunContext:
    """Every side effect of a run passes through here; what computes is given one, and asks nothing else.

    The usual context belongs to the process that writes a run's folder, alone, under its lock. One with `writes` off
    reads the same folder and leaves no trace in it: a second process of the same run. `RunContext.silent()` has no
    folder at all: a trial of a search. Kept features belong to the machine, not to a run: any context shares them.

    Attributes:
        terminal: what a person sees.
        folder: of the run. A new run that has none yet gets the next free one when it begins, if it writes.
        settings: how it is saved and watched.
        notify: URLs that messages are sent to; they hold passwords.
        handed_in: trackers from Python. What they raise reaches whoever called.
        stop: asked by signals, by the memory guard, or by whoever else holds it.
        writes: whether this process writes, locks, listens to signals and tells watchers.
        run_id: of the run, once it is known.
        watch: who watches; nobody before `watched` and after it.

    Raises:
        UsageError: something handed in is no tracker.
    """

    terminal: Terminal
    folder: RunFolder | None = None
    settings: Settings = field(default_factory=Settings)
    notify: tuple[str, ...] = field(default=(), repr=False)
    handed_in: Sequence[object] = ()
    stop: StopRequest = field(default_factory=StopRequest)
    writes: bool = True
    run_id: str = ""
    watch: Watch = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # At once: what cannot be told is found before anything is changed.
        self._own = [HandedIn(tracker) for tracker in self.handed_in]
        self.watch = Watch(self.terminal)

    @classmethod
    def silent(cls, stop: StopRequest | None = None, trackers: Sequence[object] = ()) -> "RunContext":
        """Make a context in which nothing of a run is written, printed, locked or sent, but what `trackers` do."""
        return cls(Terminal(make_console(quiet=True)), handed_in=trackers, stop=stop or StopRequest(), writes=False)

    @property
    def run(self) -> RunFolder:
        """The folder, of a run that has one."""
        assert self.folder is not None
        return self.folder

    def say(self, text: str) -> None:
        self.terminal.say(text)

    # ---- While the run is this process's ----------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock.

        Raises:
            RunError: another live process holds it.
        """
        if not self.writes:
            yield
            return
        with hold_lock(self.run.path):
            yield

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Hear signals, and guard the memory: both ask `stop`."""
        if not self.writes:
            with self.stop.in_run(""):
                yield
            return
        with listen_for_signals(f"finetune resume {self.folder}", self.stop), guard_memory(self.stop):
            yield

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Tell everybody who watches; also how the block ends, if it is not by the run's own end."""
        names, notify = (self.settings.trackers, self.notify) if self.writes else ([], ())
        every_epochs = self.settings.notify_every_epochs
        with watching(self.terminal, self.folder, names, notify, every_epochs, self._own) as self.watch:
            yield

    # ---- Written while it trains ------------------------------------------------------------------------------------

    def open_log(self, mark: LogMark | None, last_step: int) -> MetricsFile:
        """metrics.jsonl, as the checkpoint to go on from knows it; None = a new one."""
        path = self.run.metrics_file if self.writes else None
        return MetricsFile(path, self.watch.say, mark, last_step)

    def check_room(self, state: CheckpointState, optimizer_bytes: int) -> None:
        """See `checkpoint.check_room`."""
        if self.writes:
            check_room(self.run.checkpoints, state, self.settings.keep, optimizer_bytes)

    def save(self, state: CheckpointState, *, is_best: bool) -> None:
        """Write a checkpoint.

        Raises:
            RunError: it cannot be written.
        """
        if self.writes:
            self.watch.saving()
            write_checkpoint(self.run.checkpoints, state, is_best=is_best, keep=self.settings.keep)
            self.watch.saved()

    def save_final(self, state: CheckpointState) -> None:
        """Write the checkpoint of the solved head.

        Raises:
            RunError: it cannot be written.
        """
        if self.writes:
            write_final(self.run.checkpoints, state)

    def save_labels(self, doubts: Sequence[Doubt], left_out: Collection[str]) -> None:
        """Write labels.csv, with the marks that somebody made in it; that it cannot be written stops no run."""
        if self.writes:
            marked = set[str]()
            with suppress(UsageError, OSError):  # the first one, or none any more
                marked = {one.name for one in read_doubts(self.run.labels_file) if one.is_marked}
            text = csv_of(doubts, marked, left_out)
            try:
                write_atomically(self.run.labels_file, lambda stream: stream.write(text.encode()))
            except OSError as error:
                self.watch.say(f"{self.run.labels_file} cannot be written ({one_line(error)})")

    def save_novelty(self, content: bytes) -> None:
        """Write the file of what the head read of training samples; b"" = there is none. That it cannot be written
        stops no run."""
        if not self.writes:
            return
        try:
            if not content:
                self.run.novelty_file.unlink(missing_ok=True)
            else:
                write_atomically(self.run.novelty_file, lambda stream: stream.write(content))
        except OSError as error:
            self.watch.say(f"{self.run.novelty_file} cannot be written ({one_line(error)})")

    def read_best(self) -> CheckpointState:
        """The loop's best.

        Raises:
            RunError: it is missing, or damaged.
        """
        return read_checkpoint(self.run.checkpoints / BEST, self.run_id)

    def save_contents(self, contents: Contents) -> None:
        """Write what the image files held when they were first read."""
        if self.writes:
            contents.save(self.run.contents_file, self.watch.say)

    @property
    def bad_batch_file(self) -> Path | None:
        """Where the samples of a batch are written down whose loss was no number."""
        return self.run.bad_batch_file if self.writes else None
