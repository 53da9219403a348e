"""The process that talks to the outside: it takes nothing from the run and gives nothing back."""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from postbox import bad_server, begun, mailbox, outside, service, validated, wait_until

from finetune.base.events import Begun, Ended, Example
from finetune.watch.pipe import Closed, Logged, Queue, decode, encode, scrub, secrets_of
from finetune.watch.remote_trackers import Outside

linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")


@linux
def test_the_other_process_has_no_file_of_the_run_no_signal_of_its_terminal_and_none_of_its_random_numbers(tmp_path):
    def states():
        name, keys, *rest = np.random.get_state()
        return random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()

    before, handlers = states(), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with open(tmp_path / "lock", "w") as lock, mailbox() as box:
        os.set_inheritable(lock.fileno(), True)
        with outside(tmp_path, box.url) as (one, said):
            one.begin(begun(tmp_path))
            box.wait_for(1)
            folder = Path(f"/proc/{one.process.pid}/fd")
            files = {os.readlink(descriptor) for descriptor in folder.iterdir()}
            assert {name.split(":")[0] for name in files} <= {"pipe", "socket", "/dev/null", "anon_inode"}
            assert os.getsid(one.process.pid) == os.getpgid(one.process.pid) == one.process.pid
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(one.process.pid, number)  # as a scheduler does, with every process of a job
            one.end(Ended("stopped", "stopped"))
            assert box.titles[-1] == f"{tmp_path.name}: stopped"
    assert one.process.returncode == 0
    assert said == []
    assert states() == before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_killed_process_is_said_once_and_nothing_else_happens(tmp_path):
    with mailbox() as box, outside(tmp_path, box.url, services=("wandb", "notify")) as (one, said):
        one.process.kill()
        wait_until(lambda: said)
        started = time.monotonic()
        one.begin(begun(tmp_path))
        for step in range(1000):
            one.logged(step, {"train/loss": 0.1})
        one.flush()
        one.end(Ended("finished", "finished"))
        assert time.monotonic() - started < 0.2
    assert said == ["wandb and notify: the process that tells it has ended (-9); the run goes on without it"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="SIGSTOP")
def test_a_process_that_takes_nothing_any_more_holds_nothing_up(tmp_path):
    with mailbox() as box, outside(tmp_path, box.url) as (one, said):
        one.begin(begun(tmp_path))
        box.wait_for(1)
        os.kill(one.process.pid, signal.SIGSTOP)
        started = time.monotonic()
        for step in range(40_000):
            one.logged(step, {"train/loss": 0.1})
        one.validated(validated(23, 0.5))
        assert time.monotonic() - started < 1
        one.end(Ended("stopped", "stopped"))
        assert time.monotonic() - started < 2.5
        # Ten thousand wait, and at most as many are on their way into the pipe.
        (sentence,) = said
        dropped = int(sentence.split()[1])
        assert sentence == f"notify: {dropped} logged steps were left out, it did not keep up"
        assert 18_000 < dropped <= 30_002
        os.kill(one.process.pid, signal.SIGCONT)
        wait_until(lambda: f"{tmp_path.name}: stopped" in box.titles)


def test_what_still_hangs_some_time_after_the_run_is_given_up(tmp_path):
    with (
        bad_server(lambda connection: time.sleep(60)) as server,
        service("service.DEADLINE_SECONDS = 1", {"services": ["notify"], "notify_urls": [server.url]}) as process,
    ):
        process.stdin.write(encode(Ended("finished", "finished")))
        started = time.monotonic()
        assert process.wait(30) == 1
        assert time.monotonic() - started < 5


def test_a_run_that_comes_to_nothing_is_not_told(tmp_path):
    with mailbox() as box, outside(tmp_path, box.url) as (one, said):
        started = time.monotonic()
        one.close()
        assert time.monotonic() - started < 1.5
        one.process.wait(20)
    assert (box.messages, said) == ([], [])


def test_a_process_that_cannot_be_started_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.watch.remote_trackers.SERVICE_COMMAND", [str(tmp_path / "nothing")])
    said: list[str] = []
    one = Outside(["notify"], ["json://x"], 0, tmp_path, said.append)
    one.begin(begun(tmp_path))
    one.end(Ended("finished", "finished"))
    (sentence,) = said
    assert sentence.startswith("notify: cannot be started (")
    assert sentence.endswith("; the run goes on without it")


def test_what_is_told_comes_out_of_the_pipe_as_it_went_in(tmp_path):
    example = Example("bild\n1.png", 1.5, "Hündin", "cat", (("cat", 0.75), ("Hündin", 0.25)), b"\x89PNG\0", "")
    best = {"metric": "accuracy", "value": 0.5, "step": 23, "epoch": 1}
    for told in (
        Logged(3, {"train/loss": float("inf"), "lr": 1e-3}),
        validated(23, 0.5),
        Ended("finished", "done", "runs/x", best, (example,)),
        Closed(),
    ):
        assert decode(encode(told)) == told
    arrived = decode(encode(begun(Path("relative"), config={"path": Path("a"), "odd": "\udcff", "pair": (1, 2)})))
    assert isinstance(arrived, Begun)
    assert (arrived.folder, arrived.facts) == (Path("relative").resolve(), {})
    assert arrived.config == {"path": "a", "odd": "?", "pair": [1, 2]}


def test_a_full_queue_spares_what_can_not_be_told_again():
    queue: Queue[str] = Queue(room=3)
    for thing in ("begun", "logged 1", "logged 2", "logged 3", "validated", "ended"):
        queue.put(thing, can_be_spared=thing.startswith("logged"))
    assert queue.take() == ["begun", "validated", "ended"]
    assert queue.dropped == 3
    queue.put("more")
    queue.close()
    queue.put("too late")
    assert (queue.take(), queue.take()) == (["more"], [])


def test_every_part_of_an_url_that_could_be_a_secret_is_hidden():
    secrets = secrets_of(["slack://bot@T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#channel?key=p%40ssw0rd&fmt=x", ""])
    text = "POST https://hooks/t1jj3t3l2/A1BRTD4JD (TIiajkdnlazkcOXrIdevi7FQ) by bot with p@ssw0rd, p%40ssw0rd: 404"
    assert scrub(text, secrets) == "POST https://hooks/*** (***) by bot with ***, ***: 404".replace(
        "/***", "/***/***", 1
    )
