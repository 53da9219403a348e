"""How good is a head with few labels? The default command against scikit-learn on the same features.

    pip install '.[bench]'
    python benchmarks/labels.py --fashion /usr/share/datasets/fashion-mnist --minilm FOLDER

Five draws each of 5, 20, 100 labels a class and of all there are; of 100 a class with every second class at an eighth
of that ("1:8", where the kit is also given --class-weights balanced and prior), and of 100 a class with a fifth of the
labels wrong. Ours is the command as it comes, files on a disk, whole processes: `finetune RECIPE`, then `finetune
evaluate` on a test part that nobody trained on. The others read the same backbone's features. Digits: bundled/vgg.
Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017; Debian's package dataset-fashion-mnist; its 10,000 test images):
bundled/mobilenet at 96 px. Messages: bundled/bert and, with --minilm, all-MiniLM-L6-v2. ECE: expected calibration error
over 15 bins, in points.
"""

import csv
import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import finetune_command, report, run_process, workplace
from PIL import Image
from pretraining import features_of, load_fashion
from quality import kept_features
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, RidgeClassifierCV
from sklearn.metrics import f1_score
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from finetune.data.digits import load_digits
from finetune.data.source import ArraySource
from finetune.data.texts import open_texts

LABELS = ("5", "20", "100", "all", "1:8", "20 % wrong")
UNEVEN_LABELS, UNEVEN_SHARE, WRONG_SHARE = 100, 8, 0.2
BINS = 15


@dataclass
class Options:
    fashion: str = ""
    """Folder of Fashion-MNIST's idx files; "" = without it."""
    minilm: str = ""
    """Folder of all-MiniLM-L6-v2; "" = without it."""
    draws: int = 5
    labels: tuple[str, ...] = LABELS
    """Labels a class, or what else is drawn."""
    data: tuple[str, ...] = ()
    """Names that data must contain; default: all."""
    output: str = ""
    """JSON file; default: benchmarks/results/labels.json."""


@dataclass(frozen=True)
class Task:
    """Data, and the command.

    Attributes:
        features: (samples, features) of the backbone.
        write: (folder, train, test): files, and what to type for them.
    """

    name: str
    targets: np.ndarray
    features: np.ndarray
    test_samples: int
    write: Callable[[Path, "Draw"], list[str]]

    def draw(self, labels: str, seed: int) -> "Draw":
        random = np.random.default_rng(seed)
        order = random.permutation(len(self.targets))
        test, rest = order[: self.test_samples], order[self.test_samples :]
        classes, said = np.unique(self.targets), self.targets.copy()
        counts = dict.fromkeys(classes, len(rest) if labels == "all" else UNEVEN_LABELS)
        if labels.isdigit():
            counts = dict.fromkeys(classes, int(labels))
        elif labels == "1:8":
            counts = {label: UNEVEN_LABELS // (UNEVEN_SHARE if label % 2 else 1) for label in classes}
        train = np.concatenate([rest[self.targets[rest] == label][: counts[label]] for label in classes])
        if labels == "20 % wrong":
            wrong = random.permutation(train)[: round(WRONG_SHARE * len(train))]
            said[wrong] = (said[wrong] + random.integers(1, len(classes), len(wrong))) % len(classes)
        wanted = sum(min(count, len(rest)) for count in counts.values())
        return Draw(train, test, said, labels == "all" or len(train) >= 0.95 * wanted)


@dataclass(frozen=True)
class Draw:
    """Samples to train on, and to test with.

    Attributes:
        said: by sample: the label that is written, which may be wrong.
        is_full: there were as many as were wanted.
    """

    train: np.ndarray
    test: np.ndarray
    said: np.ndarray
    is_full: bool


def image_task(name: str, source: ArraySource, features: torch.Tensor, test_samples: int, words: list[str]) -> Task:
    images = source.images

    def write(folder: Path, draw: Draw) -> list[str]:
        for part, samples in (("train", draw.train), ("test", draw.test)):
            for number in samples.tolist():
                where = folder / part / str(draw.said[number])
                where.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[number, 0].numpy()).save(where / f"{number:05}.png")
        return [words[0], "--images", str(folder), *words[1:]]

    return Task(name, source.targets.numpy(), features.numpy(), test_samples, write)


def text_task(name: str, words: list[str]) -> Task:
    source = open_texts("messages", "classification")

    def write(folder: Path, draw: Draw) -> list[str]:
        folder.mkdir(parents=True)
        with open(folder / "t.csv", "w", newline="", encoding="utf-8") as stream:
            rows = csv.writer(stream)
            rows.writerow(["text", "label", "split"])
            for part, samples in (("train", draw.train), ("test", draw.test)):
                rows.writerows([source.texts[n], source.classes[draw.said[n]], part] for n in samples.tolist())
        return [words[0], "--texts", str(folder / "t.csv"), "--split-column", "split", *words[1:]]

    return Task(name, source.targets.numpy(), text_features(words).float().numpy(), 500, write)


def text_features(words: list[str]) -> torch.Tensor:
    """What a run keeps of all messages."""
    with workplace() as folder:
        run_process(finetune_command(*words, "--epochs", "1", "--quiet", "--run", str(folder / "run")))
        return kept_features(folder)


# ---- Who is compared -------------------------------------------------------------------------------------------------


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


OTHERS: dict[str, Callable[[int], Any]] = {
    "LogisticRegression(C=1), unit rows": lambda _: make_pipeline(
        FunctionTransformer(unit), LogisticRegression(C=1, max_iter=2_000)
    ),
    "LogisticRegressionCV": lambda folds: make_pipeline(
        StandardScaler(), LogisticRegressionCV(cv=folds, scoring="neg_log_loss", max_iter=2_000)
    ),
    "RidgeClassifierCV": lambda _: make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-3, 5, 17))),
    "LDA, shrinkage": lambda _: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
    "nearest class mean": lambda _: NearestCentroid(),
}
KEYS = "data", "labels", "draw"
SLOW_ROWS = 2_000  # LogisticRegressionCV is left out above: it takes minutes


