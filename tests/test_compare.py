"""Several backbones side by side: an ordinary run each, one table, and what goes on after a kill."""

import json
import shutil
import time
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import assert_equal_runs, finetune, finish, kill_after_progress, last_step
from encoders import make_encoder
from rich.console import Console

from finetune.base.words import with_option, without_option
from finetune.cli import main
from finetune.models.backbones import names_of
from finetune.recipe.scripts import load_recipe_function, shipped_recipes
from finetune.runs.compare import Candidate, Row, find_candidates, show
from finetune.store.comparison import is_unfinished, note_comparison
from finetune.store.run_folder import RunFolder

QUIET = ["--track", "none", "--no-report", "--device", "cpu"]


def test_several_backbones_are_compared_by_ordinary_runs_below_one_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--train-samples", "100", "--epochs", "2", *QUIET]
    words = ["vgg_head", "--backbone", "bundled/vgg, bundled/resnet", *options]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "runs/vgg_head-1"
    rows = [line.split() for line in said.splitlines() if line.startswith("bundled/")]
    assert {row[0] for row in rows} == {"bundled/vgg", "bundled/resnet"} and len(rows) == 2
    accuracies = [float(row[1]) for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    assert all("of 359, 0." in " ".join(row) and row[-1] == "M" for row in rows)
    assert {row[0]: row[-2] for row in rows} == {"bundled/vgg": "0.3", "bundled/resnet": "0.7"}
    best = rows[0][0]
    assert f"to train on the best: finetune vgg_head --backbone {best} {' '.join(options)}" in said
    capsys.readouterr()
    assert main(["runs", "runs/vgg_head-1", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)
    assert sorted(Path(run["run"]).name for run in runs) == ["bundled-resnet", "bundled-vgg"]
    assert {run["state"] for run in runs} == {"finished"}
    # The same again: nothing is trained twice.
    assert main([*words, "--run", "runs/vgg_head-1"]) == 2
    assert "already holds a comparison; add --resume" in capsys.readouterr().err
    assert main([*words, "--run", "runs/vgg_head-1", "--resume"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("bundled/")] == [
        row[:2] for row in rows
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--backbone", "bundled/vgg,bundled/vgg"], "give each backbone once"),
        (["--backbone", "bundled/vgg,"], "give each backbone once"),
        (["--backbone", "bundled/vgg,mobilnet_v2"], "--backbone mobilnet_v2: unknown"),
        (
            ["--backbone", "bundled/vgg,bundled/resnet", "--run", "s3://bucket/x"],
            "compared in a folder on this machine",
        ),
        (["--backbone", "bundled/vgg,bundled/resnet", "--init-from", "x"], "--init-from x: has no effect"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_before_anything_is_trained(
    tmp_path, monkeypatch, capsys, words, said
):
    monkeypatch.chdir(tmp_path)
    assert main(["vgg_head", *words, *QUIET]) == 2
    assert said in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_one_that_fails_does_not_keep_the_others_from_being_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["vgg_head", "--backbone", "bundled/vgg,bundled/mobilenet", "--head", "append", "--train-samples", "60"]
    assert main([*words, "--epochs", "1", *QUIET]) == 1
    said, complained = capsys.readouterr()
    assert complained.startswith("finetune: bundled/mobilenet: ") and complained.count("\n") == 1
    assert "to train on the best: finetune vgg_head --backbone bundled/vgg" in said
    assert any(line.startswith("bundled/mobilenet") and "failed" in line for line in said.splitlines())


def test_where_a_table_has_no_room_each_backbone_has_lines_of_its_own():
    recipe = load_recipe_function(shipped_recipes()["vgg_head"])()
    candidate = Candidate("bundled/vgg", recipe, "x", parameters=300_000, weight_bytes=1_300_000)
    good = Row(candidate, {"accuracy": 0.75, "f1": 0.7, "loss": 0.5}, Path("x"), samples=60, pass_seconds=0.0)
    lost = Row(candidate, {}, failed=True)
    stream = StringIO()
    show([good, lost], ["vgg_head"], Console(file=stream, width=60))
    assert [line.rstrip() for line in stream.getvalue().splitlines()][1:7] == [
        "bundled/vgg",
        "  accuracy 0.750 (45 of 60, 0.63 to 0.84), macro F1 0.700,",
        "  loss 0.500",
        "  pass kept, weights 1.3 MB, parameters 0.3 M",
        "bundled/vgg",
        "  failed",
    ]
    nothing = StringIO()
    show([lost], ["vgg_head"], Console(file=nothing, width=60))
    assert not nothing.getvalue()


# ---- Killed, stopped, gone on with ----------------------------------------------------------------------------------


def small(*more: str) -> list[str]:
    return [
        "vgg_head", "--backbone", "bundled/vgg,bundled/resnet", "--train-samples", "320", "--epochs", "2",
        "--save-every-steps", "1", "--device", "cpu", *more,
    ]  # fmt: skip


def test_a_comparison_killed_in_its_second_run_goes_on_by_resume_alone_to_the_same_bits(tmp_path):
    finish(finetune(*small("--run", "whole"), cwd=tmp_path))
    process = finetune(*small(), cwd=tmp_path)
    folder = tmp_path / "runs" / "vgg_head-1"
    first, second = RunFolder(folder / "bundled-vgg"), RunFolder(folder / "bundled-resnet")
    kill_after_progress(process, second, 2)
    done = first.metrics_file.stat().st_mtime_ns
    listed = json.loads(finish(finetune("runs", "--json", cwd=tmp_path)))
    assert {run["name"]: run["state"] for run in listed} == {
        "vgg_head-1/bundled-vgg": "finished", "vgg_head-1/bundled-resnet": "resumable",
    }  # fmt: skip
    said = finish(finetune("resume", "--epochs", "3", cwd=tmp_path), code=2)
    assert "is a comparison, whose options stand behind its own words: finetune vgg_head --backbone" in said
    said = finish(finetune("resume", cwd=tmp_path))
    assert "is finished at step 10" in said and "to train on the best: finetune vgg_head --backbone bundled/" in said
    assert said.splitlines()[-1] == "runs/vgg_head-1" and first.metrics_file.stat().st_mtime_ns == done
    for name in ("bundled-vgg", "bundled-resnet"):
        assert_equal_runs(RunFolder(folder / name), RunFolder(tmp_path / "whole" / name))


def test_a_comparison_that_is_asked_to_stop_says_what_to_type(tmp_path):
    noted = tmp_path / "here" / "comparison.json"
    process = finetune(*small("--run", "here"), cwd=tmp_path)
    run, deadline = RunFolder(tmp_path / "here" / "bundled-vgg"), time.monotonic() + 120
    while last_step(run) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.terminate()
    said = finish(process, code=75)
    assert "the comparison goes on with: finetune vgg_head --backbone bundled/vgg,bundled/resnet" in said
    before = json.loads(noted.read_text())["command"]
    assert before[: len(small())] == small()
    again = [*small("--run", "here", "--resume"), "--lr", "0.1"]
    assert "holds another run: optimizer.lr" in finish(finetune(*again, cwd=tmp_path), code=2)
    assert json.loads(noted.read_text())["command"] == before
    finish(finetune("resume", "here", cwd=tmp_path))
    rows = finish(finetune(*small("--run", "here", "--resume"), cwd=tmp_path)).splitlines()
    assert sum("is finished at step 10" in row for row in rows) == 2


def test_a_comparison_killed_between_two_of_its_runs_goes_on_by_resume_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["vgg_head", "--train-samples", "60", "--epochs", "1", *QUIET]
    assert main([*words, "--backbone", "bundled/vgg,bundled/resnet"]) == 0
    assert main(["resume"]) == 2 and "all finished" in capsys.readouterr().err
    folder = Path("runs/vgg_head-1")
    noted = json.loads((folder / "comparison.json").read_text())
    note_comparison(folder, noted["command"])  # as it was before its end
    shutil.rmtree(folder / "bundled-resnet")
    assert main(["resume"]) == 0
    assert RunFolder(folder / "bundled-resnet").exists() and not is_unfinished(folder)
    (folder / "comparison.json").write_text("{}")
    assert main(["resume"]) == 2
    assert main(["resume", str(folder)]) == 1 and "comparison.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--images", "nope"], "--images nope: no such folder"),
        (["--no-cache", "--cache-limit", "1GB"], "--cache-limit 1GB: has no effect with --no-cache"),
        (["--notify", "nonsense"], "--notify"),
        (["--resume"], "--resume: has no effect without --run DIR"),
        (["--run", "file"], "--run file: is a file; give a folder"),
        (["--run", "full"], "--run full: holds something else than a comparison"),
    ],
)
def test_what_is_wrong_for_all_of_them_is_said_once_and_leaves_nothing_behind(
    tmp_path, monkeypatch, capsys, words, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "recipe.json").write_text("{}")
    assert main(["vgg_head", "--backbone", "bundled/vgg,bundled/resnet", "--epochs", "1", *words, *QUIET]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
    assert not list((tmp_path / "runs").rglob("*"))


# ---- Names ----------------------------------------------------------------------------------------------------------


def test_backbones_whose_names_are_alike_have_folders_of_their_own_and_their_sizes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_encoder(tmp_path / "sub" / "bert")
    make_encoder(tmp_path / "sub-bert")
    tensors = {"x": torch.zeros(3)}
    (tmp_path / "sub-bert" / "model.safetensors").unlink()
    recipe = load_recipe_function(shipped_recipes()["bert_head"])()
    torch.save(tensors, tmp_path / "sub-bert" / "pytorch_model.bin")
    found = find_candidates(recipe, ["./sub/bert", "sub-bert"])
    assert [one.folder for one in found] == ["sub-bert", "sub-bert-2"]
    assert found[1].weight_bytes == (tmp_path / "sub-bert" / "pytorch_model.bin").stat().st_size


def test_a_folder_with_a_comma_in_its_name_is_one_backbone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_encoder(tmp_path / "bert,v2")
    assert names_of("bert,v2") == ["bert,v2"] and names_of("bert, v2") == ["bert", "v2"]


@pytest.mark.parametrize("words", [["summary", "vgg_head"], ["rehearse", "vgg_head"]])
def test_what_takes_one_backbone_says_who_takes_several(capsys, words):
    assert main([*words, "--backbone", "bundled/vgg,bundled/resnet"]) == 2
    assert "one at a time; only finetune RECIPE trains on several" in capsys.readouterr().err


def test_words_that_were_typed_are_changed_where_they_stand():
    assert with_option(["r", "--a", "1", "--b=2"], "--a", "9") == ["r", "--a", "9", "--b=2"]
    assert with_option(["r", "--a=1"], "--a", "9") == ["r", "--a=9"]
    assert with_option(["r", "--b", "2"], "--a", "9") == ["r", "--b", "2", "--a", "9"]
    assert without_option(["r", "--a", "1", "--b=2", "--c", "x"], "--a", "--b", switches=["--c"]) == ["r", "x"]


def test_another_backbone_may_join_a_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["vgg_head", "--image-size", "32", "--train-samples", "60", "--epochs", "1", *QUIET, "--run", "here"]
    assert main([*words, "--backbone", "bundled/vgg,bundled/resnet"]) == 0
    three = ["--backbone", "bundled/vgg,bundled/resnet,bundled/mobilenet"]
    capsys.readouterr()
    assert main([*words, *three, "--resume"]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("bundled/")]
    assert sorted(rows) == ["bundled/mobilenet", "bundled/resnet", "bundled/vgg"]
    assert three[1] in json.loads((tmp_path / "here" / "comparison.json").read_text())["command"]
