"""Who watches a run, and how they are told that it ends, however it ends."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from finetune.base.events import Begun, Ended, Pictures, Tracker, Validated
from finetune.base.terminal import Terminal
from finetune.errors import StoppedEarly, UsageError, in_words
from finetune.store.run_folder import RunFolder
from finetune.watch.watch import Watch


class HandedIn:
    """A tracker from Python: any object with some of the methods of `Tracker`; those are called. `flush` comes when a
    checkpoint was written.

    Raises:
        UsageError: it has none of them.
    """

    METHODS = ("begin", "logged", "validated", "histograms", "draw", "flush", "end", "close")

    def __init__(self, tracker: object):
        self._tracker = tracker
        self.name = type(tracker).__name__
        if isinstance(tracker, type):
            raise UsageError(f"tracker {tracker.__name__}: is a class; give an object: {tracker.__name__}()")
        if not any(callable(getattr(tracker, method, None)) for method in self.METHODS):
            raise UsageError(f"tracker {self.name}: has none of the methods {', '.join(self.METHODS)}; define some")

    def _call(self, method: str, *values: object) -> None:
        found = getattr(self._tracker, method, None)
        if callable(found):
            found(*values)

    def begin(self, begun: Begun) -> None:
        self._call("begin", begun)

    def logged(self, step: int, values: dict[str, float]) -> None:
        self._call("logged", step, values)

    def validated(self, validated: Validated) -> None:
        self._call("validated", validated)

    def histograms(self, step: int, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        self._call("histograms", step, weights, gradients)

    def draw(self, pictures: Pictures) -> None:
        self._call("draw", pictures)

    def flush(self) -> None:
        self._call("flush")

    def end(self, ended: Ended) -> None:
        self._call("end", ended)

    def close(self) -> None:
        self._call("close")


@contextmanager
def watching(
    terminal: Terminal,
    run: RunFolder | None,
    trackers: Sequence[str],
    notify: Sequence[str],
    notify_every_epochs: int,
    handed_in: Sequence[Tracker] = (),
) -> Iterator[Watch]:
    """Everybody who is to watch. What stops or fails within the block is told; the end of a run tells `Watch.end`.

    Args:
        run: None = it has no folder, and then there are no `trackers` and no `notify`.
        trackers: names.
        notify: URLs that messages are sent to.
        handed_in: of whoever called from Python.
    """
    watch = Watch(terminal, run, handed_in)
    assert run is not None or not (trackers or notify)
    if run is not None:
        _add_named(watch, run, trackers, notify, notify_every_epochs)
    try:
        yield watch
    except StoppedEarly as error:
        watch.end("stopped", str(error))
        raise
    except Exception as error:
        watch.end("failed", in_words(error))
        raise
    finally:
        watch.close()


def _add_named(
    watch: Watch, run: RunFolder, trackers: Sequence[str], notify: Sequence[str], notify_every_epochs: int
) -> None:
    if "tensorboard" in trackers:
        watch.add("tensorboard", lambda: _tensorboard(run))
    services = [*(["wandb"] if "wandb" in trackers else []), *(["notify"] if notify else [])]
    if services:
        watch.add(" and ".join(services), lambda: _outside(run, services, notify, notify_every_epochs, watch.terminal))


# Imported when they are wanted: neither is quick to load.


def _tensorboard(run: RunFolder) -> Tracker:
    from finetune.watch.tensorboard import TensorBoard

    return TensorBoard(run.tensorboard)


def _outside(
    run: RunFolder, services: Sequence[str], notify: Sequence[str], notify_every_epochs: int, terminal: Terminal
) -> Tracker:
    from finetune.watch.remote_trackers import Outside

    return Outside(services, notify, notify_every_epochs, run.path, terminal.say, str(run))
