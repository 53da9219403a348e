"""Weights & Biases without its servers: what its own files hold of a run that is killed and goes on."""

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_equal_runs, finetune, finish, kill_after_progress, metrics_lines
from filelock import FileLock
from postbox import bad_server, begun, closed_port, mailbox, outside, service, validated, wait_until
from wandb.proto import wandb_internal_pb2

from finetune.base.events import Ended, Example
from finetune.base.files import copy_file
from finetune.store.run_folder import RunFolder
from finetune.watch.pipe import encode

PICTURE = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x00\x00\x00\x00:~\x9bU\x00\x00\x00\nIDATx"
    b"\x9cc`\x00\x00\x00\x02\x00\x01H\xaf\xa4q\x00\x00\x00\x00IEND\xaeB`\x82"
)
API_KEY = "5ecret" * 6 + "5ecr"


@pytest.fixture(autouse=True)
def nobodys_account(tmp_path, monkeypatch) -> None:
    """No account, no settings and no server of whoever runs this."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


# A validation of step 46 is not to come.
DYING = """
import sys, time
from pathlib import Path
from finetune.watch.remote_trackers import Outside
sys.path.insert(0, {tests!r})
from postbox import begun, validated
folder = Path(sys.argv[1])
outside = Outside(["wandb"], [], 0, folder, print)
outside.begin(begun(folder))
for step in (10, 20):
    outside.logged(step, {{"train/loss": 1 / step, "lr": float("nan")}})
outside.logged(23, {{"train/loss": 1 / 23}})
outside.validated(validated(23, 0.5))
outside.logged(30, {{"train/loss": float("inf")}})
outside.logged(46, {{"train/loss": 1 / 46}})
time.sleep(60)
"""


def make_folder(tmp_path: Path, trained: RunFolder) -> Path:
    folder = tmp_path / "flowers-1"
    (folder / "checkpoints").mkdir(parents=True)
    copy_file(trained.checkpoints / "best.pt", folder / "checkpoints" / "best.pt")
    return folder


def records(path: Path) -> Iterator[Any]:
    """The records in a .wandb file: LevelDB's log format, 7 bytes at the start of the file and of each piece, in blocks
    of 32 KiB."""
    data, place, record = path.read_bytes(), 7, b""
    assert data[:4] in (b":W&B", b"")  # a file that is just begun
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def all_records(folder: Path) -> list[Any]:
    return [record for path in (folder / "wandb").glob("*/*.wandb") for record in records(path)]


def read_folder(folder: Path) -> dict[str, list[Any]]:
    """Kind of record to records."""
    (path,) = folder.glob("*.wandb")
    found: dict[str, list[Any]] = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    return found


def items(record: Any) -> dict[str, Any]:
    """Name to value of a row of history, or of a summary's update."""
    both = [*getattr(record, "item", []), *getattr(record, "update", [])]
    return {"/".join(one.nested_key) or one.key: json.loads(one.value_json) for one in both}


def rows(found: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in items(row).items() if k not in ("_runtime", "_timestamp")} for row in found["history"]]


