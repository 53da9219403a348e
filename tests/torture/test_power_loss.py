"""The power goes at each moment of a run: there is always something to go on from, and it is never less than before."""

import os
import random
import shutil
from pathlib import Path

import pytest
from conftest import assert_equal_runs, resume_run, small_recipe, train_run
from power_loss import SCENARIOS, Disk, Operation, Recorder, lay_out

from finetune import RunError
from finetune.store import checkpoint
from finetune.store.run_folder import RunFolder
from finetune.training import context


def recorded_run(folder: Path, monkeypatch) -> tuple[RunFolder, list[Operation]]:
    """A whole run that saves at each step and has its best in between, and everything that it wrote."""
    recorder = Recorder(folder / "run")
    real = checkpoint.write_checkpoint

    def write(place, state, **options):
        path = real(place, state, **options)
        recorder.note("saved", step=state.progress.step)
        return path

    monkeypatch.setattr(context, "write_checkpoint", write)
    with recorder.recording():
        run = train_run(folder / "run", small_recipe(epochs=2), save_every_steps=1)
    return run, recorder.operations


def test_the_recorder_sees_a_file_that_was_never_synced_vanish(tmp_path):
    recorder = Recorder(tmp_path / "run")
    with recorder.recording():
        os.mkdir(tmp_path / "run")
        with open(tmp_path / "run" / "careless", "wb") as stream:
            stream.write(b"content")
        os.replace(tmp_path / "run" / "careless", tmp_path / "run" / "renamed")
    disk = Disk()
    for operation in recorder.operations:
        disk.apply(operation)
    chance = random.Random(0)
    assert disk.after_the_cut("killed", chance) == {".": None, "renamed": b"content"}
    assert disk.after_the_cut("names, no contents", chance) == {".": None, "renamed": b""}
    assert disk.after_the_cut("only what was synced", chance) == {}


def replay(run: RunFolder, operations: list[Operation], folder: Path, every: int) -> dict[str, int]:
    """Cut the power after each `every`-th operation, in each way, and look at what is left.

    Returns:
        Scenario -> moments looked at.
    """
    run_id = run.read_recipe().id
    disk, chance, saved, looked = Disk(), random.Random(1), 0, dict.fromkeys(SCENARIOS, 0)
    for number, operation in enumerate(operations):
        disk.apply(operation)
        saved = operation.step if operation.kind == "saved" else saved
        if number % every and operation.kind != "saved":
            continue
        for scenario in SCENARIOS:
            place = folder / "after"
            shutil.rmtree(place, ignore_errors=True)
            lay_out(disk.after_the_cut(scenario, chance), place)
            looked[scenario] += 1
            where = f"after operation {number} ({operation.kind} {operation.path}), {scenario}"
            found = RunFolder(place)
            if not saved:
                # Nothing was saved yet: the recipe is whole or not there at all.
                if found.exists():
                    assert found.read_recipe().id == run_id, where
                continue
            assert found.read_recipe().id == run_id, where
            good = checkpoint.newest_good(found.checkpoints, run_id)
            assert good is not None and good[1].progress.step >= saved, where
            latest = checkpoint.read_checkpoint(found.checkpoints / "latest.pt", run_id)
            assert latest.progress.step >= saved, where
            # The best so far is there under its name, or can be had from a numbered file.
            best_step = latest.progress.best.get("step")
            if best_step:
                best = checkpoint.read_checkpoint(found.checkpoints / "best.pt", run_id)
                assert best.progress.step <= best_step or best.progress.step > latest.progress.step, where
    return looked


@pytest.mark.torture
def test_power_may_go_at_every_moment_of_a_run(tmp_path, monkeypatch, capsys):
    run, operations = recorded_run(tmp_path, monkeypatch)
    looked = replay(run, operations, tmp_path, every=1)
    with capsys.disabled():
        print(
            f"\npower cuts: {sum(looked.values()):,} moments of {len(operations):,} operations, all with a good checkpoint"
        )


def test_power_may_go_at_many_moments_of_a_run(tmp_path, monkeypatch):
    run, operations = recorded_run(tmp_path, monkeypatch)
    looked = replay(run, operations, tmp_path, every=61)
    assert min(looked.values()) > 15


@pytest.mark.torture
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_resume_after_a_power_cut_ends_bit_for_bit_like_the_unbroken_run(tmp_path, monkeypatch, scenario):
    run, operations = recorded_run(tmp_path, monkeypatch)
    first = next(number for number, operation in enumerate(operations) if operation.kind == "saved")
    chance = random.Random(2)
    for cut in sorted(chance.sample(range(first, len(operations)), 12)):
        disk = Disk()
        for operation in operations[: cut + 1]:
            disk.apply(operation)
        place = tmp_path / f"after{cut}"
        lay_out(disk.after_the_cut(scenario, chance), place)
        resume_run(RunFolder(place))
        assert_equal_runs(RunFolder(place), run)


@pytest.mark.torture
def test_without_the_sync_of_a_checkpoint_the_replay_finds_it_lost(tmp_path, monkeypatch):
    """The test of the test: a write that forgets `fsync` is found out."""
    from finetune.base import files

    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)
    run, operations = recorded_run(tmp_path, monkeypatch)
    with pytest.raises((AssertionError, RunError)):
        replay(run, [operation for operation in operations if operation.kind != "sync"], tmp_path, every=29)
