"""Batches fetched ahead by worker processes, or in this one. Which of the two cannot change a bit."""

import atexit
import multiprocessing
import signal
import weakref
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from finetune.data.batch import Batch, Request
from finetune.data.contents import Contents
from finetune.data.images import ImagePipeline
from finetune.data.texts import TextPipeline
from finetune.errors import FinetuneError, say_nothing_of_large_images

START_METHODS = ("auto", "fork", "forkserver", "spawn")


class _PipelineDataset(Dataset):
    """A DataLoader wants a map from a key to an item; our key is a whole batch."""

    def __init__(self, pipeline: ImagePipeline | TextPipeline):
        self.pipeline = pipeline

    def __getitem__(self, request: Request) -> Batch | FinetuneError:
        try:
            return self.pipeline.fetch(request)
        except FinetuneError as error:
            # Raised in a worker, it would reach the user as that worker's traceback.
            return error


class _Requests:
    """The DataLoader's sampler: whatever was put into it last. Lets one set of workers serve every epoch."""

    def __init__(self) -> None:
        self.requests: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


def _prepare_worker(_worker: int) -> None:
    say_nothing_of_large_images()
    # Ctrl-C reaches the whole process group; only the run decides what to do about it.
    for name in ("SIGINT", "SIGUSR1", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # So does `timeout`'s or a scheduler's SIGTERM. A second one is from the run itself, and ends the worker.
    signal.signal(signal.SIGTERM, lambda number, _frame: signal.signal(number, signal.SIG_DFL))


@contextmanager
def one_thread() -> Iterator[None]:
    """Workers compute with one thread; so must this process when it does their work, or sums round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Loader:
    """Fetches the batches that are asked for, in order.

    Args:
        pipeline: does the work.
        workers: processes that fetch ahead; 0 = this process, when the batch is needed.
        start_method: how worker processes start; "auto" is the platform's own way.
        pin_memory: keep batches in page-locked memory, for faster copies to a CUDA device.
        contents: what the files held when they were first read.
    """

    def __init__(
        self,
        pipeline: ImagePipeline | TextPipeline,
        workers: int,
        start_method: str,
        pin_memory: bool,
        contents: Contents,
    ):
        self._pipeline = pipeline
        self.contents = contents
        self._requests = _Requests()
        self.workers, self._start_method, self._pin_memory = workers, start_method, pin_memory
        self._loader: DataLoader | None = None

    def _with_workers(self) -> DataLoader:
        method = None if self._start_method == "auto" else self._start_method
        return DataLoader(
            _PipelineDataset(self._pipeline),
            batch_size=None,
            sampler=self._requests,
            num_workers=self.workers,
            multiprocessing_context=multiprocessing.get_context(method),
            worker_init_fn=_prepare_worker,
            persistent_workers=True,
            pin_memory=self._pin_memory,
            # Its own, or each pass would draw a seed from the global one.
            generator=torch.Generator().manual_seed(0),
        )

    def close(self) -> None:
        """End the worker processes; the next batches start others."""
        # Left to Python they end when nothing refers to the DataLoader any more, not even a cycle or an exception's
        # frame. At exit they would be sent the one SIGTERM that they ignore, and be waited for.
        iterator = None if self._loader is None else self._loader._iterator
        self._loader = None
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """The batches of `requests`, in their order.

        Raises:
            FinetuneError: a sample is broken, or not what it was.
        """
        with closing(self._fetched(requests)) as fetched:
            for batch in fetched:
                if isinstance(batch, FinetuneError):
                    raise batch
                self.contents.note(batch.indices, batch.digests)
                yield batch

    def _fetched(self, requests: Iterable[Request]) -> Generator[Batch | FinetuneError, None, None]:
        if not self.workers:
            for request in requests:
                with one_thread():
                    batch = self._pipeline.fetch(request)
                yield batch
        else:
            if self._loader is None:
                self._loader = self._with_workers()
                _with_processes.add(self)
            self._requests.requests = requests
            yield from self._loader


_with_processes: weakref.WeakSet[Loader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Whoever was not closed is closed before the interpreter waits for its child processes."""
    for loader in list(_with_processes):
        loader.close()
