"""What the benchmarks share: the work, whole processes timed side by side, a table, a JSON file."""

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "torchvision", "lightning", "transformers", "accelerate", "fastai", "scikit-learn")
HERE = Path(__file__).parent


@dataclass
class Finished:
    """A process that ended well: seconds as a whole, the largest resident memory, and what it printed."""

    seconds: float
    peak_mb: float
    output: str


def run_process(command: Sequence[str], environment: dict[str, str]) -> Finished:
    """Run to the end.

    Raises:
        SystemExit: it failed; shows what it printed.
    """
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-3000:]}")
    return Finished(seconds, usage.ru_maxrss / 1024, text)


def finetune_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "finetune.cli", *words]


def peer_command(peer: str, work: Path, *words: str) -> list[str]:
    return [sys.executable, str(HERE / "peers.py"), peer, str(work), *words]


def interleaved(repeats: int, competitors: dict[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """Each competitor once, then each again: a busy minute of the machine meets all of them."""
    results: dict[str, list[Any]] = {name: [] for name in competitors}
    for number in range(repeats):
        for name, compete in competitors.items():
            print(f"  {name} {number + 1}/{repeats}", end=" ", flush=True, file=sys.stderr)
            results[name].append(compete())
            print("done", file=sys.stderr)
    return results


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder for the duration of a benchmark; features are kept there too, none from before."""
    with tempfile.TemporaryDirectory(prefix="finetune-benchmark-") as folder:
        os.environ["FINETUNE_CACHE"] = str(Path(folder) / "features")
        yield Path(folder)


def prepare_work(folder: Path, name: str, image_size: int) -> Path:
    """The same work for everybody: the digits, resized and normalised, split as ours are; a backbone with weights drawn
    from a seed, in a file that torchvision loads."""
    import torch
    import torchvision

    from finetune.build import open_data
    from finetune.data.images import Request
    from finetune.models.backbones import find_backbone
    from finetune.models.weights import choose_weights
    from finetune.recipe import Images, Model, Recipe

    work = folder / f"{name}-{image_size}"
    work.mkdir()
    torch.manual_seed(0)
    torch.save(torchvision.models.get_model(name).state_dict(), work / "backbone.pth")
    recipe = Recipe(model=Model(name), data=Images("digits", image_size=image_size))
    backbone, _ = choose_weights(name, str(work / "backbone.pth"))
    data = open_data(recipe, find_backbone(name))
    preprocessing = backbone.preprocessing.at(image_size)
    pipeline = dataclasses.replace(data.pipeline, preprocessing=preprocessing)
    tensors: dict[str, Any] = {"name": name, "image_size": image_size}
    for part in ("train", "validation"):
        batch = pipeline.fetch(Request(getattr(data.split, part).tolist()))
        tensors |= {f"{part}_images": batch.inputs, f"{part}_targets": batch.targets}
    torch.save(tensors, work / "data.pt")
    return work


def our_options(work: Path, *words: str) -> list[str]:
    """Options of `finetune resnet_head` for that work."""
    name, image_size = work.name.rsplit("-", 1)
    return ["--backbone", name, "--weights", str(work / "backbone.pth"), "--image-size", image_size, *words]


def processor() -> str:
    """Its maker's name for it where the system says so, else the instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "processor": processor(),
        "python": platform.python_version(),
        "versions": versions,
    }


def report(name: str, title: str, rows: list[dict[str, Any]], output: str, **facts: Any) -> None:
    """Print a table and write everything as JSON.

    Args:
        rows: columns by name; equal names in each.
        output: the file; "" = benchmarks/results/NAME.json.
        facts: what else goes into the file.
    """
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in rows[0]:
        table.add_column(column, justify="left" if column == next(iter(rows[0])) else "right")
    for row in rows:
        table.add_row(*(f"{value:,.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    about = machine()
    console = Console(width=120)
    console.print(table)
    console.print(f"{about['cores']} cores, {about['date']}, torch {about['versions']['torch']}")
    path = Path(output) if output else HERE / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "machine": about, **facts, "rows": rows}, indent=2) + "\n")
    console.print(f"written: {path}")


def verdict(ratio: float, target: float) -> str:
    """Whether a ratio that should be small is."""
    return f"{'met' if ratio <= target else 'MISSED'} ({ratio:.3f}, at most {target:g})"
