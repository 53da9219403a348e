"""What the receiver of an export will see: its program, run on samples that validate, held against the run."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from finetune.base.formatting import counted
from finetune.errors import one_line
from finetune.export.verify import Trained
from finetune.models import hub
from finetune.tasks.losses import ClassificationTask, MultiLabelTask, RegressionTask, make_task

# Of probabilities, and of numbers in deviations of the targets: more than another way to resize changes them.
LARGEST_DIFFERENCE = 0.05
# The classes that apply, and the probability of each.
_Decided = tuple[set[str], dict[str, float]]


@dataclass(frozen=True)
class Seen:
    """What the program says of samples, held against the run.

    Attributes:
        samples: how many.
        alike: how many are decided alike; None where numbers are predicted.
        difference: the largest, of probabilities; of numbers in units of the targets' deviation.
        validate: whether they are samples that validate; else they are made up, for the data is not at hand.
        unit: of the difference.
        error: why it could not be run here; "" = it was.
    """

    samples: int
    alike: int | None
    difference: float
    validate: bool
    unit: str = ""
    error: str = ""

    def text(self) -> str:
        """A sentence for a person."""
        if self.error:
            return f"tried here, it failed ({self.error}): please report it, and load the file with finetune.load"
        what = counted(self.samples, "sample" if self.validate else "made-up sample")
        what += " of those that validate" if self.validate else ", as the data is not at hand"
        differs = f"within {self.difference:.1g}" if self.difference else "bit for bit"
        but = ""
        if not self.difference <= LARGEST_DIFFERENCE:
            but = ": more than rounding and resizing explain, so please report it, and load the file with finetune.load"
        if self.alike is None:
            of = f" {self.unit}" if self.difference and self.unit else ""
            return f"run on {what}, it gives the run's numbers {differs}{of}{but}"
        return (
            f"run on {what}, it decides {self.alike} as the run does, and gives the run's probabilities {differs}{but}"
        )


def receive(program: str, trained: Trained, description: Mapping[str, Any]) -> Seen:
    """Run an export's program in this process, from files on the disk to what it predicts.

    The file is written and was held against the run before: that the program fails is said, and is no reason to have
    no export.
    """
    # The text is ours, and all that it holds of others' is quoted.
    scope: dict[str, Any] = {"__name__": "receiver"}
    expected, alike, differences = _expected(trained, description), 0, [0.0]
    with TemporaryDirectory(prefix="finetune-") as place:
        try:
            with hub.silent() if "config" in trained.backbone.options else nullcontext():
                exec(compile(program, "<the program of the export>", "exec"), scope)
                predict: Callable[[object], Any] = scope["predict"]
                found = [predict(one) for one in _on_disk(trained, Path(place))]
        except Exception as error:
            return Seen(0, None, math.inf, trained.compared.validate, error=one_line(error))
    for one, wanted in zip(found, expected, strict=True):
        if isinstance(wanted, float):
            differences.append(abs(one - wanted) / trained.deviation)
            continue
        if isinstance(wanted, list):
            differences += [abs(a - b) for a, b in zip(one, wanted, strict=True)]
            continue
        labels, chances = wanted
        pairs = one if isinstance(one, list) else [one]
        alike += {name for name, _ in pairs} == labels
        differences += [abs(chances[name] - chance) for name, chance in pairs]
    are_classes = bool(description["classes"])
    unit = "of the targets' deviation" if description["task"] == "regression" else ""
    largest = math.inf if any(map(math.isnan, differences)) else max(differences)
    return Seen(len(found), alike if are_classes else None, largest, trained.compared.validate, unit)


def _on_disk(trained: Trained, folder: Path) -> list[object]:
    """Samples as a receiver has them: texts, and paths of pictures."""
    found: list[object] = []
    for number, one in enumerate(trained.compared.originals):
        if isinstance(one, Tensor):
            path = folder / f"{number}.png"
            to_pil_image(one).save(path)
            found.append(path)
        else:
            found.append(one)
    return found


def _expected(trained: Trained, description: Mapping[str, Any]) -> list[float | list[float] | _Decided]:
    """What the run says of each: a number, an embedding, or the classes that apply and the probability of every one."""
    classes, outputs = description["classes"], trained.outputs
    task = make_task(trained.recipe.task, len(classes), trained.state.data.scale)
    if isinstance(task, RegressionTask):
        return [value.item() for value in task.in_unit(outputs.squeeze(1))]
    if not isinstance(task, ClassificationTask | MultiLabelTask):
        return [row.tolist() for row in outputs]
    chances = task.probabilities(outputs)
    if isinstance(task, MultiLabelTask):
        applies = chances > torch.tensor(description.get("thresholds") or [0.5] * len(classes))
    else:
        applies = torch.nn.functional.one_hot(chances.argmax(1), len(classes)).bool()
    return [
        ({name for name, one in zip(classes, row, strict=True) if one}, dict(zip(classes, values, strict=True)))
        for row, values in zip(applies.tolist(), chances.tolist(), strict=True)
    ]
