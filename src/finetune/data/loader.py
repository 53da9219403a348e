"""Batches fetched ahead by worker processes, or in this one. Which of the two cannot change a bit."""

import atexit
import dataclasses
import functools
import math
import multiprocessing
import signal
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from finetune.base.allocator import keep_nothing
from finetune.base.memory import usable_cores
from finetune.data.batch import Batch, Request, joined
from finetune.data.contents import Contents
from finetune.data.images import ImagePipeline
from finetune.data.order import spread
from finetune.data.source import FileSource, Source
from finetune.data.texts import TextPipeline
from finetune.errors import FinetuneError, say_nothing_of_large_images

START_METHODS = ("auto", "fork", "forkserver", "spawn")
# How many processes read files, and how many files each takes at once, follows from the cores and from what a file
# costs to decode. That goes with its size, a small one counted as `LEAST_FILE_BYTES`; no clock is asked.
LEAST_FILE_BYTES = 128 << 10
# To start a process takes about as long as to decode so much: 500 small files, 20 photographs of 12 megapixels.
WORTH_WORKERS_BYTES = 500 * LEAST_FILE_BYTES
MOST_WORKERS = 16
# What a worker takes at once: of small files a whole batch, of such photographs one, so that at the end of the files no
# core is without work for long.
PART_BYTES = 4 << 20
# So many samples are on their way while others are computed; fewer of large ones, for they lie in shared memory.
AHEAD_SAMPLES, AHEAD_BYTES = 128, 96 << 20
# So many files are asked for their size.
SIZED_FILES = 64


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
    # A process that was forked would keep the room of its largest picture.
    keep_nothing()
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


def mean_file_bytes(source: Source) -> int:
    """About how large an image file is, small ones counted as `LEAST_FILE_BYTES`; 0 = there are no files."""
    if not isinstance(source, FileSource) or not source.paths:
        return 0
    some = spread(torch.arange(len(source.paths)), SIZED_FILES).tolist()
    return sum(max(source.size_bytes(index), LEAST_FILE_BYTES) for index in some) // len(some)


def _worth_workers(source: Source, file_bytes: int) -> int:
    """How many processes are worth their start: one a core, none for images in memory or few of them."""
    is_worth = file_bytes and len(source.targets) * file_bytes >= WORTH_WORKERS_BYTES
    return min(usable_cores(), MOST_WORKERS) if is_worth else 0


class Loader:
    """Fetches the batches that are asked for, in order.

    Args:
        pipeline: does the work.
        workers: processes that fetch ahead; 0 = this process, when the batch is needed; None = one a core, or none
            where there is too little to read.
        start_method: how worker processes start; "auto" is the platform's own way.
        pin_memory: keep batches in page-locked memory, for faster copies to a CUDA device.
        contents: what the files held when they were first read.
    """

    def __init__(
        self,
        pipeline: ImagePipeline | TextPipeline,
        workers: int | None,
        start_method: str,
        pin_memory: bool,
        contents: Contents,
    ):
        self._pipeline = pipeline
        self.contents = contents
        self._requests = _Requests()
        self._asked_workers, self._start_method, self._pin_memory = workers, start_method, pin_memory
        self._loader: DataLoader | None = None

    # A loader that nothing is asked of, as of samples whose features are kept, looks at no file.

    @functools.cached_property
    def _file_bytes(self) -> int:
        return mean_file_bytes(self._pipeline.source)

    @functools.cached_property
    def workers(self) -> int:
        """How many processes fetch ahead."""
        if self._asked_workers is None:
            return _worth_workers(self._pipeline.source, self._file_bytes)
        return self._asked_workers

    @functools.cached_property
    def _part_samples(self) -> int:
        """How many samples of a batch a process fetches at once; 0 = all, as where samples are mixed within it."""
        mixes = isinstance(self._pipeline, ImagePipeline) and bool(self._pipeline.mixup or self._pipeline.cutmix)
        return max(1, PART_BYTES // self._file_bytes) if self._file_bytes and not mixes else 0

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
            prefetch_factor=self._ahead(),
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
            yield from self._joined(requests)

    def _ahead(self) -> int:
        """How many requests each worker has."""
        if not self._part_samples or not isinstance(self._pipeline, ImagePipeline):
            return 2
        sample_bytes = 3 * 4 * self._pipeline.preprocessing.image_size**2
        samples = min(AHEAD_SAMPLES, AHEAD_BYTES // sample_bytes)
        return max(2, math.ceil(samples / (self._part_samples * self.workers)))

    def _joined(self, requests: Iterable[Request]) -> Iterator[Batch | FinetuneError]:
        """Batches of the workers, which fetch each in parts."""
        counts = deque[int]()

        def parts() -> Iterator[Request]:
            for request in requests:
                count = max(len(request.indices), 1)
                size = self._part_samples or count
                starts = range(0, count, size)
                counts.append(len(starts))
                for start in starts:
                    yield dataclasses.replace(request, indices=request.indices[start : start + size])

        assert self._loader is not None
        self._requests.requests = parts()
        found = list[Batch]()
        for part in self._loader:
            if isinstance(part, FinetuneError):
                yield part
                return
            found.append(part)
            if len(found) == counts[0]:
                counts.popleft()
                yield joined(found, self._pin_memory)
                found = []


_with_processes: weakref.WeakSet[Loader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Whoever was not closed is closed before the interpreter waits for its child processes."""
    for loader in list(_with_processes):
        loader.close()
