"""Asked to stop: a run saves and exits 75 within seconds, wherever it is; asked twice by Ctrl-C, it leaves at once."""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import assert_equal_runs, finetune, finish, last_step, read

from finetune.store.run_folder import RunFolder

POLITE = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1, signal.SIGHUP] if os.name == "posix" else [])]


@pytest.fixture(autouse=True)
def nothing_is_ignored():
    """Whoever runs this suite behind `nohup` passes on that SIGHUP is ignored, and the kit respects that."""
    previous = {number: signal.getsignal(number) for number in POLITE}
    for number, handler in previous.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def wait_until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def seconds_to_leave(process: subprocess.Popen, number: int, moment: str = "") -> tuple[float, str]:
    """Send the signal; the exit code must be 75."""
    started = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, f"{moment}: {process.returncode} {output}"
    return time.monotonic() - started, output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for what a process has imported")
@pytest.mark.parametrize("number", POLITE, ids=lambda number: number.name)
def test_the_default_recipe_exits_75_within_five_seconds_wherever_it_is(tmp_path, number):
    """At start-up, in the pass over the backbone, while training; the same command then goes on, to the same end."""
    environment = os.environ | {"FINETUNE_CACHE": str(tmp_path / "features")}
    unbroken, run = RunFolder(tmp_path / "unbroken"), RunFolder(tmp_path / "run")
    finish(finetune("vgg_head", "--run", str(unbroken.path), env=environment | {"FINETUNE_CACHE": str(tmp_path / "f")}))
    command = ["vgg_head", "--run", str(run.path), "--resume"]
    moments = {
        "torch is imported": lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(),
        "a folder": run.exists,
        "filling": lambda: any((tmp_path / "features").glob("*.safetensors")),
        "an epoch": lambda: last_step(run) >= 23,
        "three epochs": lambda: last_step(run) >= 60,
    }
    for moment, reached in moments.items():
        shutil.rmtree(tmp_path / "features", ignore_errors=True)
        process = finetune(*command, env=environment, is_cold=True)  # its start, too
        wait_until(reached, process)
        seconds, output = seconds_to_leave(process, number, moment)
        assert seconds < 5, f"{moment}: {seconds:.1f} s"
        assert "Traceback" not in output, output
    finish(finetune(*command, env=environment))
    assert_equal_runs(run, unbroken)


LONG_STEPS = [
    "vgg_head", "--image-size", "128", "--augment", "light", "--batch-size", "128", "--train-samples", "384",
    "--no-cache", "--epochs", "3", "--workers", "0", "--save-every-steps", "1", "--device", "cpu", "--quiet",
]  # fmt: skip


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once_and_the_last_checkpoint_is_good(tmp_path):
    run = RunFolder(tmp_path / "run")
    process = finetune(*LONG_STEPS, "--run", str(run.path))
    wait_until(lambda: last_step(run) >= 1, process)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None  # a step takes longer than that
    seconds, output = seconds_to_leave(process, signal.SIGINT)
    assert seconds < 1 and "Traceback" not in output
    assert read(run)["step"] == last_step(run) == 1


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="nohup is of POSIX")
def test_a_signal_that_is_ignored_on_purpose_stays_ignored(tmp_path):
    run = RunFolder(tmp_path / "run")
    words = ["vgg_head", "--epochs", "2", "--train-samples", "640", "--save-every-steps", "1", "--device", "cpu"]
    process = subprocess.Popen(
        ["nohup", sys.executable, "-m", "finetune.cli", *words, "--run", str(run.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    wait_until(lambda: last_step(run) >= 2, process)
    process.send_signal(signal.SIGHUP)  # the terminal is closed
    finish(process)
    assert read(run)["status"] == "finished"


@pytest.mark.skipif(sys.platform != "win32", reason="CTRL_BREAK is of Windows: run this suite there")
def test_ctrl_break_saves_and_exits_75(tmp_path):
    run = RunFolder(Path(tmp_path) / "run")
    words = ["vgg_head", "--epochs", "2", "--train-samples", "640", "--save-every-steps", "1", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune.cli", *words, "--run", str(run.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        creationflags=subprocess.CREATE_NEW_PROCESS_GROUP,
    )
    wait_until(lambda: last_step(run) >= 2, process)
    process.send_signal(signal.CTRL_BREAK_EVENT)
    finish(process, code=75)
    assert read(run)["status"] == "running"


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are of POSIX")
@pytest.mark.parametrize(
    "is_disowned", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["stops", "disowned, goes on"]
)
def test_a_terminal_that_is_closed_stops_a_run_politely_or_not_at_all(tmp_path, is_disowned):
    import fcntl
    import termios

    ours, theirs = os.openpty()

    def own_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)  # its end is a SIGHUP to this process
        signal.signal(signal.SIGHUP, signal.SIG_IGN if is_disowned else signal.SIG_DFL)

    run = RunFolder(tmp_path / "run")
    words = ["vgg_head", "--epochs", "40" if is_disowned else "4000", "--log-every-steps", "1", "--run", str(run.path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune.cli", *words, "--track", "none", "--no-report"],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=own_terminal,
        env=os.environ | {"TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    deadline = time.monotonic() + 60
    while not run.metrics_file.exists() and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.01)[0]:
            os.read(ours, 65536)
    os.close(ours)
    assert process.wait(timeout=60) == (0 if is_disowned else 75)
    assert read(run)["status"] == ("finished" if is_disowned else "running")
