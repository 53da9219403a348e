"""Messages: what they say and when; what cannot be sent holds nothing up; no password ever shows."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from postbox import bad_server, begun, closed_port, mailbox, outside, validated, wait_until

from finetune.base.events import Ended
from finetune.errors import UsageError
from finetune.watch.notify_service import without_paths
from finetune.watch.pipe import scheme_of
from finetune.watch.remote_trackers import Outside, check_notify_urls, check_services, notify_urls

HOST = socket.gethostname()
SECRETS = ("alice99", "hunter22", "s3cr3tt0k3n", "tippt0p")


def seconds_to_tell(one: Outside, times: int) -> float:
    started = time.monotonic()
    for step in range(1, times + 1):
        one.logged(step, {"train/loss": 1 / step, "lr": 0.1})
    return time.monotonic() - started


def secret_url(port: int, options: str = "") -> str:
    return f"json://alice99:hunter22@127.0.0.1:{port}/s3cr3tt0k3n/tippt0p%2Fkey{options}"


# ---- What is said, and when ------------------------------------------------------------------------------------------


def test_a_run_tells_its_start_its_best_every_so_many_epochs_and_its_end(tmp_path):
    run = "runs/my flowers"
    with mailbox() as box, outside(tmp_path, box.url, every=2) as (one, said):
        one.begin(begun(tmp_path, run=run))
        box.wait_for(1)
        for epoch, accuracy in enumerate((0.5, 0.6, 0.7, 0.8), 1):
            one.logged(23 * epoch - 3, {"train/loss": 0.1})
            one.validated(validated(23 * epoch, accuracy))
            box.wait_for({1: 2, 2: 3, 3: 3, 4: 4}[epoch])
        best = validated(92, 0.8).best
        one.validated(validated(115, 0.7, best))
        one.end(Ended("finished", "finished", run, best))
        messages = box.messages
    assert [(message["title"], message["type"]) for message in messages] == [
        ("my flowers: started", "info"),
        ("my flowers: new best", "info"),
        ("my flowers: epoch 2/30", "info"),
        ("my flowers: epoch 4/30", "info"),
        ("my flowers: finished", "success"),
    ]
    bodies = [message["message"].split("\n") for message in messages]
    assert bodies[0] == ["30 epochs, 690 steps", f"{run} on {HOST}"]
    assert bodies[1] == [
        "epoch 1/30, step 23: train/epoch_loss 0.0435, val/loss 0.5000, val/accuracy 0.5000",
        "new best: accuracy 0.5000 in epoch 1",
        f"{run} on {HOST}",
    ]
    # A best less than a minute after another comes with the next message.
    assert bodies[3][1] == "new best: accuracy 0.8000 in epoch 4"
    assert bodies[4][:2] == [
        "epoch 5/30, step 115: train/epoch_loss 0.0087, val/loss 0.5000, val/accuracy 0.7000",
        "best: accuracy 0.8000 in epoch 4",
    ]
    assert bodies[4][2].startswith("took 0:00:0")
    assert bodies[4][3] == "weights: finetune export 'runs/my flowers'"
    assert said == []


def test_a_run_tells_that_it_goes_on_and_that_it_stops(tmp_path):
    text = "stopped by SIGTERM at step 200 of 690, saved; go on with: finetune resume runs/flowers"
    with mailbox() as box, outside(tmp_path, box.url, every=5) as (one, said):
        best = {"metric": "accuracy", "value": 0.75, "step": 92, "epoch": 4}
        one.begin(begun(tmp_path, run="runs/flowers", step=161, is_resumed=True, best=best))
        one.validated(validated(184, 0.7, best))  # epoch 8: of the fifth was told before
        box.wait_for(1)
        started = time.monotonic()
        one.end(Ended("stopped", text, "runs/flowers", best))
        assert time.monotonic() - started < 1.5
        box.wait_for(2)
        assert box.titles == ["flowers: goes on", "flowers: stopped"]
        assert box.messages[0]["message"] == f"from step 161 of 690\nruns/flowers on {HOST}"
        assert box.messages[1]["message"] == (
            f"{text}\nepoch 8/30, step 184: train/epoch_loss 0.0054, val/loss 0.5000, val/accuracy 0.7000\n"
            f"best: accuracy 0.7500 in epoch 4\nruns/flowers on {HOST}"
        )
        assert box.messages[1]["type"] == "warning"
    assert said == []


def test_a_failure_before_the_first_step_is_told_without_the_place_of_anybodys_files(tmp_path):
    text = "image /home/somebody/photos/cat.jpg is cut off; see runs/flowers/bad.json"
    with mailbox() as box, outside(tmp_path, box.url, run="runs/flowers") as (one, _):
        one.end(Ended("failed", text))
        box.wait_for(1)
    assert box.messages[0]["title"] == "flowers: failed"
    assert box.messages[0]["type"] == "failure"
    assert box.messages[0]["message"] == (
        "before its first step: image cat.jpg is cut off; see runs/flowers/bad.json\n" + f"runs/flowers on {HOST}"
    )


def test_what_comes_while_a_message_is_on_its_way_makes_one_message(tmp_path):
    with mailbox() as box, outside(tmp_path, box.url, every=1) as (one, _):
        one.begin(begun(tmp_path))
        for epoch in range(1, 21):
            one.validated(validated(23 * epoch, epoch / 100))
        one.end(Ended("stopped early", "stopped early"))
    assert len(box.messages) < 10
    assert box.titles[-1] == f"{tmp_path.name}: stopped early"
    assert "new best: accuracy 0.2000 in epoch 20" in "".join(message["message"] for message in box.messages)


def test_only_the_last_part_of_a_path_from_the_root_is_told():
    run = "/data/runs/x-1"
    assert without_paths("cannot read /home/me/a b.png", run) == "cannot read a b.png"
    assert without_paths(r"cannot read 'C:\Users\me\cat.jpg': bad", run) == "cannot read 'cat.jpg': bad"
    untouched = (f"go on with: finetune resume {run}", "s3://bucket/me/run", "photos/cat.jpg: 3/4 read", "a / b", "")
    for text in untouched:
        assert without_paths(text, run) == text


# ---- A run that dies -------------------------------------------------------------------------------------------------

DYING = """
import os, sys, time
from pathlib import Path
from finetune.watch.remote_trackers import Outside
from finetune.watch.pipe import Logged
sys.path.insert(0, {tests!r})
from postbox import begun, validated
folder = Path(sys.argv[1])
outside = Outside(["notify"], [sys.argv[2]], 0, folder, print, run="runs/flowers")
if sys.argv[3] == "begun" and os.fork() == 0:  # as a worker process of a data loader: it holds the pipe as well
    time.sleep(60)
    os._exit(0)
