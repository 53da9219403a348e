import json
import os

import pytest
import torch
from conftest import DyingTerminal, Killed, assert_equal_runs, read, resume_run, small_recipe, start_in, train_run

from finetune import Model, RunError
from finetune.base.files import write_atomically
from finetune.models import network as network_module
from finetune.models.bundled import bundled_weights
from finetune.recipe.execution import Numerics, Settings
from finetune.runs.start import Machine
from finetune.store import checkpoint
from finetune.store.run_folder import RunFolder

PLAIN = (str, int, float, bool, type(None), torch.Tensor)


def plain_problems(value, path="") -> list[str]:
    """Places in a checkpoint that hold anything but exactly these types (a numpy number is a float, but not plain)."""
    if type(value) is dict:
        found = [f"{path}: key {key!r}" for key in value if type(key) is not str]
        return found + [line for key in value for line in plain_problems(value[key], f"{path}/{key}")]
    if type(value) is list:
        return [line for number, item in enumerate(value) for line in plain_problems(item, f"{path}/{number}")]
    return [] if type(value) in PLAIN else [f"{path}: {type(value).__name__}"]


def test_a_checkpoint_holds_plain_types_only_and_every_key_of_the_contract(trained):
    state = torch.load(trained.checkpoints / "latest.pt", weights_only=True)
    assert plain_problems(state) == []
    assert next(iter(state)) == "schema_version"
    assert set(state) >= {
        "model", "frozen", "optimizer", "scheduler", "scaler", "step", "epoch", "position_samples", "rng", "config",
        "best_metric", "patience", "metrics", "history", "retention", "trackers", "versions",
    }  # fmt: skip
    assert set(state["rng"]) >= {"python", "numpy", "torch"}
    assert set(state["optimizer"]["state"]) == {"classifier.1.weight", "classifier.1.bias"}


def test_a_head_only_checkpoint_costs_its_own_bytes_not_the_backbones(trained):
    state = read(trained)
    own = sum(t.nbytes for t in state["model"].values())
    own += sum(
        t.nbytes for entry in state["optimizer"]["state"].values() for t in entry.values() if hasattr(t, "nbytes")
    )
    generators = state["rng"]["torch"].nbytes + state["rng"]["numpy"][1].nbytes
    size = (trained.checkpoints / "latest.pt").stat().st_size
    # What is left is names, numbers and the zip directory; the backbone would be 1.1 MB.
    assert own < size < own + generators + 50_000
    assert (trained.frozen / "weights.safetensors").stat().st_size > 1_000_000


def test_recipe_json_equals_the_config_in_the_checkpoint(trained):
    assert trained.read_recipe().config == read(trained)["config"]


def test_latest_and_best_are_links_to_numbered_files_and_never_one_another(tmp_path):
    run = train_run(tmp_path / "run", small_recipe(augment="none", dropout=0.0, epochs=3))
    best = read(run, "best.pt")
    assert best["step"] == best["best_metric"]["step"] == read(run)["best_metric"]["step"]
    assert (run.checkpoints / "latest.pt").samefile(run.checkpoints / "step-000021.pt")
    assert [step for step, _ in checkpoint.step_files(run.checkpoints)] == [20, 21]


def test_keep_decides_how_many_numbered_files_stay(tmp_path):
    run, _ = start_in(
        tmp_path / "run", "test", small_recipe(epochs=1), Numerics(), Machine("cpu"),
        Settings(save_every_steps=1, keep=4), DyingTerminal(),
    )  # fmt: skip
    assert [step for step, _ in checkpoint.step_files(run.checkpoints)] == [4, 5, 6, 7]


