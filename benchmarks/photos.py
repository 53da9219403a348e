"""A head on photographs as people have them: ours, by others, and the floor; whole processes, from the files on.

    pip install '.[bench]'
    python benchmarks/photos.py

200 photographs of 12 megapixels, and 1,000 of 500 x 375 (photo_files.py); MobileNetV2 at 224 with the weights that ship
with the kit. The floor: JPEG's scaled decoding, the backbone once, features in memory, by hand. All have two worker
processes. Memory is that of a competitor's largest process.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro
from common import (
    Finished,
    finetune_command,
    fresh,
    interleaved,
    last_accuracy,
    median,
    peer_command,
    report,
    run_process,
    verdict,
    workplace,
)
from photo_files import write_photos

SIZES = {"12 MP": (4000, 3000, 200), "500 px": (500, 375, 1000)}
NAMES = {"raw": "loop by hand", "lightning": "Lightning", "fastai": "fastai", "floor": "floor"}
# Of ours over the loop by hand, by size and epochs; of the first over the floor; of a second over one on the digits.
OF_LOOP = {("12 MP", 1): 0.66, ("12 MP", 10): 0.08, ("500 px", 1): 0.80, ("500 px", 10): 0.12}
OF_FLOOR, OF_DIGITS = 1.10, 1.3


@dataclass
class Options:
    repeats: int = 2
    """Rounds of one epoch; medians count."""
    epochs: int = 10
    """Passes over the data in the longer run, once."""
    long_peers: tuple[str, ...] = ("raw", "floor")
    """Who also runs the longer one: half an hour each for the others."""
    photos: str = ""
    """Folder to keep the photographs in; "" = one that goes again."""
    output: str = ""
    """JSON file; default: benchmarks/results/photos.json."""


def save_weights(path: Path) -> None:
    """Those that ship with the kit, in a file as torchvision's own are."""
    import torch
    import torchvision

    from finetune.models.weight_files import read_weights
    from finetune.models.weights import choose_weights

    _, weights = choose_weights("bundled/mobilenet", "default")
    assert weights is not None
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(read_weights(weights.path), strict=False)  # they have no head
    torch.save(model.state_dict(), path)


@dataclass(frozen=True)
class Work:
    """Where a benchmark's files are."""

    folder: Path
    photos: Path
    weights: Path

    def ours(self, images: str, epochs: int, features: Path) -> tuple[Finished, float]:
        run = fresh(self.folder, "run")
        words = [
            "--images",
            images,
            "--backbone",
            "mobilenet_v2",
            "--weights",
            str(self.weights),
            "--epochs",
            str(epochs),
        ]
        command = finetune_command("photo_head", *words, "--quiet", "--run", str(run))
        return run_process(command, {"FINETUNE_CACHE": str(features)}), last_accuracy(run)

    def first(self, epochs: int) -> tuple[Finished, float]:
        return self.ours(str(self.photos), epochs, fresh(self.folder, "features"))

    def peer(self, name: str, epochs: int) -> tuple[Finished, float]:
        words = ["--weights", str(self.weights), "--epochs", str(epochs), "--place", str(fresh(self.folder, "place"))]
        done = run_process(peer_command(name, self.photos, *words, script="photo_peers.py"))
        return done, float(done.output.splitlines()[-1])


def compared(work: Work, epochs: int, repeats: int, peers: tuple[str, ...]) -> dict[str, list[tuple[Finished, float]]]:
    competitors: dict[str, Callable[[], tuple[Finished, float]]] = {
        NAMES[name]: partial(work.peer, name, epochs) for name in peers
    }
    competitors["ours, first run"] = partial(work.first, epochs)
    if epochs == 1:
        kept, digits = fresh(work.folder, "features"), fresh(work.folder, "features")
        work.ours(str(work.photos), epochs, kept)
        work.ours("digits", epochs, digits)
        competitors["ours, second run"] = partial(work.ours, str(work.photos), epochs, kept)
        competitors["ours on the digits, second run"] = partial(work.ours, "digits", epochs, digits)
    return interleaved(repeats, competitors)


def cores_in_pass(found: dict[str, list[tuple[Finished, float]]]) -> float:
    """What a first run takes beyond a second is the pass."""
    first, second = ([done for done, _ in found[f"ours, {which} run"]] for which in ("first", "second"))
    cpu, seconds = (
        median([getattr(done, name) for done in first]) - median([getattr(done, name) for done in second])
        for name in ("cpu_seconds", "seconds")
    )
    return cpu / seconds


def main(options: Options) -> None:
    rows, targets = [], {}
    with workplace() as folder:
        save_weights(folder / "mobilenet.pth")
        for size, (width, height, count) in SIZES.items():
            photos = write_photos(Path(options.photos or folder) / size.replace(" ", "-"), width, height, count)
            work = Work(folder, photos, folder / "mobilenet.pth")
            for epochs in (1, options.epochs):
                repeats, peers = (options.repeats, tuple(NAMES)) if epochs == 1 else (1, options.long_peers)
                found = compared(work, epochs, repeats, peers)
                seconds = {name: median([done.seconds for done, _ in runs]) for name, runs in found.items()}
                rows += [
                    {
                        "work": f"{size}, {epochs} epoch{'s' * (epochs > 1)}",
                        "": name,
                        "s": round(taken, 1),
                        "of the loop": taken / seconds[NAMES["raw"]],
                        "cores busy": round(median([done.cpu_seconds / done.seconds for done, _ in found[name]]), 2),
                        "peak MB": round(max(done.peak_mb for done, _ in found[name])),
                        "accuracy": round(found[name][0][1], 4),
                    }
                    for name, taken in seconds.items()
                ]
                ours = seconds["ours, first run"]
                if (size, epochs) in OF_LOOP:
                    what = f"{size}, {epochs} epochs, of the loop"
                    targets[what] = verdict(ours / seconds[NAMES["raw"]], OF_LOOP[size, epochs])
                if epochs == 1:
                    if size == "12 MP":
                        targets[f"{size}, of the floor"] = verdict(ours / seconds[NAMES["floor"]], OF_FLOOR)
                    ratio = seconds["ours, second run"] / seconds["ours on the digits, second run"]
                    targets[f"{size}, second run, of one on the digits"] = verdict(ratio, OF_DIGITS)
                    targets[f"{size}, cores busy in the pass"] = f"{cores_in_pass(found):.2f} of {os.cpu_count()}"
    options = dataclasses.replace(options, photos="")  # where they lie is of the machine
    title = "A head on photographs: whole processes, from files on the disk"
    report("photos", title, rows, options.output, options=dataclasses.asdict(options), targets=targets)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
