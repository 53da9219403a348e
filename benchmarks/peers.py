"""The same head trained by others, each as a whole process: `python peers.py NAME WORK --epochs 10 --result FILE`.

All get the digits as ready tensors, the same frozen backbone in eval mode under `no_grad`, a new linear layer, AdamW at
3e-3 with weight decay 1e-2, batches of 64, validation and a checkpoint after each epoch. All compute in channels_last
but the Hugging Face Trainer, which cannot save such weights. Each is written as its own documentation does it, and
imports only what it needs.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

BATCH, LEARNING_RATE, WEIGHT_DECAY, CLASSES = 64, 3e-3, 1e-2, 10


class HeadOnly(nn.Module):
    """A frozen backbone, always in eval mode and without gradients, and a head that trains."""

    def __init__(self, work: Path, name: str, memory_format: torch.memory_format):
        super().__init__()
        model = torchvision.models.get_model(name)
        model.load_state_dict(torch.load(work / "backbone.pth", weights_only=True))
        path, old = [item for item in model.named_modules() if isinstance(item[1], nn.Linear)][-1]
        torch.manual_seed(0)
        self.head = nn.Linear(old.in_features, CLASSES)
        model.set_submodule(path, nn.Identity())
        self.memory_format = memory_format
        self.backbone = model.eval().requires_grad_(False).to(memory_format=memory_format)

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()
        return self

    def features(self, images):
        with torch.no_grad():
            return self.backbone(images.contiguous(memory_format=self.memory_format))

    def forward(self, images):
        return self.head(self.features(images))


class WithLoss(nn.Module):
    """A model as the Hugging Face Trainer wants it: it computes its own loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images, labels=None):
        logits = self.model(images)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def loader(data: dict, part: str, shuffle: bool):
    dataset = torch.utils.data.TensorDataset(data[f"{part}_images"], data[f"{part}_targets"])
    return DataLoader(dataset, BATCH, shuffle=shuffle)


def size_bytes(path: Path) -> int:
    """Of a file, or of all in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def largest_file(folder: Path) -> int:
    """Bytes of the largest checkpoint: a file, or a folder of files that belong together."""
    return max(map(size_bytes, folder.iterdir()), default=0)


def raw(model: HeadOnly, data: dict, epochs: int, folder: Path) -> float:
    return by_hand(model, loader(data, "train", True), loader(data, "validation", False), epochs, folder)


def by_hand(model: nn.Module, train: DataLoader, validation: DataLoader, epochs: int, folder: Path) -> float:
    """The loop that everybody writes."""
    optimizer, accuracy = adamw(model), 0.0
    for epoch in range(epochs):
        model.train()
        for images, targets in train:
            loss = functional.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        right = 0
        with torch.inference_mode():
            for images, targets in validation:
                right += (model(images).argmax(1) == targets).sum().item()
        accuracy = right / len(validation.dataset)
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, folder / "last.pt"
        )
    return accuracy


def floor(model: HeadOnly, data: dict, epochs: int, folder: Path) -> float:
    """Thirty lines that run the backbone once and keep its features in memory."""
    model.eval()
    with torch.inference_mode():
        rows = {
            part: torch.cat([model.features(images) for images in data[f"{part}_images"].split(BATCH)])
            for part in ("train", "validation")
        }
    rows = {part: value.clone() for part, value in rows.items()}
    head, optimizer, accuracy = model.head, adamw(model), 0.0
    for epoch in range(epochs):
        for batch in torch.randperm(len(rows["train"])).split(BATCH):
            loss = functional.cross_entropy(head(rows["train"][batch]), data["train_targets"][batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.inference_mode():
            right = head(rows["validation"]).argmax(1) == data["validation_targets"]
        accuracy = right.float().mean().item()
        torch.save({"head": head.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, folder / "last.pt")
    return accuracy


def lightning(model: HeadOnly, data: dict, epochs: int, folder: Path) -> float:
    return by_lightning(model, loader(data, "train", True), loader(data, "validation", False), epochs, folder)


def by_lightning(model: nn.Module, train: DataLoader, validation: DataLoader, epochs: int, folder: Path) -> float:
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.right, self.seen = model, 0, 0

        def training_step(self, batch, _number):
            return functional.cross_entropy(self.model(batch[0]), batch[1])

        def on_validation_epoch_start(self):
            self.right = self.seen = 0

        def validation_step(self, batch, _number):
            self.right += (self.model(batch[0]).argmax(1) == batch[1]).sum().item()
            self.seen += len(batch[1])

        def configure_optimizers(self):
            return adamw(self.model)

    module = Module()
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[ModelCheckpoint(folder)],
    )  # fmt: skip
    trainer.fit(module, train, validation)
    return module.right / module.seen


def huggingface(model: HeadOnly, data: dict, epochs: int, folder: Path) -> float:
    import numpy as np
    from transformers import Trainer, TrainingArguments

    class Rows(torch.utils.data.Dataset):
        def __init__(self, part):
            self.images, self.targets = data[f"{part}_images"], data[f"{part}_targets"]

        def __len__(self):
            return len(self.targets)

        def __getitem__(self, index):
            return {"images": self.images[index], "labels": self.targets[index]}

    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="constant", eval_strategy="epoch", save_strategy="epoch", save_total_limit=1,
        logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        WithLoss(model), arguments, train_dataset=Rows("train"), eval_dataset=Rows("validation"),
        optimizers=(adamw(model), None),
        compute_metrics=lambda found: {"accuracy": float(np.mean(found.predictions.argmax(1) == found.label_ids))},
    )  # fmt: skip
    trainer.train()
    return [line["eval_accuracy"] for line in trainer.state.log_history if "eval_accuracy" in line][-1]


def fastai(model: HeadOnly, data: dict, epochs: int, folder: Path) -> float:
    from fastai.callback.tracker import SaveModelCallback
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from fastai.optimizer import Adam
    from torch.utils.data import TensorDataset

    sets = [TensorDataset(data[f"{part}_images"], data[f"{part}_targets"]) for part in ("train", "validation")]
    loaders = DataLoaders(
        DataLoader(sets[0], bs=BATCH, shuffle=True, num_workers=0), DataLoader(sets[1], bs=BATCH, num_workers=0)
    )
    learner = Learner(
        loaders, model, loss_func=nn.CrossEntropyLoss(), opt_func=Adam, lr=LEARNING_RATE, wd=WEIGHT_DECAY,
        metrics=accuracy, path=folder, model_dir=".",
        splitter=lambda m: [list(m.backbone.parameters()), list(m.head.parameters())], train_bn=False,
        cbs=SaveModelCallback(every_epoch=True, with_opt=True),
    )  # fmt: skip
    learner.freeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit(epochs)
    return float(learner.recorder.values[-1][-1])


PEERS = {"raw": raw, "floor": floor, "lightning": lightning, "huggingface": huggingface, "fastai": fastai}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("work", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--result", type=Path)
    options = parser.parse_args()
    data = torch.load(options.work / "data.pt", weights_only=True)
    memory_format = torch.contiguous_format if options.peer == "huggingface" else torch.channels_last
    model = HeadOnly(options.work, data["name"], memory_format)
    folder = Path(tempfile.mkdtemp(dir=options.work))
    started = time.perf_counter()
    accuracy = PEERS[options.peer](model, data, options.epochs, folder)
    found = {
        "accuracy": accuracy,
        "checkpoint_bytes": largest_file(folder),
        "training_seconds": time.perf_counter() - started,
    }
    shutil.rmtree(folder)
    options.result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