def summary(found: dict[str, list[Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for record in found["summary"]:
        values |= items(record)
    return values


def folders(folder: Path) -> list[Path]:
    """In the order in which they were begun, which is in their names."""
    return sorted((folder / "wandb").glob("*run-*"))


def wait_for_state(folder: Path, sent_step: int) -> None:
    def is_there() -> bool:
        path = folder / "wandb-step.json"
        return path.exists() and json.loads(path.read_text())["sent_step"] >= sent_step

    wait_until(is_there, 60)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_run_killed_and_resumed_is_one_run_whose_steps_never_go_back(tmp_path, trained, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = make_folder(tmp_path, trained)
    told = begun(folder)
    script = DYING.format(tests=str(Path(__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
    wait_for_state(folder, 30)
    process.kill()
    assert process.communicate()[0] == ""
    wait_until(lambda: any(record.WhichOneof("record_type") == "exit" for record in all_records(folder)), 60)
    with outside(folder, services=("wandb",)) as (one, said):
        one.begin(begun(folder, step=20, is_resumed=True))
        one.logged(23, {"train/loss": 1 / 23})
        one.validated(validated(23, 0.5))
        one.logged(30, {"train/loss": float("inf")})
        one.logged(46, {"train/loss": 1 / 46})
        one.validated(validated(46, 0.75))
        one.logged(50, {"train/loss": 1 / 50})
        worst = (
            Example("photos/a\n.png", 2.5, "cat", "dog", (("dog", 0.9), ("cat", 0.1)), PICTURE),
            Example("reviews.csv: line 3", 1.5, "bad", "good", (("good", 0.8),), b"", "It was fine"),
        )
        one.end(Ended("finished", "finished", told.run, validated(46, 0.75).best, worst))
        one.process.wait(60)
        assert [text for text in said if not text.startswith("waiting for wandb")] == []

    first, second = map(read_folder, folders(folder))
    for found in (first, second):
        (run,) = found["run"]
        assert (run.run_id, run.project, run.display_name) == (told.run_id, "finetune", "flowers-1")
        config = {one.key: json.loads(one.value_json) for one in run.config.update}
        assert {name: value for name, value in config.items() if name != "_wandb"} == {
            "epochs": 30,
            "model": {"backbone": "bundled/vgg", "layers": [1, 2]},
        }
        assert "metadata" not in found and "output_raw" not in found
    written = [*rows(first), *rows(second)]
    assert [row["_step"] for row in written] == [10, 20, 23, 30, 46, 50]
    assert str(written[1]["lr"]) == "nan" and written[3]["train/loss"] == float("inf")
    assert written[2] == {"_step": 23, "train/loss": 1 / 23, "train/epoch_loss": 1 / 23, "val/loss": 0.5, "val/accuracy": 0.5}  # fmt: skip
    assert written[4] == {"_step": 46, "train/loss": 1 / 46, "train/epoch_loss": 1 / 46, "val/loss": 0.5, "val/accuracy": 0.75}  # fmt: skip
    assert (first["exit"][0].exit_code, second["exit"][0].exit_code) == (1, 0)
    found = summary(second)
    assert (found["best/accuracy"], found["best/step"], found["best/epoch"]) == (0.75, 46, 2)
    check_worst(second)
    check_best(first, folder, {})  # closed without an end, like a run that was killed
    check_best(second, folder, validated(46, 0.75).best)


def check_worst(found: dict[str, list[Any]]) -> None:
    (artifact,) = [one for one in found["artifact"] if one.type == "run_table"]
    files = {one.path: Path(one.local_path) for one in artifact.manifest.contents}
    table = json.loads(files.pop("worst.table.json").read_text())
    assert table["columns"] == ["sample", "picture", "text", "true", "predicted", "probability", "loss"]
    (first, second) = table["data"]
    picture = first.pop(1)
    assert first == ["photos/a\\n.png", None, "cat", "dog", 0.9, 2.5]
    assert files[picture["path"]].read_bytes().startswith(b"\x89PNG")
    assert second == ["reviews.csv: line 3", None, "It was fine", "bad", "good", 0.8, 1.5]
    assert summary(found)["worst"]["nrows"] == 2


def check_best(found: dict[str, list[Any]], folder: Path, validation: dict[str, Any]) -> None:
    (artifact,) = [one for one in found["artifact"] if one.type == "model"]
    assert artifact.name == "model-0123456789abcdef" and "best" in artifact.aliases
    (file,) = artifact.manifest.contents
    best = folder / "checkpoints" / "best.pt"
    assert file.path == "best.pt"
    # Another name for the same file, which stays what it is when the run finds a better one.
    assert Path(file.local_path).samefile(best) and Path(file.local_path) != best
    assert json.loads(artifact.metadata or "{}") == validation


def test_a_stopped_run_is_shown_as_one_to_go_on_with(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "flowers-1"
    folder.mkdir()
    with outside(folder, services=("wandb",)) as (one, said):
        one.begin(begun(folder))
        one.logged(10, {"train/loss": 0.1})
        one.logged(23, {"train/loss": 0.2})
        wait_for_state(folder, 10)
        started = time.monotonic()
        one.end(Ended("stopped", "stopped by SIGTERM"))
        assert time.monotonic() - started < 1.5
        one.process.wait(60)
    found = read_folder(folders(folder)[0])
    assert said == [] and "preempting" in found and found["exit"][0].exit_code == 75
    # The validation of step 23 may come when the run goes on.
    assert rows(found) == [{"_step": 10, "train/loss": 0.1}]
    state = json.loads((folder / "wandb-step.json").read_text())
    assert state == {"run_id": begun(folder).run_id, "sent_step": 10, "step": 23, "row": {"train/loss": 0.2}}


def test_whoever_goes_on_waits_for_the_last_words_of_whoever_told_before(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    earlier = FileLock(tmp_path / "wandb-step.lock")
    earlier.acquire()  # as of a run that was killed a moment ago
    with outside(tmp_path, services=("wandb",)) as (one, said):
        one.begin(begun(tmp_path))
        one.logged(5, {"train/loss": 0.5})
        one.logged(7, {"train/loss": 0.25})
        time.sleep(2)
        assert not folders(tmp_path)
        state = {"run_id": begun(tmp_path).run_id, "sent_step": 5, "step": 5, "row": {}}
        (tmp_path / "wandb-step.json").write_text(json.dumps(state))
        earlier.release()
        one.end(Ended("finished", "finished"))
        one.process.wait(60)
    assert [text for text in said if not text.startswith("waiting for wandb")] == []
    assert rows(read_folder(folders(tmp_path)[0])) == [{"_step": 7, "train/loss": 0.25}]


def test_a_run_begun_anew_in_its_folder_is_another_with_all_of_its_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    state = {"run_id": "of the first try", "sent_step": 10, "step": 11, "row": {"train/loss": 9.0}}
    (tmp_path / "wandb-step.json").write_text(json.dumps(state))
    with outside(tmp_path, services=("wandb",)) as (one, said):
        one.begin(begun(tmp_path))
        one.logged(5, {"train/loss": 0.5})
        one.end(Ended("finished", "finished"))
        one.process.wait(60)
    assert said == [] and rows(read_folder(folders(tmp_path)[0])) == [{"_step": 5, "train/loss": 0.5}]


def test_a_run_that_failed_is_shown_as_failed_though_its_best_is_no_number(tmp_path, trained, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = make_folder(tmp_path, trained)
    with outside(folder, services=("wandb",)) as (one, said):
        one.begin(begun(folder))
        best = {"metric": "loss", "value": float("inf"), "step": 23, "epoch": 1}
        one.end(Ended("failed", "the loss is nan", "runs/flowers-1", best))
        one.process.wait(60)
    found = read_folder(folders(folder)[0])
    assert said == [] and found["exit"][0].exit_code == 1
    check_best(found, folder, best | {"value": "inf"})


def test_without_an_account_a_run_goes_on_and_says_what_to_do(tmp_path):
    with outside(tmp_path, services=("wandb",)) as (one, said):
        one.begin(begun(tmp_path))
        one.logged(10, {"train/loss": 0.1})
        wait_until(lambda: said)
        started = time.monotonic()
        one.validated(validated(23, 0.5))
        one.end(Ended("finished", "finished"))
        assert time.monotonic() - started < 2
        assert one.process.poll() == 0
    assert said == [
        "wandb: no account is configured here; log in once with `wandb login`, or set WANDB_MODE=offline to keep "
        "everything on this machine; the run goes on without it"
    ]


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    with outside(tmp_path, services=("wandb",)) as (one, said):
        one.begin(begun(tmp_path))
        one.logged(10, {"train/loss": 0.1})
        wait_until(lambda: said, 60)
        one.end(Ended("finished", "finished"))
        one.process.wait(60)
    (place,) = (tmp_path / "wandb").glob("offline-run-*")
    (sentence,) = [text for text in said if not text.startswith("waiting for wandb")]
    assert sentence.startswith("wandb: did not take the run (")
    assert sentence.endswith(f"); everything is kept on this machine instead, to be sent later by: wandb sync {place}")
    assert rows(read_folder(place)) == [{"_step": 10, "train/loss": 0.1}]
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        assert API_KEY.encode() not in path.read_bytes(), path


def test_a_server_that_hangs_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    hello = {"services": ["wandb"], "state_folder": str(tmp_path)}
    with bad_server(lambda connection: time.sleep(60)) as server, monkeypatch.context() as environment:
        environment.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.port}")
        with service("wandb_service.LATE_SECONDS = 0.1", hello) as process:
            process.stdin.write(encode(begun(tmp_path)))
            said = json.loads(process.stdout.readline())
    text = "has not answered for two minutes, and goes on trying; the run goes on without it"
    assert said == {"service": "wandb", "problem": text}


@pytest.mark.slow
def test_wandb_that_is_switched_off_is_told_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with outside(tmp_path, services=("wandb",)) as (one, said):
        one.begin(begun(tmp_path))
        one.logged(10, {"train/loss": 0.1})
        one.end(Ended("finished", "finished"))
        one.process.wait(60)
    assert [text for text in said if not text.startswith("waiting for wandb")] == []
    assert not (tmp_path / "wandb").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_real_run_killed_twice_is_told_whole_and_is_the_same_as_one_that_nobody_watched(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    unbroken, run = RunFolder(Path("runs/unbroken")), RunFolder(Path("runs/flowers"))
    options = ["--epochs", "6", "--batch-size", "8", "--save-every-steps", "20"]
    with mailbox() as box:
        watched = ["--run", str(run), "--track", "wandb", "--notify", box.url, "--resume"]
        for deaths in (1, 2):
            process = finetune("vgg_head", *options, *watched, is_watched=True)
            kill_after_progress(process, run, 250)
            wait_until(lambda deaths=deaths: box.titles.count("flowers: died") == deaths)
            assert "go on with: finetune resume runs/flowers" in box.messages[-1]["message"]
        output = finish(finetune("resume", str(run), "--notify", box.url))
        wait_until(lambda: box.titles[-1] == "flowers: finished")
        assert "flowers: goes on" in box.titles
    assert output.splitlines()[-1] == str(run)
    finish(finetune("vgg_head", *options, "--run", str(unbroken), "--track", "none", is_watched=True))
    assert_equal_runs(run, unbroken)

    wait_until(lambda: all("exit" in read_folder(folder) for folder in folders(run.path)), 60)
    written = [row for folder in folders(run.path) for row in rows(read_folder(folder))]
    steps = [row["_step"] for row in written]
    assert steps == sorted(set(steps)) and len(folders(run.path)) == 3
    # Every validation, and of the other rows those that nobody would miss.
    lines = {line["step"]: line for line in metrics_lines(run) if "val/loss" in line}
    told = {row["_step"]: row for row in written if "val/loss" in row}
    assert list(told) == list(lines) == [180 * epoch for epoch in range(1, 7)]
    for step, line in lines.items():
        assert told[step].items() >= {name: line[name] for name in line if name.startswith("val/")}.items()
