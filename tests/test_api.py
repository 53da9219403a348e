"""The kit from Python, and in a real notebook's kernel: real cells, real processes, real kills."""

import dataclasses
import errno
import json
import os
import re
import signal
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

import finetune as kit
from finetune.api import _given
from finetune.base.lock import alone_in_process
from finetune.options import ResumeOptions, RunOptions
from finetune.store.run_folder import RunFolder

from conftest import Killed, assert_equal_runs, last_step  # isort: skip

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"
CELL = """
import finetune
def recipe(lr: float = 3e-3) -> finetune.Recipe:
    return finetune.image_head(images="digits", backbone="bundled/vgg", epochs={epochs}, lr=lr)
finetune.fit(recipe(lr=1e-3), "run", device="cpu", save_every_steps=1, track="none")
"""


@pytest.fixture(autouse=True)
def quiet_kernel(monkeypatch):
    """The kernel warns on standard error that it listens on loopback without a key."""
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")


def digits(epochs: int = 2, **options) -> kit.Recipe:
    return kit.image_head(images="digits", backbone="bundled/vgg", epochs=epochs, **options)


def client_of(folder: Path, *cells: str) -> NotebookClient:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    return NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})


def shown(cell) -> str:
    """What a cell's outputs say as HTML, else as text."""
    parts = [output.get("data", {}) for output in cell.get("outputs", [])]
    return "\n".join(part.get("text/html") or part.get("text/plain", "") for part in parts)


# ---- fit, resume --------------------------------------------------------------------------------------------------------


def test_the_same_call_starts_goes_on_and_says_that_it_is_done(tmp_path, capsys):
    run = kit.fit(digits(), tmp_path / "run", track="none", report=False)
    assert run.status == "finished" and run.folder == tmp_path / "run"
    assert [line["epoch"] for line in run.validations()] == [1, 2]
    capsys.readouterr()
    again = kit.fit(digits(), tmp_path / "run", track="none", report=False)
    assert again == run and "is finished" in capsys.readouterr().out


def test_without_a_folder_each_call_is_a_new_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"track": "none", "report": False, "quiet": True, "name": "mine"}
    folders = [str(kit.fit(digits(1), **options).folder) for _ in range(2)]
    assert folders == ["runs/mine-1", "runs/mine-2"]


