"""What does the last stage cost? CPU seconds and memory of the search for lambda and of the last solve.

    pip install '.[bench]'
    python benchmarks/last_stage.py

Rows are drawn so that few directions hold most of what varies, as with features of pretrained networks. Each size is
measured in a process of its own, on one core. Memory: the largest resident size less that before the rows were drawn,
over the size of the rows; the rows themselves are in it.
"""

import dataclasses
import json
import resource
import sys
import time
from dataclasses import dataclass

import torch
import tyro
from common import report, run_process

from finetune.store.finish_state import Finish
from finetune.training.finish import CHOOSING_ROWS, MOST_FOLDS
from finetune.training.regularisation import Held, next_strength, solve_all, try_next
from finetune.training.solver import Loss, Span, prepared

# Rows, features, classes, folds.
SIZES = [(2_000, 1_280, 10, 5), (10_000, 768, 50, 5), (100_000, 512, 100, 1)]
INNER_DIRECTIONS = 64
# Of a class about its centre, where centres lie about one apart: classes overlap, as real ones do.
SPREAD = 4.0


@dataclass
class Options:
    size: tuple[int, ...] = ()
    """Rows, features, classes, folds: of one measurement, whose figures are printed; default: all, in processes."""
    output: str = ""
    """JSON file; default: benchmarks/results/last_stage.json."""


def rows_like_features(samples: int, features: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(INNER_DIRECTIONS, features, generator=generator)
    basis *= torch.logspace(0, -1.5, INNER_DIRECTIONS).unsqueeze(1)
    centres, labels = torch.randn(classes, INNER_DIRECTIONS, generator=generator), torch.arange(samples) % classes
    rows = torch.empty(samples, features)
    for places in torch.arange(samples).split(8_192):
        inner = centres[labels[places]] + SPREAD * torch.randn(len(places), INNER_DIRECTIONS, generator=generator)
        rows[places] = inner @ basis + 0.3 * torch.randn(len(places), features, generator=generator)
    return rows, labels


def largest_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(samples: int, features: int, classes: int, folds: int) -> dict[str, float]:
    torch.set_num_threads(1)
    before = largest_bytes()
    rows, labels = rows_like_features(samples, features, classes)
    size, started = rows.nbytes, time.process_time()
    targets = torch.zeros(samples, classes).scatter_(1, labels.unsqueeze(1), 1.0)
    choosing = samples if folds > 1 else CHOOSING_ROWS
    each = choosing // max(folds, MOST_FOLDS)
    places = [Span(number * each, (number + 1) * each) for number in range(folds)]
    loss = Loss(targets, torch.ones(samples, 1), "classification")
    held, finish = Held(prepared(rows), loss, targets, places, Span(0, choosing)), Finish()
    while next_strength(finish) is not None:
        try_next(finish, held, 1)
    solve_all(held, finish)
    seconds = time.process_time() - started
    return {"CPU seconds": seconds, "memory / rows": (largest_bytes() - before) / size, "lambdas": len(finish.tried)}


def main(options: Options) -> None:
    if options.size:
        print(json.dumps(measure(*options.size)))
        return
    found = []
    for size in SIZES:
        words = [sys.executable, __file__, "--size", *map(str, size)]
        figures = json.loads(run_process(words).output.splitlines()[-1])
        found.append(dict(zip(("rows", "features", "classes", "folds"), size, strict=True)) | figures)
        print(found[-1], flush=True)
    report("last_stage", "The last stage on one core", found, options.output, dataclasses.asdict(options))


if __name__ == "__main__":
    main(tyro.cli(Options))
