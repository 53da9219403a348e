"""Disks that are full, too small, read-only or broken. Real small file systems where the system lets us make one."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DyingTerminal, assert_equal_runs, read, resume_run, small_recipe, start_in, train_run

from finetune import RunError, UsageError
from finetune.base import files
from finetune.cli import main
from finetune.recipe.execution import Machine, Numerics, Settings
from finetune.store import checkpoint
from finetune.store.run_folder import RunFolder

MB = 1_000_000


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Between the two attempts."""
    monkeypatch.setattr(checkpoint, "RETRY_AFTER_SECONDS", 0.01)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A real file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root can make a file system for this test; .ci/run does")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-R", "-l", str(place)], check=True)


RECIPE = small_recipe(augment="none")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> RunFolder:
    return train_run(tmp_path_factory.mktemp("unbroken") / "run", RECIPE)


def fill(place: Path, leave_bytes: int) -> Path:
    """Take all of a file system's room but so much."""
    file = place / "filler"
    with open(file, "wb") as stream:
        stream.write(bytes(shutil.disk_usage(place).free - leave_bytes))
    return file


def make_read_only(place: Path) -> None:
    """Only of the checkpoints: a file system with a file open for writing, like the log, cannot be."""
    checkpoints = str(place / "run" / "checkpoints")
    subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", checkpoints], check=True)


def make_writable(place: Path) -> None:
    """Undo what the two above did."""
    subprocess.run(["umount", "-q", str(place / "run" / "checkpoints")], check=False)
    (place / "filler").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("free_bytes", "said"),
    [
        (250_000, r"too little room: up to \d+ checkpoints of 0\.1 MB .* and 0\.\d MB are free; make room"),
        (40_000, r"a checkpoint cannot be written there \(.*No space left on device\); make room"),
    ],
    ids=["for all of them", "for a single one"],
)
def test_too_little_room_for_checkpoints_is_said_before_the_first_step_and_nothing_is_left(
    small_disk, free_bytes, said
):
    fill(small_disk, free_bytes)
    with pytest.raises(RunError, match=said):
        train_run(small_disk / "run", small_recipe(epochs=1))
    assert os.listdir(small_disk) == ["filler"]


def test_a_folder_on_a_read_only_disk_is_one_line(small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main(["vgg_head", "--train-samples", "100", "--device", "cpu", "--run", str(small_disk / "run")]) == 2
    assert "cannot be made (Read-only file system); give another folder" in capsys.readouterr().err


class Interfering(DyingTerminal):
    """Does something to the disk after a given step."""

    def __init__(self, at_step: int, act):
        super().__init__()
        self.at_step, self.act = at_step, act

    def step(self, step: int, *_) -> None:
        if step == self.at_step:
            self.act()


def interfered_run(path: Path, at_step: int, act) -> Interfering:
    terminal = Interfering(at_step, act)
    settings = Settings(save_every_steps=1, log_every_steps=1)
    start_in(path, "test", RECIPE, Numerics(), Machine("cpu"), settings, terminal)
    return terminal


@pytest.mark.parametrize(
    ("interfere", "said"),
    [
        (lambda place: fill(place, 0), "No space left on device"),
        (make_read_only, "Read-only file system"),
    ],
    ids=["the disk fills", "the disk becomes read-only"],
)
def test_a_disk_that_fails_under_a_run_keeps_the_last_checkpoint_and_a_resume_ends_the_same(
    small_disk, unbroken, interfere, said
):
    run = RunFolder(small_disk / "run")
    with pytest.raises(
        RunError, match=f"step-000005.pt cannot be written, nor at a second attempt .*{said}.*step-000004.pt is good"
    ):
        interfered_run(run.path, 5, lambda: interfere(small_disk))
    assert read(run)["step"] == 4
    make_writable(small_disk)
    resume_run(run)
    assert_equal_runs(run, unbroken)


def test_a_checkpoint_that_can_be_written_at_the_second_attempt_is_no_reason_to_stop(tmp_path, unbroken, monkeypatch):
    real, failures = files.os.fsync, []

    def fail_once(descriptor):
        if len(failures) == 1:
            failures.append(1)
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fail_once)
    interfered_run(tmp_path / "run", 5, lambda: failures.append(0))
    assert len(failures) == 2
    assert_equal_runs(RunFolder(tmp_path / "run"), unbroken)


# ---- Every kind of failure at every kind of write ---------------------------------------------------------------------