def test_resume_trains_longer_and_export_gives_what_load_takes(tmp_path):
    import torch

    run = kit.fit(digits(1), str(tmp_path / "run"), track="none", report=False, quiet=True)
    longer = kit.resume(run.folder, epochs=2, quiet=True)
    assert [line["epoch"] for line in longer.validations()] == [1, 2]
    assert kit.load(longer.export())(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert longer._repr_html_().count("<tr>") == 3
    with pytest.raises(kit.UsageError, match=r"must end in \.pt or"):
        longer.export(tmp_path / "model.exe")


def test_a_folder_on_a_drive_without_hard_links_goes_on_as_well(tmp_path, monkeypatch):
    def no_links(*_names, **_options):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    little = kit.ImageTraining(train_samples=100, validation_fraction=0.05)
    recipe = digits(2, augment="light", dropout=0.3, batch_size=16, training=little)
    options = {"track": "none", "report": False, "quiet": True}
    whole = kit.fit(recipe, tmp_path / "whole", **options)
    monkeypatch.setattr(os, "link", no_links)
    steps = iter(range(100))

    def dies(self, *_values):
        if next(steps) == 9:
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("finetune.base.terminal.Terminal.step", dies)
        kit.fit(recipe, tmp_path / "drive", save_every_steps=3, **options)
    assert kit.fit(recipe, tmp_path / "drive", save_every_steps=0, **options).status == "finished"
    assert_equal_runs(RunFolder(tmp_path / "drive"), RunFolder(whole.folder))
    names = [path for path in (tmp_path / "drive").rglob("*") if path.is_file()]
    assert all(path.stat().st_nlink == 1 for path in names)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kit.fit(digits), "function is no Recipe; call the recipe function"),
        (lambda: kit.fit(digits(), devise="cpu"), "option devise: unknown; did you mean device?"),
        (lambda: kit.resume("nowhere", epoch=3), "did you mean epochs?"),
        (lambda: kit.resume("nowhere"), "run folder nowhere does not exist"),
        (lambda: kit.fit(digits(), track="wandbee"), "'wandbee' is unknown; give tensorboard, wandb"),
        (lambda: kit.fit(digits(), track=["tensorboard", "x"]), "--track tensorboard,x: 'x' is unknown"),
        (lambda: kit.fit(digits(), notify="nowhere://user:secret@host"), "--notify: URL 1 (nowhere://) is none"),
        (lambda: kit.fit(digits(), workers="two"), "--workers two: is no whole number"),
        (lambda: kit.fit(digits(), keep=1.5), "--keep 1.5: is no whole number"),
        (lambda: kit.fit(digits(), report="no"), "option report 'no': give True or False"),
        (lambda: kit.fit(digits(), frozen="Copy"), "invalid choice 'Copy' for argument '--frozen'"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch, call, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kit.FinetuneError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_options_are_what_the_command_line_makes_of_them():
    words = {"save_every_minutes": "2.5", "log_every_steps": 5, "workers": None, "report": False, "cache": True}
    given = _given(RunOptions, "RECIPE", Path("a b"), words | {"notify": ("json://a", "json://b"), "quiet": True})
    expected = RunOptions(save_every_minutes=2.5, log_every_steps=5, report=False, quiet=True, run="a b")
    assert given == dataclasses.replace(expected, notify=("json://a", "json://b"))
    assert _given(RunOptions, "RECIPE", "", {"notify": "json://a,b"}).notify == ("json://a,b",)
    assert _given(ResumeOptions, "resume", "-run", {"from_": "a.pt", "lr": 1e-5}) == ResumeOptions(
        run="-run", from_="a.pt", lr=1e-5
    )


def test_a_second_training_in_the_same_process_is_refused(tmp_path):
    with alone_in_process(), pytest.raises(kit.RunError, match="another thread of this process trains"):
        kit.fit(digits(), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


# ---- In a kernel ----------------------------------------------------------------------------------------------------------


def test_the_quickstart_runs_from_top_to_bottom(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(cell.cell_type != "code" or not cell.outputs for cell in notebook.cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    trained, table = shown(code[2]), shown(code[3])
    assert (
        "validation accuracy" in trained and "the solved head; the loop&#x27;s best" in trained and "<table>" in trained
    )
    assert "epoch 5/5" in trained and not table.strip()
    assert "<iframe" in shown(code[4]) and "calibration" in shown(code[4]).lower()
    picture, prediction = code[-1].outputs
    assert "image/png" in picture["data"] and re.match(
        r"Prediction\(label='\d', probability=\d\.\d+", prediction["data"]["text/plain"]
    )
    said = [output for cell in code for output in cell.outputs if output.get("name") == "stderr"]
    assert not said  # no warning in any cell
    assert (tmp_path / "runs/digits/report.html").is_file()


@pytest.mark.slow
def test_a_recipe_of_a_cell_goes_on_when_the_kernel_was_killed_and_the_cell_is_run_again(tmp_path):
    (tmp_path / "whole").mkdir()
    client_of(tmp_path / "whole", CELL.format(epochs=30)).execute()
    client = client_of(tmp_path, CELL.format(epochs=30))
    run = RunFolder(tmp_path / "run")
    kills = []

    async def kill_later(cell, cell_index):
        import threading

        def kill():
            pid = client.km.provisioner.pid
            while last_step(run) < 50:
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            kills.append(pid)

        threading.Thread(target=kill).start()

    client.on_cell_execute = kill_later
    with pytest.raises(DeadKernelError):
        client.execute()
    assert kills and last_step(run) < 30 * 23
    again = client_of(tmp_path, CELL.format(epochs=30))
    again.execute()
    assert "resuming run at step" in shown(again.nb.cells[0])
    assert_equal_runs(run, RunFolder(tmp_path / "whole" / "run"))


@pytest.mark.slow
def test_an_error_in_a_cell_is_one_line_and_no_traceback(tmp_path):
    client = client_of(tmp_path, "import finetune\nfinetune.resume('nowhere')")
    with pytest.raises(CellExecutionError) as error:
        client.execute()
    output = client.nb.cells[0].outputs[-1]
    assert output["traceback"] == ["RunError: run folder nowhere does not exist; check the path"]
    assert json.dumps(output) and "Traceback" not in str(error.value)
