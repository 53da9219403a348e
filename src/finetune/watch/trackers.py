"""Who watches a run, and how they are told that it ends, however it ends."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from finetune.base.events import Tracker
from finetune.base.terminal import Terminal
from finetune.errors import StoppedEarly, in_words
from finetune.store.run_folder import RunFolder
from finetune.watch.watch import Watch


@contextmanager
def watching(
    run: RunFolder, trackers: Sequence[str], notify: Sequence[str], notify_every_epochs: int, terminal: Terminal
) -> Iterator[Watch]:
    """Everybody who is to watch. What stops or fails within the block is told; the end of a run tells `Watch.end`.

    Args:
        trackers: names.
        notify: URLs that messages are sent to.
    """
    watch = Watch(terminal, run=run)
    if "tensorboard" in trackers:
        watch.add("tensorboard", lambda: _tensorboard(run))
    services = [*(["wandb"] if "wandb" in trackers else []), *(["notify"] if notify else [])]
    if services:
        watch.add(" and ".join(services), lambda: _outside(run, services, notify, notify_every_epochs, terminal))
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


# Imported when they are wanted: neither is quick to load.


def _tensorboard(run: RunFolder) -> Tracker:
    from finetune.watch.tensorboard import TensorBoard

    return TensorBoard(run.tensorboard)


def _outside(
    run: RunFolder, services: Sequence[str], notify: Sequence[str], notify_every_epochs: int, terminal: Terminal
) -> Tracker:
    from finetune.watch.remote_trackers import Outside

    return Outside(services, notify, notify_every_epochs, run.path, terminal.say, str(run))
