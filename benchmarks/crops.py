"""Photos where nothing can be fetched: 300 crops of ten photographs that scikit-learn and scikit-image bring along.

    pip install '.[bench]'
    python benchmarks/crops.py crops
    finetune photo_head --images crops --backbone bundled/mobilenet,bundled/vgg,bundled/resnet

Which photograph a crop is of is its class. A crop's edge is 15 to 35 % of the photograph's shorter one, at a random
place, mirrored half of the time, lighter or darker by up to a third, stored at 96 to 320 px as JPEG: always the same.
"""

import argparse
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

OF_SKLEARN = {"china": "china.jpg", "flower": "flower.jpg"}
OF_SKIMAGE = {
    "astronaut": "astronaut.png", "cat": "chelsea.png", "coffee": "coffee.png", "galaxies": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png", "retina": "retina.jpg", "rocket": "rocket.jpg", "tissue": "ihc.png",
}  # fmt: skip
CROPS_EACH = 30


def photographs() -> dict[str, Image.Image]:
    folders = {
        Path(str(resources.files("sklearn"))) / "datasets" / "images": OF_SKLEARN,
        Path(str(resources.files("skimage"))) / "data": OF_SKIMAGE,
    }
    found = {}
    for folder, files in folders.items():
        found |= {name: Image.open(folder / file).convert("RGB") for name, file in files.items()}
    return dict(sorted(found.items()))


def crop(photograph: Image.Image, random: np.random.Generator) -> Image.Image:
    edge = int(min(photograph.size) * random.uniform(0.15, 0.35))
    left, top = (int(random.integers(0, size - edge)) for size in photograph.size)
    found = photograph.crop((left, top, left + edge, top + edge)).resize([int(random.integers(96, 321))] * 2)
    found = ImageOps.mirror(found) if random.random() < 0.5 else found
    return ImageEnhance.Brightness(found).enhance(random.uniform(0.67, 1.33))


def write_crops(folder: Path) -> None:
    """Write folder/CLASS/NN.jpg."""
    random = np.random.default_rng(0)
    for name, photograph in photographs().items():
        (folder / name).mkdir(parents=True)
        for number in range(CROPS_EACH):
            crop(photograph, random).save(folder / name / f"{number:02}.jpg", quality=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write_crops(parser.parse_args().folder)
