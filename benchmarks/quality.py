"""Is the loop any good? Ours with its default options, but without the last stage (see `labels.py`), against
scikit-learn's LogisticRegressionCV on the same features.

    python benchmarks/quality.py
    python benchmarks/quality.py --weights mobilenet_v2=mobilenet_v2-b0353104.pth

Features are those that our run kept. Both are judged on the validation part after the last epoch, not the best one.
scikit-learn gets standardised features and chooses its regularisation by cross-validation, on accuracy.
"""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import finetune_command, fresh, last_accuracy, report, run_process, workplace
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from finetune.data.digits import load_digits
from finetune.data.images import split_source
from finetune.features.cache import Entry
from finetune.features.feature_file import RowFile, RowReader, read_layout

ALLOWED_POINTS = 0.5
RECIPES = {"vgg_head": "bundled/vgg", "resnet_head": "bundled/resnet"}


@dataclass
class Options:
    weights: tuple[str, ...] = ()
    """More pretrained backbones: NAME=FILE, images at 96 px."""
    seeds: int = 3
    """Splits and first weights; the mean counts."""
    output: str = ""
    """JSON file; default: benchmarks/results/quality.json."""


def our_accuracy(folder: Path, words: list[str], seed: int) -> float:
    run = fresh(folder, "run")
    run_process(finetune_command(*words, "--finish", "none", "--seed", str(seed), "--quiet", "--run", str(run)))
    return last_accuracy(run)


def kept_features(folder: Path) -> torch.Tensor:
    """All rows of the only entry, by sample: the digits are few, so they lie in their own order."""
    entry = Entry(next((folder / "features").glob("*.safetensors")))
    file = RowFile(entry.path, read_layout(entry.path))
    rows = RowReader(file, lambda block: None, 1 << 30, 0).read(torch.arange(file.layout.count))
    file.close()
    return rows


def their_accuracy(rows: torch.Tensor, seed: int) -> float:
    digits = load_digits()
    split = split_source(digits, 0.2, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its own future
        classifier = make_pipeline(
            StandardScaler(), LogisticRegressionCV(max_iter=2_000, n_jobs=-1, scoring="accuracy")
        )
        classifier.fit(rows[split.train].numpy(), digits.targets[split.train].numpy())
        return float(classifier.score(rows[split.validation].numpy(), digits.targets[split.validation].numpy()))


def main(options: Options) -> None:
    works = {f"{recipe}, {backbone}": [recipe] for recipe, backbone in RECIPES.items()}
    for word in options.weights:
        name, _, file = word.partition("=")
        works[f"vgg_head, {name}"] = ["vgg_head", "--backbone", name, "--weights", file, "--image-size", "96"]
    rows = []
    for title, words in works.items():
        with workplace() as folder:
            ours = [our_accuracy(folder, words, seed) for seed in range(options.seeds)]
            features = kept_features(folder)
            theirs = [their_accuracy(features, seed) for seed in range(options.seeds)]
        points = 100 * (sum(ours) - sum(theirs)) / options.seeds
        rows.append(
            {
                "work": title,
                "ours - theirs, points": round(points, 2),
                "target": "met" if points >= -ALLOWED_POINTS else "MISSED",
                "ours": round(100 * sum(ours) / options.seeds, 2),
                "LogisticRegressionCV": round(100 * sum(theirs) / options.seeds, 2),
            }
        )
    title = f"Validation accuracy on the digits, mean of {options.seeds} seeds"
    files = [word.partition("=")[0] + "=" + Path(word.partition("=")[2]).name for word in options.weights]
    report("quality", title, rows, options.output, options=dataclasses.asdict(options) | {"weights": files})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
