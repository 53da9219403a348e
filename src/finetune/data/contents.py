"""What each image file held when it was first read: so that a file that changes under a run is found, and named.

Listing a million files takes their path and size; reading them all first would take hours. So their content is
hashed as they are decoded, and held against the first time.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetune.base.files import TRAILER_BYTES, BadFile, verify_trailer, write_atomically
from finetune.data.source import Source
from finetune.errors import RunError, one_line


class Contents:
    """Digests by sample.

    Attributes:
        digests: (samples,) int64; 0 = not read yet.
        changed: whether there is something to save.
        damaged: whether there was a file that could not be used.
    """

    def __init__(self, source: Source, path: Path | None = None):
        """Those saved at `path`, where there are any; where that file is damaged, anew."""
        self.source = source
        self.digests = torch.zeros(len(source.targets), dtype=torch.int64)
        self.changed = False
        self.damaged = False
        self._failed = False
        if path is not None and path.is_file():
            try:
                verify_trailer(path)
                saved = np.fromfile(path, dtype="<i8", count=(path.stat().st_size - TRAILER_BYTES) // 8)
                if len(saved) != len(self.digests):
                    raise BadFile(f"{path} is of other data")
                self.digests = torch.from_numpy(saved.astype(np.int64))
            except (BadFile, OSError):
                self.damaged = True

    def note(self, indices: Tensor, digests: Tensor) -> None:
        """Take what was just read.

        Args:
            indices, digests: (batch,) int64; digest 0 = no file.

        Raises:
            RunError: a file is not what it was; names it.
        """
        known = self.digests[indices]
        other = ((known != 0) & (digests != 0) & (known != digests)).nonzero()
        if len(other):
            name = self.source.name(int(indices[other[0, 0]]))
            raise RunError(
                f"image {name} is not what it was when the run first read it; restore it, or start a new run"
            )
        fresh = (known == 0) & (digests != 0)
        if fresh.any():
            self.digests[indices[fresh]] = digests[fresh]
            self.changed = True

    def save(self, path: Path, say: Callable[[str], None]) -> None:
        """Write them, if anything was added: 8 bytes a sample. What cannot be written is said once: it is for finding
        files that change, and no reason to stop."""
        if self.changed and not self._failed:
            content = self.digests.numpy().astype("<i8").tobytes()
            try:
                write_atomically(path, lambda stream: stream.write(content), trailer=True)
                self.changed = False
            except OSError as error:
                self._failed = True
                say(f"{path} cannot be written ({one_line(error)}): a file that changes may not be found at a resume")
