"""Runs whose folder lives elsewhere: a real S3 server on loopback, killed and restarted; other places by fsspec."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import assert_equal_runs, finetune, finish, small_recipe, train_run

from finetune import RunError, StoppedEarly, UsageError
from finetune.base.lock import owner_to_text, this_process
from finetune.cli import main
from finetune.store import checkpoint
from finetune.store.remote import Uploader, is_remote, mirror_folder, open_run
from finetune.store.remote_fs import HEARTBEAT_SECONDS, SILENCE_SECONDS, Lease, RemoteFolder
from finetune.store.run_folder import RunFolder

WORDS = [
    "vgg_head", "--augment", "light", "--epochs", "3", "--train-samples", "640", "--batch-size", "32", "--device", "cpu",
    "--save-every-steps", "4", "--log-every-steps", "1",
]  # fmt: skip


class Server:
    """moto's S3, in a process of its own. What it holds is gone when it is killed."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.environment = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
        }
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
            assert time.monotonic() < deadline and self.process.poll() is None, "the S3 server does not answer"
            time.sleep(0.05)
        self.files().mkdir("bucket")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def files(self):
        """A file system of our own, that remembers nothing of others."""
        import s3fs

        return s3fs.S3FileSystem(
            key="test",
            secret="test",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def names(self) -> set[str]:
        return {name.removeprefix("bucket/run/") for name in self.files().find("bucket/run")}


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    running.start()
    yield running
    running.kill()


def machine(server: Server, home: Path) -> dict[str, str]:
    """The environment of a machine that has nothing but the network: mirrors and features of its own."""
    return (
        os.environ | server.environment | {"XDG_DATA_HOME": str(home / "data"), "FINETUNE_CACHE": str(home / "cache")}
    )


def mirror(home: Path) -> RunFolder:
    (found,) = (home / "data" / "finetune" / "remote").glob("run-*")
    return RunFolder(found)


def wait_for(condition, process: subprocess.Popen, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps(names: set[str]) -> list[int]:
    return sorted(int(name[-9:-3]) for name in names if name.startswith("checkpoints/step-"))


@pytest.mark.slow
def test_a_run_on_s3_killed_here_goes_on_exactly_on_another_machine(tmp_path, server):
    here, there = tmp_path / "here", tmp_path / "there"
    process = finetune(*WORDS, "--run", "s3://bucket/run", env=machine(server, here))
    wait_for(lambda: steps(server.names()), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert {"recipe.json", "frozen/frozen.json", "metrics.jsonl"} <= server.names()
    # Its last sign of life is on the server; the process is known to be dead here, as it is of this very machine.
    said = finish(finetune("resume", "s3://bucket/run", env=machine(server, there)))
    assert "fetching" in said and "resuming s3://bucket/run at" in said and said.splitlines()[-1] == "s3://bucket/run"

    unbroken = RunFolder(tmp_path / "unbroken")
    finish(finetune(*WORDS, "--run", str(unbroken.path)))
    assert_equal_runs(mirror(there), unbroken)
    files = server.files()
    for name in server.names():
        assert files.cat(f"bucket/run/{name}") == (mirror(there).path / name).read_bytes(), name
    names = server.names()
    assert {"checkpoints/latest.pt", "checkpoints/best.pt"} <= names and len(steps(names)) == 2
    assert not any("lock" in name or ".tmp" in name for name in names)


@pytest.mark.slow
def test_a_run_on_s3_is_evaluated_and_exported_on_a_machine_that_never_saw_it(tmp_path, server):
    finish(finetune(*WORDS, "--run", "s3://bucket/run", env=machine(server, tmp_path / "here")))
    elsewhere = machine(server, tmp_path / "third")
    figures = json.loads(finish(finetune("evaluate", "s3://bucket/run", "--json", env=elsewhere)).splitlines()[-1])
    assert figures["run"] == "s3://bucket/run"
    exported = finish(finetune("export", "s3://bucket/run", "--output", str(tmp_path / "model.pt"), env=elsewhere))
    assert str(tmp_path / "model.pt") in exported and (tmp_path / "model.json").exists()


@pytest.mark.slow
def test_a_server_killed_and_restarted_in_the_middle_delays_only_the_upload(tmp_path, server):
    process = finetune(*WORDS, "--run", "s3://bucket/run", env=machine(server, tmp_path))
    wait_for(lambda: steps(server.names()), process)
    server.kill()
    run = mirror(tmp_path)
    before = max(step for step, _ in checkpoint.step_files(run.checkpoints))
    wait_for(lambda: max(step for step, _ in checkpoint.step_files(run.checkpoints)) > before, process)  # it goes on
    wait_for(lambda: "finished" in str(checkpoint.read_checkpoint(run.checkpoints / "latest.pt", run.read_recipe().id).progress.status), process)  # fmt: skip
    said = ""
    # The library of S3 tries again by itself for some seconds before it says so.
    while "cannot be written just now" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    assert process.poll() is None  # it waits with what is not uploaded
    server.start()
    said += finish(process)
    assert said.count("cannot be written just now") == 1 and "the run goes on, uploads wait" in said
    assert "MB wait to be uploaded to s3://bucket/run" in said and "can be written again" in said
    files = server.files()
    for path in run.path.rglob("*"):
        if path.is_file() and path.name != "lock":
            name = path.relative_to(run.path).as_posix()
            assert files.cat(f"bucket/run/{name}") == path.read_bytes(), name


@pytest.mark.slow
def test_a_server_that_hangs_for_a_while_holds_nothing_up(tmp_path, server):
    process = finetune(*WORDS, "--run", "s3://bucket/run", env=machine(server, tmp_path))
    wait_for(lambda: steps(server.names()), process)
    os.kill(server.process.pid, signal.SIGSTOP)
    run = mirror(tmp_path)
    before = max(step for step, _ in checkpoint.step_files(run.checkpoints))
    wait_for(lambda: max(step for step, _ in checkpoint.step_files(run.checkpoints)) >= before + 8, process)
    os.kill(server.process.pid, signal.SIGCONT)
    finish(process)
    assert steps(server.names()) == [step for step, _ in checkpoint.step_files(run.checkpoints)]


@pytest.mark.slow
def test_a_second_machine_is_told_who_uses_the_run(tmp_path, server):
    first = finetune(*WORDS, "--run", "s3://bucket/run", env=machine(server, tmp_path / "here"))
    wait_for(lambda: steps(server.names()), first)
    os.killpg(first.pid, signal.SIGSTOP)  # however fast it is, it is not ready before the second one asks
    try:
        second = finetune("resume", "s3://bucket/run", env=machine(server, tmp_path / "there"))
        said = finish(second, code=1)
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    assert f"run s3://bucket/run is in use by process {first.pid}, since 20" in said and "last heard of" in said
    finish(first)


# ---- What needs no server: fsspec's file system in memory ---------------------------------------------------------


@pytest.fixture
def memory(monkeypatch, tmp_path):
    import fsspec

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def uploader_to(remote: RemoteFolder, folder: Path, said: list[str] | None = None) -> Uploader:
    return Uploader(remote, Lease(remote), folder, {}, ([] if said is None else said).append)


def test_only_urls_are_remote():
    assert is_remote("s3://bucket/run") and is_remote("gs://b/r") and is_remote("memory://r")
    assert not is_remote("runs/vgg_head-1") and not is_remote("C:\\runs") and not is_remote("/s3/run")


def test_any_file_system_of_fsspec_will_do(memory, tmp_path, capsys):
    words = ["--epochs", "1", "--train-samples", "100", "--device", "cpu", "--run", "memory://place/run"]
    assert main(["vgg_head", *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "memory://place/run"
    assert memory.exists("/place/run/checkpoints/latest.pt") and not memory.exists("/place/run/lock.owner")
    assert main(["vgg_head", *words, "--resume"]) == 0
    assert "finished at step 2" in capsys.readouterr().out
    assert main(["vgg_head", *words]) == 2
    assert "--run memory://place/run: already holds a run" in capsys.readouterr().err


def test_a_start_that_fails_leaves_nothing_there(memory, capsys):
    words = ["vgg_head", "--train-samples", "5", "--device", "cpu", "--run", "memory://place/run"]
    assert main(words) == 2
    assert memory.find("/place") == []


def test_a_mirror_that_is_ahead_is_uploaded_and_one_of_another_time_moved_aside(memory, tmp_path):
    folder, said = mirror_folder("memory://place/run"), []
    train_run(folder, small_recipe(epochs=1))
    with open_run("memory://place/run", said.append) as run:
        assert run.path == folder
    assert memory.exists("/place/run/checkpoints/step-000007.pt")
    assert said == [f"memory://place/run holds no run; what lies in {folder} is uploaded"]

    other = train_run(tmp_path / "other", small_recipe(epochs=1, seed=9))
    memory.rm("/place/run", recursive=True)
    memory.put(str(other.path), "/place/run", recursive=True)
    with open_run("memory://place/run", said.append) as run:
        assert run.read_recipe().id == other.read_recipe().id
    assert "is of another time; it is now" in said[2]
    assert len(list(folder.parent.iterdir())) == 2  # nothing is lost


def test_a_mirror_that_somebody_deletes_takes_nothing_with_it(memory, tmp_path):
    run = train_run(tmp_path / "run", small_recipe(epochs=1))
    uploader = uploader_to(RemoteFolder("memory://place/run"), run.path)
    assert uploader.attempt()
    there = memory.find("/place/run")
    assert len(there) > 5
    for path in [*run.checkpoints.iterdir(), run.metrics_file]:
        path.unlink()
    assert uploader.attempt() and memory.find("/place/run") == there


def test_the_latest_moves_only_after_its_data_is_whole(memory, tmp_path):
    """Whatever upload fails: what is there can be resumed from, and is never older than before."""
    run = train_run(tmp_path / "run", small_recipe(epochs=1))
    remote = RemoteFolder("memory://place/run")
    calls = 0
    for failing in range(1, 14):
        memory.store.clear()
        calls = 0

        def failing_call(call, failing=failing):
            def wrapped(*arguments):
                nonlocal calls
                calls += 1
                if calls == failing:
                    raise OSError("the network is gone")
                return call(*arguments)

            return wrapped

        real = RemoteFolder("memory://place/run")
        remote.upload, remote.copy = failing_call(real.upload), failing_call(real.copy)
        uploader = uploader_to(remote, run.path)
        uploader.attempt()
        names = real.list()
        if "checkpoints/latest.pt" in names:
            assert memory.cat("/place/run/checkpoints/latest.pt") == (run.checkpoints / "latest.pt").read_bytes()
            assert "checkpoints/step-000007.pt" in names and "recipe.json" in names
        assert uploader.attempt() and uploader.waiting_bytes() == 0


def test_a_listing_that_leads_out_of_the_folder_is_refused(memory):
    for name in ("../outside.pt", "checkpoints/../../x", "a\\..\\b", "C:x", "line\nbreak"):
        memory.store.clear()
        memory.pipe_file("/place/run/recipe.json", b"{}")
        remote = RemoteFolder("memory://place/run")
        remote.file_system = type(
            "Hostile",
            (),
            {
                "invalidate_cache": lambda self: None,
                "find": lambda self, root, detail, name=name: {f"{root}/{name}": {"size": 1}},
            },
        )()
        with pytest.raises(RunError, match="which is no file of a run; remove it"):
            remote.list()


def test_a_run_that_another_machine_uses_is_refused_until_it_is_silent(memory, tmp_path):
    memory.pipe_file("/place/run/recipe.json", b"{}")
    owner = owner_to_text(this_process()).replace(str(os.getpid()), "1").replace(socket.gethostname(), "elsewhere")
    memory.pipe_file("/place/run/lock.owner", f"{owner}\n{time.time() - 60}".encode())
    with (
        pytest.raises(
            RunError, match=r"in use by process 1 on elsewhere, since .*, last heard of 60 s ago.* again in 1(19|20) s"
        ),
        open_run("memory://place/run", print),
    ):
        pass


def test_a_kind_of_url_that_nobody_knows_is_one_line():
    with pytest.raises(UsageError, match="--run nowhere://bucket/run: cannot be used"):
        RemoteFolder("nowhere://bucket/run")


# ---- What the other side, and another machine, may do ----------------------------------------------------------------


def other_owner(beat: str) -> bytes:
    """What another machine would have written."""
    text = owner_to_text(this_process()).replace(str(os.getpid()), "1").replace(socket.gethostname(), "elsewhere")
    return f"{text}\n{beat}".encode()


def finished_there(memory, tmp_path: Path, home: str, monkeypatch, **options) -> RunFolder:
    """A run in the bucket, made by another machine; returns its mirror."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / home))
    with open_run("memory://place/run", lambda _: None) as run:
        train_run(run.path, small_recipe(augment="none"), **options)
    return run


@pytest.mark.parametrize("beat", ["nan", "inf", "-inf", "1e12", "soon", ""])
def test_a_sign_of_life_that_means_nothing_keeps_nobody_out(memory, beat):
    memory.pipe_file("/place/run/lock.owner", other_owner(beat))
    assert Lease(RemoteFolder("memory://place/run")).other() is None


def test_a_run_taken_over_by_another_machine_is_not_written_any_more(memory, tmp_path, monkeypatch):
    run = train_run(tmp_path / "run", small_recipe(epochs=1, augment="none"))
    remote, said = RemoteFolder("memory://place/run"), []
    uploader = uploader_to(remote, run.path, said)
    uploader.lease.take()
    assert uploader.attempt()
    # The network was gone for so long that another machine took over.
    memory.pipe_file("/place/run/lock.owner", other_owner(str(time.time())))
    memory.pipe_file("/place/run/checkpoints/latest.pt", b"of the other machine")
    (run.path / "metrics.jsonl").write_text("changed")
    uploader.lease._last_heartbeat -= HEARTBEAT_SECONDS + 1
    assert not uploader.attempt() and not uploader.attempt()
    assert len(said) == 1 and "is used by process 1 on elsewhere" in said[0]
    with pytest.raises(RunError, match="was taken over by process 1 on elsewhere"):
        uploader.start()
        uploader.finish(None)
    assert memory.cat("/place/run/checkpoints/latest.pt") == b"of the other machine"
    assert b"elsewhere" in memory.cat("/place/run/lock.owner")
    assert SILENCE_SECONDS > 2 * HEARTBEAT_SECONDS


def test_a_fetch_that_is_interrupted_is_taken_for_nothing(memory, tmp_path, monkeypatch):
    there = finished_there(memory, tmp_path, "there", monkeypatch)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "here"))
    real = RemoteFolder.download

    def dying(self, name, file):
        if name.endswith("best.pt"):
            raise KeyboardInterrupt
        real(self, name, file)

    with (
        monkeypatch.context() as patched,
        pytest.raises(KeyboardInterrupt),
    ):
        patched.setattr(RemoteFolder, "download", dying)
        with open_run("memory://place/run", lambda _: None, writes=False):
            pass
    with open_run("memory://place/run", lambda _: None, writes=False) as run:
        for name in ("best.pt", "latest.pt"):
            assert (run.checkpoints / name).read_bytes() == (there.checkpoints / name).read_bytes()


def test_a_rewind_on_one_machine_is_not_undone_by_the_mirror_of_another(memory, tmp_path, monkeypatch):
    from conftest import resume_run

    finished_there(memory, tmp_path, "there", monkeypatch, save_every_steps=2)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "here"))
    with open_run("memory://place/run", lambda _: None) as run:
        first = run.checkpoints / checkpoint.step_files(run.checkpoints)[0][1].name
        checkpoint.rewind(run.checkpoints, first, run.read_recipe().id)
    aside = "/place/run/checkpoints/superseded/step-000014.pt"
    assert memory.exists(aside) and not memory.exists("/place/run/checkpoints/step-000014.pt")
    said: list[str] = []
    with open_run("memory://place/run", said.append):
        pass
    assert said == []  # this machine's mirror knows of it
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "there"))
    with open_run("memory://place/run", said.append) as run:
        newest = checkpoint.newest_good(run.checkpoints, run.read_recipe().id)
        assert newest[1].progress.step == checkpoint.step_files(run.checkpoints)[-1][0] < 14
        resume_run(run)
    assert any("is of another time" in line for line in said)
    assert memory.exists(aside) and memory.exists("/place/run/checkpoints/step-000014.pt")


def test_somebody_elses_files_in_a_bucket_are_left_alone(memory, capsys):
    memory.pipe_file("/place/run/metrics.jsonl", b"mine")
    words = ["vgg_head", "--train-samples", "100", "--device", "cpu", "--run", "memory://place/run"]
    assert main(words) == 2
    assert "--run memory://place/run: holds other files (metrics.jsonl); give a new folder" in capsys.readouterr().err
    assert memory.find("/place") == ["/place/run/metrics.jsonl"] and memory.cat("/place/run/metrics.jsonl") == b"mine"


def test_a_folder_behind_a_url_will_do_and_so_will_a_place_that_cannot_copy(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))

    def cannot(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(RemoteFolder, "copy", cannot)
    words = ["--epochs", "1", "--train-samples", "100", "--device", "cpu", "--run", f"file://{tmp_path}/new/folder/run"]
    assert main(["vgg_head", *words]) == 0
    there = RunFolder(tmp_path / "new" / "folder" / "run")
    assert (
        checkpoint.read_checkpoint(there.checkpoints / "final.pt", there.read_recipe().id).progress.status == "finished"
    )
    assert main(["evaluate", words[-1], "--json"]) == 0


def test_what_cannot_be_written_to_is_said_before_the_run_begins(memory, monkeypatch, capsys):
    def refused(*_):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(RemoteFolder, "write", refused)
    assert main(["vgg_head", "--device", "cpu", "--run", "memory://place/run"]) == 1
    error = capsys.readouterr().err
    assert "memory://place/run cannot be reached or written (Access Denied); check the address" in error


def test_the_runs_own_error_is_told_first_and_kept_when_uploads_wait(memory, tmp_path, monkeypatch):
    """A network that is gone must not hide what is wrong, nor how the run ended."""
    run = train_run(tmp_path / "run", small_recipe(epochs=1, augment="none"))
    remote, said = RemoteFolder("memory://place/run"), []
    uploader = uploader_to(remote, run.path, said)

    def gone(*_):
        raise OSError("the network is gone")

    monkeypatch.setattr(remote, "upload", gone)
    uploader.start()
    with monkeypatch.context() as patched:
        patched.setattr("finetune.store.remote.time.sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        uploader.finish(RunError("the loss is nan"))
    assert said[-3:-1] == ["the loss is nan", said[-2]] and "wait to be uploaded" in said[-2]
    assert "are not uploaded to memory://place/run; they lie in" in said[-1]
    with monkeypatch.context() as patched, pytest.raises(StoppedEarly, match="are not uploaded") as stopped:
        patched.setattr("finetune.store.remote.time.sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        uploader.finish(None)
    assert stopped.value.exit_code == 75
