"""How training on kept features grows with the data: memory beyond the imports, and seconds an epoch.

    python benchmarks/growth.py

Rows of 2,048 numbers in two bytes each, as a large backbone gives in bf16: a million take 4 GB on the disk and must not
take them in memory. The rows are random and written in place of a backbone's; all that reads them and trains is ours.
"""

import dataclasses
import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from common import report, run_itself, train_alone, workplace

WIDTH, CLASSES, BATCH = 2_048, 100, 64
TARGET_MB = 1_500


@dataclass
class Options:
    rows: tuple[int, ...] = (250_000, 500_000, 1_000_000)
    """How many rows; one process each."""
    only: int = 0
    """Used by the benchmark itself: so many rows, in this process."""
    folder: str = ""
    """Used by the benchmark itself."""
    output: str = ""
    """JSON file; default: benchmarks/results/growth.json."""


def resident_mb() -> float:
    """Now, not at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train_on(count: int, folder: Path) -> dict[str, Any]:
    """Two epochs on so many random rows that carry their class; four fifths train."""
    import torch

    from finetune.base.signals import StopRequest
    from finetune.base.terminal import Terminal, make_console
    from finetune.data.contents import Contents
    from finetune.data.source import ArraySource
    from finetune.features.kept import Features, Pass
    from finetune.models.freeze import Rule
    from finetune.models.heads import StandardisedLinear
    from finetune.recipe import Images, Model, Optimizer, Recipe
    from finetune.recipe.execution import Settings
    from finetune.store.run_folder import RunFolder
    from finetune.training.context import RunContext
    from finetune.training.phase import Feed

    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports the rest of torch
    before_mb = resident_mb()
    targets = torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(1))
    source = ArraySource(torch.zeros(count, 1), targets, [str(number) for number in range(CLASSES)], "random")
    noise = torch.randn(4_096, WIDTH, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    class Asked:
        """In the place of a loader: says which samples are asked for."""

        contents = Contents(source)

        def batches(self, requests):
            from finetune.data.batch import Batch

            for request in requests:
                indices = torch.tensor(request.indices)
                yield Batch(indices, targets[indices], indices, torch.zeros_like(indices), [])

        def close(self):
            pass

    def compute(indices):
        rows = noise[indices % len(noise)].clone()
        rows[torch.arange(len(indices)), targets[indices]] += 3
        return rows

    run_of = Pass(compute, WIDTH, torch.bfloat16, {"rows": count}, source, Asked(), "random rows")
    everything = torch.arange(count)
    train_indices, validation_indices = everything[everything % 5 != 0], everything[everything % 5 == 0]
    features = Features(run_of, {None: everything}, len(train_indices))
    terminal = Terminal(make_console(quiet=True))
    started = time.perf_counter()
    features.fill(terminal, StopRequest())
    fill_seconds = time.perf_counter() - started

    model = torch.nn.Sequential(StandardisedLinear(WIDTH, CLASSES, 0.0))
    feed = Feed(lambda rows: model(rows.float()), features, features, features)
    recipe = Recipe(Model("none"), Images("none"), optimizer=Optimizer(lr=1e-3), epochs=2, batch_size=BATCH)
    started = time.perf_counter()
    progress = train_alone(
        recipe, model, (Rule("*"),), feed, Asked.contents, train_indices, validation_indices,
        RunContext(terminal, RunFolder(folder / f"run{count}"), Settings(log_every_steps=1_000)),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "rows": count,
        "peak MB beyond imports": round(peak_mb - before_mb),
        "seconds an epoch": round(seconds / 2, 1),
        "µs a row": round(seconds / 2 / count * 1e6, 2),
        "seconds to write": round(fill_seconds, 1),
        "accuracy": round(progress.last_validation["val/accuracy"], 4),
    }


def main(options: Options) -> None:
    if options.only:
        print(json.dumps(train_on(options.only, Path(options.folder))))
        return
    rows = []
    for count in options.rows:
        with workplace() as folder:
            rows.append(run_itself(__file__, "--only", str(count), "--folder", str(folder)))
    per_row = np.array([row["µs a row"] for row in rows])
    targets = {
        "memory": f"{'met' if max(row['peak MB beyond imports'] for row in rows) < TARGET_MB else 'MISSED'}",
        "linear": f"time a row differs by {100 * (per_row.max() / per_row.min() - 1):.0f} %",
    }
    title = f"Training on kept rows, {WIDTH:,} wide in bf16, validation and checkpoint in each epoch"
    report("growth", title, rows, options.output, options=dataclasses.asdict(options), targets=targets)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
