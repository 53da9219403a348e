"""A run meets other data than it was trained on: what is other is said, and how to go on; other classes are taken over."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune import StoppedEarly, StopRequest, TextTable, UsageError, fit, image_head, text_head
from finetune.cli import main
from finetune.data.digits import load_digits
from finetune.store.restore import trained_network
from finetune.store.run_folder import RunFolder

QUICK = ["--epochs", "1", "--finish", "none", "--device", "cpu", "--track", "none", "--no-report"]


def digits(folder: Path, classes: dict[str, int], count: int = 12) -> Path:
    """A folder with so many pictures of a digit a class."""
    source = load_digits()
    for name, digit in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, index in enumerate((source.targets == digit).nonzero().flatten().tolist()[:count]):
            Image.fromarray(source.images[index, 0].numpy()).save(folder / name / f"{number:02}.png")
    return folder


def last_layer(run: Path) -> dict[str, torch.Tensor]:
    network, _ = trained_network(RunFolder(run), "latest", calibrated=False)
    layer = network.last_layer()
    return {name: value.clone() for name, value in layer.state_dict().items()}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits(tmp_path / "my photos", {"zero": 0, "one": 1, "two": 2})
    assert main(["vgg_head", "--images", "my photos", *QUICK, "--run", "run"]) == 0
    return tmp_path / "run"


def said(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main([*words]) in (1, 2)
    return capsys.readouterr().err


def test_what_is_other_is_named_and_the_line_that_is_given_trains_on_it(run, tmp_path, capsys):
    photos, again = tmp_path / "my photos", ["resume", "run", "--epochs", "2", "--lr", "1e-3"]
    (photos / "one" / "extra.png").write_bytes((photos / "one" / "00.png").read_bytes())
    text = said(capsys, *again)
    assert "was trained on: 1 image more, like one/extra.png; bring back what it was, or train" in text
    (photos / "zero" / "03.png").unlink()
    (photos / "zero" / "04.png").unlink()
    assert "1 image more, like one/extra.png; 2 images missing, like zero/03.png;" in said(capsys, *again)
    digits(photos, {"three": 3})
    text = said(capsys, *again)
    assert "class 'three' is new; 13 images more" in text
    command = shlex.split(text.rstrip().rpartition("weights on: ")[2])
    assert command[:4] == ["finetune", "vgg_head", "--images", "my photos"] and command[-1] == "--new-classes"
    assert main([*command[1:], "--run", "next"]) == 0
    assert "from run; 3 of 4 classes taken over" in " ".join(capsys.readouterr().out.split())
    # Of a run that has no list of names the numbers are told.
    RunFolder(run).samples_file.unlink()
    shown = said(capsys, *again)
    assert "class 'three' is new; 9 images more;" in shown or "class 'three' is new; 11 images more;" in shown
    photos.rename(tmp_path / "elsewhere")
    assert "is not there any more; if it was moved: finetune resume run --images PLACE" in said(capsys, *again)
    assert "if it was moved: finetune evaluate run --images PLACE" in said(capsys, "evaluate", "run")


def test_rows_of_the_same_classes_are_taken_over_by_name(run, tmp_path, capsys):
    digits(tmp_path / "more", {"one": 1, "seven": 7, "zero": 0, "Four": 4})
    words = ["vgg_head", "--images", "more", *QUICK, "--init-from", "run:latest"]
    text = said(capsys, *words)
    assert "trained on other classes ('one', 'two', 'zero'; here 'Four', 'one', 'seven', 'zero'); --new-classes" in text
    # Before the first step: a rate of nothing moves no weight.
    assert main([*words, "--new-classes", "--run", "next", "--lr", "1e-30", "--weight-decay", "0"]) == 0
    before, after = last_layer(run), last_layer(tmp_path / "next")
    for name in ("weight", "bias"):
        assert torch.allclose(after[name][[1, 3]], before[name][[0, 2]], rtol=0, atol=1e-12)
        assert not torch.allclose(after[name][[0, 2]], before[name][[1, 1]], rtol=0, atol=1e-3)
    assert torch.equal(after["mean"], before["mean"])
    record = json.loads((tmp_path / "next" / "recipe.json").read_text())
    assert record["new_classes"] is True and record["init_from"] == "run:latest"
    # As many classes, of which one is another.
    digits(tmp_path / "others", {"one": 1, "seven": 7, "zero": 0})
    words[2] = "others"
    assert main([*words, "--new-classes", "--run", "third", "--lr", "1e-30", "--weight-decay", "0"]) == 0
    third = last_layer(tmp_path / "third")["weight"]
    assert torch.allclose(third[[0, 2]], before["weight"][[0, 2]], rtol=0, atol=1e-12)
    assert not torch.allclose(third[1], before["weight"][1], rtol=0, atol=1e-3)
    words[2] = "my photos"
    assert "--new-classes: has no effect with --init-from run:latest, its classes are those" in said(
        capsys, *words, "--new-classes"
    )
    assert "--new-classes: has no effect without --init-from" in said(capsys, "vgg_head", "--new-classes")


def test_a_resume_of_such_a_run_is_exact(run, tmp_path, monkeypatch):
    digits(tmp_path / "more", {"one": 1, "seven": 7, "zero": 0, "four": 4})
    options = {
        "init_from": "run",
        "new_classes": True,
        "track": "none",
        "report": False,
        "device": "cpu",
        "quiet": True,
    }
    recipe = image_head(images="more", backbone="bundled/vgg", epochs=2, batch_size=8)
    fit(recipe, "whole", **options)
    stop = StopRequest()

    class Asking:
        def validated(self, event):
            if event.epoch == 1:
                stop.ask("by a test")

    with pytest.raises(StoppedEarly):
        fit(recipe, "broken", trackers=[Asking()], stop=stop, **options)
    fit(recipe, "broken", **options)
    first, second = (
        trained_network(RunFolder(tmp_path / name), "best")[0].module.state_dict() for name in ("whole", "broken")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("head", ["mlp", "append"])
def test_other_heads_take_rows_over_too(tmp_path, monkeypatch, head):
    monkeypatch.chdir(tmp_path)
    digits(tmp_path / "first", {"zero": 0, "one": 1})
    digits(tmp_path / "second", {"zero": 0, "two": 2, "one": 1})
    words = ["vgg_head", "--head", head, *QUICK]
    assert main([*words, "--images", "first", "--run", "run"]) == 0
    words += ["--images", "second", "--init-from", "run:latest", "--new-classes", "--run", "next"]
    assert main([*words, "--lr", "1e-30", "--weight-decay", "0"]) == 0
    before, after = last_layer(tmp_path / "run"), last_layer(tmp_path / "next")
    assert torch.allclose(after["weight"][[0, 2]], before["weight"], rtol=0, atol=1e-12) and len(after["weight"]) == 3


def test_numbers_have_no_classes_to_take_over(tmp_path):
    (tmp_path / "n.csv").write_text("text,stars\n" + "".join(f"text {n},{n % 7}\n" for n in range(40)))
    recipe = text_head(
        texts=str(tmp_path / "n.csv"), backbone="bundled/bert", task="regression", epochs=1,
        table=TextTable(label_column="stars"),
    )  # fmt: skip
    options = {"track": "none", "report": False, "device": "cpu", "quiet": True}
    fit(recipe, tmp_path / "run", **options)
    with pytest.raises(UsageError, match=r"--new-classes: has no effect .* no class has a row of its own"):
        fit(recipe, tmp_path / "next", init_from=tmp_path / "run", new_classes=True, **options)
