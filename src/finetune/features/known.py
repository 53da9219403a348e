"""Kept features of samples whose files are what they were, looked up and not touched: nothing is written."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from finetune.base.files import BadFile
from finetune.data.batch import Batch, Request, batch_of_rows
from finetune.data.source import FileSource
from finetune.features.feature_file import RowFile, RowReader
from finetune.features.kept import MEMORY_BYTES, KeptRows


class KnownRows:
    """Rows in the place of samples: gives batches as a `Loader` does.

    Args:
        file: open for reading; holds whole blocks of all samples that will be asked for.
    """

    def __init__(self, kept: KeptRows, file: RowFile):
        self._kept, self._file = kept, file
        self._reader = RowReader(file, self._damaged, MEMORY_BYTES, 0)

    def _damaged(self, block: int) -> None:
        raise BadFile(f"{self._file.path}: block {block} was damaged while it was read; try again")

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """See `kept.Features.batches`."""
        for request in requests:
            indices = torch.tensor(request.indices, dtype=torch.int64)
            rows = self._reader.read(self._kept.row_of_sample[indices])
            yield batch_of_rows(rows, indices, self._kept.run.source.targets)

    def close(self) -> None:
        self._file.close()


def find_known(kept: KeptRows, samples: Tensor) -> KnownRows | None:
    """The rows of some samples; None where one was not computed, or its file is not what it was computed from.

    Args:
        samples: (n,) int64, among those of `kept`.
    """
    try:
        file = RowFile(kept.entry.path, kept.layout, read_only=True)
    except (OSError, BadFile):
        return None
    if not _are_whole(file, kept.row_of_sample[samples]) or not _are_unchanged(kept, file, samples):
        file.close()
        return None
    return KnownRows(kept, file)


def _are_whole(file: RowFile, rows: Tensor) -> bool:
    """Whether each was computed, and lies in a block that is as it was written."""
    into = torch.empty(file.layout.block_rows, file.layout.width, dtype=file.layout.dtype)
    blocks = (rows // file.layout.block_rows).unique().tolist()
    return all(file.is_written(block) and file.read_block(block, into) for block in blocks) and bool(
        (torch.from_numpy(file.digests)[rows] >= 0).all()
    )


def _are_unchanged(kept: KeptRows, file: RowFile, samples: Tensor) -> bool:
    """Whether the files hold what they did; only those with another time are read."""
    source = kept.run.source
    if not isinstance(source, FileSource):
        return True
    for sample, row in zip(samples.tolist(), kept.row_of_sample[samples].tolist(), strict=True):
        if source.changed_ns(sample) != file.changed_ns[row] and source.digest(sample) != file.digests[row]:
            return False
    digests = torch.from_numpy(file.digests.astype(np.int64))[kept.row_of_sample[samples]]
    kept.run.loader.contents.note(samples, digests)
    return True
