"""Mean and spread of numbers that come in batches, however far from zero they lie."""

import torch
from torch import Tensor


def widened(numbers: Tensor) -> Tensor:
    """In float64; in float32 on a device that has no float64."""
    return numbers.float() if numbers.device.type == "mps" else numbers.double()


class Moments:
    """Of numbers that come in batches, without making a device wait.

    Squared distances are taken from the batch's own mean, and batches put together by what their means differ: a mean
    of squares less a squared mean would lose whatever sets large numbers apart. (Chan, Golub and LeVeque, "Algorithms
    for computing the sample variance: analysis and recommendations", The American Statistician, 1983.)

    Attributes:
        count: numbers so far.
        mean: of them; a tensor where they come in columns.
        squares: their squared distances from it, added up.
    """

    def __init__(self, device: torch.device):
        self.count = 0
        self.mean = self.squares = widened(torch.zeros((), device=device))

    def add(self, numbers: Tensor) -> None:
        """Take a batch: (samples,), or (samples, columns)."""
        count = len(numbers)
        if not count:
            return
        numbers = widened(numbers)
        mean = numbers.mean(0)
        squares = (numbers - mean).square().sum(0)
        apart, share = mean - self.mean, count / (self.count + count)
        self.squares = self.squares + squares + apart.square() * (self.count * share)
        self.mean = self.mean + apart * share
        self.count += count

    def deviation(self) -> Tensor:
        return (self.squares / max(self.count, 1)).sqrt()
