"""`finetune look`: what a data set is like, and what is wrong with it, before anything is trained."""

import csv
import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import text_head
from finetune.cli import main
from finetune.data.digits import load_digits
from finetune.data.glyphs import render_glyphs
from finetune.data.open import open_source, split_data
from finetune.report.overview import overview_of

from conftest import small_recipe, train_run  # isort: skip


def save(folder: Path, name: str, index: int, edge: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(load_digits().images[index, 0].numpy()).resize((edge, edge + 8))
    image.save(folder / name)
    return folder / name


@pytest.fixture(scope="module")
def leak(tmp_path_factory):
    """Digits in parts of their own: copies across them, within one, under two labels; two broken files; others."""
    folder, targets = tmp_path_factory.mktemp("data") / "leak", load_digits().targets
    threes, sevens = ((targets == digit).nonzero().flatten().tolist() for digit in (3, 7))
    for name, members in (("three", threes), ("seven", sevens)):
        for number, index in enumerate(members[:40]):
            save(folder / ("val" if number % 4 == 0 else "train") / name, f"{index}.png", index)
    shutil.copy(folder / "train" / "three" / f"{threes[1]}.png", folder / "val" / "three" / "again.png")
    shutil.copy(folder / "train" / "seven" / f"{sevens[1]}.png", folder / "train" / "seven" / "twice.png")
    shutil.copy(folder / "train" / "seven" / f"{sevens[2]}.png", folder / "train" / "three" / "other.png")
    (folder / "train" / "three" / "empty.png").write_bytes(b"")
    (folder / "val" / "seven" / "page.jpg").write_bytes(b"<html>")
    (folder / "train" / "three" / "notes.txt").write_text("no image")
    return folder


def look(*words, capsys) -> str:
    capsys.readouterr()
    assert main(["look", *map(str, words), "--device", "cpu"]) == 0
    return capsys.readouterr().out


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_what_stands_in_the_way_is_found_named_and_written_down_to_act_on(leak, tmp_path, capsys):
    said = look("vgg_head", "--images", leak, "--output", tmp_path / "leak.html", capsys=capsys)
    assert said.splitlines()[-1] == str(tmp_path / "leak.html")
    assert "62 to train on, 21 to validate, 2 classes" in said and "1 .txt" in said
    rows = rows_of(tmp_path / "leak.csv")
    found = {}
    for row in rows:
        found.setdefault(row["finding"], []).append(row)
    assert {kind: len(of_kind) for kind, of_kind in found.items()} == {
        "broken": 2, "copy across parts": 1, "copy with another label": 2, "copy": 1,
    }  # fmt: skip
    assert {Path(row["name"]).name for row in found["broken"]} == {"empty.png", "page.jpg"}
    (across,) = found["copy across parts"]
    assert (
        across["name"] == "val/three/again.png"
        and across["part"] == "validation"
        and across["beside"].startswith("train/three")
    )
    assert {row["label"] for row in found["copy with another label"]} == {"three", "seven"}
    page = (tmp_path / "leak.html").read_text()
    for words in ("On both sides of the split", "The same, labelled otherwise", "Copies within a class", "again.png"):
        assert words in page
    assert page.count("data:image/") > 24 and "<script" not in page and not re.search(r'(src|href)="(?!#|data:)', page)
    # What somebody marks is left out of a run.
    for row in rows:
        row["wrong"] = "x" if row["finding"] in ("broken", "copy across parts") else ""
    with (tmp_path / "leak.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    words = [
        "vgg_head",
        "--images",
        str(leak),
        "--without",
        str(tmp_path / "leak.csv"),
        "--epochs",
        "1",
        "--finish",
        "none",
    ]
    assert main([*words, "--track", "none", "--no-report", "--device", "cpu", "--run", str(tmp_path / "run")]) == 0
    assert "3 left out" in re.sub(r"\s+", " ", capsys.readouterr().out)
    assert not list(Path(tmp_path).glob("*.tmp"))


def test_with_features_that_a_run_kept_near_copies_and_doubtful_labels_are_found(tmp_path, capsys):
    folder, targets = tmp_path / "digits", load_digits().targets
    for digit in (0, 1, 4):
        for number, index in enumerate((targets == digit).nonzero().flatten().tolist()[:40]):
            save(folder / ("val" if number < 10 else "train") / str(digit), f"{index}.png", index)
    zero = (targets == 0).nonzero().flatten().tolist()
    save(folder / "train" / "4", "planted.png", zero[60])
    Image.open(folder / "train" / "1" / f"{(targets == 1).nonzero().flatten().tolist()[20]}.png").resize((44, 52)).save(
        folder / "val" / "1" / "resized.png"
    )
    words = ["vgg_head", "--images", folder, "--output", tmp_path / "look.html"]
    assert "features are not kept yet" in re.sub(r"\s+", " ", look(*words, capsys=capsys))
    run = ["vgg_head", "--images", str(folder), "--epochs", "1", "--finish", "none", "--track", "none", "--no-report"]
    assert main([*run, "--device", "cpu", "--run", str(tmp_path / "run")]) == 0
    assert "an earlier run kept" in re.sub(r"\s+", " ", look(*words, capsys=capsys))
    found = {(row["finding"], Path(row["name"]).name) for row in rows_of(tmp_path / "look.csv")}
    assert ("label looks wrong", "planted.png") in found and ("near copy across parts", "resized.png") in found


def test_texts_are_looked_at_with_their_lengths_copies_and_numbers(tmp_path, capsys):
    rows = [("the parcel never came", "late"), ("my lamp is broken", "damaged")] * 2
    rows += [(f"message number {number} about a parcel", ("late", "damaged")[number % 2]) for number in range(40)]
    with (tmp_path / "mail.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *rows])
    said = look("--texts", tmp_path / "mail.csv", "--output", tmp_path / "found.html", capsys=capsys)
    assert "characters" in said and "tokens" in said
    found = {row["finding"] for row in rows_of(tmp_path / "found.csv")}
    assert found <= {"copy", "copy across parts"} and found
    assert "message number" in (tmp_path / "found.html").read_text()
    with (tmp_path / "stars.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "stars"), *((f"text {n}", n / 4) for n in range(40))])
    words = ["bert_head", "--texts", tmp_path / "stars.csv", "--task", "regression", "--label-column", "stars"]
    said = look(*words, "--output", tmp_path / "numbers.html", capsys=capsys)
    assert re.search(r"numbers +[\d.]+ to 9[\d.]*, half of them below", said)


def test_augmented_pictures_stand_beside_plain_ones_and_many_classes_are_all_there(tmp_path, capsys):
    source, folder = render_glyphs(""), tmp_path / "many"
    chosen = np.linspace(0, len(source.targets) - 1, 250).astype(int)
    for number, index in enumerate(chosen.tolist()):
        place = folder / f"class {number % 60:02}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.images[index, 0].numpy()).save(place / f"{number}.png")
    said = look("--images", folder, "--augment", "light", "--output", tmp_path / "many.html", capsys=capsys)
    page = (tmp_path / "many.html").read_text()
    assert page.count("the same, changed at random") == 24 and page.count('<span class="name">class') == 60
    assert "... 48 between" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs a recipe, or data"),
        (["--epochs", "3"], "needs a recipe, or data"),
        (["--images", "nowhere"], "nowhere"),
        (["vgg_head", "--run", "x"], "--run x: has no effect on a look"),
        (["vgg_head", "--output", "look.pdf"], "must end in .html"),
        (["vgg_haed"], "vgg_head"),
    ],
)
def test_what_cannot_be_looked_at_is_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["look", *words]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_nothing_of_it_changes_what_a_run_computes_or_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    look("vgg_head", capsys=capsys)
    assert torch.equal(torch.rand(3), wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["look.csv", "look.html"]


def test_the_report_of_a_run_begins_with_the_data(tmp_path):
    run = train_run(tmp_path / "run", small_recipe(), save_every_steps=0)
    assert main(["report", str(run.path)]) == 0
    page = run.report_file.read_text()
    assert page.index('id="data"') < page.index('id="what"') and page.count("as the network sees it") == 24
    assert page.count("the same, changed at random") == 24


def test_samples_are_shown_as_the_network_sees_them(tmp_path):
    """Cropped and resized: nothing else than what is normalised for it."""
    import io

    from finetune.models.backbones import find_backbone

    recipe = small_recipe(augment="none")
    source = open_source(recipe.data, "classification")
    preprocessing = find_backbone("bundled/vgg").preprocessing
    view = overview_of(source, split_data(source, recipe), recipe, preprocessing)
    sample = view.samples[5]
    index = int(sample.name.removeprefix("sample "))
    shown = np.asarray(Image.open(io.BytesIO(sample.picture)).resize((32, 32), Image.Resampling.NEAREST))
    expected = preprocessing.resize(source.read(index)[0]).permute(1, 2, 0).numpy()
    assert np.abs(shown.astype(int) - expected).max() <= 1 and sample.label == str(int(source.targets[index]))
    assert {one.label for one in view.samples} == set(source.classes)
    assert json.dumps(view.facts) == '[["size", "all 8 x 8 px"]]'


def test_a_table_of_somebody_elses_is_never_written_over_and_marks_stay(tmp_path, capsys):
    rows = [
        ("text", "label"),
        *((f"message {n} of mine", ("a", "b")[n % 2]) for n in range(30)),
        ("message 4 of mine", "a"),
    ]
    with (tmp_path / "mail.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    before = (tmp_path / "mail.csv").read_bytes()
    assert main(["look", "--texts", str(tmp_path / "mail.csv"), "--output", str(tmp_path / "mail.html")]) == 2
    assert "mail.csv is no look.csv" in capsys.readouterr().err
    assert (tmp_path / "mail.csv").read_bytes() == before and not (tmp_path / "mail.html").exists()
    words = ["--texts", tmp_path / "mail.csv", "--output", tmp_path / "look.html"]
    look(*words, capsys=capsys)
    found = rows_of(tmp_path / "look.csv")
    (tmp_path / "look.csv").write_text((tmp_path / "look.csv").read_text().replace("\n,", "\nx,", 1))
    look(*words, capsys=capsys)  # once more
    assert [row["wrong"] for row in rows_of(tmp_path / "look.csv")] == ["x"] + [""] * (len(found) - 1)
    (tmp_path / "look.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "look.csv").read_bytes())  # as Excel saves it
    look(*words, "--without", tmp_path / "look.csv", capsys=capsys)  # nothing is found of it now
    assert [(row["wrong"], row["name"]) for row in rows_of(tmp_path / "look.csv")] == [("x", found[0]["name"])]
    # What a run's labels.csv marks is marked in the new table too: one --without has both.
    other = "message 7 of mine"
    line = next(number for number, row in enumerate(rows[1:]) if row[0] == other)
    name = open_source(
        text_head(texts=str(tmp_path / "mail.csv"), backbone="bundled/bert").data, "classification"
    ).name(line)
    (tmp_path / "labels.csv").write_text(f"wrong,name\nx,{name}\n")
    words[-1] = tmp_path / "second look.html"
    look(*words, "--without", tmp_path / "labels.csv", capsys=capsys)
    assert ("x", name) in [(row["wrong"], row["name"]) for row in rows_of(tmp_path / "second look.csv")]
    page = html.unescape((tmp_path / "second look.html").read_text())
    assert f"--without '{tmp_path / 'second look.csv'}'</code>" in page and page.count("--without") == 2


def test_it_never_says_that_something_was_looked_for_which_was_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    look("vgg_head", "--output", tmp_path / "digits.html", capsys=capsys)
    page = (tmp_path / "digits.html").read_text()
    assert "These images come with finetune: none is broken, and copies were not looked for." in page
    folder, targets = tmp_path / "digits", load_digits().targets
    for digit in (0, 1):
        for index in (targets == digit).nonzero().flatten().tolist()[:15]:
            save(folder / str(digit), f"{index}.png", index)
    run = ["vgg_head", "--images", str(folder), "--epochs", "1", "--finish", "none", "--head", "mlp", "--track", "none"]
    assert main([*run, "--no-report", "--device", "cpu", "--run", str(tmp_path / "run")]) == 0
    words = ["vgg_head", "--images", folder, "--head", "mlp", "--output", tmp_path / "look.html"]
    said = re.sub(r"\s+", " ", look(*words, capsys=capsys))
    assert "labels that look wrong were not: no head is solved, because the head is not one linear layer" in said