def calibration_error(probabilities: np.ndarray, targets: np.ndarray) -> float:
    confidence, right = probabilities.max(1), probabilities.argmax(1) == targets
    error = 0.0
    for number in range(BINS):
        here = (confidence > number / BINS) & (confidence <= (number + 1) / BINS)
        if here.any():
            error += here.mean() * abs(confidence[here].mean() - right[here].mean())
    return 100 * error


def ours(task: Task, folder: Path, draw: Draw, seed: int, weights: str) -> dict[str, float]:
    words = [*task.write(folder / "data", draw), "--class-weights", weights]
    run = folder / "run"
    finished = run_process(
        finetune_command(*words, "--seed", str(seed), "--quiet", "--no-report", "--track", "none", "--run", str(run))
    )
    found = json.loads(run_process(finetune_command("evaluate", str(run), "--json")).output)
    return {
        "accuracy": 100 * found["accuracy"], "f1": 100 * found["f1"], "ece": 100 * found["calibration_error"],
        "seconds": finished.seconds,
    }  # fmt: skip


def theirs(name: str, task: Task, draw: Draw) -> dict[str, float]:
    said, rows, truth = draw.said[draw.train], task.features[draw.train], task.targets[draw.test]
    model, started = OTHERS[name](max(2, min(5, int(np.bincount(said).min())))), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(rows, said)
        seconds = time.perf_counter() - started
        predicted = model.predict(task.features[draw.test])
        has_probabilities = hasattr(model, "predict_proba")
        probabilities = model.predict_proba(task.features[draw.test]) if has_probabilities else None
    return {
        "accuracy": 100 * float((predicted == truth).mean()),
        "f1": 100 * float(f1_score(truth, predicted, average="macro")),
        "ece": calibration_error(probabilities, truth) if probabilities is not None else float("nan"),
        "seconds": seconds,
    }


def tasks(options: Options) -> Iterator[Task]:
    digits = load_digits()
    yield image_task("digits", digits, features_of(digits, "bundled/vgg", "default"), 500, ["vgg_head"])
    yield text_task("messages, bundled/bert", ["bert_head"])
    if options.minilm:
        yield text_task("messages, MiniLM", ["bert_head", "--backbone", options.minilm])
    if options.fashion:
        fashion = load_fashion(Path(options.fashion))
        rows = features_of(fashion, "bundled/mobilenet", "default", 96)
        yield image_task("Fashion-MNIST", fashion, rows, 2_000, ["photo_head", "--image-size", "96"])


def main(options: Options) -> None:
    rows: list[dict[str, Any]] = []
    for task in tasks(options):
        for labels in options.labels if not options.data or any(name in task.name for name in options.data) else ():
            for seed in range(options.draws):
                draw = task.draw(labels, seed)
                if not draw.is_full:
                    continue
                cell = {"data": task.name, "labels": labels, "draw": seed}
                for weights in ("none", "balanced", "prior") if labels == "1:8" else ("none",):
                    name = "finetune" if weights == "none" else f"finetune --class-weights {weights}"
                    with workplace() as folder:
                        rows.append(cell | {"head": name} | ours(task, folder, draw, seed, weights))
                for name in OTHERS:
                    if name == "LogisticRegressionCV" and len(draw.train) > SLOW_ROWS:
                        continue
                    rows.append(cell | {"head": name} | theirs(name, task, draw))
            show(rows, task.name, labels)
    compare(rows)
    named = {"fashion": Path(options.fashion).name, "minilm": Path(options.minilm).name}
    title = "Accuracy, macro F1 and ECE in points"
    report("labels", title, rows, options.output, options=dataclasses.asdict(options) | named)


def show(rows: list[dict[str, Any]], data: str, labels: str) -> None:
    print(f"\n{data}, {labels} labels a class")
    for head in dict.fromkeys(row["head"] for row in rows):
        cells = [row for row in rows if (row["data"], row["labels"], row["head"]) == (data, labels, head)]
        if cells:
            means = {name: np.mean([cell[name] for cell in cells]) for name in ("accuracy", "f1", "ece", "seconds")}
            print(f"  {head:<36}" + "".join(f"{name} {value:7.2f}  " for name, value in means.items()), flush=True)


def compare(rows: list[dict[str, Any]]) -> None:
    """Against the best single one of the others over all cells of even, right labels: paired differences by cell."""
    even = [row for row in rows if row["labels"] in LABELS[:4]]
    found = {}
    for name in OTHERS:
        gaps: dict[tuple[str, str], list[float]] = {}
        for row in even:
            if row["head"] == name:
                key = row["data"], row["labels"], row["draw"]
                own = next(one for one in even if one["head"] == "finetune" and key == tuple(one[k] for k in KEYS))
                gaps.setdefault(key[:2], []).append(own["accuracy"] - row["accuracy"])
        found[name] = gaps
    whole = max(map(len, found.values()))
    means = {
        name: np.mean([np.mean(cell) for cell in gaps.values()]) for name, gaps in found.items() if len(gaps) == whole
    }
    best = min(means, key=lambda name: means[name])
    print(f"\nthe best single one of the others: {best}; accuracy of finetune less its, mean {means[best]:+.2f} points")
    for (data, labels), cell in found[best].items():
        error = np.std(cell, ddof=1) / len(cell) ** 0.5 if len(cell) > 1 else float("nan")
        print(f"  {data}, {labels}: {np.mean(cell):+.2f}, standard error {error:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Options))
