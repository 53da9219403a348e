"""The same head on texts trained by others, each as a whole process: `text_peers.py NAME WORK --result FILE`.

All get the same texts as strings and the same encoder in a folder, frozen and in eval mode; AdamW at 3e-3 with weight
decay 1e-2, batches of 64, validation and a checkpoint after each epoch. Each pads to the longest of a batch, as its own
documentation does it, and imports only what it needs. "floor" keeps the features in memory, and runs over texts sorted
by length.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

BATCH, LEARNING_RATE, WEIGHT_DECAY = 64, 3e-3, 1e-2


def floor(data: dict, epochs: int, folder: Path) -> float:
    """One pass by hand, then a linear layer on what it gave."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data["backbone"])
    model = AutoModel.from_pretrained(data["backbone"], dtype=torch.float32).eval()
    rows = data["train"] + data["validation"]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number][0]))
    features = torch.zeros(len(rows), model.config.hidden_size)
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            inputs = tokenizer(
                [rows[number][0] for number in chosen], padding=True, truncation=True, max_length=data["max_length"],
                return_tensors="pt",
            )  # fmt: skip
            hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
            features[chosen] = (hidden * mask).sum(1) / mask.sum(1)
    targets = torch.tensor([label for _, label in rows])
    count = len(data["train"])
    head = nn.Linear(features.shape[1], data["classes"])
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    accuracy = 0.0
    for _ in range(epochs):
        for chosen in torch.randperm(count).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(head(features[chosen]), targets[chosen]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = (head(features[count:]).argmax(1) == targets[count:]).float().mean().item()
        torch.save(head.state_dict(), folder / "head.pt")
    return accuracy


def huggingface(data: dict, epochs: int, folder: Path) -> float:
    import numpy as np
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(data["backbone"])
    model = AutoModelForSequenceClassification.from_pretrained(
        data["backbone"], num_labels=data["classes"], dtype=torch.float32
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("bert.") or "pooler" in name)
    model.eval()

    class Rows(torch.utils.data.Dataset):
        def __init__(self, part):
            texts = [text for text, _ in data[part]]
            self.tokens = tokenizer(texts, truncation=True, max_length=data["max_length"])
            self.labels = [label for _, label in data[part]]

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            return {name: values[index] for name, values in self.tokens.items()} | {"labels": self.labels[index]}

    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="constant", eval_strategy="epoch", save_strategy="epoch", save_total_limit=1,
        logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=Rows("train"), eval_dataset=Rows("validation"),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {"accuracy": float(np.mean(found.predictions.argmax(1) == found.label_ids))},
    )  # fmt: skip
    trainer.train()
    return [line["eval_accuracy"] for line in trainer.state.log_history if "eval_accuracy" in line][-1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=["floor", "huggingface"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args()
    data = json.loads((options.work / "data.json").read_text())
    folder = Path(tempfile.mkdtemp(dir=options.work))
    accuracy = {"floor": floor, "huggingface": huggingface}[options.peer](data, options.epochs, folder)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    options.result.write_text(json.dumps({"accuracy": accuracy, "checkpoint_bytes": sum(sizes)}))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
