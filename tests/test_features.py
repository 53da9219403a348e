"""Runs on kept features: the same samples, the same figures, exact at a resume; real kills, real second processes."""

import dataclasses
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import pytest
import torch
from conftest import (
    DyingTerminal,
    Killed,
    assert_equal_runs,
    finetune,
    finish,
    kill_after_progress,
    metrics_lines,
    read,
    resume_in,
    resume_run,
    small_recipe,
    start_in,
    train_run,
    train_with_deaths,
)
from PIL import Image

from finetune import Images, Model, Optimizer, Trainable, UsageError
from finetune.base.files import read_json, write_json
from finetune.data import source
from finetune.data.batch import Request
from finetune.data.decode import BrokenImage
from finetune.data.digits import load_digits
from finetune.data.images import ImagePipeline
from finetune.errors import RunError
from finetune.features.cache import entries
from finetune.features.feature_file import RowFile, read_layout
from finetune.features.kept import Features
from finetune.recipe.execution import Machine, Numerics, Settings
from finetune.recipe.head_options import AnyTable
from finetune.runs.evaluate import evaluate
from finetune.runs.start import Plan, new_setup
from finetune.store.restore import trained_network
from finetune.store.run_folder import RunFolder
from finetune.training.context import RunContext
from finetune.training.phase import start_phase


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Nothing is kept from before."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "features"))
    return tmp_path / "features"


@pytest.fixture
def fetched(monkeypatch) -> list[list[int]]:
    """The samples that were read as images, batch by batch."""
    seen, fetch = [], ImagePipeline.fetch

    def noting(self, request):
        seen.append(request.indices)
        return fetch(self, request)

    monkeypatch.setattr(ImagePipeline, "fetch", noting)
    return seen


def plain_recipe(**changes):
    return small_recipe(**{"augment": "none"} | changes)


def views_recipe(**changes):
    return small_recipe(data=Images("digits", augment="light", views=2, train_samples=100), epochs=3, **changes)


def thawing_recipe(**changes):
    """The head alone, then the last block, then everything."""
    rules = (("head", "trainable", 0), ("features.8", "trainable", 1), ("*", "trainable", 2))
    return plain_recipe(trainable=Trainable(rules=rules), epochs=3, **changes)


def train_and_listen(path, recipe, *, cache_limit="", **numerics) -> list[str]:
    """What a run says of its features."""
    terminal = DyingTerminal()
    machine = Machine("cpu", workers=0, cache_limit=cache_limit)
    start_in(path, "test", recipe, Numerics(**numerics), machine, Settings(), terminal)
    return [line for line in terminal.lines if line.startswith("features:")]


# ---- Once -----------------------------------------------------------------------------------------------------------


def test_the_backbone_sees_each_image_once_and_a_second_run_reads_none(tmp_path, fetched):
    first = train_run(tmp_path / "first", plain_recipe(epochs=3))
    counted = sorted(index for batch in fetched for index in batch)
    facts = read(first)["data"]
    assert len(counted) == len(set(counted)) == facts["train_samples"] + facts["validation_samples"]
    fetched.clear()
    second = train_run(tmp_path / "second", plain_recipe(epochs=3))
    assert fetched == []
    assert_equal_runs(second, first)


@pytest.mark.slow
def test_another_head_rate_and_order_use_the_same_entry(tmp_path, fetched):
    data = Images("digits")
    train_run(tmp_path / "first", plain_recipe(data=data, epochs=1))
    fetched.clear()
    for number, changes in enumerate(({"head": "mlp"}, {"seed": 9}, {"optimizer": Optimizer(name="sgd", lr=0.1)})):
        train_run(tmp_path / str(number), plain_recipe(data=data, epochs=1, **changes))
    assert fetched == [] and len(entries()) == 1


def test_other_weights_size_data_or_precision_are_other_entries(tmp_path):
    train_run(tmp_path / "first", plain_recipe(epochs=1))
    others = [
        plain_recipe(epochs=1, model=Model("bundled/vgg", weights="none")),
        plain_recipe(epochs=1, data=Images("digits", image_size=24, train_samples=100)),
        plain_recipe(epochs=1, data=Images("digits", train_samples=101)),
        plain_recipe(epochs=1, backbone="bundled/resnet"),
    ]
    for number, recipe in enumerate(others, 2):
        train_run(tmp_path / str(number), recipe)
        assert len(entries()) == number
    train_run(tmp_path / "bf16", plain_recipe(epochs=1), backbone_precision="bf16")
    assert len(entries()) == len(others) + 2


