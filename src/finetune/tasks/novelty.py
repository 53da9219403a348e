"""How far a new sample lies from those that a model was trained on, in the features that its head reads.

The distance to the nearest of them, by the angle between features (Sun et al., "Out-of-distribution detection with deep
nearest neighbors", ICML 2022). What it is worth says the share of the training samples that lie nearer to one another.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from finetune.data.order import spread

# What a file of them may hold, a byte a number.
MOST_BYTES, MOST_ROWS, FEWEST_ROWS = 4_000_000, 4_000, 8
LEVELS = 127
# Farther than this share of the training samples is from the rest of them: like nothing that the model knows.
NOVEL_PERCENTILE = 99.0
PART_ROWS = 1_024
# What such a file says beside its tensors.
READ_BY, ROWS = "read_by_sha256", "rows"


@dataclass(frozen=True)
class NoveltyReference:
    """Features of training samples.

    Attributes:
        rows: (rows, features) int8: their directions; lengths say nothing.
        distances: (rows,) float32: how far the nearest other one is, the smallest first.
    """

    rows: Tensor
    distances: Tensor

    def to_file(self, read_by: str) -> bytes:
        """A file of safetensors.

        Args:
            read_by: sha256 over what can ever change of the network before its head.
        """
        about = {READ_BY: read_by, ROWS: str(len(self.rows))}
        return save({"rows": self.rows, "distances": self.distances}, about)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "NoveltyReference":
        """Raises: ValueError: they are none."""
        rows, distances = tensors.get("rows"), tensors.get("distances")
        if rows is None or distances is None or set(tensors) != {"rows", "distances"}:
            raise ValueError("holds other tensors")
        if rows.dtype != torch.int8 or rows.dim() != 2 or not len(rows):
            raise ValueError("rows are no features")
        if distances.dtype != torch.float32 or distances.shape != rows.shape[:1] or not distances.isfinite().all():
            raise ValueError("distances are not those of the rows")
        return cls(rows, distances)

    def percentiles(self, features: Tensor) -> list[float]:
        """By sample, 0 to 100: how many of 100 training samples lie nearer to another one than it does.

        Args:
            features: as `watched` gives them.
        """
        known = functional.normalize(self.rows.float(), dim=1)
        # Rounded as those are, so that one of them lies at no distance from itself.
        rows = functional.normalize(_rounded(_rows_of(features)), dim=1)
        found = 1 - torch.cat([(part @ known.T).amax(1) for part in rows.split(PART_ROWS)])
        places = torch.searchsorted(self.distances, found.contiguous())
        return (100.0 * places / len(self.distances)).tolist()


def about_file(path: Path) -> dict[str, str]:
    """What such a file says beside its tensors; nothing where there is none, or none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def rows_to_keep(samples: Tensor, features: int) -> Tensor:
    """Of samples, evenly spread, those that a file has room for."""
    return spread(samples, min(MOST_ROWS, max(MOST_BYTES // max(features, 1), 1)))


def reference_of(features: Tensor) -> NoveltyReference | None:
    """What to keep of the features of training samples; None = they are too few, or say nothing.

    Args:
        features: (samples, features).
    """
    if len(features) < FEWEST_ROWS or not features.isfinite().all():
        return None
    # Of copies one will do: else the rest would lie at no distance, and whatever is no copy would seem strange.
    rows = _rounded(features).to(torch.int8).unique(dim=0)
    if len(rows) < FEWEST_ROWS:
        return None
    known, nearest = functional.normalize(rows.float(), dim=1), []
    for start in range(0, len(known), PART_ROWS):
        alike = known[start : start + PART_ROWS] @ known.T
        alike.diagonal(start).fill_(-1)
        nearest.append(alike.amax(1))
    return NoveltyReference(rows, (1 - torch.cat(nearest)).sort().values)


def _rounded(features: Tensor) -> Tensor:
    """Rows in whole numbers of 8 bits, each by its own largest."""
    largest = features.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (features / largest * LEVELS).round()


def _rows_of(features: Tensor) -> Tensor:
    """What a head reads as a row a sample: of a feature map the mean over its places."""
    rows = features.detach().float().cpu()
    return rows.flatten(2).mean(2) if rows.dim() > 2 else rows


@contextmanager
def watched(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What a layer reads within the block, a tensor (batch, features) a call; of calls by this thread alone."""
    found: list[Tensor] = []
    thread = threading.get_ident()

    def note(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            found.append(_rows_of(inputs[0]))

    hook = layer.register_forward_pre_hook(note)
    try:
        yield found
    finally:
        hook.remove()