class FailingDisk:
    """From a moment on, writing below a folder fails: at `open`, `fsync`, `rename` or `link`."""

    def __init__(self, monkeypatch, call: str, number: int, folder: Path):
        self.on = False
        real = {name: getattr(files.os, name) for name in ("fsync", "replace", "link")}
        real_open = open

        def fails(name: str, path) -> None:
            if self.on and name == call and str(folder) in os.path.abspath(os.fspath(path)):
                raise OSError(number, os.strerror(number))

        def opened(path, mode="r", *rest, **options):
            if set(mode) & set("wax"):
                fails("open", path)
            return real_open(path, mode, *rest, **options)

        def fsync(descriptor):
            fails("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            return real["fsync"](descriptor)

        monkeypatch.setattr(files.os, "fsync", fsync)
        monkeypatch.setattr("builtins.open", opened)
        for name in ("replace", "link"):
            monkeypatch.setattr(
                files.os, name, lambda one, other, name=name: (fails(name, other), real[name](one, other))
            )


@pytest.mark.skipif(sys.platform != "linux", reason="names the file of a descriptor as Linux does")
@pytest.mark.parametrize(
    ("call", "number"),
    [
        pytest.param(
            call, number, id=f"{call}-{errno.errorcode[number]}",
            marks=() if number == errno.ENOSPC or (call, number) == ("fsync", errno.EIO) else pytest.mark.slow,
        )
        for call in ("open", "fsync", "replace", "link")
        for number in (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES)
    ],
)  # fmt: skip
def test_whatever_fails_while_a_checkpoint_is_written_the_one_before_is_good(
    tmp_path, unbroken, monkeypatch, call, number
):
    run = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patched:
        disk = FailingDisk(patched, call, number, run.checkpoints)
        if call == "link":  # not every file system has them: a copy does as well
            interfered_run(run.path, 5, lambda: setattr(disk, "on", True))
        else:
            with pytest.raises(
                RunError, match=f"step-000005.pt cannot be written.*{os.strerror(number)}.*step-00000[45].pt is good"
            ):
                interfered_run(run.path, 5, lambda: setattr(disk, "on", True))
            assert read(run)["step"] >= 4
            assert not list(run.checkpoints.glob(".*"))
    resume_run(run)
    assert_equal_runs(run, unbroken)


def test_a_log_that_cannot_be_written_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch):
    class Full:
        """A file whose disk is full for a while."""

        def __init__(self, stream):
            self.stream, self.full = stream, False

        def write(self, data):
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.stream.write(data)

        def __getattr__(self, name):
            return getattr(self.stream, name)

    from finetune.store.metrics_log import MetricsFile
    from finetune.training import context

    logs = []

    class Log(MetricsFile):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._stream = Full(self._stream)
            logs.append(self._stream)

    monkeypatch.setattr(context, "MetricsFile", Log)
    terminal = interfered_run(tmp_path / "run", 3, lambda: setattr(logs[0], "full", True))
    said = [line for line in terminal.lines if "metrics.jsonl cannot be written" in line]
    assert len(said) == 1 and "the run goes on" in said[0]
    run = RunFolder(tmp_path / "run")
    assert read(run)["status"] == "finished" and read(run)["step"] == 14


def test_a_log_catches_up_when_there_is_room_again(tmp_path):
    from finetune.store.metrics_log import MetricsFile

    said: list[str] = []
    log = MetricsFile(tmp_path / "metrics.jsonl", said.append)
    stream = log._stream

    log.write({"step": 1})
    log._stream = type("Short", (), {"write": lambda self, data: stream.write(data[:7]) or 7})()
    log.write({"step": 2})  # in pieces
    log._stream = type(
        "Never", (), {"write": lambda self, data: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))}
    )()
    log.write({"step": 3})
    log._stream = stream
    log.write({"step": 4})
    mark = log.mark()
    log.close()
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert [line["step"] for line in map(json.loads, content.splitlines())] == [1, 2, 3, 4]
    assert mark.bytes == len(content) and len(said) == 1


def test_a_run_over_a_file_system_without_links_keeps_copies(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", no_links)
    monkeypatch.setattr(Path, "hardlink_to", no_links)
    run = train_run(tmp_path / "run", small_recipe(epochs=1))
    assert read(run)["status"] == "finished"
    assert not (run.checkpoints / "latest.pt").samefile(run.checkpoints / "step-000007.pt")


def test_a_run_folder_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be made \(Not a directory\); give another folder"):
        train_run(tmp_path / "file" / "run", small_recipe(epochs=1))
