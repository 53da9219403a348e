"""The promise of the kit, with real processes: SIGKILLed again and again, the end is the same bit for bit."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    assert_equal_values,
    comparable,
    finetune,
    finish,
    kill_after_progress,
    last_step,
    metrics_lines,
    read,
)

from finetune.data.digits import load_digits
from finetune.data.images import split_source
from finetune.data.order import epoch_order
from finetune.store import checkpoint
from finetune.store.run_folder import RunFolder

KILLS_PER_EPOCH = 3
EPOCHS = 2
BATCH = 32
TRAIN_SAMPLES = 640  # 20 steps an epoch


def kill_through(run: RunFolder, command: list[str], seed: int) -> list[int]:
    """Run and resume until every epoch was killed `KILLS_PER_EPOCH` times; returns position_samples at each kill."""
    chance = random.Random(seed)
    positions: list[int] = []
    words = command
    for epoch in range(EPOCHS):
        kills = 0
        while kills < KILLS_PER_EPOCH:
            process = finetune(*words)
            kill_after_progress(process, run, chance.randint(1, 4))
            found = checkpoint.newest_good(run.checkpoints, run.read_recipe().id)
            assert found is not None
            progress = found[1].progress
            assert progress.epoch == epoch or (progress.epoch == epoch + 1 and progress.position_samples == 0)
            positions.append(progress.position_samples)
            kills += 1
            words = ["resume", str(run.path)]
        if epoch + 1 < EPOCHS:
            # On to the next epoch: run until its first step was saved, then go on from there.
            process = finetune(*words)
            steps = TRAIN_SAMPLES // BATCH * (epoch + 1) + 1 - last_step(run)
            kill_after_progress(process, run, steps)
    return positions


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        pytest.param(
            "resnet_head", ["--workers", "2", "--accumulate", "4", "--precision", "bf16"], marks=pytest.mark.slow
        ),
        ("vgg_head", ["--workers", "0"]),
        pytest.param(
            "vgg_head", ["--workers", "2", "--accumulate", "4", "--worker-start", "spawn"], marks=pytest.mark.slow
        ),
    ],
    ids=["resnet, two workers, bf16, accumulated", "vgg, in process", "vgg, spawned workers, accumulated"],
)
def test_killed_three_times_an_epoch_the_end_is_bit_for_bit_that_of_the_unbroken_run(tmp_path, recipe, options):
    common = [
        recipe, "--augment", "light", "--dropout", "0.3", "--epochs", str(EPOCHS), "--batch-size", str(BATCH),
        "--train-samples", str(TRAIN_SAMPLES), "--save-every-steps", "1", "--log-every-steps", "1", "--device", "cpu",
        *options,
    ]  # fmt: skip
    broken, unbroken = RunFolder(tmp_path / "broken"), RunFolder(tmp_path / "unbroken")
    positions = kill_through(broken, [*common, "--run", str(broken.path)], seed=len(recipe))
    last = finetune("resume", str(broken.path))
    whole = finetune(*common, "--run", str(unbroken.path))
    assert finish(last).splitlines()[-1] == str(broken.path)
    finish(whole)

    assert len(positions) >= KILLS_PER_EPOCH * EPOCHS
    mid_epoch = [position for position in positions if 0 < position < TRAIN_SAMPLES]
    assert len(mid_epoch) > len(positions) / 2
    for name in ("latest.pt", "best.pt"):
        ours, theirs = read(broken, name), read(unbroken, name)
        assert_equal_values(comparable(ours), comparable(theirs), name)
    assert metrics_lines(broken) == metrics_lines(unbroken)
    exports = [run.path / "model.pt" for run in (broken, unbroken)]
    for run in (broken, unbroken):
        finish(finetune("export", str(run.path), "--from", "latest"))
    assert exports[0].read_bytes() == exports[1].read_bytes()


def test_the_interrupted_epoch_sees_each_sample_exactly_once(tmp_path):
    """A recipe of the user's own writes down which samples each batch holds; killed in the middle, then resumed."""
    seen_file = tmp_path / "seen.jsonl"
    hook = tmp_path / "sitecustomize.py"
    # Loaded by Python at start-up: notes every sample that is fetched for training, in the process that fetches it.
    hook.write_text(
        "import json, os\n"
        "def install():\n"
        "    from finetune.data import images\n"
        "    fetch = images.ImagePipeline.fetch\n"
        "    def noting(self, request):\n"
        "        if request.augment_epoch is not None:\n"
        f"            with open({str(seen_file)!r}, 'a') as file:\n"
        "                print(json.dumps([request.augment_epoch, os.getpid(), request.indices]), file=file)\n"
        "        return fetch(self, request)\n"
        "    images.ImagePipeline.fetch = noting\n"
        "import sys\n"
        "if any('finetune' in word for word in sys.orig_argv):\n"
        "    install()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = RunFolder(tmp_path / "run")
    process = finetune(
        "vgg_head", "--epochs", "1", "--batch-size", str(BATCH), "--train-samples", str(TRAIN_SAMPLES),
        "--augment", "light", "--save-every-steps", "1", "--keep", "100", "--device", "cpu", "--run", str(run.path), env=environment,
    )  # fmt: skip
    kill_after_progress(process, run, 7)
    _, state, _ = checkpoint.newest_good(run.checkpoints, run.read_recipe().id)
    finish(finetune("resume", str(run.path), env=environment))

    lines = [json.loads(line) for line in seen_file.read_text().splitlines()]
    first = [index for _, pid, indices in lines if pid == lines[0][1] for index in indices]
    second = [index for _, pid, indices in lines if pid != lines[0][1] for index in indices]
    # The killed process may have begun a step that was not saved: that one is computed again, none is skipped.
    counted = first[: state.progress.position_samples] + second
    train_indices, _, _ = split_source(load_digits(), 0.2, 0, TRAIN_SAMPLES)
    assert counted == train_indices[epoch_order(0, 0, TRAIN_SAMPLES)].tolist()
    assert sorted(counted) == sorted(train_indices.tolist())
    assert len(first) - state.progress.position_samples in (0, BATCH)


def test_a_terminated_run_exits_75_and_the_same_command_with_resume_ends_it(tmp_path):
    run = RunFolder(tmp_path / "run")
    command = [
        "vgg_head", "--epochs", "2", "--train-samples", "640", "--save-every-steps", "1", "--device", "cpu",
        "--run", str(run.path), "--resume",
    ]  # fmt: skip
    process = finetune(*command)
    deadline = time.monotonic() + 120
    while last_step(run) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    started = time.monotonic()
    process.terminate()
    output = finish(process, code=75)
    assert time.monotonic() - started < 5
    assert "stopped by SIGTERM" in output and f"finetune resume {run.path}" in output
    assert "resuming" in finish(finetune(*command))
    assert "is finished at step 20" in finish(finetune(*command))


def test_a_run_killed_before_its_first_checkpoint_starts_over_by_the_same_command(tmp_path):
    run = RunFolder(tmp_path / "run")
    command = ["vgg_head", "--epochs", "1", "--train-samples", "100", "--device", "cpu", "--run", str(run.path)]
    process = finetune(*command)
    deadline = time.monotonic() + 120
    while not run.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not Path(run.checkpoints / "latest.pt").exists()
    assert finish(finetune(*command)).splitlines()[-1] == str(run.path)
    assert read(run)["status"] == "finished"
