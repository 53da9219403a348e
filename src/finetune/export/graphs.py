"""Files that hold the network itself, not only its weights: ONNX, for onnxruntime; and torch.export's, for plain torch.

Each is run here as its receiver will run it. ONNX needs the packages of the extra `onnx`.
"""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.data.tokens import PADDING
from finetune.errors import RunError, UsageError, one_line

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# What the inputs of such a file are called; what it gives is called so.
IMAGES, TOKENS, OUTPUT = "images", ("input_ids", "attention_mask"), "logits"


class Inputs(NamedTuple):
    """What such a network takes.

    Attributes:
        tensors: by name; the first dimension is that of the batch, the second of tokens their number.
        dynamic_shapes: which of their dimensions may be any, as torch.export has it.
    """

    tensors: dict[str, Tensor]
    dynamic_shapes: tuple[dict[int, Any], ...]


class _OfTokens(nn.Module):
    """A text classifier that takes tokens and mask, by place."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return found


def inputs_of(samples: Tensor) -> Inputs:
    """Images (batch, 3, height, width) float32, or tokens (batch, length) int64 with `PADDING`, by the names that such
    files have for them."""
    any_number: Any = torch.export.Dim.AUTO
    if samples.is_floating_point():
        return Inputs({IMAGES: samples}, ({0: any_number},))
    mask = samples != PADDING
    tensors = dict(zip(TOKENS, (samples.masked_fill(~mask, 0), mask.long()), strict=True))
    return Inputs(tensors, ({0: any_number, 1: any_number},) * 2)


def write_onnx(model: nn.Module, samples: Tensor, path: Path) -> Tensor:
    """Write a network and its weights as one file, for any number of samples at once, and run it in onnxruntime.

    Args:
        model: in eval mode, on the CPU.
        samples: see `inputs_of`.

    Returns:
        What it gives for them there.

    Raises:
        UsageError: a package is missing.
        RunError: the network cannot be written so.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f"--format onnx: needs {', '.join(missing)}; install with: pip install {' '.join(missing)}")
    import onnxruntime

    inputs, traced = inputs_of(samples), inputs_of(_several(samples))
    with _quietly("onnx"):
        torch.onnx.export(
            _by_place(model, inputs),
            tuple(traced.tensors.values()),
            str(path),
            dynamo=True,
            input_names=list(inputs.tensors),
            output_names=[OUTPUT],
            dynamic_shapes=traced.dynamic_shapes,
            external_data=False,
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.tensors.items()})
    return torch.from_numpy(found)


def write_torch_export(model: nn.Module, samples: Tensor, path: Path) -> Tensor:
    """The same with torch.export, loaded and run by plain torch.

    Raises:
        RunError: the network cannot be written so.
    """
    inputs, traced = inputs_of(samples), inputs_of(_several(samples))
    with _quietly("torch-export"):
        exported = torch.export.export(
            _by_place(model, inputs),
            tuple(traced.tensors.values()),
            dynamic_shapes=traced.dynamic_shapes,
            strict=False,
        )
        torch.export.save(exported, path)
        found: Tensor = torch.export.load(path).module()(*inputs.tensors.values())
    return found


def _several(samples: Tensor) -> Tensor:
    """A single sample twice: torch takes a dimension of 1 for one that is always 1."""
    return samples.repeat(2, *[1] * (samples.dim() - 1)) if len(samples) == 1 else samples


def _by_place(model: nn.Module, inputs: Inputs) -> nn.Module:
    return model if IMAGES in inputs.tensors else _OfTokens(model).eval()


@contextmanager
def _quietly(format_name: str) -> Iterator[None]:
    """The exporters print their progress, and warn of what concerns their own authors.

    Raises:
        RunError: what they raise, in a line.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.inference_mode(False):
            warnings.simplefilter("ignore")
            with torch.no_grad():
                yield
    except Exception as error:  # of whatever kind: a network that cannot be traced
        raise RunError(
            f"--format {format_name}: this network cannot be written so ({one_line(error)[:200]}); export a .pt"
        ) from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
