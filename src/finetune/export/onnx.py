"""ONNX files, and what they compute in onnxruntime. Needs the packages of the extra `onnx`."""

import contextlib
import importlib.util
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.errors import UsageError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def write_onnx(model: nn.Module, images: Tensor, path: Path) -> Tensor:
    """Write a network and its weights as one file, for any number of images at once, and run it in onnxruntime.

    Args:
        model: in eval mode, on the CPU.
        images: (batch, 3, height, width) float32 to run it on.

    Returns:
        What it gives for them there.

    Raises:
        UsageError: a package is missing.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f"--format onnx: needs {', '.join(missing)}; install with: pip install {' '.join(missing)}")
    import onnxruntime

    # The exporter prints its progress, and warns of what concerns its own authors.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (images,),
                str(path),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
            )
    finally:
        logger.setLevel(level)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(found)
