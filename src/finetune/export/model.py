"""An export, ready to predict: what `finetune.load` gives, and what `finetune predict` asks."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from finetune.base.device import NO_TF32, module_to_device, numerics_put_back, pick_device, set_tf32, to_device
from finetune.base.halves import freeing, in_halves
from finetune.base.terminal import say_aside
from finetune.data.decode import Picture
from finetune.data.inputs import ImageInputs, TextInput, TextInputs, image_files, texts_in
from finetune.data.preprocess import Preprocessing
from finetune.data.source import Reading
from finetune.data.table import TABLE_SUFFIXES
from finetune.data.texts import TEXT_SUFFIXES
from finetune.data.tokens import Tokenization
from finetune.errors import RunError, UsageError
from finetune.export.load import in_own_unit, load_described, prepared, read_novelty
from finetune.models.heads import beside_zero
from finetune.recipe.spec import TASKS
from finetune.tasks.levels import nearest_level
from finetune.tasks.losses import Classifying, RegressionTask, Task, make_task
from finetune.tasks.novelty import NOVEL_PERCENTILE, NoveltyReference, watched

# Classes that are listed, and samples that are computed at once, unless other numbers are given.
TOP_K, BATCH_SIZE = 3, 64


class Ranked(NamedTuple):
    """A class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True, repr=False)
class Prediction:
    """What is predicted of an image or a text.

    Attributes:
        label, probability: the most probable class; None where a number is predicted, or the sample is not known well
            enough for `unsure_below`.
        top: the most probable classes, the first of them first.
        labels: of several labels a sample those that apply; else None.
        value: the number, in the unit of the training data; None where classes are predicted.
        level: the step of the scale that is nearest to it, where the training data is such, as stars are; else None.
        low, high: the true number lies between them with 90 % probability; None where nothing is known of that.
        distance_percentile: how many of 100 training samples lie nearer to another one than this sample does to any:
            from 99 on it is like nothing that the model was trained on. None where the export does not know.
        unsure: why nobody should rely on it; "" = nothing speaks against it.
        error: what is wrong with the sample, of which then nothing is predicted; else "".
        where: "file", "line", "text" of the sample, what there is of them.
    """

    label: str | None = None
    probability: float | None = None
    top: list[Ranked] = field(default_factory=list)
    labels: list[str] | None = None
    value: float | None = None
    level: float | None = None
    low: float | None = None
    high: float | None = None
    distance_percentile: float | None = None
    unsure: str = ""
    error: str = ""
    where: dict[str, object] = field(default_factory=dict)

    def __repr__(self) -> str:
        """What there is to say."""
        said = {
            one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name not in ("top", "where")
        }
        words = [f"{name}={value!r}" for name, value in said.items() if value not in (None, "")]
        return f"Prediction({', '.join(words)})"

    def to_plain(self) -> dict[str, object]:
        """As a line of JSON holds it."""
        if self.error:
            return self.where | {"error": self.error}
        row: dict[str, object] = dict(self.where)
        if self.value is not None:
            row["value"] = self.value
            row |= {"level": self.level} if self.level is not None else {}
            row |= {"low": self.low, "high": self.high} if self.low is not None else {}
        else:
            if self.labels is not None:
                row["labels"] = self.labels
            else:
                chance = None if self.probability is None else round(self.probability, 6)
                row |= {"label": self.label, "probability": chance}
            row["top"] = [{"label": one.label, "probability": round(one.probability, 6)} for one in self.top]
        if self.distance_percentile is not None:
            row["distance_percentile"] = round(self.distance_percentile, 2)
        return row | ({"unsure": self.unsure} if self.unsure else {})


