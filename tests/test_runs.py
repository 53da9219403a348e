import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Killed, metrics_lines, resume_run, small_recipe, train_run
from terminal import ESCAPES, run_in_terminal

from finetune import Finish, Optimizer, Stop
from finetune.base.files import link_or_copy, read_json, write_json
from finetune.base.terminal import PatientConsole
from finetune.cli import main
from finetune.listing.compared import Comparison
from finetune.listing.found import describe, training_seconds
from finetune.store.run_folder import RunFolder, newest_unfinished


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory) -> Path:
    """A folder with a finished run, one that was killed, one that stopped early, and one without a checkpoint. Do not
    change it."""
    folder = tmp_path_factory.mktemp("some") / "runs"
    shutil.copytree(trained.path, folder / "finished-1")
    recipe = small_recipe(augment="none")
    with pytest.raises(Killed):
        train_run(folder / "killed-1", recipe, die_after_steps=9)
    with pytest.raises(Killed):
        train_run(folder / "new-1", recipe, die_after_steps=2, save_every_steps=0)
    still = small_recipe(augment="none", optimizer=Optimizer(lr=1e-12), stop=Stop(patience=1), epochs=5)
    train_run(folder / "still-1", still)
    return folder


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> Path:
    """Two runs on the same data whose best is the one with the lowest loss."""
    folder = tmp_path_factory.mktemp("losses")
    for name, lr in (("slow", 1e-4), ("quick", 1e-2)):
        values = {"optimizer": Optimizer(lr=lr), "stop": Stop(metric="loss"), "finish": Finish("none"), "epochs": 3}
        train_run(folder / name, small_recipe(augment="none", **values))
    return folder


