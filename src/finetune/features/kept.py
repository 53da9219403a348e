"""Kept features: the frozen prefix runs once over the samples, its rows lie in a file, and training reads them.

The pass is cut into fixed batches of the sorted samples, broken ones included, so that a row comes out the same in
every bit whether it is computed at first, after a kill, or again because its block was damaged. Where memory runs out
the batches are smaller, and the rows are others. Within a block, texts of about equal length are in one batch.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetune.base.allocator import give_back
from finetune.base.formatting import parse_size, size_text
from finetune.base.halves import freeing, in_halves
from finetune.base.signals import StopRequest
from finetune.base.terminal import Terminal
from finetune.data.batch import Batch, Request, batch_of_rows
from finetune.data.loader import Loader
from finetune.data.order import WINDOW_SAMPLES, reading_order, shuffles_in_blocks
from finetune.data.source import FileSource, Source
from finetune.errors import RunError, is_out_of_memory
from finetune.features.cache import Entry, disk_limit, entry, waiting
from finetune.features.feature_file import BATCH_ROWS, Layout, RowFile, RowReader, written_blocks

# For rows in memory, all entries of a run together; smaller data lies there as a whole.
MEMORY_BYTES = 512 << 20
# From so many on somebody waits long enough to be told how it would be shorter.
HINTED_ROWS = 2_000
# In the place of a digest; that of a broken file is stored negative.
UNREADABLE = 1
SCHEMA = 1


class CannotKeep(Exception):
    """Why features cannot be kept."""


@contextmanager
def keeping(folder: Path) -> Iterator[None]:
    """What cannot be written within the block is no reason to stop.

    Raises:
        CannotKeep: why.
    """
    try:
        yield
    except OSError as error:
        raise CannotKeep(f"they cannot be written to {folder} ({error.strerror or error})") from None


@dataclass(frozen=True)
class Pass:
    """The frozen backbone on its way over the samples.

    Attributes:
        compute: prepared images (batch, 3, height, width), or tokens (batch, length), on the CPU -> rows (batch, width)
            on the CPU.
        width, dtype: of the rows.
        identity: plain values; all that a row depends on besides its sample.
        loader: reads the samples.
        about: what runs over what, for people.
        lengths: (samples,) int64: how long each text is; None of images.
        hint: asked before it runs over many samples: what a person could do to make it shorter; "" = nothing.
    """

    compute: Callable[[Tensor], Tensor]
    width: int
    dtype: torch.dtype
    identity: Mapping[str, object]
    source: Source
    loader: Loader
    about: str
    lengths: Tensor | None = None
    hint: Callable[[], str] = str


class KeptRows:
    """The rows of some samples under one view of each.

    Attributes:
        samples: (rows,) int64 sample indices, in the order of the rows.
        batch_rows: how many are computed at once, which shows in their last bits.
        view: number of the augmented view, or None for the plain images.
        broken: samples that could not be read.
        row_of_sample: (sample,) int64 numbers of their rows.
    """

    def __init__(self, run: Pass, samples: Tensor, view: int | None, batch_rows: int = BATCH_ROWS):
        self.run, self.samples, self.view, self.batch_rows = run, samples, view, batch_rows
        about = run.about if view is None else f"{run.about}, view {view + 1}"
        self.layout = Layout(len(samples), run.width, run.dtype, about)
        self.entry: Entry = entry(self._key())
        self.row_of_sample = torch.full((int(samples.max()) + 1,), -1)
        self.row_of_sample[samples] = torch.arange(len(samples))
        self._opened: RowFile | None = None
        self._reader: RowReader | None = None

    def _key(self) -> str:
        chosen = hashlib.sha256(self.samples.numpy().astype("<i8").tobytes()).hexdigest()
        rows = {"block": self.layout.block_rows, "batch": self.batch_rows, "type": str(self.layout.dtype)}
        parts = {**self.run.identity, "schema": SCHEMA, "rows": rows, "samples": chosen, "view": self.view}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def missing_bytes(self) -> int:
        """What still has to be written."""
        missing = self.layout.blocks - written_blocks(self.entry.path, self.layout)
        return self.layout.file_bytes * missing // self.layout.blocks

    @property
    def file(self) -> RowFile:
        assert self._opened is not None, "open() comes first"
        return self._opened

    @property
    def broken(self) -> list[int]:
        return self.samples[torch.from_numpy(self.file.digests < 0)].tolist()

    def open(self, terminal: Terminal, stop: StopRequest) -> int:
        """Open the file and hold what it was computed from against what is there now; the entry's fill lock is held.

        Returns:
            How many rows have to be computed.
        """
        self._opened = RowFile(self.entry.path, self.layout)
        changed = self._changed_blocks(terminal, stop)
        if changed and self.entry.users() > 1:
            # Another run goes on with what it has read: it keeps that file, we begin another.
            self.close()
            self.entry.path.unlink()
            self._opened = RowFile(self.entry.path, self.layout)
        for block in changed:
            self.file.discard(block)
        known = np.repeat((self.file.checksums != 0).all(0), self.layout.block_rows)[: self.layout.count]
        known &= self.file.digests > 0
        self.run.loader.contents.note(self.samples[known], torch.from_numpy(self.file.digests[known].astype(np.int64)))
        return sum(len(self.file.rows_of(block)) for block in self.file.missing())

    def _changed_blocks(self, terminal: Terminal, stop: StopRequest) -> list[int]:
        """The blocks of image files that have another content now. Only files with another time are read."""
        file, source, said = self.file, self.run.source, False
        changed: list[int] = []
        if not isinstance(source, FileSource):
            return changed
        for block in range(self.layout.blocks):
            if stop.requested:
                raise stop.stopped("while image files were compared")
            for row in file.rows_of(block) if file.is_written(block) else ():
                index, digest = int(self.samples[row]), abs(int(file.digests[row]))
                changed_ns = source.changed_ns(index)
                if changed_ns == file.changed_ns[row] and digest != UNREADABLE:
                    continue
                if not said:
                    terminal.say("image files look newer than their features: their content is compared")
                    said = True
                if (source.digest(index) or UNREADABLE) != digest:
                    changed.append(block)
                    break
                file.touch(row, changed_ns)
        return changed

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def fill(self, blocks: list[int], advance: Callable[[int], None], stop: StopRequest) -> None:
        """Compute blocks and write each as soon as it is whole.

        Raises:
            StoppedEarly: asked for; whole blocks are kept.
            CannotKeep: it cannot be written.
        """
        file, run = self.file, self.run
        changed_ns = np.zeros(len(self.samples), dtype=np.int64)

        def requests() -> Iterator[Request]:
            for rows in self._batches(blocks):
                batch = self.samples[rows].tolist()
                if isinstance(run.source, FileSource):
                    # Before they are read: a file that is changed meanwhile will then seem older than it is.
                    changed_ns[rows] = [run.source.changed_ns(index) for index in batch]
                yield Request(batch, augment_epoch=self.view, tolerant=True)

        batches = run.loader.batches(requests())
        for block in blocks:
            numbers = file.rows_of(block)
            rows = torch.zeros(len(numbers), run.width, dtype=run.dtype)
            digests = np.zeros(len(numbers), dtype=np.int64)
            for _ in self._batches([block]):
                batch = next(batches)
                for index, reason in batch.broken:
                    digests[int(self.row_of_sample[index]) - numbers.start] = -self._digest_of_broken(index, reason)
                if len(batch.indices):
                    places = self.row_of_sample[batch.indices] - numbers.start
                    rows[places] = run.compute(batch.inputs)
                    digests[places.numpy()] = batch.digests.numpy()
                advance(len(batch.indices) + len(batch.broken))
                if stop.requested:
                    raise stop.stopped("while the frozen backbone runs; what it has computed is kept")
            with keeping(self.entry.path.parent):
                file.write(block, rows, digests, changed_ns[numbers.start : numbers.stop])
        with keeping(self.entry.path.parent):
            file.sync()

    def _batches(self, blocks: list[int]) -> Iterator[Tensor]:
        """(rows,) numbers of the rows of each batch of the pass: a function of the block alone."""
        for block in blocks:
            numbers = self.file.rows_of(block)
            rows = torch.arange(numbers.start, numbers.stop)
            if self.run.lengths is not None:
                rows = rows[self.run.lengths[self.samples[rows]].argsort(stable=True)]
            yield from torch.split(rows, self.batch_rows)

    def _digest_of_broken(self, index: int, reason: str) -> int:
        """Of a file that cannot be decoded, to know it again; `UNREADABLE` where it cannot even be read.

        Raises:
            RunError: it could be, when the run began.
        """
        if self._reader is not None and self.file.digests[int(self.row_of_sample[index])] >= 0:
            raise RunError(reason)
        source = self.run.source
        return (source.digest(index) if isinstance(source, FileSource) else 0) or UNREADABLE

    def read(self, indices: Tensor, memory_bytes: int, window_samples: int) -> Tensor:
        """Rows (n, width) of samples (n,)."""
        if self._reader is None:
            self._reader = RowReader(self.file, self._remake, memory_bytes, window_samples)
        return self._reader.read(self.row_of_sample[indices])

    def _remake(self, block: int) -> None:
        with self.entry.filling(lambda: None):
            self.fill([block], lambda _count: None, StopRequest())


class Features:
    """Everything that a run reads in place of samples. Used by one process, in one phase of training.

    Args:
        parts: sorted samples by view.
        train_samples: how many an epoch goes through.
        halvings: of the batch that is computed at once.

    Attributes:
        pass_seconds: what the frozen part took for what was not kept from before; 0 = all was.
    """

    pass_seconds = 0.0

    def __init__(self, run: Pass, parts: dict[int | None, Tensor], train_samples: int, halvings: int = 0):
        self._run, self.halvings, batch_rows = run, halvings, max(1, BATCH_ROWS >> halvings)
        self._parts = {
            view: KeptRows(run, reading_order(samples, train_samples), view, batch_rows)
            for view, samples in parts.items()
        }
        self._resources = ExitStack()
        # The order jumps about within a window of training samples; between those lie the samples that validate.
        share = max(len(samples) for samples in parts.values()) / max(train_samples, 1)
        self._window = int(WINDOW_SAMPLES * max(share, 1)) if shuffles_in_blocks(train_samples) else 0

    @property
    def _folder(self) -> Path:
        return next(iter(self._parts.values())).entry.path.parent

    @property
    def broken(self) -> list[int]:
        """Samples that could not be read, under any view."""
        return sorted({index for part in self._parts.values() for index in part.broken})

    def check_size(self, limit: str) -> None:
        """Whether there is room for what is not there yet.

        Args:
            limit: as `--cache-limit` takes it; "" = a quarter of the free disk.

        Raises:
            CannotKeep: there is not.
        """
        wanted = sum(part.missing_bytes for part in self._parts.values())
        with keeping(self._folder):
            allowed = parse_size(limit) if limit else disk_limit(self._folder)
        if wanted > allowed:
            which = f"--cache-limit {limit}" if limit else "a quarter of the free disk"
            text = f"they would take {size_text(wanted)} in {self._folder}, more than {which}"
            raise CannotKeep(text if limit else f"{text}, {size_text(allowed)}")

    def fill(self, terminal: Terminal, stop: StopRequest) -> None:
        """Open every part and compute what is missing.

        Raises:
            CannotKeep: the disk is full, or the folder cannot be written.
            StoppedEarly: asked for; whole blocks are kept.
        """
        # In the order of their names, so that two runs never wait for each other.
        parts = sorted(self._parts.values(), key=lambda part: part.entry.key)
        new = [part for part in parts if not part.entry.path.exists()]
        waits = waiting(terminal, stop)
        try:
            with ExitStack() as locks:
                with keeping(self._folder):
                    for part in parts:
                        self._resources.enter_context(part.entry.in_use())
                        locks.enter_context(part.entry.filling(waits))
                self._fill(terminal, stop)
        except BaseException as error:
            self.close()
            # Nobody would go on with what cannot be finished.
            for part in new if isinstance(error, CannotKeep) or is_out_of_memory(error) else ():
                with suppress(OSError):
                    part.entry.clear()
            raise
        finally:
            self._run.loader.close()
            give_back()

    def _fill(self, terminal: Terminal, stop: StopRequest) -> None:
        """The entries' locks are held."""
        missing, count = 0, 0
        for part in self._parts.values():
            self._resources.callback(part.close)
            with keeping(self._folder):
                missing, count = missing + part.open(terminal, stop), count + part.layout.count
        terminal.say(f"features: {self._how(missing, count)}")
        if missing:
            if missing >= HINTED_ROWS and (hint := self._run.hint()):
                terminal.say(hint)
            started = time.monotonic()
            with terminal.track(f"the frozen backbone runs over the {self._run.source.noun}s", count) as advance:
                advance(count - missing)
                for part in self._parts.values():
                    part.fill(part.file.missing(), advance, stop)
            self.pass_seconds = time.monotonic() - started

    def _how(self, missing: int, count: int) -> str:
        """For people: what is kept, how large, and what the backbone still has to do."""
        views = sum(view is not None for view in self._parts)
        what = f"{views} fixed views of each image are kept" if views else "kept"
        noun = self._run.source.noun
        size = size_text(sum(part.layout.file_bytes for part in self._parts.values()))
        if not missing:
            return f"{what} from before, so the frozen backbone does not run ({count:,} rows, {size} in {self._folder})"
        once = f"the frozen backbone runs over {count:,} {noun}s once"
        if missing < count:
            once = f"the frozen backbone runs over {missing:,} {noun}s, {count - missing:,} rows are there"
        return f"{what}; {once} ({size} in {self._folder})"

    def read(self, indices: Tensor, view: int | None) -> Tensor:
        """Rows (n, width) of samples (n,) under a view."""
        return self._parts[view].read(indices, MEMORY_BYTES // len(self._parts), self._window)

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """What a `Loader` gives, with rows in place of samples: one gather a batch."""
        for request in requests:
            indices = torch.tensor(request.indices, dtype=torch.int64)
            yield batch_of_rows(self.read(indices, request.augment_epoch), indices, self._run.source.targets)

    def close(self) -> None:
        self._resources.close()


def filled(
    run: Pass,
    parts: dict[int | None, Tensor],
    train_samples: int,
    limit: str,
    device: torch.device,
    terminal: Terminal,
    stop: StopRequest,
    halvings: int = 0,
) -> Features:
    """The rows of all samples, computed where they are missing; with fewer samples at once where memory runs out.

    Args:
        parts, train_samples: see `Features`.
        limit: see `Features.check_size`.
        halvings: of the batch, to begin with: as many as a run that goes on had.

    Raises:
        CannotKeep: there is no room for them.
        StoppedEarly: asked for; whole blocks are kept.
        RunError: not even one sample at a time fits.
    """

    def attempt(halvings: int) -> Features:
        features = Features(run, parts, train_samples, halvings)
        features.check_size(limit)
        features.fill(terminal, stop)
        return features

    note = "; the pass begins anew, as that shows in a row's last bits"
    features, _ = in_halves(attempt, BATCH_ROWS, halvings, freeing(device, terminal.say), note=note)
    return features
