"""Runs, checkpoints and exports that an older version wrote: read, gone on with, judged, exported, loaded. See golden/README.md."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_equal_values, resume_run

import finetune
from finetune.base.files import BadFile, read_json, write_json
from finetune.base.migrate import migrate
from finetune.base.safe_load import load_plain
from finetune.cli import main
from finetune.data.digits import load_digits
from finetune.errors import RunError, UsageError
from finetune.export.load import load_described, prepared
from finetune.recipe.execution import completed
from finetune.store.run_folder import RunFolder, newest_unfinished
from finetune.store.state import CheckpointState

GOLDEN = Path(__file__).parent / "golden"
RUNS = GOLDEN / "schema-4"
CHECKPOINTS = sorted(RUNS.rglob("*.pt"))
# Another processor has other kernels: some last bits of a weight around 0.1, through a dozen steps.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture
def golden(tmp_path) -> Path:
    """A copy of the runs that may be written to."""
    return shutil.copytree(RUNS, tmp_path / "runs")


# Keys that came after these files were written.
LATER = {
    "finish",
    "skipped_steps",
    "validation_halvings",
    "frozen/features_halvings",
    "data/taught_halvings",
    "data/levels",
    "plateaus",
}


def without_later(ours, theirs, path: str = "") -> tuple[dict, list[str]]:
    """A checkpoint without the keys that another one lacks, and their names."""
    found, later = {}, [f"{path}{key}" for key in ours if key not in theirs]
    for key in theirs:
        found[key] = ours[key]
        if isinstance(ours[key], dict) and isinstance(theirs[key], dict):
            found[key], more = without_later(ours[key], theirs[key], f"{path}{key}/")
            later += more
    return found, later


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_a_checkpoint_of_schema_4_is_read_whole_and_would_be_written_the_same(path):
    plain = load_plain(path)
    assert plain["schema_version"] == 4
    written, later = without_later(CheckpointState.from_plain(plain, str(path)).to_plain(), plain)
    assert_equal_values(written, plain)
    assert set(later) <= LATER


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_run_that_the_older_version_began_goes_on_to_the_same_end(golden, kind):
    run = RunFolder(golden / f"{kind}-killed")
    said = resume_run(run)
    assert any("resuming" in line for line in said)
    finished = {"image": golden / "image-finished" / "checkpoints" / "latest.pt", "text": golden / "text-finished.pt"}
    wanted, found = load_plain(finished[kind]), load_plain(run.latest)
    assert completed(found["config"]) == completed(wanted["config"])
    found, later = without_later(found | {"config": wanted["config"]}, wanted)
    assert set(later) <= LATER
    for name in ("step", "epoch", "position_samples", "status", "patience", "scheduler", "frozen", "data"):
        assert found[name] == wanted[name], name
    assert completed(wanted["config"])["data"]["listing"] == "suffix"  # what came later means the way before
    assert found["model"].keys() == wanted["model"].keys()
    for name, value in wanted["model"].items():
        torch.testing.assert_close(found["model"][name], value, **TOLERANCE)
    metrics = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [line["epoch"] for line in metrics if "val/loss" in line] == [1, 2, 3]


def test_a_run_of_the_older_version_is_listed_judged_reported_and_exported(golden, capsys):
    run = golden / "image-finished"
    assert main(["runs", str(golden), "--json"]) == 0
    states = {one["name"]: one["state"] for one in json.loads(capsys.readouterr().out)}
    assert states == {"image-finished": "finished", "image-killed": "resumable", "text-killed": "resumable"}
    assert main(["evaluate", str(run), "--json", "--device", "cpu"]) == 0
    kept = load_plain(run / "checkpoints" / "best.pt")["metrics"]["last_validation"]
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(kept["val/accuracy"], abs=0.01)
    assert main(["report", str(run)]) == 0 and "<svg" in (run / "report.html").read_text()
    assert main(["export", str(run)]) == 0
    old, new = (
        torch.load(path, weights_only=True) for path in (GOLDEN / "export-schema-3/digits.pt", run / "model.pt")
    )
    assert_equal_values(dict(new), dict(old))


def test_an_export_of_schema_3_loads_and_knows_its_digits():
    path = GOLDEN / "export-schema-3" / "digits.pt"
    model, description = load_described(path)
    digits = load_digits()
    images = torch.stack([digits.read(index)[0] for index in range(len(digits.targets))])
    preprocessing = prepared(path, description)
    logits = model(preprocessing.normalise(preprocessing.resize(images)))
    assert (logits.argmax(1) == digits.targets).double().mean() > 0.93
    assert finetune.load(path).state_dict().keys() == torch.load(path, weights_only=True).keys()


def test_a_record_of_before_commands_were_kept_is_one_without_a_command(golden, capsys):
    run = RunFolder(golden / "image-finished")
    plain = read_json(run.recipe_file, "recipe")
    del plain["command"]
    write_json(run.recipe_file, plain)
    assert run.read_recipe().command == []
    assert main(["report", str(run)]) == 0


REQUIRED = [
    "step",
    "epoch",
    "position_samples",
    "status",
    "patience",
    "halvings",
    "history",
    "metrics",
    "run_id",
    "rng",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_checkpoint_that_lacks_what_it_must_hold_is_refused_by_name(key):
    plain = load_plain(RUNS / "text-finished.pt")
    del plain[key]
    with pytest.raises(BadFile, match=f"file: '{key}' is missing or of a wrong kind"):
        CheckpointState.from_plain(plain, "file")


def test_what_nobody_reads_and_what_came_later_may_be_missing():
    plain = load_plain(RUNS / "text-finished.pt")
    del plain["retention"], plain["trackers"], plain["frozen"]["features_kept"]
    state = CheckpointState.from_plain(plain, "file")
    assert (state.keep, state.trackers, state.frozen.features_kept) == (0, {}, False)


@pytest.mark.parametrize("value", [10**400, True, "1", None])
def test_what_is_no_number_is_damage_and_no_fault_of_ours(value):
    plain = load_plain(RUNS / "text-finished.pt")
    plain["best_metric"]["value"] = value
    with pytest.raises(BadFile, match="'best_metric': 'value' is missing or of a wrong kind"):
        CheckpointState.from_plain(plain, "file")


def test_a_resume_without_a_name_passes_over_runs_of_another_version(golden, monkeypatch, capsys):
    monkeypatch.chdir(golden.parent)
    newest = golden / "image-finished"
    plain = load_plain(newest / "checkpoints" / "latest.pt") | {"schema_version": 3}
    torch.save(plain, newest / "checkpoints" / "latest.pt")
    os.utime(newest / "metrics.jsonl", (2e9, 2e9))
    assert newest_unfinished().name in ("image-killed", "text-killed")
    for name in ("image-killed", "text-killed"):
        shutil.rmtree(golden / name)
    with pytest.raises(UsageError, match=r"1 run\(s\) there, 1 of another version of finetune, the others finished"):
        newest_unfinished()


# ---- The chain ------------------------------------------------------------------------------------------------------


def renamed(plain):
    return {"name" if key == "title" else key: value for key, value in plain.items()}


def counted(plain):
    return plain | {"letters": len(plain["name"])}


STEPS = {1: renamed, 2: counted}


def test_older_schemas_go_through_every_step_and_what_was_given_stays_as_it_was():
    oldest = {"schema_version": 1, "title": "abc"}
    assert migrate(oldest, "file", 3, STEPS) == {"schema_version": 3, "name": "abc", "letters": 3}
    assert oldest == {"schema_version": 1, "title": "abc"}
    assert migrate({"schema_version": 2, "name": "a"}, "file", 3, STEPS)["letters"] == 1
    newest = {"schema_version": 3, "name": "", "letters": 9}
    assert migrate(newest, "file", 3, STEPS) == newest


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        ({"schema_version": 4}, "file has schema 4, this finetune reads 3: a newer version wrote it; upgrade"),
        ({"schema_version": 0}, "file has schema 0, this finetune reads 1 to 3; use the version that wrote it"),
        ({"schema_version": "3"}, "file names no schema"),
        ({"schema_version": True}, "file names no schema"),
        ({}, "file names no schema"),
    ],
)
def test_a_schema_that_cannot_be_read_is_named(plain, words):
    with pytest.raises(RunError, match=words):
        migrate(plain, "file", 3, STEPS)
