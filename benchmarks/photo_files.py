"""Photographs where nothing can be fetched, of any size: `python photo_files.py FOLDER --width 4000 --count 200`.

Random crops of the two photographs that scikit-learn brings along, 240 to 480 pixels wide, enlarged to the size, with
the grain of a camera (a deviation of 6 levels in brightness, 3 in each colour), as FOLDER/CLASS/NNNN.jpg, quality 90.
Always the same.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

OF_SKLEARN = ("china.jpg", "flower.jpg")


def write_photo(folder: Path, width: int, height: int, number: int) -> None:
    from sklearn.datasets import load_sample_image

    random, name = np.random.default_rng(number), OF_SKLEARN[number % 2]
    photograph = Image.fromarray(load_sample_image(name))
    across = int(random.integers(240, min(480, photograph.height * width // height)))
    down = across * height // width
    left, top = int(random.integers(0, photograph.width - across)), int(random.integers(0, photograph.height - down))
    large = photograph.crop((left, top, left + across, top + down)).resize((width, height), Image.Resampling.BICUBIC)
    grain = random.normal(0, 6, (height, width, 1)) + random.normal(0, 3, (height, width, 3))
    pixels = np.clip(np.asarray(large) + grain, 0, 255).astype(np.uint8)
    place = folder / name.partition(".")[0]
    place.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(place / f"{number:04}.jpg", quality=90)


def write_photos(folder: Path, width: int, height: int, count: int) -> Path:
    """Those that are not there yet."""
    missing = [number for number in range(count) if not list(folder.glob(f"*/{number:04}.jpg"))]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(partial(write_photo, folder, width, height), missing, chunksize=4))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for option, usual in (("--width", 4000), ("--height", 3000), ("--count", 200)):
        parser.add_argument(option, type=int, default=usual)
    given = parser.parse_args()
    write_photos(given.folder, given.width, given.height, given.count)
