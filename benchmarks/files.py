"""How a run grows with the number of image files: a thousand to a million hard links.

    python benchmarks/files.py

JPEGs of 96 x 96, a thousand different ones at most, the others are links to them; bundled/resnet, two epochs, then the
same again on kept features. "Until the first step" is from the command on, with the pass; in the second run without it.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from common import fresh, report, workplace
from photo_files import write_photos

DIFFERENT, EDGE, EPOCHS = 1_000, 96, 2


@dataclass
class Options:
    files: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    """How many; two runs each."""
    only: str = ""
    """Used by the benchmark itself: a folder to train on, in this process."""
    run: str = ""
    """Used by the benchmark itself."""
    started: float = 0.0
    """Used by the benchmark itself: when the process was asked for."""
    output: str = ""
    """JSON file; default: benchmarks/results/files.json."""


def train_on(images: str, run: str, started: float) -> dict[str, float]:
    import resource

    import finetune

    class Clock:
        """Told of the run: when it begins to train, and when it has."""

        name, began, ended = "clock", 0.0, 0.0

        def begin(self, _begun) -> None:
            self.began = time.time()

        def end(self, _ended) -> None:
            self.ended = time.time()

        def nothing(self, *_told) -> None:
            pass

        logged = validated = histograms = draw = flush = close = nothing

    clock = Clock()
    recipe = finetune.image_head(images=images, backbone="bundled/resnet", epochs=EPOCHS, batch_size=256)
    finetune.fit(recipe, run, trackers=[clock], quiet=True, report=False, track="")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"first_step": clock.began - started, "epochs": clock.ended - clock.began, "peak_mb": peak}


def links(source: Path, folder: Path, count: int) -> Path:
    """So many files of two classes."""
    files = sorted(source.glob("*/*.jpg"))
    for kind in {file.parent.name for file in files}:
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        file = files[number % len(files)]
        os.link(file, folder / file.parent.name / f"{number:07}.jpg")
    return folder


def measured(images: Path, folder: Path, features: Path) -> dict[str, float]:
    words = ["--only", str(images), "--run", str(fresh(folder, "run") / "run"), "--started", str(time.time())]
    environment = os.environ | {"FINETUNE_CACHE": str(features)}
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main(options: Options) -> None:
    if options.only:
        print(json.dumps(train_on(options.only, options.run, options.started)))
        return
    rows: list[dict[str, Any]] = []
    with workplace() as folder:
        source = write_photos(folder / "source", EDGE, EDGE, DIFFERENT)
        for count in options.files:
            images, features = links(source, folder / f"images{count}", count), fresh(folder, "features")
            first, second = (measured(images, folder, features) for _ in range(2))
            rows.append({
                "files": f"{count:,}",
                "until the first step, s": round(first["first_step"], 1),
                "on kept features, s": round(second["first_step"], 1),
                "pass, µs a file": round((first["first_step"] - second["first_step"]) / count * 1e6),
                "epoch and its validation, µs a file": round(second["epochs"] / EPOCHS / count * 1e6, 1),
                "peak MB, first": round(first["peak_mb"]),
                "peak MB, second": round(second["peak_mb"]),
            })  # fmt: skip
            print(rows[-1], file=sys.stderr)
    title = f"A run on image files of {EDGE} x {EDGE}, {EPOCHS} epochs, from the command on"
    report("files", title, rows, options.output, options=dataclasses.asdict(options))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
