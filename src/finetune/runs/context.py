"""How the context of a run is opened: from what a person typed, or handed in from Python."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from finetune.base.signals import StopRequest
from finetune.base.terminal import Terminal
from finetune.recipe.execution import Settings
from finetune.store.remote import open_run
from finetune.training.context import RunContext


@contextmanager
def open_context(
    run: str,
    terminal: Terminal,
    settings: Settings,
    notify: tuple[str, ...] = (),
    trackers: Sequence[object] = (),
    stop: StopRequest | None = None,
) -> Iterator[RunContext]:
    """The context of a run that this process writes; a remote run is fetched first, and carried over in the end.

    Args:
        run: its folder or URL; "" = the next free folder, once it begins.
        notify, trackers, stop: see `RunContext`.

    Raises:
        RunError: the remote folder cannot be used.
    """
    with open_run(run, terminal.say) if run else nullcontext() as folder:
        yield RunContext(terminal, folder, settings, notify, trackers, stop or StopRequest())