def damage(path):
    """Change one byte of the file, not of those that are linked with it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.unlink()
    path.write_bytes(content)


def test_a_damaged_newest_file_is_named_and_the_one_before_it_used(tmp_path):
    recipe = small_recipe()
    with pytest.raises(Killed):
        train_run(tmp_path / "run", recipe, die_after_steps=6)
    run = RunFolder(tmp_path / "run")
    damage(run.checkpoints / "step-000005.pt")
    (run.checkpoints / "latest.pt").write_bytes((run.checkpoints / "step-000005.pt").read_bytes())
    lines = resume_run(run)
    assert "step-000005.pt is damaged" in lines[0]
    assert any("at step 4 (epoch 1, sample 64)" in line for line in lines)
    unbroken = train_run(tmp_path / "unbroken", recipe)
    assert torch.equal(read(run)["model"]["classifier.1.weight"], read(unbroken)["model"]["classifier.1.weight"])


def test_no_good_checkpoint_is_one_line_that_names_the_files(tmp_path):
    with pytest.raises(Killed):
        train_run(tmp_path / "run", small_recipe(), die_after_steps=2)
    run = RunFolder(tmp_path / "run")
    for path in run.checkpoints.glob("*.pt"):
        damage(path)
    with pytest.raises(RunError, match=r"no good checkpoint in .*step-000001\.pt is damaged") as error:
        resume_run(run)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_a_newer_schema_is_refused(tmp_path, trained):
    state = read(trained) | {"schema_version": 999}
    path = tmp_path / "newer.pt"
    write_atomically(path, lambda stream: torch.save(state, stream), trailer=True)
    with pytest.raises(RunError, match="has schema 999, this finetune reads 4: a newer version wrote it; upgrade"):
        checkpoint.read_checkpoint(path, state["run_id"])


def test_a_death_between_the_numbered_file_and_its_names_loses_nothing(tmp_path, monkeypatch):
    recipe = small_recipe(augment="none", dropout=0.0)
    unbroken = train_run(tmp_path / "unbroken", recipe, save_every_steps=0)

    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "link_or_copy", die)
        with pytest.raises(Killed):
            train_run(tmp_path / "run", recipe, save_every_steps=0)
    run = RunFolder(tmp_path / "run")
    assert os.listdir(run.checkpoints) == ["step-000007.pt"]
    with pytest.raises(Killed):
        resume_run(run, die_after_steps=8)
    # The first validation was the best so far: its file must have become best.pt.
    assert read(run, "best.pt")["step"] == read(run, "latest.pt")["step"] == 7
    resume_run(run)
    assert read(run, "best.pt")["step"] == read(unbroken, "best.pt")["step"]


def test_minutes_decide_when_to_save_too(tmp_path):
    run, _ = start_in(
        tmp_path / "run", "test", small_recipe(epochs=1), Numerics(), Machine("cpu"),
        Settings(save_every_minutes=1e-9, keep=20), DyingTerminal(),
    )  # fmt: skip
    assert [step for step, _ in checkpoint.step_files(run.checkpoints)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "kind",
    [pytest.param("link", marks=pytest.mark.slow), "copy", "reference", pytest.param("random", marks=pytest.mark.slow)],
)
def test_the_frozen_weights_are_kept_so_that_a_resume_finds_them(tmp_path, monkeypatch, kind):
    """A hard link where the file system can, else by name and hash; a copy when asked, and of what no file holds."""
    recipe = small_recipe(model=Model("bundled/vgg", weights="none" if kind == "random" else "default"))
    if kind == "reference":
        monkeypatch.setattr(network_module, "on_one_file_system", lambda *_: False)
    with pytest.raises(Killed):
        train_run(tmp_path / "run", recipe, die_after_steps=3, copy_frozen=kind == "copy")
    run = RunFolder(tmp_path / "run")
    record = json.loads((run.frozen / "frozen.json").read_text())
    file = run.frozen / "weights.safetensors"
    assert record["kind"] == ("tensors" if kind == "random" else "source")
    assert record["file"] == ("" if kind == "reference" else file.name)
    assert file.exists() == (kind != "reference")
    if kind in ("link", "copy"):
        assert file.samefile(bundled_weights("bundled/vgg")) == (kind == "link")
    resume_run(run)
    unbroken = train_run(tmp_path / "unbroken", recipe)
    assert_equal_runs(run, unbroken)
