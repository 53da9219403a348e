"""A head on a frozen backbone, whole process: ours against the trainers that people use, and against 30 lines by hand.

    python benchmarks/head.py --epochs 10
    python benchmarks/head.py --epochs 30
    python benchmarks/head.py --text --epochs 5

Ours runs twice: with nothing kept, and again, when the features are there. See peers.py for what the others do, and
text_peers.py for texts.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from common import (
    finetune_command,
    fresh,
    interleaved,
    last_accuracy,
    median,
    our_options,
    our_text_options,
    peer_command,
    prepare_text_work,
    prepare_work,
    report,
    run_process,
    verdict,
    workplace,
)

OTHERS = {"raw": "loop by hand", "lightning": "Lightning", "huggingface": "HF Trainer", "fastai": "fastai"}
TEXT_OTHERS = {"huggingface": "HF Trainer"}
# Of the fastest peer's time.
TARGETS = {10: {"first": 0.20, "second": 0.10}, 30: {"first": 0.08}}

# On texts: of the HF Trainer's time, and of a pass by hand with its imports.
TEXT_TARGET, FLOOR_TARGET = 0.30, 1.15


@dataclass
class Options:
    text: bool = False
    """A head on a text encoder."""
    backbone: str = ""
    """A model of torchvision that ends in a linear layer (resnet18); of texts a folder, or minilm (its shape, weights
    drawn from a seed)."""
    image_size: int = 64
    """Edge in pixels."""
    epochs: int = 10
    """Passes over the training data."""
    repeats: int = 1
    """Rounds; medians count."""
    output: str = ""
    """JSON file; default: benchmarks/results/head-EPOCHS.json."""


@dataclass
class Outcome:
    seconds: float
    peak_mb: float
    checkpoint_bytes: int
    accuracy: float


def ours(work: Path, epochs: int, environment: dict[str, str]) -> Outcome:
    run = fresh(work, "run")
    is_text = (work / "data.json").exists()
    words = ["bert_head", *our_text_options(work)] if is_text else ["resnet_head", *our_options(work)]
    words += ["--epochs", str(epochs), "--run", str(run), "--quiet"]
    process = run_process(finetune_command(*words), environment)
    size = (run / "checkpoints" / "latest.pt").stat().st_size
    return Outcome(process.seconds, process.peak_mb, size, last_accuracy(run))


def peer(name: str, work: Path, epochs: int) -> Outcome:
    result = work / f"{name}.json"
    script = "text_peers.py" if (work / "data.json").exists() else "peers.py"
    process = run_process(peer_command(name, work, "--epochs", str(epochs), "--result", str(result), script=script))
    found = json.loads(result.read_text())
    return Outcome(process.seconds, process.peak_mb, found["checkpoint_bytes"], found["accuracy"])


def main(options: Options) -> None:
    others = TEXT_OTHERS if options.text else OTHERS
    with workplace() as folder:
        if options.text:
            work = prepare_text_work(folder, options.backbone or "minilm")
        else:
            work = prepare_work(folder, options.backbone or "resnet18", options.image_size)
        kept = {"FINETUNE_CACHE": str(folder / "kept")}

        def first() -> Outcome:
            """With nothing kept: a cache of its own each time."""
            return ours(work, options.epochs, {"FINETUNE_CACHE": str(fresh(folder, "features"))})

        ours(work, 1, kept)  # what the second runs find
        competitors = {name: lambda name=name: peer(name, work, options.epochs) for name in others}
        competitors |= {
            "floor": lambda: peer("floor", work, options.epochs),
            "first": first,
            "second": lambda: ours(work, options.epochs, kept),
        }
        results = interleaved(options.repeats, competitors)
    outcomes = {
        name: Outcome(*(median([getattr(one, field.name) for one in found]) for field in dataclasses.fields(Outcome)))
        for name, found in results.items()
    }
    fastest = min(outcomes[name].seconds for name in others)
    labels = others | {"floor": "features by hand (floor)", "first": "finetune", "second": "finetune, second run"}
    rows = [
        {
            "": labels[name],
            "of fastest peer": outcome.seconds / fastest,
            "seconds": round(outcome.seconds, 1),
            "peak MB": round(outcome.peak_mb),
            "checkpoint bytes": int(outcome.checkpoint_bytes),
            "accuracy": round(outcome.accuracy, 4),
        }
        for name, outcome in outcomes.items()
    ]
    first = outcomes["first"]
    if options.text:
        floor_ratio = first.seconds / outcomes["floor"].seconds
        verdicts = {
            "of HF Trainer": verdict(first.seconds / fastest, TEXT_TARGET),
            "of floor": f"{floor_ratio:.3f}, {verdict(floor_ratio, FLOOR_TARGET)}",
        }
        title = (
            f"2,000 texts of 100 tokens or more, {options.backbone or 'minilm'}, {options.epochs} epochs, whole process"
        )
        name = f"head-text-{options.epochs}"
    else:
        targets = TARGETS.get(options.epochs, {}).items()
        verdicts = {name: verdict(outcomes[name].seconds / fastest, target) for name, target in targets}
        best = max(outcomes[name].accuracy for name in others)
        verdicts["accuracy"] = f"{'met' if first.accuracy >= best else 'MISSED'} (best peer {best:.4f})"
        backbone = options.backbone or "resnet18"
        title = f"{backbone} at {options.image_size} px on the digits, {options.epochs} epochs, whole process"
        name = f"head-{options.epochs}"
    report(name, title, rows, options.output, options=dataclasses.asdict(options), targets=verdicts)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
