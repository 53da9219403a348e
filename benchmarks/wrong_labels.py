"""Are wrong labels found? The default command on 300 crops of ten photographs, five of which are labelled wrong.

    pip install '.[bench]'
    python benchmarks/wrong_labels.py

Twenty draws: which five, and what they are called instead. The crops are those of `crops.py`. Counted is how many of
the planted ones are among the first five of labels.csv, and the same of the first ten.
"""

import csv
import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path

import tyro
from common import finetune_command, report, run_process, workplace
from crops import write_crops

FIRST = (5, 10)


@dataclass
class Options:
    draws: int = 20
    planted: int = 5
    output: str = ""
    """JSON file; default: benchmarks/results/wrong_labels.json."""


def plant(images: list[Path], count: int, seed: int) -> dict[Path, str]:
    """A label for each image: that of its folder, but for some."""
    draw, labels = random.Random(seed), {image: image.parent.name for image in images}
    for image in draw.sample(images, count):
        labels[image] = draw.choice(sorted({*labels.values()} - {labels[image]}))
    return labels


def found_first(folder: Path, labels: dict[Path, str], seed: int) -> list[str]:
    """Names in the order of labels.csv."""
    table = folder / f"labels-{seed}.csv"
    with open(table, "w", newline="", encoding="utf-8") as stream:
        rows = [(image.relative_to(folder).as_posix(), label) for image, label in labels.items()]
        csv.writer(stream).writerows([("image", "label"), *rows])
    run = folder / f"run-{seed}"
    words = ["photo_head", "--images", str(table), "--seed", str(seed), "--quiet", "--no-report", "--track", "none"]
    run_process(finetune_command(*words, "--run", str(run)))
    with open(run / "labels.csv", newline="", encoding="utf-8") as stream:
        return [row["name"] for row in csv.DictReader(stream)]


def main(options: Options) -> None:
    rows = []
    with workplace() as folder:
        write_crops(folder)
        images = sorted(folder.glob("*/*.jpg"))
        for seed in range(options.draws):
            labels = plant(images, options.planted, seed)
            wrong = {
                image.relative_to(folder).as_posix() for image, label in labels.items() if label != image.parent.name
            }
            names = found_first(folder, labels, seed)
            ahead = {count: sum(name in wrong for name in names[:count]) for count in FIRST}
            rows.append({"draw": seed} | {f"among the first {count}": ahead[count] for count in FIRST})
            print(rows[-1], flush=True)
    for count in FIRST:
        share = sum(row[f"among the first {count}"] for row in rows) / (options.draws * options.planted)
        print(f"{share:.0%} of the planted ones are among the first {count}")
    report("wrong_labels", "Planted labels that are found", rows, options.output, dataclasses.asdict(options))


if __name__ == "__main__":
    main(tyro.cli(Options))