if sys.argv[3] == "begun":
    outside.begin(begun(folder, run="runs/flowers"))
    outside.validated(validated(23, 0.5))
    outside.logged(40, {{"train/loss": 0.1}})
print("told", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("moment", ["begun", "loading"])
def test_a_run_killed_by_sigkill_is_told_with_the_command_to_go_on(tmp_path, moment):
    with mailbox() as box:
        script = DYING.format(tests=str(Path(__file__).parent))
        command = [sys.executable, "-c", script, str(tmp_path), box.url, moment]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            assert process.stdout.readline() == "told\n"
            if moment == "begun":
                box.wait_for(2)
            process.kill()  # the worker lives on
            wait_until(lambda: "flowers: died" in box.titles)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        message = box.messages[-1]
        assert message["type"] == "failure"
        go_on = "go on with: finetune resume runs/flowers"
        if moment == "begun":
            assert message["message"] == (
                f"run runs/flowers died without a word at step 40; {go_on}\n"
                "epoch 1/30, step 23: train/epoch_loss 0.0435, val/loss 0.5000, val/accuracy 0.5000\n"
                f"best: accuracy 0.5000 in epoch 1\nruns/flowers on {HOST}"
            )
        else:
            line = f"run runs/flowers died without a word before its first step; {go_on}"
            assert message["message"] == f"{line}\nruns/flowers on {HOST}"
        assert box.titles.count("flowers: died") == 1


# ---- What cannot be sent ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_fails_is_said_once_without_its_secrets_and_holds_nothing_up(tmp_path, capfd, monkeypatch):
    """One refuses, one hangs, one closes at once, one answers 500; the fifth is well."""
    with (
        mailbox(500) as broken,
        mailbox() as well,
        bad_server(lambda connection: time.sleep(60)) as hanging,
        bad_server(lambda connection: connection.close()) as closing,
    ):
        ports = {"refuses": closed_port(), "hangs": hanging.port, "closes": closing.port, "500": broken.port}
        urls = [secret_url(port, "?rto=0.5") for port in ports.values()]
        monkeypatch.setenv("FINETUNE_NOTIFY", " ".join([*urls, well.url]))
        with outside(tmp_path, *notify_urls(())) as (one, said):
            one.begin(begun(tmp_path))
            assert min(seconds_to_tell(one, 1000) for _ in range(3)) < 0.05
            process = Path(f"/proc/{one.process.pid}")
            seen = [(process / name).read_bytes().decode() for name in ("cmdline", "environ") if process.exists()]
            wait_until(lambda: len(said) >= 2)
            one.logged(1001, {"train/loss": 0.1})
            started = time.monotonic()
            one.end(Ended("failed", "the disk is full"))
            assert time.monotonic() - started < 1.5
        assert len(broken.messages) > 3  # three tries; and the next message
        assert broken.users[0] == "alice99:hunter22"
        assert well.titles == [f"{tmp_path.name}: started", f"{tmp_path.name}: failed"]
    sentence = "notify: json:// did not take a message ({}); the run goes on, later ones are tried"
    reasons = [
        "A Connection error occurred sending JSON notification to ***.",
        "Failed to send JSON POST notification: Internal server error., error=500.",
    ]
    assert sorted(said) == [sentence.format(reason) for reason in reasons]
    seen += [*said, *capfd.readouterr()]
    seen += [path.read_bytes().decode() for path in tmp_path.rglob("*") if path.is_file()]
    for secret in SECRETS:
        assert not any(secret in text for text in seen), secret


@pytest.mark.slow
def test_a_server_that_never_ends_its_answer_costs_a_finished_run_twenty_seconds_at_most(tmp_path):
    """It drips: no time limit between two reads ever strikes. And what failed once is not said again."""

    def drip(connection: socket.socket) -> None:
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while True:
                connection.sendall(b"x")
                time.sleep(0.5)
        except OSError:
            pass

    with bad_server(drip) as server, outside(tmp_path, secret_url(server.port), every=1) as (one, said):
        one.begin(begun(tmp_path))
        started = time.monotonic()
        one.end(Ended("finished", "finished"))
        assert 19 < time.monotonic() - started < 22
        assert said == ["waiting for notify, 18 s at most; what is left goes on by itself"]

    with bad_server(drip) as server, outside(tmp_path, secret_url(server.port), every=1) as (one, said):
        one.begin(begun(tmp_path))
        wait_until(lambda: said, 60)
        one.validated(validated(23, 0.5))
        time.sleep(40)
        one.validated(validated(46, 0.6))
        assert said == [
            "notify: json:// did not take a message (no answer within 10 s); the run goes on, later ones are tried"
        ]


# ---- Before a run ----------------------------------------------------------------------------------------------------


def test_an_url_that_messages_cannot_go_to_is_refused_without_being_named():
    check_notify_urls([])
    good = [
        "json://user:hunter22@localhost/x",
        "mailto://alice99:hunter22@gmail.com",
        "tgram://123456789:abcdefg_hijk/x/",
    ]
    with pytest.raises(UsageError) as caught:
        check_notify_urls([*good, "tgram://hunter22", *good])
    assert str(caught.value) == (
        "--notify: URL 4 (tgram://) is none that messages can go to; "
        "how each kind is written: https://github.com/caronc/apprise/wiki"
    )
    assert scheme_of("s3cr3tt0k3n") == scheme_of("xoxb-1:2") == "one without a scheme"


def test_urls_come_from_the_command_line_and_from_the_environment(monkeypatch):
    monkeypatch.setenv("FINETUNE_NOTIFY", " json://a\tslack://b/c \n json://a")
    assert notify_urls(["json://d", "slack://b/c"]) == ("json://d", "slack://b/c", "json://a")
    monkeypatch.delenv("FINETUNE_NOTIFY")
    assert notify_urls([]) == ()


def test_a_library_that_is_not_installed_is_named_with_the_command_to_install_it(tmp_path):
    check_services(["wandb", "notify", "tensorboard"])
    package = Path(check_services.__code__.co_filename).parents[1]
    shutil.copytree(package, tmp_path / "finetune", ignore=shutil.ignore_patterns("bundled", "__pycache__"))
    script = "import sys; sys.path.insert(0, sys.argv[1]); from finetune.watch.remote_trackers import check_services; check_services(sys.argv[2:])"
    for name, words in [("wandb", "--track wandb: wandb"), ("notify", "--notify: apprise")]:
        # Without site-packages.
        command = [sys.executable, "-I", "-S", "-c", script, str(tmp_path), name]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stderr.splitlines()[-1] == (
            f"finetune.errors.UsageError: {words} is not installed; install it with: pip install {words.split()[-1]}"
        )