def listed(capsys, *words: str) -> dict[str, dict]:
    """What `finetune runs --json` says, by name, in its order."""
    capsys.readouterr()
    assert main(["runs", "--json", *words]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


# ---- States -----------------------------------------------------------------------------------------------------------


def test_each_run_is_shown_in_its_state_with_its_epochs_and_its_best(runs, trained, capsys):
    found = listed(capsys, str(runs))
    states = {name: row["state"] for name, row in found.items()}
    assert states == {"finished-1": "finished", "killed-1": "resumable", "new-1": "new", "still-1": "stopped early"}
    done = {name: (row["epochs_done"], row["epochs"]) for name, row in found.items()}
    assert done == {"finished-1": (3, 3), "killed-1": (1, 2), "new-1": (0, 2), "still-1": (2, 5)}
    lines = metrics_lines(trained)
    best = max((line for line in lines if "val/accuracy" in line), key=lambda line: line["val/accuracy"])
    assert found["finished-1"]["best"] == {
        "metric": "accuracy", "value": lines[-1]["finish/accuracy"], "step": best["step"], "epoch": best["epoch"],
        "loss": lines[-1]["finish/loss"], "samples": 359, "is_solved": True,
    }  # fmt: skip
    assert found["killed-1"]["step"] == 8 and found["new-1"]["best"] is None
    assert found["new-1"]["run"] == str(runs / "new-1")


def test_a_run_is_running_as_long_as_the_process_that_holds_its_lock_lives(runs, tmp_path, capsys):
    copy = shutil.copytree(runs / "killed-1", tmp_path / "run")
    holds = (
        "import sys, time; from pathlib import Path; from finetune.base.lock import hold_lock\n"
        "with hold_lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", holds, str(copy)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        found = listed(capsys, str(tmp_path))["run"]
        assert found["state"] == "running" and found["process"]["pid"] == process.pid and found["step"] == 8
        assert main(["runs", str(tmp_path)]) == 0
        assert f"by process {process.pid}, since" in capsys.readouterr().out
    finally:
        process.kill()
        process.communicate()
    found = listed(capsys, str(tmp_path))["run"]
    assert found["state"] == "resumable" and found["process"] is None


def test_a_checkpoint_that_latest_does_not_name_yet_is_one_to_resume_from(runs, tmp_path, capsys):
    copy = shutil.copytree(runs / "killed-1", tmp_path / "killed-1")
    (copy / "checkpoints" / "latest.pt").unlink()
    assert listed(capsys, str(tmp_path))["killed-1"]["state"] == "resumable"


def test_training_time_is_that_of_all_processes_together(runs, tmp_path, capsys):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(f'{{"step": {n}, "time/seconds": {s}}}\n' for n, s in enumerate([1, 20.5, 2, 30, 0.5, 4])))
    with open(log, "a") as stream:
        stream.write('torn {"time/sec')
    assert training_seconds(log) == 20.5 + 30 + 4
    copy = RunFolder(shutil.copytree(runs / "killed-1", tmp_path / "killed-1"))
    before = training_seconds(copy.metrics_file)
    resume_run(copy)
    assert listed(capsys, str(tmp_path))["killed-1"]["seconds"] > before


def test_an_absurd_time_in_a_log_is_no_reason_to_list_nothing(trained, tmp_path, capsys):
    run = RunFolder(shutil.copytree(trained.path, tmp_path / "absurd"))
    with open(run.metrics_file, "a") as stream:
        stream.write('{"step": 99, "time/seconds": ' + "9" * 400 + "}\n")
    assert main(["runs", str(tmp_path)]) == 0
    assert "absurd" in capsys.readouterr().out


def test_the_size_counts_what_is_linked_several_times_once(trained, tmp_path, capsys):
    copy = RunFolder(shutil.copytree(trained.path, tmp_path / "run"))
    for path in [path for path in copy.path.rglob("*") if path.is_file()]:
        path.unlink() if path.suffix == ".pt" else None
    once = listed(capsys, str(tmp_path))["run"]["size_bytes"]
    (copy.checkpoints / "step-000001.pt").write_bytes(bytes(1_000_000))
    for name in ("latest.pt", "best.pt"):
        link_or_copy(copy.checkpoints / "step-000001.pt", copy.checkpoints / name)
    twice = listed(capsys, str(tmp_path))["run"]["size_bytes"]
    assert 1_000_000 <= twice - once < 1_010_000


# ---- Options and order --------------------------------------------------------------------------------------------------


def test_only_options_that_differ_are_shown(losses, runs, capsys):
    assert main(["runs", str(losses)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[-1] == "optimizer.lr" and "model" not in header
    assert {row.split()[0]: row.split()[-1] for row in rows[:2]} == {"quick": "0.01", "slow": "0.0001"}
    assert main(["runs", str(runs), str(losses)]) == 0
    header = capsys.readouterr().out.splitlines()[0]
    assert "stop.patience" in header and "data.train_samples" in header and "backbone" not in header


def test_the_best_comes_first_whether_higher_or_lower_is_better(losses, runs, capsys):
    assert list(listed(capsys, str(losses), "--sort", "best")) == ["quick", "slow"]
    values = [row["best"] and row["best"]["value"] for row in listed(capsys, str(runs), "--sort", "best").values()]
    assert values[-1] is None and values[:-1] == sorted(values[:-1], reverse=True)


def test_each_key_sorts(runs, tmp_path, capsys):
    assert list(listed(capsys, str(runs), "--sort", "state")) == ["killed-1", "new-1", "still-1", "finished-1"]
    assert next(iter(listed(capsys, str(runs), "--sort", "epochs"))) == "finished-1"
    assert next(iter(listed(capsys, str(runs), "--sort", "changed"))) == "still-1"
    for key, value in (("time", "seconds"), ("size", "size_bytes")):
        values = [row[value] or 0 for row in listed(capsys, str(runs), "--sort", key).values()]
        assert values == sorted(values, reverse=True)
    for number in (10, 9, 100):
        shutil.copytree(runs / "new-1", tmp_path / f"run-{number}")
    assert list(listed(capsys, str(tmp_path), "--sort", "name")) == ["run-9", "run-10", "run-100"]


# ---- Damage -------------------------------------------------------------------------------------------------------------


def damage(folder: Path, good: Path) -> None:
    """Runs that somebody or something has spoilt, each in its own way."""

    def copy(name: str) -> RunFolder:
        return RunFolder(shutil.copytree(good, folder / name))

    copy("no-json").recipe_file.write_text("{")
    copy("deep").recipe_file.write_text("[" * 100_000)
    copy("list").recipe_file.write_text("[]")
    old = copy("old")
    record = read_json(old.recipe_file, "recipe")
    write_json(old.recipe_file, record | {"schema_version": 3})
    copy("no-recipe").recipe_file.unlink()
    pipe = copy("pipe")
    pipe.recipe_file.unlink()
    os.mkfifo(pipe.recipe_file)
    pipe.metrics_file.unlink()
    os.mkfifo(pipe.metrics_file)
    huge = copy("huge")
    os.truncate(huge.recipe_file, 1 << 33)
    cut = copy("cut")
    os.truncate(cut.latest, 5_000)
    copy("no-checkpoint").latest.write_bytes(b"\x80\x02cposix\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03.")
    other = copy("other")
    write_json(other.recipe_file, record | {"id": "0" * 32})
    loop = copy("loop")
    (loop.path / "code" / "round").symlink_to(loop.path)
    (folder / "dangling").symlink_to("/nowhere/at/all")
    (folder / "itself").symlink_to("itself")
    copy("\x1b[31mred\nline")
    copy(os.fsdecode(b"no\xffutf8"))
    (folder / "a file").write_text("")
    (folder / "an empty folder").mkdir()


def test_damaged_runs_are_rows_that_say_so(trained, tmp_path, capsys):
    damage(tmp_path, trained.path)
    found = listed(capsys, str(tmp_path))
    said = {name: row["note"] for name, row in found.items() if row["state"] == "damaged"}
    assert {name for name, row in found.items() if row["state"] == "finished"} == {"loop", "\x1b[31mred\nline"}
    for name, words in (
        ("no-json", "is damaged"),
        ("deep", "is damaged"),
        ("list", "holds no checksum"),
        ("old", "has schema 3, this finetune reads 4"),
        ("no-recipe", "recipe.json does not exist"),
        ("pipe", "recipe.json is no file"),
        ("huge", "too large"),
        ("cut", "an older checkpoint may be good: finetune resume"),
        ("no-checkpoint", "latest.pt cannot be read ("),
        ("other", "is of another run"),
        ("no\udcffutf8", "cannot be read ('utf-8' codec can't encode"),  # torch does not take such names
        ("itself", "cannot be looked into (Too many levels of symbolic links)"),
        ("dangling", "cannot be looked into (No such file or directory)"),
    ):
        assert words in said.pop(name)
    assert not said
    assert main(["runs", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output and r"\x1b[31mred\nline" in output
    assert main(["runs", str(tmp_path / "cut"), str(tmp_path / "pipe")]) == 0
    assert re.search(r"state +damaged +damaged", capsys.readouterr().out)


@pytest.fixture
def somebody_else() -> Iterator[None]:
    """Root may read everything: for a while this process is not root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_a_run_that_may_not_be_read_or_written_is_a_row(trained, tmp_path, monkeypatch, capsys, request):
    shutil.copytree(trained.path, tmp_path / "readable")
    for name in ("closed", "secret", "empty"):
        shutil.copytree(trained.path, tmp_path / name)
    (tmp_path / "closed").chmod(0)
    (tmp_path / "secret" / "recipe.json").chmod(0)
    (tmp_path / "empty" / "checkpoints" / "latest.pt").chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # the folders above it are forbidden, too
    request.getfixturevalue("somebody_else")
    found = listed(capsys, ".")
    assert {name: row["state"] for name, row in found.items()} == {
        "readable": "finished", "closed": "damaged", "secret": "damaged", "empty": "damaged"
    }  # fmt: skip
    assert all("Permission denied" in row["note"] for name, row in found.items() if name != "readable")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: cannot be looked into (No such file or directory); give a folder that holds runs"),
        (["a-file"], "a-file: cannot be looked into (Not a directory); give a folder that holds runs"),
        (["none"], "none: there is no run in it; give the folder that holds runs, or begin one: finetune vgg_head"),
        (["s3://bucket/runs"], "s3://bucket/runs: only folders of this machine are listed"),
        (["none", "--sort", "taste"], "--sort taste: no such key; give name, state, best, time, size, changed, epochs"),
    ],
)
def test_what_cannot_be_listed_is_one_line_that_says_what_to_do(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("none/empty").mkdir(parents=True)
    Path("a-file").write_text("")
    assert main(["runs", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# ---- Speed ----------------------------------------------------------------------------------------------------------------


def test_torch_is_imported_only_where_there_is_a_checkpoint(runs, tmp_path):
    code = """
import sys
from finetune.cli import main
fresh, empty, full = sys.argv[1:]
try:
    main(["runs", "--help"])
except SystemExit as end:
    assert end.code == 0
assert main(["runs", empty]) == 2
assert main(["runs", fresh]) == 0
assert "torch" not in sys.modules
assert main(["runs", full]) == 0
assert "torch" in sys.modules and "torchvision" not in sys.modules
"""
    shutil.copytree(runs / "new-1", tmp_path / "fresh" / "new-1")
    (tmp_path / "empty").mkdir()
    folders = [str(tmp_path / "fresh"), str(tmp_path / "empty"), str(runs)]
    subprocess.run([sys.executable, "-c", code, *folders], check=True, capture_output=True)


def test_five_hundred_runs_are_listed_in_a_few_seconds(trained, tmp_path, capsys):
    for number in range(500):
        run = RunFolder(tmp_path / f"run-{number}")
        run.checkpoints.mkdir(parents=True)
        for name in ("recipe.json", "metrics.jsonl", "checkpoints/latest.pt"):
            os.link(trained.path / name, run.path / name)
    started = time.monotonic()
    found = listed(capsys, str(tmp_path))
    seconds = time.monotonic() - started
    assert len(found) == 500 and {row["state"] for row in found.values()} == {"finished"}
    assert seconds < 10, f"{seconds:.1f} s"  # 2 on a quiet machine


# ---- For people -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 100])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(runs, columns):
    command = [sys.executable, "-m", "finetune.cli", "runs", str(runs)]
    shown = run_in_terminal(command, columns, environment={"NO_COLOR": "1"} if columns == 100 else {}).splitlines()
    lines = [ESCAPES.sub("", line) for line in shown]
    assert any("\x1b[33mresumable" in line for line in shown) == (columns != 100)
    assert max(map(len, lines)) <= columns
    starts = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert starts[:6] == ["run", "still-1", "new-1", "killed-1", "finished-1", "4"]
    text = " ".join(" ".join(lines).split())
    for words in (
        "finished-1",
        "stopped early",
        "3/3",
        "best accuracy",
        "0.9",
        "MB",
        "just now",
        "optimizer.lr",
        "1e-12",
    ):
        assert words in text, words


def test_in_a_pipe_a_run_is_one_line_however_long(runs, capsys):
    assert main(["runs", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["run", "still-1", "new-1", "killed-1", "finished-1"]
    assert len(lines) == 7 and lines[6].startswith(f"4 runs in {runs}, ")


# ---- Two runs -------------------------------------------------------------------------------------------------------------


def test_two_runs_are_compared_epoch_by_epoch_and_the_better_is_marked(losses, monkeypatch, capsys):
    monkeypatch.chdir(losses)
    assert main(["runs", "slow", "quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"] == {"optimizer.lr": [1e-4, 1e-2]}
    assert found["same_data"] is True and found["same_frozen"] is True
    logs = [metrics_lines(RunFolder(Path(name))) for name in ("slow", "quick")]
    figures = [[line for line in log if "val/loss" in line] for log in logs]
    assert [row["loss"] for row in found["epochs"]] == [
        [a["val/loss"], b["val/loss"]] for a, b in zip(*figures, strict=True)
    ]
    assert [row["epoch"] for row in found["epochs"]] == [1, 2, 3]
    assert main(["runs", "slow", "quick"]) == 0
    output = capsys.readouterr().out
    last = figures[0][-1]["val/loss"], figures[1][-1]["val/loss"]
    assert last[0] > last[1] and re.search(rf" 3 +{last[0]:.4f} +{last[1]:.4f}\*", output)
    assert re.search(r"best +loss \d\.\d{4}, epoch \d +loss \d\.\d{4}, epoch \d\*", output)


def test_runs_on_other_data_or_other_frozen_weights_are_told_apart(runs, losses, tmp_path, capsys):
    train_run(tmp_path / "other", small_recipe("bundled/resnet", augment="none", epochs=1))
    for other, same_data, same_frozen in (
        (runs / "killed-1", True, True),
        (runs / "new-1", None, None),
        (tmp_path / "other", True, False),
    ):
        assert main(["runs", str(losses / "slow"), str(other), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["same_data"], found["same_frozen"]) == (same_data, same_frozen), other.name


def test_two_runs_fit_into_sixty_columns(losses):
    console = PatientConsole(file=io.StringIO(), width=60)
    Comparison.of(describe(losses / "slow"), describe(losses / "quick")).show(console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 60 and "\u2026" not in console.file.getvalue()
    assert any(re.search(r"optimizer\.lr +0\.0001 +0\.01", line) for line in lines)


def test_the_newest_unfinished_run_is_the_one_that_was_killed(runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    assert newest_unfinished() == Path("runs/new-1")