def test_cached_and_uncached_runs_see_the_same_samples_in_the_same_order(tmp_path, fetched, monkeypatch):
    asked, batches = [], Features.batches

    def noting(self, requests):
        for request in requests:
            asked.append(request.indices)
            yield from batches(self, [request])

    monkeypatch.setattr(Features, "batches", noting)
    train_run(tmp_path / "cached", plain_recipe())
    fetched.clear()
    train_run(tmp_path / "uncached", plain_recipe(), cache=False)
    first_look = -(-100 // 64)
    assert fetched[first_look:] == asked


@pytest.mark.parametrize(
    "make", [plain_recipe, *(pytest.param(one, marks=pytest.mark.slow) for one in (views_recipe, thawing_recipe))]
)
def test_cached_and_uncached_runs_agree_within_1e_4_on_the_logits(tmp_path, make):
    recipe = make(dropout=0.0, seed=2)
    runs = [train_run(tmp_path / str(cache), recipe, cache=cache) for cache in (True, False)]
    assert [read(run)["frozen"]["features_kept"] for run in runs] == [make is not thawing_recipe, False]
    images = load_digits().images[:50].expand(-1, 3, -1, -1).float().repeat_interleave(4, 2).repeat_interleave(4, 3)
    with torch.inference_mode():
        ours, theirs = (trained_network(run, "latest")[0].module(images / 255) for run in runs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_logits_of_kept_features_are_those_of_the_network(tmp_path):
    job, _ = new_setup(Plan(plain_recipe(), Numerics(), Machine("cpu", workers=0)))
    phase = start_phase(job, 0, RunContext.silent())
    batch = job.data.pipeline.fetch(Request(list(range(64))))
    chosen = [index for index in batch.indices.tolist() if index in set(torch.cat(job.data.split).tolist())]
    job.network.module.eval()
    with torch.inference_mode():
        rows = phase.feed.features.read(torch.tensor(chosen), None)
        whole = job.network.module(batch.inputs[chosen])
        torch.testing.assert_close(phase.feed.forward(rows), whole, rtol=0, atol=1e-5)
    phase.close()


# ---- Exact ----------------------------------------------------------------------------------------------------------


KILLED = {
    "plain": (plain_recipe, {}),
    "bf16": (plain_recipe, {"precision": "bf16"}),
    "backbone in bf16": (plain_recipe, {"backbone_precision": "bf16"}),
    "views": (views_recipe, {}),
    "thawing": (thawing_recipe, {}),
}
# Some are in the ordinary suite once, all others in the slow one.
ORDINARY, ORDINARY_DELETED = ("plain", "bf16", "thawing"), ("bf16", "views")


@pytest.mark.parametrize(
    ("make", "options", "deleted"),
    [
        pytest.param(
            *KILLED[name],
            deleted,
            id=f"{name}, {'deleted' if deleted else 'kept'}",
            marks=() if name in ORDINARY and deleted == (name in ORDINARY_DELETED) else pytest.mark.slow,
        )
        for name in KILLED
        for deleted in (False, True)
    ],
)
def test_a_killed_run_on_kept_features_ends_as_the_unbroken_one(tmp_path, make, options, deleted, folder, monkeypatch):
    recipe = make(accumulate=2)
    unbroken = train_run(tmp_path / "unbroken", recipe, **options)
    if deleted:
        shutil.rmtree(folder)
        resume = conftest.resume

        def forgetful(*arguments, **named):
            shutil.rmtree(folder, ignore_errors=True)
            return resume(*arguments, **named)

        monkeypatch.setattr(conftest, "resume", forgetful)
    interrupted = train_with_deaths(tmp_path / "run", recipe, [3, 8, 12], **options)
    assert_equal_runs(interrupted, unbroken)


def test_epoch_e_sees_view_e_mod_k(tmp_path, monkeypatch):
    views, read_rows = [], Features.read

    def noting(self, indices, view):
        views.append(view)
        return read_rows(self, indices, view)

    monkeypatch.setattr(Features, "read", noting)
    train_run(tmp_path / "run", views_recipe())
    # The first two measure for the head, the last three keep what it has seen.
    trained = [view for view in views[2:-3] if view is not None]
    assert trained == [0] * 7 + [1] * 7 + [0] * 7
    assert sorted(re.search(r"view \d|$", entry.describe()[0])[0] for entry in entries()) == ["", "view 1", "view 2"]


def test_two_views_of_an_image_differ_and_a_view_is_that_of_the_uncached_epoch(tmp_path):
    cached = train_run(tmp_path / "cached", views_recipe(seed=1))
    uncached = train_run(tmp_path / "uncached", views_recipe(seed=1), cache=False)
    losses = [
        [line["train/epoch_loss"] for line in metrics_lines(run) if "val/loss" in line] for run in (cached, uncached)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    rows = []
    for entry in entries():
        if "view" in entry.describe()[0]:
            file = RowFile(entry.path, read_layout(entry.path))
            rows.append(torch.empty(100, file.layout.width))
            assert file.read_block(0, rows[-1])
            file.close()
    assert (rows[0] - rows[1]).abs().amax(1).min() > 0.01


# ---- Real processes --------------------------------------------------------------------------------------------------

# Four blocks; about a second each.
SLOW = [
    "vgg_head", "--backbone", "resnet18", "--weights", "none", "--image-size", "64", "--epochs", "2",
    "--save-every-steps", "1", "--device", "cpu",
]  # fmt: skip


def wait_for_blocks(process, folder: Path, count: int) -> None:
    """Until so many blocks of the only entry are written."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        for path in folder.glob("*.safetensors"):
            if path.stat().st_size > 100_000:
                file = RowFile(path, read_layout(path))
                written = file.layout.blocks - len(file.missing())
                file.close()
                if written >= count:
                    return
        time.sleep(0.01)
    raise AssertionError("no progress within two minutes")


@pytest.mark.slow
def test_killed_while_filling_whole_blocks_are_kept_and_the_end_is_the_same(tmp_path, folder):
    run = RunFolder(tmp_path / "run")
    process = finetune(*SLOW, "--run", str(run.path))
    wait_for_blocks(process, folder, 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert run.exists() and not list(run.checkpoints.iterdir())

    # Asked politely, it stops between two batches and says how to go on.
    process = finetune("resume", str(run.path), "--save-every-steps", "1")
    wait_for_blocks(process, folder, 2)
    process.terminate()
    assert f"go on with: finetune resume {run.path}" in finish(process, code=75)

    process = finetune("resume", str(run.path))
    kill_after_progress(process, run, 5)
    said = finish(finetune("resume", str(run.path)))
    assert "features: kept from before, so the frozen backbone does not run" in said
    shutil.rmtree(folder)
    unbroken = RunFolder(tmp_path / "unbroken")
    finish(finetune(*SLOW, "--run", str(unbroken.path)))
    assert_equal_runs(run, unbroken)


@pytest.mark.slow
def test_of_two_runs_that_fill_the_same_entry_one_waits(tmp_path, folder):
    runs = [RunFolder(tmp_path / name) for name in "ab"]
    first = finetune(*SLOW, "--run", str(runs[0].path))
    wait_for_blocks(first, folder, 1)
    os.killpg(first.pid, signal.SIGSTOP)  # however fast it is, it is not ready before the second one asks
    second = finetune(*SLOW, "--run", str(runs[1].path))
    waiting = "another process computes the same features: waiting for it"
    try:
        said = next(line for line in second.stdout if waiting in line)
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    outputs = [finish(first), said + finish(second)]
    assert "waiting for it" not in outputs[0] and "runs over 1,797 images once" in outputs[0]
    assert "the frozen backbone does not run" in outputs[1]
    assert_equal_runs(*runs)


def test_a_full_disk_is_no_reason_to_stop(tmp_path, folder):
    """The system refuses files of more than half a megabyte: checkpoints fit, features do not."""
    limit = 500_000
    process = subprocess.run(
        [sys.executable, "-m", "finetune.cli", "vgg_head", "--epochs", "1", "--run", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert process.returncode == 0, process.stderr
    said = " ".join(process.stdout.split())
    assert f"features: not kept, the backbone runs in every epoch, because they cannot be written to {folder}" in said
    assert list(folder.glob("*.safetensors")) == []


# ---- Damage and change ----------------------------------------------------------------------------------------------


def test_a_bit_that_flips_between_a_kill_and_the_resume_changes_nothing(tmp_path):
    unbroken = train_run(tmp_path / "unbroken", plain_recipe())
    with pytest.raises(Killed):
        train_run(tmp_path / "run", plain_recipe(), die_after_steps=9)
    path = entries()[0].path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    run = RunFolder(tmp_path / "run")
    resume_run(run)
    assert_equal_runs(run, unbroken)
    content[len(content) // 2] ^= 1
    assert path.read_bytes() == content  # made again, as it was


@pytest.fixture
def photos(tmp_path) -> Path:
    """Thirty pictures of digits as files, in three classes."""
    digits = load_digits()
    for index in range(60):
        label = int(digits.targets[index])
        if label < 3:
            path = tmp_path / "photos" / f"class {label}" / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.images[index, 0].numpy()).save(path)
    return tmp_path / "photos"


def photo_recipe(photos, **changes):
    return plain_recipe(data=Images(str(photos)), batch_size=4, epochs=1, **changes)


def test_files_that_only_look_newer_are_not_computed_again_and_changed_ones_are(tmp_path, photos, fetched):
    train_run(tmp_path / "first", photo_recipe(photos))
    fetched.clear()
    some = sorted(photos.rglob("*.png"))[3]
    os.utime(some)
    train_run(tmp_path / "second", photo_recipe(photos))
    assert fetched == []
    # A picture of the same size: only its bytes and its time tell.
    content = some.read_bytes()
    other = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
    some.write_bytes(other)
    with pytest.raises(RunError, match=r"1 broken image"):
        train_run(tmp_path / "third", photo_recipe(photos))
    some.write_bytes(content)
    train_run(tmp_path / "fourth", photo_recipe(photos))
    assert_equal_runs(RunFolder(tmp_path / "fourth"), RunFolder(tmp_path / "first"))


def test_moved_data_use_the_same_entry_also_at_a_resume(tmp_path, photos, fetched):
    with pytest.raises(Killed):
        train_run(tmp_path / "run", photo_recipe(photos), die_after_steps=3)
    fetched.clear()
    moved = photos.rename(tmp_path / "elsewhere")
    for path in moved.rglob("*.png"):
        os.utime(path)
    resume_run(RunFolder(tmp_path / "run"), place=str(moved))
    assert fetched == [] and len(entries()) == 1


def test_an_image_that_changed_since_the_checkpoint_stops_the_resume(tmp_path, photos):
    with pytest.raises(Killed):
        train_run(tmp_path / "run", photo_recipe(photos), die_after_steps=3)
    some, other = sorted(photos.rglob("*.png"))[:2]
    size = some.stat().st_size
    content = other.read_bytes()
    some.write_bytes(content[:size].ljust(size, b"\0"))
    with pytest.raises(RunError, match=r"is not what it was when the run first read it|cannot be decoded"):
        resume_run(RunFolder(tmp_path / "run"))


def test_broken_images_are_named_before_anything_is_made_or_left_out(tmp_path, photos, fetched):
    broken = sorted(photos.rglob("*.png"))[4]
    broken.write_bytes(b"no image")
    with pytest.raises(RunError, match=rf"1 broken image\(s\): .*{broken.name} cannot be decoded .*--skip-broken"):
        train_run(tmp_path / "run", photo_recipe(photos))
    assert not (tmp_path / "run").exists()
    own = tmp_path / "own" / "notes.txt"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(UsageError, match=r"holds other files \(notes.txt\); give a new folder"):
        train_run(own.parent, photo_recipe(photos))
    assert [path.name for path in own.parent.iterdir() if path.is_file() and "lock" not in path.name] == ["notes.txt"]
    fetched.clear()
    unbroken = train_run(tmp_path / "unbroken", photo_recipe(photos), skip_broken=True)
    # Read once more, to say what is wrong with it.
    assert [len(batch) for batch in fetched] == [1]
    assert len(read(unbroken)["data"]["skipped"]) == 1
    interrupted = train_with_deaths(tmp_path / "run", photo_recipe(photos), [2, 4], skip_broken=True)
    assert_equal_runs(interrupted, unbroken)


def test_images_that_can_no_longer_be_read_stop_a_resume_that_computes_again(tmp_path, photos, folder):
    with pytest.raises(Killed):
        train_run(tmp_path / "run", photo_recipe(photos), die_after_steps=3)
    shutil.rmtree(folder)
    some = sorted(photos.rglob("*.png"))[0]
    some.write_bytes(b"x" * some.stat().st_size)
    with pytest.raises(RunError, match=rf"{some.name} .*though it could be read when the run began"):
        resume_run(RunFolder(tmp_path / "run"))


def test_a_damaged_block_is_not_made_again_of_images_that_are_gone(tmp_path, photos):
    job, _ = new_setup(Plan(photo_recipe(photos), Numerics(), Machine("cpu", workers=0)))
    phase = start_phase(job, 0, RunContext.silent())
    path = entries()[0].path
    content = bytearray(path.read_bytes())
    content[3_000] ^= 1
    path.write_bytes(content)
    shutil.rmtree(photos)
    with pytest.raises(RunError, match="does not exist"):
        phase.feed.features.read(job.data.split.train, None)
    phase.close()


def test_other_pictures_of_the_same_names_sizes_and_times_are_other_features(tmp_path, photos):
    runs = []
    for name, grey in (("a", 0), ("b", 255)):
        for path in photos.rglob("*.png"):
            other = tmp_path / name / path.parent.name / (path.stem + ".bmp")
            other.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as image:
                Image.eval(image, lambda value, grey=grey: abs(grey - value)).save(other)
            os.utime(other, (1e9, 1e9))
        runs.append(train_run(tmp_path / f"run {name}", photo_recipe(tmp_path / name)))
    uncached = train_run(tmp_path / "uncached", photo_recipe(tmp_path / "b"), cache=False)
    losses = [read(run)["metrics"]["last_validation"]["val/loss"] for run in (*runs, uncached)]
    assert losses[1] == pytest.approx(losses[2], rel=1e-3) and losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_a_run_keeps_reading_its_rows_while_another_begins_with_changed_images(tmp_path, photos):
    job, _ = new_setup(Plan(photo_recipe(photos), Numerics(), Machine("cpu", workers=0)))
    phase = start_phase(job, 0, RunContext.silent())
    rows = phase.feed.features.read(job.data.split.train, None)
    some = sorted(photos.rglob("*.png"))[2]
    some.write_bytes(some.read_bytes()[:-1] + b"\0")  # behind the picture: it still decodes
    other, _ = new_setup(Plan(photo_recipe(photos), Numerics(), Machine("cpu", workers=0)))
    second = start_phase(other, 0, RunContext.silent())
    assert torch.equal(second.feed.features.read(job.data.split.train, None), rows)
    inodes = [one.feed.features._parts[None].file._stream for one in (phase, second)]
    assert os.fstat(inodes[0].fileno()).st_ino != os.fstat(inodes[1].fileno()).st_ino
    phase.close(), second.close()


def test_an_image_that_could_not_be_read_once_is_tried_again(tmp_path, photos, monkeypatch):
    some = sorted(photos.rglob("*.png"))[3]
    read_once = source.read_bytes

    def failing(path):
        if path.name == some.name:
            raise BrokenImage(f"image {path} cannot be read (too many open files)")
        return read_once(path)

    monkeypatch.setattr(source, "read_bytes", failing)
    with pytest.raises(RunError, match="1 broken image"):
        train_run(tmp_path / "first", photo_recipe(photos))
    monkeypatch.setattr(source, "read_bytes", read_once)
    assert not read(train_run(tmp_path / "second", photo_recipe(photos)))["data"]["skipped"]


@pytest.mark.parametrize("augment", ["light", pytest.param("none", marks=pytest.mark.slow)])
def test_a_signal_to_the_whole_group_stops_politely_though_workers_get_it_too(tmp_path, photos, folder, augment):
    for number in range(20):
        for path in list(photos.glob(f"*/{'[0-9]' * 2}.png")):
            os.link(path, path.with_name(f"{path.stem}-{number}.png"))
    run = RunFolder(tmp_path / "run")
    words = ["--images", str(photos), "--augment", augment, "--workers", "2", "--image-size", "64", "--epochs", "50"]
    process = finetune("vgg_head", "--backbone", "resnet18", "--weights", "none", *words, "--run", str(run.path))
    started = (lambda: any(folder.glob("*.safetensors"))) if augment == "none" else run.metrics_file.exists
    deadline = time.monotonic() + 60
    while not started() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)
    said = finish(process, code=75)
    assert "Traceback" not in said and run.exists()


def test_without_a_checkpoint_a_resume_finds_moved_images_and_refuses_more_epochs(tmp_path, photos):
    with pytest.raises(Killed):
        train_run(tmp_path / "run", photo_recipe(photos), die_after_steps=1)
    moved = photos.rename(tmp_path / "elsewhere")
    run = RunFolder(tmp_path / "run")
    with pytest.raises(UsageError, match="no checkpoint yet; go on without --epochs and --lr"):
        resume_run(run, epochs=5)
    resume_run(run, place=str(moved))
    assert read(run)["status"] == "finished"


def test_a_frozen_head_layer_is_measured_and_thawed_exactly(tmp_path):
    """Frozen at first, it stands in front of what trains; what is measured on the data belongs to the checkpoint."""
    rules = (("classifier.1.0", "trainable", 1), ("head", "trainable", 0), ("*", "frozen", 0))
    recipe = plain_recipe(head="mlp", trainable=Trainable(rules=rules))
    unbroken = train_run(tmp_path / "unbroken", recipe)
    assert read(unbroken)["model"]["classifier.1.0.deviation"].std() > 0
    assert_equal_runs(train_with_deaths(tmp_path / "run", recipe, [3, 9]), unbroken)


# ---- Which, and why -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({}, {"cache": False}, "because of --no-cache"),
        ({"augment": "light"}, {}, "--augment light makes other images in every epoch (--views 4 would keep four of each)"),
        ({"data": Images("digits", mixup=0.2, train_samples=50)}, {}, "--mixup makes other images in every epoch"),
        ({"trainable": Trainable(rules=(("*", "trainable", 0),))}, {}, "because what trains begins at the images"),
        ({"epochs": 0, "max_steps": 2}, {}, "the run ends before it has seen each image once"),
        ({}, {"cache_limit": "50KB"}, "they would take 392.6 KB in"),
    ],
)  # fmt: skip
def test_a_run_says_in_one_line_why_nothing_is_kept(tmp_path, folder, changes, options, reason):
    lines = train_and_listen(tmp_path / "run", plain_recipe(**changes), **options)
    assert len(lines) == 1 and reason in lines[0] and "the backbone runs in every epoch" in lines[0]
    assert not folder.exists() or list(folder.glob("*.safetensors")) == []


def test_a_run_says_in_one_line_what_is_kept_and_how_large_it_is(tmp_path, folder):
    once = train_and_listen(tmp_path / "a", plain_recipe())
    assert once == [f"features: kept; the frozen backbone runs over 190 images once (392.6 KB in {folder})"]
    again = train_and_listen(tmp_path / "b", plain_recipe())
    assert again[0].startswith("features: kept from before, so the frozen backbone does not run (190 rows, 392.6 KB")
    views = train_and_listen(tmp_path / "c", views_recipe())
    assert views[0].startswith("features: 2 fixed views of each image are kept; the frozen backbone runs over 559")
    thawing = train_and_listen(tmp_path / "d", thawing_recipe())
    assert [line.split(":")[1][:9] for line in thawing] == [" kept fro", " kept; th", " not kept"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path, folder):
    folder.write_text("a file")
    assert "they cannot be written to" in train_and_listen(tmp_path / "run", plain_recipe())[0]


def test_a_run_without_features_stays_without_when_it_resumes(tmp_path):
    recipe = plain_recipe()
    terminal, machine = DyingTerminal(3), Machine("cpu", workers=0, cache_limit="1KB")
    with pytest.raises(Killed):
        start_in(tmp_path / "run", "t", recipe, Numerics(), machine, Settings(save_every_steps=1), terminal)
    lines = resume_run(RunFolder(tmp_path / "run"))
    assert any("because that is how the run began" in line for line in lines)


def test_features_that_can_no_longer_be_kept_are_a_loud_reason_for_other_bits(tmp_path, folder):
    with pytest.raises(Killed):
        train_run(tmp_path / "run", plain_recipe(), die_after_steps=5)
    shutil.rmtree(folder)
    terminal = DyingTerminal()
    machine = Machine("cpu", workers=0, cache_limit="1KB")
    resume_in(RunFolder(tmp_path / "run"), machine, terminal, settings={})
    assert any(line.startswith("not bit for bit from here on: features were kept") for line in terminal.lines)
    assert read(RunFolder(tmp_path / "run"))["status"] == "finished"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"views": 3}, "without --augment they would all be the same"),
        ({"views": 3, "augment": "light", "mixup": 0.1}, "not together with --mixup or --cutmix"),
        ({"views": -1}, r"--views -1: not allowed; give 0"),
    ],
)
def test_views_that_mean_nothing_are_refused(changes, reason):
    with pytest.raises(UsageError, match=reason):
        plain_recipe(data=dataclasses.replace(Images("digits"), **changes))


# ---- A precision of the backbone's own ------------------------------------------------------------------------------


def test_a_backbone_in_bf16_is_recorded_halves_the_rows_and_is_evaluated_as_it_was_trained(tmp_path):
    runs = {
        (precision, cache): train_run(
            tmp_path / f"{precision}{cache}", plain_recipe(dropout=0.0), backbone_precision=precision, cache=cache
        )
        for precision in ("", "bf16")
        for cache in (True, False)
    }
    assert read(runs["bf16", True])["config"]["backbone_precision"] == "bf16"
    dtypes = {read_layout(entry.path).dtype for entry in entries()}
    assert dtypes == {torch.float32, torch.bfloat16}
    for run in runs.values():
        validated = read(run)["metrics"]["last_validation"]
        figures = evaluate(run, "latest", "", AnyTable(), "cpu", 0)
        assert figures["loss"] == pytest.approx(validated["val/loss"], rel=1e-4)
    losses = {key: read(run)["metrics"]["last_validation"]["val/loss"] for key, run in runs.items()}
    assert losses["bf16", True] == pytest.approx(losses["bf16", False], rel=1e-3)
    assert losses["bf16", True] != losses["", True]


def measured(path, way="centred", **options):
    """What a run measured of its head's features: mean and deviation."""
    model = Model("bundled/vgg", standardisation=way)
    recipe = small_recipe(model=model, data=Images("digits", train_samples=60), epochs=0, max_steps=4)
    state = read(train_run(path, recipe, **options))["model"]
    return torch.stack([state["classifier.1.mean"], state["classifier.1.deviation"]])


@pytest.mark.parametrize("option", ["precision", pytest.param("backbone_precision", marks=pytest.mark.slow)])
def test_a_head_is_measured_in_the_arithmetic_of_the_run_whether_its_features_are_kept_or_not(tmp_path, option):
    fp32 = measured(tmp_path / "fp32", cache=False)
    kept = measured(tmp_path / "kept", **{option: "bf16"})
    unkept = measured(tmp_path / "unkept", cache=False, **{option: "bf16"})
    away = (unkept - fp32).abs().max()
    assert away > 1e-3 and (unkept - kept).abs().max() < 1e-4 * away


def test_a_record_that_names_no_way_is_begun_again_with_what_it_would_have_measured_then(tmp_path):
    options = {"cache": False, "precision": "bf16"}
    plain = measured(tmp_path / "plain", "plain", **options)
    assert torch.equal(plain, measured(tmp_path / "fp32", "plain", cache=False))  # whatever the run computes in
    recipe = small_recipe(data=Images("digits", train_samples=60), model=Model("bundled/vgg"), epochs=0, max_steps=4)
    with pytest.raises(Killed):
        train_run(tmp_path / "old", recipe, die_after_steps=1, **options)
    run = RunFolder(tmp_path / "old")
    record = read_json(run.recipe_file, "recipe")
    del record["config"]["model"]["standardisation"]
    write_json(run.recipe_file, record)
    assert "starting over" in resume_run(run)[0]
    state = read(run)["model"]
    assert torch.equal(torch.stack([state["classifier.1.mean"], state["classifier.1.deviation"]]), plain)
    assert not torch.equal(plain, measured(tmp_path / "new", **options))


def test_a_precision_for_a_backbone_that_trains_is_refused(tmp_path):
    recipe = plain_recipe(trainable=Trainable(rules=(("*", "trainable", 0),)))
    with pytest.raises(UsageError, match=r"--backbone-precision bf16: the backbone cannot be computed apart"):
        train_run(tmp_path / "run", recipe, backbone_precision="bf16")
    assert not (tmp_path / "run").exists()
