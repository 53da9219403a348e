"""Does a model say that it does not know? Samples of another kind, told from held-out ones of its own.

    pip install '.[bench]'
    python benchmarks/novelty.py --fashion FOLDER

Models of the default recipes, trained by the kit, exported, loaded with `finetune.load`; `distance_percentile` and the
largest probability of `predict` are compared by AUROC (0.5 = chance, 1 = perfect). Held out are the samples that
validate; the heads are solved without them (`--final train`). Of another kind are: to handwritten digits printed
letters (matplotlib's fonts) and Fashion-MNIST; to photographs of seven things those of three others (`crops.py`), in
three ways; to messages of a web shop sentences of Python's documentation, and, hardest, one of the eight intents that
was not trained on.
"""

import csv
import dataclasses
import gzip
import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from common import report, workplace
from crops import write_crops

import finetune
from finetune import ImageTraining, Training, image_head, text_head
from finetune.data.digits import load_digits
from finetune.data.glyphs import render_glyphs
from finetune.data.open import open_source, split_data
from finetune.recipe.spec import Recipe

STRANGE_SAMPLES = 400
MODULES = (
    "argparse", "asyncio", "csv", "datetime", "decimal", "email", "http.client", "json", "logging", "os", "random",
    "re", "shutil", "socket", "sqlite3", "ssl", "statistics", "threading", "unittest", "zipfile",
)  # fmt: skip


@dataclass
class Options:
    fashion: str = ""
    """Folder with t10k-images-idx3-ubyte.gz of Fashion-MNIST; default: it is left out."""
    output: str = ""
    """JSON file; default: benchmarks/results/novelty.json."""


def auroc(known: list[float], strange: list[float]) -> float:
    """How often a strange sample has the larger value than a known one; a tie counts half."""
    ours, theirs = np.asarray(known)[:, None], np.asarray(strange)[None]
    return float((theirs > ours).mean() + (theirs == ours).mean() / 2)


def compared(name: str, other: str, model: finetune.LoadedModel, known: list, strange: list) -> dict[str, object]:
    """A row: how well the two are told apart."""
    inside, outside = model.predict(known, top_k=1), model.predict(strange, top_k=1)
    distance = auroc(*([one.distance_percentile for one in part] for part in (inside, outside)))
    chance = auroc(*([-one.top[0].probability for one in part] for part in (inside, outside)))
    unsure = [np.mean([bool(one.unsure) for one in part]) for part in (inside, outside)]
    return {
        "trained on": name, "against": other, "AUROC distance": round(distance, 3),
        "AUROC probability": round(chance, 3), "own called unsure": round(float(unsure[0]), 3),
        "others called unsure": round(float(unsure[1]), 3), "held out": len(known), "others": len(strange),
    }  # fmt: skip


def trained(recipe: Recipe, run: Path) -> finetune.LoadedModel:
    return finetune.fit(recipe, run, track="none", report=False, quiet=True).load()


def digits_rows(folder: Path, fashion: str) -> list[dict[str, object]]:
    rows, source, letters = [], load_digits(), render_glyphs("")
    chosen = (letters.targets >= 10).nonzero().flatten()
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:STRANGE_SAMPLES]
    strange = {"printed letters": letters.images[chosen[order]]}
    if fashion:
        content = gzip.decompress((Path(fashion) / "t10k-images-idx3-ubyte.gz").read_bytes())
        pixels = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 1, 28, 28)[:STRANGE_SAMPLES]
        strange["Fashion-MNIST"] = torch.from_numpy(pixels.copy())
    for backbone in ("bundled/vgg", "bundled/resnet"):
        recipe = image_head(images="digits", backbone=backbone, training=ImageTraining(final="train"))
        model = trained(recipe, folder / backbone.replace("/", "-"))
        known = list(source.images[split_data(open_source(recipe.data, "classification"), recipe).validation])
        rows += [compared(f"digits, {backbone}", name, model, known, list(them)) for name, them in strange.items()]
    return rows


def photo_rows(folder: Path) -> list[dict[str, object]]:
    """Classes in three groups; each in turn is what was never seen."""
    write_crops(folder / "crops")
    names, rows = sorted(path.name for path in (folder / "crops").iterdir()), []
    for number in range(3):
        left_out, table = names[number::3][:3], folder / f"photos-{number}.csv"
        files = sorted(path for path in (folder / "crops").glob("*/*") if path.parent.name not in left_out)
        with table.open("w", newline="") as stream:
            csv.writer(stream).writerows([("image", "label"), *((path, path.parent.name) for path in files)])
        recipe = image_head(images=str(table), backbone="bundled/mobilenet", training=ImageTraining(final="train"))
        model = trained(recipe, folder / f"photos-{number}")
        held = split_data(open_source(recipe.data, "classification"), recipe).validation.tolist()
        strange = sorted(path for path in (folder / "crops").glob("*/*") if path.parent.name in left_out)
        rows.append(
            compared(
                "photographs, bundled/mobilenet", ", ".join(left_out), model, [files[one] for one in held], strange
            )
        )
    return rows


def documentation() -> list[str]:
    """First paragraphs of what Python's own library says of itself."""
    found = set()
    for name in MODULES:
        for _, value in inspect.getmembers(importlib.import_module(name), callable):
            text = " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())
            if len(text.split()) > 6:
                found.add(text[:200])
    ordered = sorted(found)
    return [ordered[place] for place in np.linspace(0, len(ordered) - 1, STRANGE_SAMPLES).astype(int)]


def text_rows(folder: Path) -> list[dict[str, object]]:
    recipe = text_head(texts="messages", backbone="bundled/bert", training=Training(final="train"))
    source = open_source(recipe.data, "classification")
    held = split_data(source, recipe).validation.tolist()
    model = trained(recipe, folder / "messages")
    known = np.array([source.texts[one] for one in held], dtype=object)
    rows = [
        compared(
            "messages, bundled/bert", "Python's documentation", model, known, np.array(documentation(), dtype=object)
        )
    ]
    for number, intent in enumerate(source.classes):
        table = folder / f"without-{number}.csv"
        kept = [one for one in range(len(source.texts)) if int(source.targets[one]) != number]
        with table.open("w", newline="", encoding="utf-8") as stream:
            lines = [(source.texts[one], source.classes[int(source.targets[one])]) for one in kept]
            csv.writer(stream).writerows([("text", "label"), *lines])
        recipe = text_head(texts=str(table), backbone="bundled/bert", training=Training(final="train"))
        model, own = trained(recipe, folder / f"without-{number}"), open_source(recipe.data, "classification")
        held = split_data(own, recipe).validation.tolist()
        strange = [source.texts[one] for one in range(len(source.texts)) if int(source.targets[one]) == number]
        known, others = (np.array(texts, dtype=object) for texts in ([own.texts[one] for one in held], strange))
        rows.append(compared("messages of 7 intents", intent, model, known, others))
    return rows


def main(options: Options) -> None:
    with workplace() as folder:
        rows = digits_rows(folder, options.fashion) + photo_rows(folder) + text_rows(folder)
    settings = dataclasses.asdict(options) | {"fashion": bool(options.fashion)}
    report("novelty", "Samples of another kind, told apart", rows, options.output, settings)


if __name__ == "__main__":
    main(tyro.cli(Options))
