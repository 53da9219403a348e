"""What each command costs before it does anything: seconds, and whose modules are imported.

    python benchmarks/startup.py

Each in a process of its own, files in the page cache; the import of a package counts without that of the others within
it (python -X importtime).
"""

import dataclasses
import re
import resource
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from common import finetune_command, median, report, workplace

SHOWN = ("torch", "torchvision", "transformers", "sympy", "finetune")
LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)")


@dataclass
class Options:
    repeats: int = 3
    """Medians count."""
    output: str = ""
    """JSON file; default: benchmarks/results/startup.json."""


def imports_of(command: list[str], folder: Path) -> Counter[str]:
    """Seconds by owner."""
    words = [command[0], "-X", "importtime", *command[1:]]
    said = subprocess.run(words, capture_output=True, text=True, cwd=folder).stderr
    found: Counter[str] = Counter()
    for microseconds, module in LINE.findall(said):
        top = module.partition(".")[0]
        found[top] += int(microseconds) / 1e6
    return found


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds, and CPU seconds of all its processes."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, cwd=folder)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-2000:].decode()}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


COMMANDS = {
    "--help": ["--help"],
    "recipes": ["recipes"],
    "runs": ["runs", "."],
    "doctor": ["doctor"],
    "vgg_head --help": ["vgg_head", "--help"],
    "predict, an image": ["predict", "vgg_head", "digit.png"],
    "predict, a text": ["predict", "bert_head", "where is it"],
    "evaluate": ["evaluate", "vgg_head"],
    "resume on kept features, images": ["resume", "vgg_head", "--epochs", "{epochs}"],
    "resume on kept features, texts": ["resume", "bert_head", "--epochs", "{epochs}"],
}


def prepare(folder: Path) -> None:
    """A run of each kind, exported, and a picture."""
    from PIL import Image

    from finetune.data.digits import load_digits

    for recipe in ("vgg_head", "bert_head"):
        words = [recipe, "--epochs", "1", "--quiet", "--run", str(folder / recipe)]
        subprocess.run(finetune_command(*words), check=True)
        subprocess.run(finetune_command("export", str(folder / recipe)), check=True, capture_output=True)
    Image.fromarray(load_digits().images[0, 0].numpy()).save(folder / "digit.png")


def main(options: Options) -> None:
    rows: list[dict[str, Any]] = []
    with workplace() as folder:
        prepare(folder)
        for name, words in COMMANDS.items():
            found = []
            for number in range(options.repeats + 1):
                command = finetune_command(*(word.format(epochs=number + 2) for word in words))
                if number < options.repeats:
                    found.append(timed(command, folder))
                else:
                    imports = imports_of(command, folder)
            shown = {owner: round(imports.pop(owner, 0.0), 2) for owner in SHOWN}
            seconds, cpu = (round(median([one[place] for one in found]), 2) for place in range(2))
            others = round(sum(imports.values()), 2)
            rows.append({"command": name, "s": seconds, "CPU s": cpu, **shown, "others": others})
    title = "What a command costs, and what of it is the import of whom, in seconds"
    report("startup", title, rows, options.output, options=dataclasses.asdict(options))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
