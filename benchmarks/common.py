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
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finetune.data.contents import Contents
    from finetune.models.freeze import Rule
    from finetune.recipe import Recipe
    from finetune.store.state import Progress
    from finetune.training.context import RunContext
    from finetune.training.phase import Feed

PACKAGES = ("torch", "torchvision", "lightning", "transformers", "accelerate", "fastai", "scikit-learn")
HERE = Path(__file__).parent


@dataclass
class Finished:
    """A process that ended well: seconds as a whole, those of all its cores, the largest resident memory, and its
    standard output."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    output: str


def run_process(command: Sequence[str], environment: dict[str, str] | None = None) -> Finished:
    """Run to the end.

    Raises:
        SystemExit: it failed; shows what it printed.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=os.environ | (environment or {}))
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        for stream in (output, errors):
            stream.seek(0)
        text, said = output.read(), errors.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-3000:]}{said[-3000:]}")
    return Finished(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, text)


def run_itself(script: str, *words: str) -> Any:
    """What a benchmark prints when it is called for one part of its work: the last line, as JSON."""
    return json.loads(run_process([sys.executable, script, *words]).output.splitlines()[-1])


def finetune_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "finetune.cli", *words]


def peer_command(peer: str, work: Path, *words: str, script: str = "peers.py") -> list[str]:
    return [sys.executable, str(HERE / script), peer, str(work), *words]


def fresh(folder: Path, name: str) -> Path:
    """A new, empty folder."""
    path = folder / f"{name}{len(list(folder.glob(f'{name}*')))}"
    path.mkdir()
    return path


def last_accuracy(run: Path) -> float:
    """Of a run's last validation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["val/accuracy"] for line in lines if "val/accuracy" in line][-1]


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

    from finetune.data.batch import Request
    from finetune.models.backbones import find_backbone
    from finetune.models.weights import choose_weights
    from finetune.recipe import Images, Model, Recipe
    from finetune.training.dataset import open_data

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


TEXTS, FEWEST_TOKENS, LONGEST_TEXT = 2_000, 100, 256


def prepare_text_work(folder: Path, backbone: str) -> Path:
    """The same work for everybody: messages that ship with the kit, several of one kind together until they have 100
    tokens, split as ours are; and an encoder in a folder.

    Args:
        backbone: a folder, or "minilm": its shape, with weights drawn from a seed and the tokenizer that ships with the
            kit.
    """
    import random

    import torch
    import transformers

    from finetune.data.texts import open_texts
    from finetune.models.bundled import bundled_folder

    work = folder / "text"
    work.mkdir()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled_folder("bundled/bert"))
    if backbone == "minilm":
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=len(tokenizer), hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
            intermediate_size=1536, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        transformers.BertModel(config).save_pretrained(work / "backbone")
        tokenizer.save_pretrained(work / "backbone")
        backbone = str(work / "backbone")
    source = open_texts("messages", "classification")
    messages = [[] for _ in source.classes]
    for text, label in zip(source.texts, source.targets.tolist(), strict=True):
        messages[label].append(text)
    generator, rows = random.Random(0), []
    while len(rows) < TEXTS:
        label, text = len(rows) % len(messages), ""
        while len(tokenizer(text)["input_ids"]) < FEWEST_TOKENS + generator.randrange(60):
            text = f"{text} {generator.choice(messages[label])}".strip()
        rows.append((text, label))
    held_out = rows[:: len(messages) // 2 + 1]
    data = {"backbone": backbone, "classes": len(messages), "max_length": LONGEST_TEXT, "validation": held_out}
    data["train"] = [row for row in rows if row not in held_out]
    (work / "data.json").write_text(json.dumps(data))
    lines = [json.dumps({"text": text, "label": str(label), "part": "train"}) for text, label in data["train"]]
    lines += [json.dumps({"text": text, "label": str(label), "part": "val"}) for text, label in held_out]
    (work / "texts.jsonl").write_text("\n".join(lines))
    return work


def our_text_options(work: Path) -> list[str]:
    """Options of `finetune bert_head` for that work."""
    backbone = json.loads((work / "data.json").read_text())["backbone"]
    words = ["--texts", str(work / "texts.jsonl"), "--split-column", "part", "--max-length", str(LONGEST_TEXT)]
    return [*words, "--backbone", backbone, "--pooling", "mean"]


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


def train_alone(
    recipe: "Recipe", model: "nn.Module", rules: "tuple[Rule, ...]", feed: "Feed", contents: "Contents",
    train_indices: "Tensor", validation_indices: "Tensor", context: "RunContext",
) -> "Progress":  # fmt: skip
    """Our own loop and nothing around it, on the CPU, with AdamW.

    Args:
        feed: gives the batches, in the place of images or kept features.
        contents: of a source that nothing is fetched from.
        context: of a new run.
    """
    import torch

    from finetune.data.batch import Split
    from finetune.models.backbones import Backbone
    from finetune.models.freeze import FreezeMap
    from finetune.models.network import Network
    from finetune.recipe.execution import Machine, Numerics
    from finetune.store.state import Progress
    from finetune.training.dataset import Data
    from finetune.training.loop import train
    from finetune.training.optimizer import build_optimizer
    from finetune.training.phase import Phase
    from finetune.training.setup import Loaders, Setup

    class Nothing:
        """In the place of what is not used: the backbone's description, the loaders of images."""

        libraries = ()

        def __init__(self):
            self.contents = contents

        def to_plain(self) -> dict[str, Any]:
            return {}

    freeze_map = FreezeMap(model, rules, recipe.trainable.batchnorm)
    freeze = freeze_map.at(0)
    trainable = freeze.apply()
    parameters = {name: value for name, value in model.named_parameters() if name in trainable}
    optimizer = build_optimizer(parameters, "adamw", recipe.optimizer.lr, 1e-2, 0.9)
    phase = Phase(freeze, trainable, optimizer, freeze.sha256(), [], feed)
    split = Split(train_indices, validation_indices, torch.zeros(0, dtype=torch.int64))
    backbone: Backbone = Nothing()  # type: ignore[assignment]
    setup = Setup(
        recipe, Numerics(), Machine("cpu"), backbone, Network(model, [], "none", 0), freeze_map,
        Data(contents.source, split, split, None), Loaders(Nothing(), Nothing()), torch.device("cpu"), "", "",
    )  # type: ignore[arg-type]  # fmt: skip
    context.run.make()
    return train(setup, context, phase, Progress())


def report(
    name: str,
    title: str,
    rows: list[dict[str, Any]],
    output: str,
    options: dict[str, Any],
    targets: dict[str, str] | None = None,
) -> None:
    """Print a table and write everything as JSON.

    Args:
        rows: columns by name; equal names in each.
        output: the file; "" = benchmarks/results/NAME.json.
        options: of the benchmark.
        targets: name to verdict, of those that are no column.
    """
    # Where it is written is of the machine, not of the measurement.
    facts = {"options": {key: value for key, value in options.items() if key != "output"}}
    facts |= {"targets": targets} if targets else {}
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
    for target, text in (targets or {}).items():
        print(f"target {target}: {text}")


def verdict(ratio: float, target: float) -> str:
    """Whether a ratio that should be small is."""
    return f"{'met' if ratio <= target else 'MISSED'} ({ratio:.3f}, at most {target:g})"
