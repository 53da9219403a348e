"""Classify image files with an export. Needs only the file and its JSON; executes nothing from either."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.data.decode import IMAGE_SUFFIXES, normalise, read_image, resize
from finetune.device import pick_device
from finetune.errors import RunError, UsageError
from finetune.export import load, read_description


def image_files(inputs: Iterable[str]) -> Iterator[Path]:
    """The files meant: a file as it stands, a folder with every image below it in the order of their names.

    Raises:
        UsageError: an input that does not exist, or a folder without images.
    """
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = False
            for folder, folders, files in os.walk(path):
                folders.sort()
                for file in sorted(files):
                    if file.lower().endswith(IMAGE_SUFFIXES):
                        found = True
                        yield Path(folder) / file
            if not found:
                raise UsageError(f"folder {path}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
        elif path.exists():
            yield path
        else:
            raise UsageError(f"{path}: no such file or folder; give images or folders")


def predict(file: Path, inputs: Iterable[str], top_k: int, batch_size: int, device_name: str) -> int:
    """Print one JSON line an image: file, label, probability, the `top_k` classes; or file and error.

    Returns:
        0, or 1 when an image could not be read.
    """
    if top_k < 1 or batch_size < 1:
        raise UsageError(f"--top-k {top_k} --batch-size {batch_size}: both must be 1 or more")
    device = pick_device(device_name)
    model = load(file).to(device, memory_format=torch.channels_last)
    description = read_description(file)
    classes, preprocessing = description["classes"], description["preprocessing"]
    failed = 0
    batch: list[tuple[Path, Tensor]] = []

    def flush() -> None:
        if batch:
            images = normalise(torch.stack([image for _, image in batch]), preprocessing["mean"], preprocessing["std"])
            for (path, _), row in zip(batch, classify(model, images.to(device)), strict=True):
                print(json.dumps(prediction(str(path), row, classes, top_k), ensure_ascii=False))
            batch.clear()

    for path in image_files(inputs):
        try:
            batch.append((path, resize(read_image(path), preprocessing["image_size"])))
        except RunError as error:
            flush()  # keep the order of the files
            failed += 1
            print(json.dumps({"file": str(path), "error": str(error)}, ensure_ascii=False))
        if len(batch) == batch_size:
            flush()
    flush()
    if failed:
        print(f"finetune: {failed} image(s) could not be read", file=sys.stderr)
    return 1 if failed else 0


@torch.inference_mode()
def classify(model: nn.Module, images: Tensor) -> Tensor:
    """(batch, classes) probabilities, on the CPU."""
    return model(images).softmax(dim=1).cpu()


def prediction(file: str, probabilities: Tensor, classes: list[str], top_k: int) -> dict:
    """One line of the output as a value."""
    values, numbers = probabilities.topk(min(top_k, len(classes)))
    top = [
        {"label": classes[number], "probability": round(value, 6)}
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True)
    ]
    return {"file": file, **top[0], "top": top}
