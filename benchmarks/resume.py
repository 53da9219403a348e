"""Does it matter where in a long epoch a run died? Seconds from the start of the process to the next step.

    python benchmarks/resume.py

Resumed at 1, 50 and 99 % of an epoch over 20,000 image files, augmented anew in each epoch, so that the backbone runs.
Who finds the place by going through the epoch again needs the longer, the later it died.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro
from common import finetune_command, median, report, run_process, workplace

BATCH, CLASSES, SIZE = 64, 10, 32
POSITIONS = (0.01, 0.50, 0.99)


@dataclass
class Options:
    files: int = 20_000
    """Images in the epoch."""
    repeats: int = 3
    """Rounds; medians count."""
    only: str = ""
    """Used by the benchmark itself: lightning or huggingface."""
    folder: str = ""
    """Used by the benchmark itself."""
    step: int = 0
    """Used by the benchmark itself: resume there; 0 = train and save."""
    output: str = ""
    """JSON file; default: benchmarks/results/resume.json."""


def make_files(folder: Path, count: int) -> Path:
    """The digits as PNG files, again and again by hard links."""
    from PIL import Image

    from finetune.data.digits import load_digits

    digits, images = load_digits(), folder / "images"
    for index in range(count):
        number = index % len(digits.targets)
        path = images / str(int(digits.targets[number])) / f"{index:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index < len(digits.targets):
            Image.fromarray(digits.images[number, 0].numpy()).resize((96, 96)).save(path)
        else:
            os.link(images / str(int(digits.targets[number])) / f"{number:06}.png", path)
    return images


def steps_of(count: int) -> list[int]:
    """The steps to resume at; four fifths of the images train."""
    steps = count * 4 // 5 // BATCH
    return [max(round(steps * position), 1) for position in POSITIONS]


# ---- Ours -----------------------------------------------------------------------------------------------------------


def train_ours(folder: Path) -> Path:
    run = folder / "run"
    words = ["vgg_head", "--images", str(folder / "images"), "--augment", "light", "--epochs", "1", "--run", str(run)]
    words += ["--save-every-steps", "1", "--keep", "1000", "--log-every-steps", "1", "--workers", "0", "--quiet"]
    run_process(finetune_command(*words))
    return run


def resume_ours(run: Path, step: int) -> float:
    metrics, checkpoint = run / "metrics.jsonl", run / "checkpoints" / f"step-{step:06d}.pt"
    inode, started = metrics.stat().st_ino, time.perf_counter()
    words = ["resume", str(run), "--from", str(checkpoint), "--workers", "0", "--quiet"]
    process = subprocess.Popen(finetune_command(*words), stdout=subprocess.DEVNULL, start_new_session=True)
    while metrics.stat().st_ino == inode or not _has_step(metrics, step + 1):
        if process.poll() is not None:
            raise SystemExit(f"finetune resume ended with {process.returncode}")
        time.sleep(0.002)
    seconds = time.perf_counter() - started
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return seconds


def _has_step(metrics: Path, step: int) -> bool:
    lines = metrics.read_bytes().splitlines()
    return bool(lines) and lines[-1].endswith(b"}") and json.loads(lines[-1])["step"] >= step


# ---- Theirs ---------------------------------------------------------------------------------------------------------


def their_data(folder: Path):
    import torch
    from PIL import Image
    from torchvision.transforms import v2

    paths = sorted((folder / "images").rglob("*.png"))
    paths = [path for number, path in enumerate(paths) if number % 5]
    change = v2.Compose(
        [v2.PILToTensor(), v2.RandomAffine(10, (0.1, 0.1)), v2.RandomResizedCrop(SIZE, (0.7, 1.0), antialias=True),
         v2.ColorJitter(0.2, 0.2), v2.ToDtype(torch.float32, scale=True)]
    )  # fmt: skip

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, index):
            with Image.open(paths[index]) as image:
                return {"images": change(image.convert("RGB")), "labels": int(paths[index].parent.name)}

    return Images()


def their_model():
    from finetune.models.bundled import BUNDLED

    model = BUNDLED["bundled/vgg"][0](CLASSES)
    for parameter in model.features.parameters():
        parameter.requires_grad_(False)
    return model


def lightning(folder: Path, steps: list[int], step: int) -> None:
    import lightning as L
    import torch
    from torch.nn import functional

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = their_model()

        def training_step(self, batch, _number):
            return functional.cross_entropy(self.model(batch["images"]), batch["labels"])

        def on_train_batch_end(self, *_arguments):
            if step:
                leave()
            if self.trainer.global_step in steps:
                self.trainer.save_checkpoint(folder / f"lightning-{self.trainer.global_step}.ckpt")

        def configure_optimizers(self):
            return torch.optim.AdamW(self.model.classifier.parameters(), lr=3e-3)

    loader = torch.utils.data.DataLoader(their_data(folder), BATCH, shuffle=True)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Module(), loader, ckpt_path=folder / f"lightning-{step}.ckpt" if step else None)


def huggingface(folder: Path, steps: list[int], step: int) -> None:
    import torch
    from peers import WithLoss
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class AtStep(TrainerCallback):
        def on_step_end(self, arguments, state, control, **_named):
            if step:
                leave()
            control.should_save = state.global_step in steps

    model = WithLoss(their_model())
    arguments = TrainingArguments(
        output_dir=str(folder / "hf"), num_train_epochs=1, per_device_train_batch_size=BATCH, save_strategy="no",
        logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=their_data(folder), callbacks=[AtStep()],
        optimizers=(torch.optim.AdamW(model.model.classifier.parameters(), lr=3e-3), None),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(folder / "hf" / f"checkpoint-{step}") if step else None)


def leave() -> None:
    """The first step after a resume is done: that is all we want to know."""
    print("first step", flush=True)
    os._exit(0)


THEIRS = {"lightning": lightning, "huggingface": huggingface}


def their_process(name: str, options: Options, folder: Path, step: int = 0) -> float:
    words = ["--only", name, "--folder", str(folder), "--files", str(options.files), "--step", str(step)]
    finished = run_process([sys.executable, __file__, *words])
    if step and "first step" not in finished.output:
        raise SystemExit(f"{name} did not go on at step {step}:\n{finished.output[-2000:]}")
    return finished.seconds


def main(options: Options) -> None:
    steps = steps_of(options.files)
    if options.only:
        THEIRS[options.only](Path(options.folder), steps, options.step)
        return
    with workplace() as folder:
        make_files(folder, options.files)
        run = train_ours(folder)
        for name in THEIRS:
            their_process(name, options, folder)
        resume: dict[str, Callable[[int], float]] = {"finetune": lambda step: resume_ours(run, step)}
        resume |= {name: lambda step, name=name: their_process(name, options, folder, step) for name in THEIRS}
        times: dict[str, dict[int, list[float]]] = {name: {step: [] for step in steps} for name in resume}
        # Ours goes back to an earlier place: then the later ones are set aside. So from the end to the beginning,
        # and what was set aside comes back for the next round.
        for _ in range(options.repeats):
            for step in reversed(steps):
                for name in resume:
                    times[name][step].append(resume[name](step))
            for path in (run / "checkpoints" / "superseded").glob("step-*.pt"):
                path.replace(run / "checkpoints" / path.name)
    rows = []
    for name, by_step in times.items():
        seconds = [median(by_step[step]) for step in steps]
        at = {f"at {position:.0%}, s": round(value, 2) for position, value in zip(POSITIONS, seconds, strict=True)}
        rows.append({"": name, **at, "99 % over 1 %": seconds[-1] / seconds[0]})
    spread = max(max(values) / min(values) for values in times["finetune"].values())
    ratio = rows[0]["99 % over 1 %"]
    targets = {"equal within noise": f"{'met' if ratio <= spread else 'MISSED'} ({ratio:.3f}, noise {spread:.3f})"}
    title = f"From the start of the process to the next step, in an epoch over {options.files:,} files"
    report("resume", title, rows, options.output, options=dataclasses.asdict(options), targets=targets)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
