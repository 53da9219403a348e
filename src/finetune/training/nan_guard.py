"""Watches losses and weights for what is no number, without making a device wait at each step."""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from finetune.base.files import write_json
from finetune.errors import RunError


class Losses:
    """The losses of the newest steps, not looked at yet.

    Args:
        file: where the samples of a bad batch are written down; None = nowhere.
        name: of a sample, by its index: where it lies.
    """

    def __init__(self, file: Path | None, name: Callable[[int], str]):
        self._file, self._name = file, name
        self._steps: list[tuple[int, Tensor, Tensor]] = []

    def note(self, step: int, indices: Tensor, loss: Tensor) -> None:
        """Of an optimizer step: the batch's samples, and its mean loss, still on the device."""
        self._steps.append((step, indices, loss))

    def check(self) -> None:
        """Nothing is recorded as good once a loss has left the numbers.

        Raises:
            RunError: a loss is not finite; the samples of the first such batch are written down.
        """
        losses = torch.stack([loss for *_, loss in self._steps]).tolist() if self._steps else []
        for (step, indices, _), loss in zip(self._steps, losses, strict=True):
            if not math.isfinite(loss):
                self._stop(f"the loss is {loss} at step {step}", step, indices)
        del self._steps[:-1]

    def check_weights(self, weights: dict[str, Tensor]) -> None:
        """Nothing is saved once a weight has left the numbers: a step of a good loss can still be one too far.

        Raises:
            RunError: a weight is not finite; the samples of the newest batch are written down.
        """
        bad = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
        if bad and self._steps:
            step, indices, _ = self._steps[-1]
            self._stop(f"weights are no numbers after step {step} ({bad[0]} and {len(bad) - 1} more)", step, indices)

    def _stop(self, what: str, step: int, indices: Tensor) -> NoReturn:
        samples = [{"index": index, "name": self._name(index)} for index in indices.tolist()]
        kept = ""
        if self._file is not None:
            with suppress(OSError):
                write_json(self._file, {"step": step, "what": what, "samples": samples})
            kept = f"; the last good checkpoint is kept, and that step's samples are listed in {self._file}"
        raise RunError(f"{what}{kept}: lower --lr, or set --clip-norm, and start again")
