"""BatchNorm that learns: no sample is left alone, in a batch or in a part of one; what that changes is said."""

import dataclasses

import pytest
import torch
from conftest import (
    DyingTerminal,
    assert_equal_runs,
    read,
    resume_run,
    small_recipe,
    start_in,
    train_run,
    train_with_deaths,
)

from finetune import Images, Optimizer, Recipe, RunError, Trainable, UsageError
from finetune.base.files import read_json, write_json
from finetune.recipe.execution import Machine, Numerics, Settings
from finetune.store.run_folder import RunFolder
from finetune.training import step
from finetune.training.step import cut_batch

ALL = Trainable(rules=(("*", "trainable", 0),), batchnorm=True)
LATE = Trainable(rules=(("head", "trainable", 0), ("layer3", "trainable", 1), ("*", "frozen", 0)), batchnorm=True)


def learning(train_samples: int = 100, batch_size: int = 33, accumulate: int = 1, **changes) -> Recipe:
    """Of a hundred samples one is left over."""
    # So small that a channel of one image is one number in the end.
    data = Images("digits", image_size=8, train_samples=train_samples, validation_fraction=0.05)
    values = {"trainable": ALL, "epochs": 2, "batch_size": batch_size, "data": data, "dropout": 0.0} | changes
    return small_recipe("bundled/resnet", optimizer=Optimizer(lr=1e-3, accumulate=accumulate), **values)


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """How many samples each forward pass of the training had."""
    found, real = [], step.training_loss

    def loss(task, outputs, targets):
        found.append(len(targets))
        return real(task, outputs, targets)

    monkeypatch.setattr(step, "training_loss", loss)
    return found


def begun(path, recipe: Recipe) -> list[str]:
    terminal = DyingTerminal()
    start_in(path, "test", recipe, Numerics(), Machine("cpu"), Settings(log_every_steps=1), terminal)
    return terminal.lines


def test_a_sample_that_is_left_over_joins_the_batch_before_it_also_after_a_kill(tmp_path, sizes):
    unbroken = RunFolder(tmp_path / "unbroken")
    said = begun(unbroken.path, learning())
    assert sizes == [33, 33, 34] * 2 and read(unbroken)["step"] == 6
    assert (
        "batches: the image that is left over in each epoch of 100 joins the batch before it, 34 images"
        in "\n".join(said)
    )
    interrupted = train_with_deaths(tmp_path / "run", learning(), [3], save_every_steps=1)
    assert_equal_runs(interrupted, unbroken)


def test_it_does_so_from_the_beginning_where_batchnorm_learns_from_a_thaw_on_and_else_never(tmp_path, sizes):
    begun(tmp_path / "late", learning(trainable=LATE))
    assert sizes == [33, 33, 34] * 2
    sizes.clear()
    said = begun(tmp_path / "never", learning(trainable=dataclasses.replace(LATE, batchnorm=False)))
    assert sizes == [33, 33, 33, 1] * 2 and not any("BatchNorm" in line for line in said)


def test_a_run_that_an_older_version_began_keeps_its_batches_and_is_told_why_they_cannot_be(tmp_path, sizes):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(RunError, match=r"of which there are no statistics; .* --init-from RUN:latest"):
        train_run(run.path, learning(last_batch="alone"))
    assert sizes == [33, 33, 33] and read(run)["step"] == 3
    record = read_json(run.recipe_file, "recipe")
    del record["config"]["last_batch"]
    write_json(run.recipe_file, record)
    with pytest.raises(RunError, match="of which there are no statistics"):
        resume_run(run)
    new = train_run(tmp_path / "new", learning(epochs=1), init_from=f"{run.path}:latest")
    assert read(new)["status"] == "finished"


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (lambda: learning(batch_size=1), "--batch-size 1: BatchNorm learns here, and of one sample there are no stat"),
        (
            lambda: learning(batch_size=8, accumulate=5),
            "--accumulate 5: .*; give 4 at most, so that each part has two im",
        ),
        (lambda: learning(10, batch_size=64, accumulate=6), "--accumulate 6: .*; give 5 at most, so that each"),
    ],
)
def test_parts_of_one_sample_are_refused_before_there_is_a_folder(tmp_path, recipe, words):
    with pytest.raises(UsageError, match=words):
        begun(tmp_path / "run", recipe())
    assert not (tmp_path / "run").exists()


def test_accumulation_is_said_to_be_another_step_and_leaves_no_sample_alone(tmp_path, sizes):
    said = begun(tmp_path / "run", learning(train_samples=69, batch_size=32, accumulate=4, epochs=1))
    assert sizes == [8] * 8 + [3, 2]
    assert any(
        line.startswith(
            "--accumulate 4 (the last batch of an epoch, 5 images, in 2): BatchNorm learns from each part by itself, "
            "8 of 32 images, so the step is not that of the whole batch"
        )
        for line in said
    )


@pytest.mark.parametrize(("fits", "ends"), [(2, [2] * 6), (1, None)])
def test_halving_says_that_the_step_is_another_and_stops_at_two_samples(tmp_path, monkeypatch, fits, ends):
    passed, real = [], step.training_loss

    def loss(task, outputs, targets):
        if len(targets) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        passed.append(len(targets))
        return real(task, outputs, targets)

    monkeypatch.setattr(step, "training_loss", loss)
    recipe = learning(batch_size=16, epochs=1)
    if ends is None:
        words = r"with 2 samples, and BatchNorm learns from no fewer, at a time; give a smaller --image-size"
        with pytest.raises(RunError, match=words):
            begun(tmp_path / "run", recipe)
        return
    said = [line for line in begun(tmp_path / "run", recipe) if "out of memory" in line]
    assert said[0] == (
        "out of memory (OutOfMemoryError) at 16 samples at once: 8 from here on; BatchNorm learns from each part by "
        "itself, so this is not quite the step of the whole batch"
    )
    assert min(passed) >= 2 and max(passed) <= fits and passed[:6] == ends


def test_of_any_batch_the_parts_of_two_or_more_are_all_of_it():
    for count in range(2, 40):
        for parts in (1, 2, 3, 8, 64, 1024):
            pairs = cut_batch(torch.arange(count), torch.arange(count), parts, True)
            assert min(len(targets) for _, targets in pairs) >= 2 and len(pairs) <= parts
            assert torch.cat([inputs for inputs, _ in pairs]).tolist() == list(range(count))
