"""What the distilled encoder that ships is worth: a linear head on it, on its teacher, on an untrained twin; and what
LogisticRegression makes of counted words (tf-idf, one and two at a time).

    python benchmarks/distillation.py --teacher FOLDER --news FOLDER

FOLDER of the teacher: all-MiniLM-L6-v2. FOLDER of the news: TOPIC/*.txt, as in the BBC's five topics (Greene and
Cunningham, ICML 2006), which no encoder here was distilled on. Accuracies are means over splits and first weights.
"""

import statistics
from dataclasses import dataclass

import tyro
from common import finetune_command, fresh, last_accuracy, report, run_process, workplace

# Of the teacher's margin over the untrained twin, on the news.
TARGET = 0.90
# (data, labels to train on; 0 = all).
TASKS = (("messages", 80), ("messages", 160), ("messages", 320), ("messages", 0), ("news", 0))


@dataclass
class Options:
    teacher: str
    """Folder of the teacher."""
    news: str
    """Folder of the news."""
    seeds: int = 5
    """Splits and first weights."""
    max_length: int = 128
    """Tokens of a text."""
    output: str = ""
    """JSON file; default: benchmarks/results/distillation.json."""


def counted(place: str, labels: int, seed: int) -> float:
    """Accuracy on the same split."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    from finetune import Training
    from finetune.data.open import open_source, split_data
    from finetune.recipe.scripts import load_recipe_function, shipped_recipes

    function = load_recipe_function(shipped_recipes()["bert_head"])
    recipe = function(texts=place, seed=seed, training=Training(train_samples=labels))
    source = open_source(recipe.data, recipe.task.kind)
    train, validation = (
        ([source.texts[n] for n in part.tolist()], source.targets[part]) for part in split_data(source, recipe)[:2]
    )
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=2_000)
    )
    return model.fit(*train).score(*validation)


def main(options: Options) -> None:
    encoders = {
        "teacher": ["--backbone", options.teacher],
        "bundled/bert": [],
        "untrained twin": ["--weights", "none"],
    }
    rows = []
    with workplace() as folder:
        for data, labels in TASKS:
            place = options.news if data == "news" else data
            row: dict[str, object] = {"data": data, "labels": labels or "all"}
            words = ["--texts", place, "--max-length", str(options.max_length), "--train-samples", str(labels)]
            for name, encoder in encoders.items():
                accuracies = []
                for seed in range(options.seeds):
                    run = fresh(folder, "run")
                    command = ["bert_head", *words, *encoder, "--seed", str(seed), "--run", str(run), "--quiet"]
                    run_process(finetune_command(*command))
                    accuracies.append(last_accuracy(run))
                row[name] = round(statistics.mean(accuracies), 4)
            row["words counted"] = round(
                statistics.mean(counted(place, labels, seed) for seed in range(options.seeds)), 4
            )
            kept = (row["bundled/bert"] - row["untrained twin"]) / (row["teacher"] - row["untrained twin"])
            rows.append(row | {"share of the margin kept": round(kept, 3)})
    verdict = f"{'met' if kept >= TARGET else 'MISSED'} (target {TARGET})"
    settings = {"seeds": options.seeds, "max_length": options.max_length}
    title = f"A linear head on frozen text encoders, {options.max_length} tokens, accuracy"
    report("distillation", title, rows, options.output, options=settings, targets={"news": verdict})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