class LoadedModel:
    """A trained model, loaded: it does to an image or a text what was done to those that it was trained on.

    It can be called like the network itself, and whatever else is asked of it the network answers.

    Attributes:
        file: the export.
        module: the bare network, in eval mode: prepared images (batch, 3, height, width) float32, or tokens, to
            (batch, classes) logits.
        description: what the JSON beside the file says.
        classes: their names; [] where numbers are predicted.
        task: "classification", "multi-label" or "regression".
    """

    def __init__(self, file: Path, module: nn.Module, description: dict[str, Any], device: torch.device):
        self.file, self.description, self.device = file, description, device
        self.module = module
        self.classes: list[str] = description["classes"]
        self.task: str = description["task"]
        self.thresholds = torch.tensor(description.get("thresholds") or [0.5] * len(self.classes))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "module" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.module, name)

    def __repr__(self) -> str:
        what = f"{len(self.classes)} classes" if self.classes else "numbers"
        reads = "texts" if self.reads_texts else "images"
        return f"<finetune model {self.file}: {self.task} of {reads}, {what}>"

    @functools.cached_property
    def novelty(self) -> NoveltyReference | None:
        """What the export knows of the samples that it was trained on; None = nothing."""
        return read_novelty(self.file, self.description)

    @functools.cached_property
    def preprocessing(self) -> Preprocessing | Tokenization:
        """What is done to images, or texts, before the network sees them."""
        return prepared(self.file, self.description)

    @property
    def reads_texts(self) -> bool:
        return "pooling" in self.description["architecture"]["options"]

    @property
    def reading(self) -> Reading:
        """How tables are read; an export of before it said so reads them as its run did."""
        return Reading(quotes=self.description.get("quotes", "standard"))

    def predict(
        self,
        inputs: object,
        *,
        top_k: int = TOP_K,
        unsure_below: float = 0.0,
        batch_size: int = BATCH_SIZE,
        allow_outside: bool = False,
    ) -> Any:
        """Predict what `finetune predict` would.

        Args:
            inputs: of images a path, a picture of PIL, an array (height, width, 3) of uint8 or a tensor (3, height,
                width) of uint8; of texts a text, or a path. A folder or a table is a list of what it holds. Or a list,
                a column of a DataFrame or an array of such; a column of texts holds texts, whatever they look like.
            top_k: classes to list.
            unsure_below: no label is given where the probability is below this, or where a sample is like nothing that
                the model was trained on.
            batch_size: samples computed at once.
            allow_outside: read files outside a folder too, behind links.

        Returns:
            A `Prediction`; of a list, a folder or a table a list of them, in order. What of these cannot be read has an
            `error`.

        Raises:
            FinetuneError: the one sample cannot be read, or there is none.
        """
        samples, is_one = self.samples(inputs, allow_outside)
        found = list(self.predictions(samples, top_k=top_k, unsure_below=unsure_below, batch_size=batch_size))
        if not is_one:
            return found
        if found[0].error:
            raise RunError(found[0].error)
        return found[0]

    def samples(self, inputs: object, allow_outside: bool = False) -> tuple[ImageInputs | TextInputs, bool]:
        """The samples that are meant; whether it is a single one."""
        preprocessing = self.preprocessing
        is_text = isinstance(preprocessing, Tokenization)
        is_one = isinstance(inputs, str | os.PathLike | Image.Image | Tensor) or (
            isinstance(inputs, np.ndarray) and inputs.dtype.kind in "uifb"
        )
        if isinstance(inputs, bytes | dict) or not (is_one or isinstance(inputs, Iterable)):
            what = "a text or a path" if is_text else "a path, a picture of PIL or an array"
            raise UsageError(f"predict: {type(inputs).__name__} is nothing to predict; give {what}, or a list of such")
        if is_one and isinstance(inputs, str | os.PathLike):
            is_one = not os.path.isdir(inputs) and Path(inputs).suffix.lower() not in TABLE_SUFFIXES
        # A column of a DataFrame, or an array: each of its values is a sample.
        is_column = not is_one and hasattr(inputs, "tolist")
        values = [inputs] if is_one or isinstance(inputs, str | os.PathLike) else list(cast(Iterable[Any], inputs))
        if isinstance(preprocessing, Tokenization):
            texts = self._texts(values, is_column, allow_outside)
            return TextInputs(texts, preprocessing), is_one and len(texts) == 1
        return ImageInputs(self._images(values, is_column, allow_outside), preprocessing), is_one

    def _images(self, values: Sequence[Any], is_column: bool, allow_outside: bool) -> list[Picture]:
        found: list[Picture] = []
        for value in values:
            if not isinstance(value, str | os.PathLike):
                found.append(value)
            elif is_column:
                found.append(Path(value))
            else:
                name = os.fspath(value)
                found += image_files([name], allow_outside=allow_outside, say=say_aside, reading=self.reading)
        return found

    def _texts(self, values: Sequence[Any], is_column: bool, allow_outside: bool) -> list[TextInput]:
        found: list[TextInput] = []
        for value in values:
            if isinstance(value, os.PathLike):
                path = Path(value)
                if not path.is_dir() and path.suffix.lower() not in (*TABLE_SUFFIXES, *TEXT_SUFFIXES):
                    raise UsageError(f"{path}: is no folder, and no file of texts; give the text itself as a str")
                found += texts_in([str(path)], "", allow_outside, say_aside, self.reading)
            elif is_column:  # what is missing there is a number, or None
                found.append({"file": "", "line": "", "text": value if isinstance(value, str) else ""})
            elif isinstance(value, str):
                found += texts_in([value], "", allow_outside, say_aside, self.reading)
            else:
                raise UsageError(f"predict: {type(value).__name__} is no text; give texts, or paths of files of them")
        return found

    @numerics_put_back()
    def predictions(
        self,
        samples: ImageInputs | TextInputs,
        *,
        top_k: int = TOP_K,
        unsure_below: float = 0.0,
        batch_size: int = BATCH_SIZE,
        advance: Callable[[int], None] = lambda _: None,
    ) -> Iterator[Prediction]:
        """A prediction a sample, in order.

        Args:
            advance: told of each batch that is done.

        Raises:
            UsageError: a number that cannot be, or that has no effect.
        """
        self.check(top_k, batch_size, unsure_below)
        set_tf32(NO_TF32)
        free, halvings = freeing(self.device, lambda text: say_aside(f"finetune: {text}")), 0
        for batch in samples.batches(batch_size):
            outputs: Iterator[tuple[Tensor, float | None]] = iter(())
            if batch.inputs is not None:
                attempt = partial(self._compute, batch.inputs)
                found, halvings = in_halves(attempt, len(batch.inputs), halvings, free)
                outputs = iter(found)
            for where, error in zip(batch.where, batch.errors, strict=True):
                if error:
                    yield Prediction(error=error, where=where)
                else:
                    yield self._prediction(*next(outputs), where, top_k, unsure_below)
            advance(len(batch.where))

    def check(self, top_k: int, batch_size: int, unsure_below: float) -> None:
        """Raises: UsageError: see `predictions`."""
        if top_k < 1 or batch_size < 1:
            raise UsageError(f"--top-k {top_k} --batch-size {batch_size}: both must be 1 or more")
        if not 0 <= unsure_below <= 1:
            raise UsageError(f"--unsure-below {unsure_below:g}: not allowed; give a probability, 0 to 1")
        if self.task == "distillation":
            raise UsageError(
                f"{self.file}: is an encoder without a head, which predicts nothing; train one: finetune bert_head"
            )
        if self.task == "regression":
            for option, value, usual in (("top-k", top_k, TOP_K), ("unsure-below", unsure_below, 0.0)):
                if value != usual:
                    raise UsageError(
                        f"--{option} {value:g}: has no effect, {self.file} predicts a number and no classes; leave it "
                        "out"
                    )

    @torch.inference_mode()
    def _compute(self, inputs: Tensor, halvings: int = 0) -> list[tuple[Tensor, float | None]]:
        """Of each sample what is decided by: (classes,) probabilities, of several labels each on its own, or a number;
        and its `Prediction.distance_percentile`.

        Args:
            halvings: of the batch that is computed at once.
        """
        task = make_task(TASKS[self.task](), len(self.classes))
        one_logit = self.description["architecture"].get("one_logit", False)

        def decide(part: Tensor) -> list[Tensor]:
            outputs = self.module(to_device(part, self.device))
            return _decided(beside_zero(outputs) if one_logit else outputs, task)

        found: list[tuple[Tensor, float | None]] = []
        for part in inputs.split(max(1, len(inputs) >> halvings)):
            if self.novelty is None:
                found += [(one, None) for one in decide(part)]
                continue
            with watched(self.module.get_submodule(self.description["novelty"]["layer"])) as features:
                decided = decide(part)
            found += zip(decided, self.novelty.percentiles(features[-1]), strict=True)
        return found

    def _prediction(
        self, output: Tensor, distance: float | None, where: dict[str, object], top_k: int, unsure_below: float
    ) -> Prediction:
        unsure = ""
        if distance is not None and distance >= NOVEL_PERCENTILE:
            unsure = "unlike the training data"
        if not self.classes:
            value = output.item()
            width = self.description.get("interval", {}).get("half_width")
            low, high = (None, None) if width is None else (value - width, value + width)
            levels = self.description.get("levels")
            level = nearest_level(output.reshape(1), levels).item() if levels else None
            return Prediction(
                value=value, level=level, low=low, high=high, distance_percentile=distance, unsure=unsure, where=where
            )
        values, numbers = output.topk(min(top_k, len(self.classes)))
        top = [
            Ranked(self.classes[number], value) for value, number in zip(values.tolist(), numbers.tolist(), strict=True)
        ]
        if self.task == "multi-label":
            applies = output > self.thresholds
            labels = [name for name, one in zip(self.classes, applies, strict=True) if one]
            certainty = float(torch.maximum(output, 1 - output).min())  # of the decision that is most in doubt
            what = "the least certain yes or no has probability"
        else:
            labels, certainty, what = None, top[0].probability, "probability"
        if certainty < unsure_below:
            shown = math.floor(certainty * 10_000) / 10_000  # never rounded up to what was asked for
            unsure = "; ".join([*([unsure] if unsure else []), f"{what} {shown:.4g}"])
        if labels is not None:
            labels = [] if unsure and unsure_below else labels
            return Prediction(top=top, labels=labels, distance_percentile=distance, unsure=unsure, where=where)
        if unsure and unsure_below:
            return Prediction(top=top, distance_percentile=distance, unsure=unsure, where=where)
        return Prediction(*top[0], top=top, distance_percentile=distance, unsure=unsure, where=where)


