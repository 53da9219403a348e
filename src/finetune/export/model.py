"""An export, ready to predict: what `finetune.load` gives, and what `finetune predict` asks."""

import contextlib
import functools
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.base.allocator import freed_memory_kept
from finetune.base.device import in_fp32, module_to_device, pick_device, to_device
from finetune.base.halves import freeing, in_halves
from finetune.base.terminal import say_aside
from finetune.data.given import images_given, texts_given
from finetune.data.inputs import ImageInputs, TextInputs
from finetune.data.preprocess import Preprocessing
from finetune.data.source import Reading
from finetune.data.tokens import Tokenization
from finetune.errors import RunError, UsageError
from finetune.export.load import in_own_unit, load_described, prepared, read_novelty
from finetune.export.prediction import Prediction, Ranked
from finetune.models.freeze import in_eval
from finetune.models.heads import beside_zero
from finetune.recipe.spec import TASKS
from finetune.tasks.levels import nearest_level
from finetune.tasks.losses import Classifying, RegressionTask, Task, make_task
from finetune.tasks.novelty import NOVEL_PERCENTILE, NoveltyReference, watched

# Classes that are listed, and samples that are computed at once, unless other numbers are given.
TOP_K, BATCH_SIZE = 3, 64
# What is computed in TF32 is set for the whole process, so whatever its threads predict, one batch at a time.
COMPUTING = threading.RLock()


class LoadedModel:
    """A trained model, loaded: it does to an image or a text what was done to those that it was trained on.

    It can be called like the network itself, and whatever else is asked of it, or set, is the network's: after
    `model.to(torch.bfloat16)` it predicts so. Threads may share it. It is no `nn.Module`: where a library
    wants one, give it `module`.

    Attributes:
        file: the export.
        module: the bare network, in eval mode: prepared images (batch, 3, height, width) float32, or tokens, to
            (batch, classes) logits.
        description: what the JSON beside the file says.
        classes: their names; [] where numbers are predicted.
        task: "classification", "multi-label" or "regression".
    """

    def __init__(self, file: Path, module: nn.Module, description: dict[str, Any]):
        self.file, self.description = file, description
        self.classes: list[str] = description["classes"]
        self.task: str = description["task"]
        self.thresholds = torch.tensor(description.get("thresholds") or [0.5] * len(self.classes))
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "module" not in self.__dict__:
            raise AttributeError(name)
        found = getattr(self.module, name)
        if not inspect.ismethod(found):
            return found

        @functools.wraps(found)
        def answer(*args: Any, **kwargs: Any) -> Any:
            given = found(*args, **kwargs)
            return self if given is self.module else given

        return answer

    def __setattr__(self, name: str, value: object) -> None:
        if "module" not in self.__dict__ or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(self.module, name, value)

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
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.module.parameters()).device

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
                a column of a DataFrame or an array of such; in these a str of a text model is a text, whatever it looks
                like, and a file is given as a `Path`.
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
        with contextlib.nullcontext() if is_one else freed_memory_kept():
            found = list(self.predictions(samples, top_k=top_k, unsure_below=unsure_below, batch_size=batch_size))
        if not is_one:
            return found
        if found[0].error:
            raise RunError(found[0].error)
        return found[0]

    def samples(self, inputs: object, allow_outside: bool = False) -> tuple[ImageInputs | TextInputs, bool]:
        """The samples that are meant; whether it is a single one."""
        preprocessing = self.preprocessing
        if isinstance(preprocessing, Tokenization):
            texts, is_one = texts_given(inputs, allow_outside, say_aside, self.reading)
            return TextInputs(texts, preprocessing), is_one
        images, is_one = images_given(inputs, allow_outside, say_aside, self.reading)
        return ImageInputs(images, preprocessing), is_one

    def predictions(
        self,
        samples: ImageInputs | TextInputs,
        *,
        top_k: int = TOP_K,
        unsure_below: float = 0.0,
        batch_size: int = BATCH_SIZE,
        first_samples: int = 0,
        advance: Callable[[int], None] = lambda _: None,
    ) -> Iterator[Prediction]:
        """A prediction a sample, in order.

        Args:
            first_samples: computed first, for somebody who waits to see one; 0 = as many as at all other times.
            advance: told of each batch that is done.

        Raises:
            UsageError: a number that cannot be, or that has no effect.
        """
        self.check(top_k, batch_size, unsure_below)
        free, halvings = freeing(self.device, lambda text: say_aside(f"finetune: {text}")), 0
        for batch in samples.batches(batch_size, first_samples):
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
        for option, value in (("top-k", top_k), ("batch-size", batch_size)):
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise UsageError(f"--{option} {value!r}: is no whole number; give one from 1 on")
        if not isinstance(unsure_below, Real):
            raise UsageError(f"--unsure-below {unsure_below!r}: is no number; give a probability, 0 to 1")
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

    def _compute(self, inputs: Tensor, halvings: int = 0) -> list[tuple[Tensor, float | None]]:
        """Of each sample what is decided by: (classes,) probabilities, of several labels each on its own, or a number;
        and its `Prediction.distance_percentile`.

        Args:
            halvings: of the batch that is computed at once.
        """
        task = make_task(TASKS[self.task](), len(self.classes))
        one_logit = self.description["architecture"].get("one_logit", False)
        weight = next(self.module.parameters())

        def decide(part: Tensor) -> list[Tensor]:
            part = to_device(part.to(weight.dtype) if part.is_floating_point() else part, weight.device)
            outputs = self.module(part)
            return _decided(beside_zero(outputs) if one_logit else outputs, task)

        found: list[tuple[Tensor, float | None]] = []
        with COMPUTING, in_fp32(), torch.inference_mode(), in_eval(self.module):
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
    return list(task.probabilities(outputs.float()).cpu())


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
    return LoadedModel(file, in_own_unit(module, description), description)
