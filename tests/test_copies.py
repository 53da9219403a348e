"""The same sample twice, and samples that belong together: said before the first step, and kept on one side."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import DyingTerminal, assert_equal_runs, read, small_recipe, start_in, train_run, train_with_deaths
from encoders import make_encoder
from PIL import Image

from finetune import Images, Training, UsageError, text_head
from finetune.cli import main
from finetune.data.batch import Split
from finetune.data.copies import find_copies
from finetune.data.digits import load_digits
from finetune.data.groups import groups_by_name
from finetune.data.images import open_images, split_source
from finetune.data.order import grouped_split
from finetune.data.source import Reading
from finetune.data.table import Columns
from finetune.recipe.execution import Machine, Numerics, Settings


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


def test_copies_are_found_across_parts_under_two_labels_and_within_a_class():
    #                 0  1  2  3  4  5  6  7  8  9
    digests = tensor(7, 7, 8, 8, 9, 9, 9, 5, 0, 0)
    targets = tensor(0, 0, 1, 0, 1, 1, 1, 1, 0, 0)
    split = Split(tensor(0, 1, 2, 4, 8), tensor(3, 5, 9), tensor(6, 7))
    found = find_copies(digests, targets, split)
    assert found.across == {(0, 1): [(2, 3), (4, 5)], (0, 2): [(4, 6)], (1, 2): [(5, 6)]}
    assert found.labels == [[2, 3]] and found.within == [(0, 1)]
    # Of 4, 5, 6 the one in the test part stays; of 2 and 3 nobody knows which label is right.
    assert sorted(found.dropped) == [1, 2, 3, 4, 5]
    assert (
        find_copies(torch.zeros(3, dtype=torch.int64), targets[:3], Split(tensor(0, 1), tensor(2), tensor())).dropped
        == []
    )
    several = torch.tensor([[1, 0], [1, 0], [0, 1]], dtype=torch.uint8)
    assert find_copies(tensor(4, 4, 4), several, Split(tensor(0, 1), tensor(2), tensor())).labels == [[0, 2, 1]]
    numbers = torch.tensor([1.0, 2.0])  # two opinions on one text are no mistake
    assert find_copies(tensor(4, 4), numbers, Split(tensor(0), tensor(1), tensor())).labels == []


def pictures(folder, count=24):
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            shade = rng.integers(0, 120, (16, 16, 3)) + (120 if label == "b" else 0)
            Image.fromarray(shade.astype(np.uint8)).save(folder / label / f"p{number // 4}-{number:02}.png")
    return folder


@pytest.fixture
def data(tmp_path):
    return pictures(tmp_path / "data")


def copy(folder, name, other):
    (folder / other).write_bytes((folder / name).read_bytes())


def begin(path, recipe):
    terminal = DyingTerminal()
    shown = []
    terminal.begin = lambda facts, *_: shown.append(facts)
    run, _ = start_in(path, "test", recipe, Numerics(), Machine(device="cpu", workers=0), Settings(), terminal)
    return run, shown[0]["note"].split("\n") if "note" in shown[0] else []


@pytest.mark.parametrize("cache", [True, False])
def test_a_run_says_which_images_are_copies_and_leaves_them_out_if_asked(data, tmp_path, cache):
    source = open_images(str(data))
    train, validation, _ = split_source(source, 0.2, seed=3)
    by_class = {label: [source.name(i) for i in train.tolist() if source.name(i)[0] == label] for label in "ab"}
    judged = source.name(int(validation[0]))
    copy(data, judged, by_class[judged[0]][0])  # a training image that also validates
    copy(data, by_class["a"][1], by_class["a"][2])
    copy(data, by_class["a"][3], by_class["b"][1])  # under two labels
    recipe = small_recipe(data=Images(str(data)), epochs=1, augment="none" if cache else "light")
    _, notes = begin(tmp_path / "run", recipe)
    assert "bundled/vgg learnt from printed characters" in notes[0]
    across, labels, within = notes[1:4]
    assert (
        across.startswith("1 image(s) of the validation part are copies of some in the train part, like ")
        and judged in across
    )
    assert labels.startswith("2 image(s) are copies of some with another label, like ") and "mend the labels" in labels
    assert within.startswith("1 image(s) are copies of some with the same label in the same part, like ")
    assert all("--drop-duplicates" in note for note in notes[1:4])
    dropped = dataclasses.replace(recipe, data=Images(str(data), drop_duplicates=True))
    run, notes = begin(tmp_path / "dropped", dropped)
    gone = {by_class[judged[0]][0], by_class["a"][2], by_class["a"][3], by_class["b"][1]}
    assert set(read(run)["data"]["skipped"]) == gone
    assert any("4 image(s) left out as copies (--drop-duplicates)" in note for note in notes)
    assert read(run)["data"]["train_samples"] == len(train) - 4


def test_a_run_without_copies_resumes_exactly_and_leaves_out_the_same(data, tmp_path):
    copy(data, "a/p0-00.png", "a/p1-04.png")
    recipe = small_recipe(data=Images(str(data), drop_duplicates=True, augment="light"), epochs=2)
    whole = train_run(tmp_path / "whole", recipe)
    broken = train_with_deaths(tmp_path / "broken", recipe, deaths=[1, 3])
    assert_equal_runs(broken, whole)
    assert len(read(whole)["data"]["skipped"]) == 1


def test_pictures_saved_again_are_named_as_near(data, tmp_path):
    source = open_images(str(data))
    train, validation, _ = split_source(source, 0.2, seed=3)
    judged = source.name(int(validation[0]))
    other = next(source.name(i) for i in train.tolist() if source.name(i)[0] == judged[0])
    Image.open(data / judged).save(data / other, "JPEG", quality=97, subsampling=0)
    _, notes = begin(tmp_path / "run", small_recipe(data=Images(str(data)), epochs=1, augment="none"))
    near = [note for note in notes if "near to one that is trained on" in note]
    assert near and f"{judged} and {other} (cosine of features 0.9" in near[0] and "--group-by keeps them" in near[0]


def test_different_digits_are_not_near(tmp_path):
    digits = load_digits()
    for number in range(400):
        folder = tmp_path / "data" / digits.classes[int(digits.targets[number])]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[number, 0].numpy()).save(folder / f"{number}.png")
    _, notes = begin(tmp_path / "run", small_recipe(data=Images(str(tmp_path / "data")), epochs=1, augment="none"))
    assert all("validate with fewer than 10" in note for note in notes)


def test_texts_are_compared_by_content_and_labels(tmp_path):
    encoder = make_encoder(tmp_path / "bert")
    rows = [f"cat number {n} saw a dog,{'ab'[n % 2]}" for n in range(40)]
    rows += ["the very same,a", " the very same ,a", "said twice,a", "said twice,b"]
    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    recipe = text_head(texts=str(tmp_path / "a.csv"), backbone=str(encoder), epochs=1)
    _, notes = begin(tmp_path / "run", recipe)
    text = "\n".join(notes)
    assert "2 text(s) are copies of some with another label, like line 45 of line 44" in text
    assert "of line 42" in text and "line 43" in text
    run, notes = begin(
        tmp_path / "dropped",
        text_head(
            texts=str(tmp_path / "a.csv"), backbone=str(encoder), epochs=1, training=Training(drop_duplicates=True)
        ),
    )
    assert {"line 44", "line 45"} <= set(read(run)["data"]["skipped"]) and len(read(run)["data"]["skipped"]) == 3


# ---- What belongs together ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_groups_stay_on_one_side_and_classes_keep_their_shares(seed):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 60, (600,), generator=generator)
    targets = (groups % 3 + torch.randint(0, 2, (600,), generator=generator)).clamp(max=3)
    train, validation = grouped_split(targets, groups, 0.2, seed)
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(600))
    assert not set(groups[train].tolist()) & set(groups[validation].tolist())
    shares = targets[validation].bincount(minlength=4) / targets.bincount(minlength=4)
    assert (shares - 0.2).abs().max() < 0.08, shares
    again = grouped_split(targets, groups, 0.2, seed)
    assert torch.equal(again[1], validation)


def test_a_class_of_one_group_keeps_it_to_train_on():
    targets, groups = tensor(0, 0, 0, 0, 1, 1), tensor(0, 0, 1, 2, 3, 3)
    train, validation = grouped_split(targets, groups, 0.3, 0)
    assert {4, 5} <= set(train.tolist()) and len(validation)


def test_images_are_grouped_by_their_names_and_rows_by_a_column(data, tmp_path):
    source = open_images(str(data), reading=Reading(group_by=r"/(p\d+)-"))
    assert source.groups.max() == 5 and "48 images in 6 groups by --group-by /(p" in source.notes[-1]
    split = split_source(source, 0.2, seed=0)
    patients = [{source.name(i).split("/")[1][:2] for i in part.tolist()} for part in split[:2]]
    assert patients[0] and patients[1] and not patients[0] & patients[1]
    rows = [f"{source.name(i)},{source.name(i)[0]},patient {i % 8}" for i in range(48)]
    (data / "list.csv").write_text("image,label,patient\n" + "\n".join(rows) + "\n")
    table = open_images(str(data / "list.csv"), columns=Columns(group="patient"))
    assert table.groups.max() == 7 and "by --group-column patient, like 'patient 0'" in table.notes[-1]
    recipe = small_recipe(data=Images(str(data), group_by=r"/(p\d+)-"), epochs=1)
    assert_equal_runs(train_with_deaths(tmp_path / "b", recipe, deaths=[2]), train_run(tmp_path / "w", recipe))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "is no regular expression"),
        ("x([0-9]+)", r"finds nothing in 48 of 48 names, like 'a/p0-00.png'; mend it"),
        ("png", "all images are one group"),
        (r"/(.*)", "images are one group|each image is a group of its own"),
    ],
)
def test_a_group_that_groups_nothing_is_refused(data, pattern, words):
    if pattern == r"/(.*)":
        (data / "b").rename(data / "c")
        for path in (data / "c").iterdir():
            path.rename(path.with_name(f"c{path.name}"))
    with pytest.raises(UsageError, match=words):
        open_images(str(data), reading=Reading(group_by=pattern))


def test_options_of_groups_go_where_they_mean_something(data, tmp_path, capsys):
    assert groups_by_name(["a-1", "b-2"], "a|b") == ["a", "b"]
    (tmp_path / "a.csv").write_text("text,label,who\nx,a,\n")
    assert main(["bert_head", "--texts", str(tmp_path / "a.csv"), "--group-column", "who"]) == 2
    assert "line 2: column 'who' is empty" in capsys.readouterr().err
    (tmp_path / "a.csv").write_text("text,label\nx,a\ny,b\n")
    assert main(["bert_head", "--texts", str(tmp_path / "a.csv"), "--group-by", "x"]) == 2
    assert "is for names of files; give --group-column" in capsys.readouterr().err
    assert main(["vgg_head", "--images", str(data), "--group-column", "who"]) == 2
    assert "columns and --separator belong to a" in capsys.readouterr().err


def test_groups_on_both_sides_of_parts_that_are_given_are_said(data, tmp_path):
    for part, numbers in (("train", range(0, 18)), ("val", range(18, 24))):
        for label in "ab":
            (tmp_path / "parts" / part / label).mkdir(parents=True)
            for number in numbers:
                source = data / label / f"p{number // 4}-{number:02}.png"
                source.rename(tmp_path / "parts" / part / label / source.name)
    recipe = small_recipe(data=Images(str(tmp_path / "parts"), group_by=r"/(p\d+)-"), epochs=1, augment="none")
    _, notes = begin(tmp_path / "run", recipe)
    assert any("1 group(s) have images in more than one part" in note for note in notes), json.dumps(notes)


def test_a_class_that_nothing_validates_is_named(data, tmp_path):
    (data / "c").mkdir()
    Image.new("RGB", (16, 16), (9, 200, 9)).save(data / "c" / "only.png")
    _, notes = begin(tmp_path / "run", small_recipe(data=Images(str(data)), epochs=1, augment="none"))
    assert "1 class(es) have no image that validates, like 'c' (1 to train on): no figure says" in "\n".join(notes)
