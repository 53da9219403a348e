"""How far from the floor: ours over thirty lines by hand that keep the features in memory, on the same work.

    python benchmarks/floor.py

Whole processes, nothing kept from before.
"""

import dataclasses
from dataclasses import dataclass

import tyro
from common import (
    finetune_command,
    fresh,
    interleaved,
    median,
    our_options,
    peer_command,
    prepare_work,
    report,
    run_process,
    verdict,
    workplace,
)

TARGET = 1.15


@dataclass
class Options:
    backbones: tuple[str, ...] = ("resnet18", "vgg16_bn")
    """Models of torchvision that end in a linear layer."""
    image_size: int = 64
    """Edge in pixels."""
    epochs: int = 10
    """Passes over the training data."""
    repeats: int = 3
    """Rounds; medians count."""
    output: str = ""
    """JSON file; default: benchmarks/results/floor.json."""


def main(options: Options) -> None:
    rows = []
    with workplace() as folder:
        for backbone in options.backbones:
            work = prepare_work(folder, backbone, options.image_size)
            epochs = ["--epochs", str(options.epochs)]

            def ours(work=work, epochs=epochs) -> float:
                words = ["resnet_head", *our_options(work, *epochs, "--quiet", "--run", str(fresh(folder, "run")))]
                return run_process(finetune_command(*words), {"FINETUNE_CACHE": str(fresh(folder, "features"))}).seconds

            def floor(work=work, epochs=epochs) -> float:
                words = ["--result", str(folder / "result.json")]
                return run_process(peer_command("floor", work, *epochs, *words)).seconds

            found = interleaved(options.repeats, {"floor": floor, "ours": ours})
            ratio = median(found["ours"]) / median(found["floor"])
            rows.append(
                {
                    "work": f"{backbone} at {options.image_size} px",
                    "ours / floor": ratio,
                    "target": verdict(ratio, TARGET),
                    "ours, s": round(median(found["ours"]), 1),
                    "floor, s": round(median(found["floor"]), 1),
                }
            )
    title = f"A head on the digits, {options.epochs} epochs, whole process, against features by hand"
    report("floor", title, rows, options.output, options=dataclasses.asdict(options))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
