"""What the distilled encoder that ships is worth: a linear head on it, on its teacher, on an untrained twin.

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


def main(options: Options) -> None:
    encoders = {
        "teacher": ["--backbone", options.teacher],
        "bundled/bert": [],
        "untrained twin": ["--weights", "none"],
    }
    rows, kept = [], {}
    with workplace() as folder:
        for data, place in (("messages", "messages"), ("news", options.news)):
            row: dict[str, object] = {"data": data}
            for name, words in encoders.items():
                accuracies = []
                for seed in range(options.seeds):
                    run = fresh(folder, "run")
                    command = ["bert_head", "--texts", place, "--max-length", str(options.max_length), *words]
                    run_process(finetune_command(*command, "--seed", str(seed), "--run", str(run), "--quiet"))
                    accuracies.append(last_accuracy(run))
                row[name] = round(statistics.mean(accuracies), 4)
            margin = row["teacher"] - row["untrained twin"]
            kept[data] = (row["bundled/bert"] - row["untrained twin"]) / margin
            rows.append(row | {"share of the margin kept": round(kept[data], 3)})
    verdict = f"{'met' if kept['news'] >= TARGET else 'MISSED'} (target {TARGET})"
    settings = {"seeds": options.seeds, "max_length": options.max_length}
    title = f"A linear head on frozen text encoders, {options.max_length} tokens, accuracy"
    report("distillation", title, rows, options.output, options=settings, targets={"news": verdict})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
