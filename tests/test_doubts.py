"""Labels that are probably wrong: found out of fold, listed, shown, and left out when somebody marked them."""

import csv
import json

import pytest
import torch
from conftest import read, resume_run
from PIL import Image

from finetune.cli import main
from finetune.data.digits import load_digits
from finetune.data.source import ArraySource
from finetune.errors import UsageError
from finetune.recipe.spec import Classification, MultiLabel, Regression
from finetune.store.run_folder import RunFolder
from finetune.tasks.doubts import csv_of, find_doubts, marked_as_wrong, read_doubts


def source_of(targets: torch.Tensor, classes: list[str]) -> ArraySource:
    return ArraySource(torch.zeros(len(targets), 1, 8, 8, dtype=torch.uint8), targets, classes, "")


def test_the_least_probable_label_comes_first():
    source = source_of(torch.tensor([0, 1, 1]), ["cat", "dog"])
    outputs = torch.tensor([[2.0, 0.0], [3.0, 0.0]])
    first, second = find_doubts(source, Classification(), torch.tensor([0, 2]), outputs)
    assert (first.label, first.likelier, second.label, second.likelier) == ("dog", "cat", "cat", "cat")
    assert first.probability == pytest.approx(torch.sigmoid(torch.tensor(-3.0)).item())
    assert first.name == source.name(2)
    assert find_doubts(source, Regression(), torch.tensor([0]), outputs[:1]) == []


def test_of_several_labels_the_decision_that_is_most_in_doubt_counts():
    source = source_of(torch.tensor([[1, 0], [0, 0]]), ["red", "blue"])
    outputs = torch.tensor([[3.0, -3.0], [-3.0, 2.0]])
    first, second = find_doubts(source, MultiLabel(), torch.tensor([0, 1]), outputs)
    assert (first.name, first.label, first.likelier) == (source.name(1), "blue: no", "blue: yes")
    assert second.label == second.likelier


def test_a_list_that_somebody_marked_is_read_again(tmp_path):
    source = source_of(torch.tensor([0, 1]), ["a", 'b, "quoted"'])
    doubts = find_doubts(source, Classification(), torch.arange(2), torch.tensor([[1.0, 0.0], [4.0, 0.0]]))
    file = tmp_path / "labels.csv"
    file.write_text(csv_of(doubts))
    again = read_doubts(file)
    assert [(one.name, one.label) for one in again] == [(one.name, one.label) for one in doubts]
    with pytest.raises(UsageError, match="no row is marked"):
        marked_as_wrong(str(file), source)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], f"x{lines[1]}", lines[2]]))
    assert marked_as_wrong(str(file), source) == [doubts[0].name] and marked_as_wrong("", source) == []
    file.write_text(f"wrong,name\nX,{source.name(0)}\n")  # the other columns may be gone
    assert marked_as_wrong(str(file), source) == [source.name(0)]
    file.write_text(f"wrong,name\nX,some.jpg\nx,{source.name(0)}\n")
    with pytest.raises(UsageError, match="1 of its marked images are not in the data, like some"):
        marked_as_wrong(str(file), source)
    for text, problem in {
        "path,label\na,b\n": "has no columns wrong and name", "wrong,name,probability\nx,a,high\n": "is no number",
    }.items():  # fmt: skip
        file.write_text(text)
        with pytest.raises(UsageError, match=problem):
            marked_as_wrong(str(file), source)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A folder of 200 digits, twenty a class, three of them in the wrong folder; the names of those."""
    folder, digits = tmp_path_factory.mktemp("planted"), load_digits()
    wrong = []
    for label in range(10):
        (folder / str(label)).mkdir()
    for label in range(10):
        for place, number in enumerate((digits.targets == label).nonzero().flatten()[:20].tolist()):
            said = (label + 1) % 10 if place == 0 and label in (0, 1, 4) else label
            name = f"{said}/{number}.png"
            Image.fromarray(digits.images[number, 0].numpy()).save(folder / name)
            wrong += [name] if said != label else []
    return folder, sorted(wrong)


def test_planted_labels_come_first_are_shown_and_are_left_out_when_marked(planted, tmp_path, capsys):
    folder, wrong = planted
    words = ["vgg_head", "--images", str(folder), "--epochs", "2", "--track", "none", "--device", "cpu"]
    assert main([*words, "--run", str(tmp_path / "run")]) == 0
    run = RunFolder(tmp_path / "run")
    said = capsys.readouterr().out
    assert "of 200 labels look wrong, like " in said and "train again with --without" in said
    with open(run.labels_file, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 200 and sorted(row["name"] for row in rows[:3]) == wrong
    page = run.report_file.read_text()
    assert '<section id="doubts"' in page and "Labels that look wrong" in page
    section = page[page.index('<section id="doubts"') : page.index('<section id="next"')]
    assert all(f">{name}</p>" in section for name in wrong) and section.count("data:image/png") >= 3
    assert "marked wrong" not in section
    for row in rows[:3]:
        row["wrong"] = "x"
    with open(run.labels_file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert main(["report", str(run.path)]) == 0
    assert run.report_file.read_text().count("marked wrong") == 3
    assert main([*words, "--without", str(run.labels_file), "--run", str(tmp_path / "again")]) == 0
    again = RunFolder(tmp_path / "again")
    kept = read(again)["data"]
    assert kept["train_samples"] + kept["validation_samples"] == 197
    # They stay marked in its own list, which may so be given to a third run; so do marks of before at an extension.
    rows = read_doubts(again.labels_file)
    assert sorted(row.name for row in rows if row.is_marked) == wrong and len(rows) == 200
    again.labels_file.write_text(again.labels_file.read_text().replace(f"\n,{rows[0].name}", f"\nx,{rows[0].name}"))
    # What it leaves out is in its own record: the list may go, and the run goes on.
    run.labels_file.unlink()
    resume_run(again, epochs=3)
    assert read(again)["epoch"] == 3
    marked = sorted(row.name for row in read_doubts(again.labels_file) if row.is_marked)
    assert marked == sorted([*wrong, rows[0].name])
    capsys.readouterr()
    assert main(["report", str(run.path)]) == 0 and '<section id="doubts"' not in run.report_file.read_text()
    assert main([*words, "--without", str(run.labels_file), "--run", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_what_the_temperature_does_stands_in_the_report(planted, tmp_path):
    folder, _ = planted
    words = ["vgg_head", "--images", str(folder), "--epochs", "2", "--track", "none", "--device", "cpu"]
    for name, more, where in (
        ("solved", [], "found on samples out of fold"),
        ("loop", ["--finish", "none"], "found on these very images"),
    ):
        assert main([*words, *more, "--run", str(tmp_path / name)]) == 0
        run = RunFolder(tmp_path / name)
        found = json.loads(run.validation_file.read_text())
        before, after = found["calibrated"]["loss"]
        # What is shown of the solved head is as it ships, of the loop as it was measured.
        assert found["figures"]["loss"] == pytest.approx(after if name == "solved" else before, rel=1e-5)
        assert where in run.report_file.read_text()
    assert main([*words, "--finish", "none", "--no-calibrate", "--run", str(tmp_path / "raw")]) == 0
    raw = RunFolder(tmp_path / "raw")
    assert "calibrated" not in json.loads(raw.validation_file.read_text())
    assert "divided by a temperature" not in raw.report_file.read_text()
