"""How good is a head with few labels? The default command against scikit-learn on the same features.

    pip install '.[bench]'
    python benchmarks/labels.py --fashion /usr/share/datasets/fashion-mnist --minilm FOLDER

Five draws each of 5, 20, 100 labels a class and of all there are. Ours is the command as it comes, files on a disk,
whole processes: `finetune RECIPE`, then `finetune evaluate` on a test part that nobody trained on. The others read the
same backbone's features. Digits: bundled/vgg. Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017; Debian's package
dataset-fashion-mnist; its 10,000 test images): bundled/mobilenet at 96 px. Messages: bundled/bert and, with --minilm,
all-MiniLM-L6-v2. ECE: expected calibration error over 15 bins, in points.
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

LABELS = (5, 20, 100, 0)
BINS = 15


@dataclass
class Options:
    fashion: str = ""
    """Folder of Fashion-MNIST's idx files; "" = without it."""
    minilm: str = ""
    """Folder of all-MiniLM-L6-v2; "" = without it."""
    draws: int = 5
    labels: tuple[int, ...] = LABELS
    """A class; 0 = all."""
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
    write: Callable[[Path, np.ndarray, np.ndarray], list[str]]

    def draw(self, labels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples to train on, and to test with."""
        order = np.random.default_rng(seed).permutation(len(self.targets))
        test, rest = order[: self.test_samples], order[self.test_samples :]
        if not labels:
            return rest, test
        chosen = [rest[self.targets[rest] == label][:labels] for label in np.unique(self.targets)]
        return np.concatenate(chosen), test


def image_task(name: str, source: ArraySource, features: torch.Tensor, test_samples: int, words: list[str]) -> Task:
    images, targets = source.images, source.targets

    def write(folder: Path, train: np.ndarray, test: np.ndarray) -> list[str]:
        for part, samples in (("train", train), ("test", test)):
            for number in samples.tolist():
                where = folder / part / str(int(targets[number]))
                where.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[number, 0].numpy()).save(where / f"{number:05}.png")
        return [words[0], "--images", str(folder), *words[1:]]

    return Task(name, targets.numpy(), features.numpy(), test_samples, write)


def text_task(name: str, words: list[str]) -> Task:
    source = open_texts("messages", "classification")

    def write(folder: Path, train: np.ndarray, test: np.ndarray) -> list[str]:
        folder.mkdir(parents=True)
        with open(folder / "t.csv", "w", newline="", encoding="utf-8") as stream:
            rows = csv.writer(stream)
            rows.writerow(["text", "label", "split"])
            for part, samples in (("train", train), ("test", test)):
                rows.writerows(
                    [source.texts[n], source.classes[int(source.targets[n])], part] for n in samples.tolist()
                )
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
SLOW_ROWS = 2_000  # LogisticRegressionCV is left out above: it takes minutes


def calibration_error(probabilities: np.ndarray, targets: np.ndarray) -> float:
    confidence, right = probabilities.max(1), probabilities.argmax(1) == targets
    error = 0.0
    for number in range(BINS):
        here = (confidence > number / BINS) & (confidence <= (number + 1) / BINS)
        if here.any():
            error += here.mean() * abs(confidence[here].mean() - right[here].mean())
    return 100 * error


def ours(task: Task, folder: Path, train: np.ndarray, test: np.ndarray, seed: int) -> dict[str, float]:
    words = task.write(folder / "data", train, test)
    run = folder / "run"
    finished = run_process(
        finetune_command(*words, "--seed", str(seed), "--quiet", "--no-report", "--track", "none", "--run", str(run))
    )
    found = json.loads(run_process(finetune_command("evaluate", str(run), "--json")).output)
    return {
        "accuracy": 100 * found["accuracy"], "f1": 100 * found["f1"], "ece": 100 * found["calibration_error"],
        "seconds": finished.seconds,
    }  # fmt: skip


def theirs(name: str, task: Task, train: np.ndarray, test: np.ndarray) -> dict[str, float]:
    folds = max(2, min(5, int(np.bincount(task.targets[train]).min())))
    model, started = OTHERS[name](folds), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(task.features[train], task.targets[train])
        seconds = time.perf_counter() - started
        predicted = model.predict(task.features[test])
        has_probabilities = hasattr(model, "predict_proba")
        probabilities = model.predict_proba(task.features[test]) if has_probabilities else None
    truth = task.targets[test]
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
        for labels in options.labels:
            for seed in range(options.draws):
                train, test = task.draw(labels, seed)
                if labels and len(train) < 0.95 * labels * len(np.unique(task.targets)):
                    continue
                cell = {"data": task.name, "labels": labels or "all", "draw": seed}
                with workplace() as folder:
                    rows.append(cell | {"head": "finetune"} | ours(task, folder, train, test, seed))
                for name in OTHERS:
                    if name == "LogisticRegressionCV" and len(train) > SLOW_ROWS:
                        continue
                    rows.append(cell | {"head": name} | theirs(name, task, train, test))
            show(rows, task.name, labels or "all")
    report("labels", "Accuracy, macro F1 and ECE in points", rows, options.output, dataclasses.asdict(options))


def show(rows: list[dict[str, Any]], data: str, labels: object) -> None:
    print(f"\n{data}, {labels} labels a class")
    for head in ("finetune", *OTHERS):
        cells = [row for row in rows if (row["data"], row["labels"], row["head"]) == (data, labels, head)]
        if cells:
            means = {name: np.mean([cell[name] for cell in cells]) for name in ("accuracy", "f1", "ece", "seconds")}
            print(f"  {head:<36}" + "".join(f"{name} {value:7.2f}  " for name, value in means.items()), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
