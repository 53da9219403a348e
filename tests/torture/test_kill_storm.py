"""SIGKILL at random moments, in time: start-up, the pass over the backbone, training, validation, a save."""

from pathlib import Path

import pytest
from conftest import assert_equal_runs, finetune, finish
from rich.console import Console
from rich.table import Table
from storm import PLACES, Storm, storm

from finetune.cli import main
from finetune.store.run_folder import RunFolder

CACHED = ["--save-every-steps", "5", "--log-every-steps", "1", "--device", "cpu", "--batch-size", "32"]
AUGMENTED = [
    "--augment", "light", "--dropout", "0.3", "--workers", "2", "--accumulate", "4", "--train-samples", "640",
    "--batch-size", "32", "--save-every-steps", "2", "--log-every-steps", "1", "--device", "cpu",
]  # fmt: skip
# So many pictures that the pass over the backbone is met as well.
VIEWS = ["--augment", "light", "--views", "6"]
KILLS_EACH = 25


def weather(words: list[str], folder: Path, seed: int, kills: int, seconds: tuple[float, float]) -> Storm:
    """A run through a storm, and one without; their ends must be the same, bit for bit, and so must their exports."""
    folder.mkdir()
    broken, unbroken = RunFolder(folder / "broken"), RunFolder(folder / "unbroken")
    result = storm(words, broken, folder, seed, kills, seconds)
    finish(finetune(*words, "--run", str(unbroken.path), "--quiet"), timeout_seconds=900)
    assert_equal_runs(broken, unbroken)
    for run in (broken, unbroken):
        assert main(["export", str(run.path), "--from", "latest"]) == 0
    assert (broken.path / "model.pt").read_bytes() == (unbroken.path / "model.pt").read_bytes()
    return result


@pytest.mark.torture
def test_a_hundred_kills_a_hundred_resumes_and_the_same_weights(tmp_path, capsys):
    results = {}
    for number, recipe in enumerate(("vgg_head", "resnet_head")):
        words = {
            f"{recipe}, features kept": [recipe, *CACHED, *VIEWS, "--epochs", "900"],
            f"{recipe}, augmented, 2 workers, accumulation 4": [recipe, *AUGMENTED, "--epochs", "80"],
        }
        for name, command in words.items():
            place = tmp_path / f"{number}-{len(results)}"
            results[name] = weather(command, place, seed=len(results), kills=KILLS_EACH, seconds=(0.2, 8))
    table = Table(title="kills, by where they fell", title_justify="left", box=None)
    for column in ("run", *PLACES.values(), "kills", "after new progress", "resumes by themselves", "final weights"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, result in results.items():
        fell = [str(result.kills[place]) for place in PLACES.values()]
        table.add_row(name, *fell, str(result.kills.total()), str(result.with_progress), str(result.resumes), "equal")
    with capsys.disabled():
        Console(width=160).print("\n", table)
    assert sum(result.with_progress for result in results.values()) >= 100
    assert all(result.resumes == result.kills.total() for result in results.values())


@pytest.mark.slow
def test_a_few_kills_at_random_moments_and_the_same_weights(tmp_path):
    words = ["vgg_head", *CACHED, "--epochs", "12", "--train-samples", "640"]
    result = weather(words, tmp_path / "storm", seed=7, kills=2, seconds=(2.5, 5))
    assert result.with_progress >= 1 and result.resumes == result.kills.total()
