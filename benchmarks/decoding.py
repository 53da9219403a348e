"""What reduced decoding costs and saves: photographs whole and at a part of their size, for three ways to resize.

    pip install '.[bench]'
    python benchmarks/decoding.py

Crops of ten photographs (crops.py) enlarged to 4000 x 3000 and three smaller sizes, with grain, JPEG of quality 90. One
thread. "At once the size" and "at twice" say what a reduced photograph keeps at least of the size that it is resized
to; the kit takes twice. Features are MobileNetV2's with the weights that ship with the kit; the head is trained on
photographs decoded whole, and judged on others, decoded either way.
"""

import dataclasses
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import median, report
from crops import photographs
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from finetune.data.decode import Decoding, decode
from finetune.data.preprocess import Preprocessing

SIZES = {"12 MP": (4000, 3000), "3 MP": (2000, 1500), "0.8 MP": (1024, 768), "0.2 MP": (500, 375)}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
RULES = {
    "bilinear, shorter edge": Preprocessing(224, 256, True, "bilinear", MEAN, STD),
    "bicubic, shorter edge": Preprocessing(224, 256, True, "bicubic", MEAN, STD),
    "bilinear, both edges": Preprocessing(224, 224, False, "bilinear", MEAN, STD),
}


@dataclass
class Options:
    each: int = 6
    """Photographs of each of ten kinds and of each size; half of them train the head."""
    output: str = ""
    """JSON file; default: benchmarks/results/decoding.json."""


def as_before(content: bytes) -> Tensor:
    """Pillow, the whole picture, with the copies that the kit once made of it."""
    with Image.open(io.BytesIO(content)) as image:
        return functional.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))


def at(times: int) -> Callable[[Preprocessing], Decoding]:
    return lambda rule: Decoding(least_edge=times * rule.resize_size)


WAYS = {"at once the size": at(1), "at twice the size": at(2)}


def make(each: int) -> dict[str, list[tuple[int, bytes]]]:
    """(kind, JPEG) by size; the same pictures in each."""
    found: dict[str, list[tuple[int, bytes]]] = {name: [] for name in SIZES}
    for kind, photograph in enumerate(photographs().values()):
        for number in range(each):
            random = np.random.default_rng(1_000 * kind + number)
            down = int(min(photograph.size[1], photograph.size[0] * 3 / 4) * random.uniform(0.4, 0.8))
            across = down * 4 // 3
            left = int(random.integers(0, photograph.width - across + 1))
            top = int(random.integers(0, photograph.height - down + 1))
            crop = photograph.crop((left, top, left + across, top + down))
            for name, (width, height) in SIZES.items():
                large = np.asarray(crop.resize((width, height), Image.Resampling.BICUBIC))
                grain = random.normal(0, 6, (height, width, 1)) + random.normal(0, 3, (height, width, 3))
                stream = io.BytesIO()
                Image.fromarray(np.clip(large + grain, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
                found[name].append((kind, stream.getvalue()))
    return found


def timed(compute: Callable[[bytes], Tensor], files: list[bytes]) -> tuple[float, list[Tensor]]:
    """Milliseconds of the median file, and what is made of each."""
    taken, made = [], []
    for content in files:
        started = time.perf_counter()
        made.append(compute(content))
        taken.append(1e3 * (time.perf_counter() - started))
    return median(taken), made


def backbone() -> Callable[[Tensor], Tensor]:
    import torchvision

    from finetune.models.weight_files import read_weights
    from finetune.models.weights import choose_weights

    _, weights = choose_weights("bundled/mobilenet", "default")
    assert weights is not None
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(read_weights(weights.path), strict=False)
    model.eval()

    def features(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([model.features(part).mean((2, 3)) for part in images.split(16)]).clone()

    return features


def head_on(rows: Tensor, kinds: Tensor) -> nn.Linear:
    """Logistic regression with a little weight decay, on standardised rows."""
    head = nn.Linear(rows.shape[1], int(kinds.max()) + 1)
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(rows), kinds) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head


def compared(size: str, name: str, files: list[bytes], kinds: Tensor, trains: Tensor, features) -> list[dict[str, Any]]:
    """A row a way to decode files of one size for one way to resize."""
    rule = RULES[name]
    decodings = {"exact": Decoding()} | {way: decoding(rule) for way, decoding in WAYS.items()}
    ways: dict[str, Callable[[bytes], Tensor]] = {"as before": as_before}
    ways |= {way: partial(decode, path=Path("a.jpg"), decoding=decoding) for way, decoding in decodings.items()}
    found = {way: timed(lambda content, way=way: rule.resize(ways[way](content)), files) for way in ways}
    pixels = {way: torch.stack(made) for way, (_, made) in found.items()}
    rows = {way: features(rule.normalise(one)) for way, one in pixels.items()}
    mean, std = rows["as before"][trains].mean(0), rows["as before"][trains].std(0) + 1e-6
    head = head_on((rows["as before"][trains] - mean) / std, kinds[trains])
    with torch.inference_mode():
        logits = {way: head((one - mean) / std) for way, one in rows.items()}

    def figures(way: str) -> dict[str, Any]:
        cosines = nn.functional.cosine_similarity(rows[way], rows["as before"])
        right = (logits[way].argmax(1) == kinds)[~trains].float().mean()
        return {
            "files": size,
            "resize": name,
            "decoded": way,
            "ms": round(found[way][0], 1),
            "levels of 255": round(float((pixels[way].float() - pixels["as before"].float()).abs().mean()), 3),
            "least cosine": round(float(cosines.min()), 5),
            "logits moved": round(float((logits[way] - logits["as before"]).abs().max()), 3),
            "head right": round(float(right), 4),
            "same pixels": bool(torch.equal(pixels[way], pixels["as before"])),
        }

    return [figures(way) for way in ways]


def main(options: Options) -> None:
    torch.set_num_threads(1)
    features, rows = backbone(), list[dict[str, Any]]()
    for size, pairs in make(options.each).items():
        kinds, files = torch.tensor([kind for kind, _ in pairs]), [content for _, content in pairs]
        trains = torch.arange(len(files)) % options.each < options.each // 2
        for name in RULES:
            rows += compared(size, name, files, kinds, trains, features)
    report("decoding", "Decoding and resizing a JPEG, one thread", rows, options.output, dataclasses.asdict(options))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