def _decided(outputs: Tensor, task: Task) -> list[Tensor]:
    """A tensor a sample, on the CPU."""
    if isinstance(task, RegressionTask):
        return list(outputs.cpu().double().squeeze(1))
    assert isinstance(task, Classifying), "nothing else predicts"
    return list(task.probabilities(outputs).cpu())


def load_model(path: str | Path, device_name: str = "cpu", *, in_fast_format: bool = False) -> LoadedModel:
    """The model of an export, or of a run that was exported.

    Args:
        path: the .pt or .safetensors, with its .json beside it; or a run's folder, of which model.pt is meant.
        in_fast_format: the memory format that convolutions are fastest in; what they give is rounded otherwise then.

    Raises:
        RunError: the files are missing, damaged, or do not belong together.
    """
    file = Path(path)
    if file.is_dir():
        names = [f"model{suffix}" for suffix in (".pt", ".safetensors")]
        there = [file / name for name in names if (file / name).is_file()]
        if not there:
            raise RunError(f"{file}: is a folder without {' or '.join(names)}; write it with: finetune export {file}")
        file = there[0]
    device = pick_device(device_name)
    module, description = load_described(file)
    module = module_to_device(module, device) if in_fast_format else module.to(device)
    return LoadedModel(file, in_own_unit(module, description), description, device)
