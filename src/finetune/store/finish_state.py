"""How far the last stage of a run is: a linear head, solved after the loop."""

from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from finetune.base.events import Best
from finetune.base.formatting import best_text, number_text, validation_text
from finetune.base.plain import stored


class Tried(TypedDict):
    """What came of a strength of the regularisation.

    Attributes:
        strength: lambda, of mean loss + lambda / 2 * |weight|^2.
        log_loss: mean over the rows that were held out, after the temperature.
        temperature: that makes it least; 1 where there is none.
        fold_losses: the same by fold.
    """

    strength: float
    log_loss: float
    temperature: float
    fold_losses: list[float]


class Judged(TypedDict, total=False):
    """Both heads on the samples that validate, which neither was trained on.

    Attributes:
        solved, loop: log loss (of numbers: squared error) of the solved head and of the loop's best, each after a
            temperature of its own.
        samples: how many.
        error: standard error of the mean difference of the two.
        optimism: by how much the loss of the chosen strength looks better than it is, as it was chosen by it.
        figures: what the solved head makes of the samples: loss, accuracy, ...
    """

    solved: float
    loop: float
    samples: int
    error: float
    optimism: float
    figures: NotRequired[dict[str, float]]


@dataclass
class Finish:
    """The last stage.

    Attributes:
        status: "" = the loop is not over, or there is no such stage; "due" = it is under way; "done".
        ended: how the loop ended: "finished" or "stopped early".
        tried: strengths, in order.
        weights: (folds, outputs, directions + 1) float64, at the strength that was tried last.
        best_weights: the same at the best so far.
        judged: of both heads.
        held_samples, held_outputs: (samples,) int64, (samples, outputs) float32: samples that the solved head is
            trained on, and what the heads gave of them that were solved without; of final.pt alone.
        thresholds: as of `Best`; of final.pt alone.
        half_width: as of `Best`, of samples that were held out; 0 = not known; of final.pt alone.
        ships: which checkpoint is the better one: "best" or "final".
    """

    status: str = field(default="", metadata=stored("status", writer="finish", reader="session, finish", may_lack=True))
    ended: str = field(default="", metadata=stored("ended", writer="session", reader="finish", may_lack=True))
    tried: list[Tried] = field(
        default_factory=list, metadata=stored("tried", writer="finish", reader="finish, report", may_lack=True)
    )
    weights: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.float64),
        metadata=stored("weights", writer="finish", reader="finish", may_lack=True),
    )
    best_weights: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.float64),
        metadata=stored("best_weights", writer="finish", reader="finish", may_lack=True),
    )
    judged: Judged = field(
        default_factory=Judged, metadata=stored("judged", writer="finish", reader="report", may_lack=True)
    )
    held_samples: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.int64),
        metadata=stored("held_samples", writer="finish", reader="evaluate", may_lack=True),
    )
    held_outputs: Tensor = field(
        default_factory=lambda: torch.zeros(0),
        metadata=stored("held_outputs", writer="finish", reader="evaluate", may_lack=True),
    )
    thresholds: list[float] = field(
        default_factory=list, metadata=stored("thresholds", writer="finish", reader="export, evaluate", may_lack=True)
    )
    half_width: float = field(
        default=0.0, metadata=stored("half_width", writer="finish", reader="export", may_lack=True)
    )
    ships: str = field(
        default="best", metadata=stored("ships", writer="finish", reader="export, evaluate, report", may_lack=True)
    )

    @property
    def best(self) -> Tried:
        """Of those that were tried."""
        return min(self.tried, key=lambda one: one["log_loss"])


def shipped_best(best: Best, finish: Finish) -> Best:
    """The loop's best validation, or, where the solved head ships, what that makes of the same samples.

    Args:
        best: of the loop.
    """
    figures = finish.judged.get("figures", {})
    if not best or finish.ships != "final" or best["metric"] not in figures:
        return best
    value, samples = figures[best["metric"]], finish.judged["samples"]
    solved = Best(metric=best["metric"], value=value, step=best["step"], epoch=best["epoch"])
    return solved | Best(loss=figures["loss"], samples=samples, is_solved=True)


def outcome_text(best: Best, finish: Finish) -> str:
    """What ships of a run, and how good it is.

    Args:
        best: of the loop.
    """
    shipped = shipped_best(best, finish)
    if not shipped.get("is_solved"):
        as_it_ships = best.get("figures", {}).get(best["metric"], best["value"]) if best else 0.0
        has_thresholds = "thresholds" in best and as_it_ships != best["value"]
        more = f"; {number_text(as_it_ships)} with the thresholds that ship, chosen there" if has_thresholds else ""
        return best_text(best) + more
    loop = number_text(best["value"])
    return f"{validation_text(shipped)}, the solved head; the loop's best {loop} in epoch {best['epoch']}"
