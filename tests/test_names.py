"""Names of classes are compared by what they mean, wherever they stand."""

import json
import unicodedata

import pytest
from PIL import Image

from finetune.data.images import open_images
from finetune.data.names import classes_of, meaning, normal, order_of
from finetune.data.source import Reading
from finetune.data.table import Columns
from finetune.data.texts import open_texts
from finetune.errors import UsageError

NFD = unicodedata.normalize("NFD", "café")


def make_table(path, labels, name="list.csv"):
    lines = ["text,label", *(f"text {number},{label}" for number, label in enumerate(labels))]
    (path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path / name)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("café", NFD),
        ("강아지", unicodedata.normalize("NFD", "강아지")),
        ("hot dog", "hot\u00a0dog"),
        ("hot dog", "hot\u202fdog"),
        ("cat", "cat\u200b"),
        ("cat", "\ufeffcat"),
        ("cat", "c\u00adat"),
        ("cat", "cat "),
        ("1", "1.0"),
        ("-3", "-3.00"),
        ("True", "true"),
        ("FALSE", "False"),
    ],
)
def test_names_that_mean_the_same_are_one(one, other):
    assert meaning(one) == meaning(other)


@pytest.mark.parametrize(
    "pair", [("7", "007"), ("Cat", "cat"), ("1", "1.5"), ("1.1", "1.10"), ("yes", "Yes"), ("a b", "ab")]
)
def test_names_that_differ_stay_apart(pair):
    assert meaning(pair[0]) != meaning(pair[1])


def test_the_most_frequent_spelling_names_the_class_and_nothing_becomes_of_nothing():
    assert classes_of(["1.0", "1", "1"]) == {"1": "1"} and classes_of(["1.0"]) == {"1": "1.0"}
    assert normal("\u200b") == "\u200b"
    assert order_of(["1.0", NFD], ["1", "café"]) == [0, 1] and order_of(["café", "1"], ["1", NFD]) == [1, 0]
    assert order_of(["a", "b"], ["a", "c"]) is None and order_of(["a"], ["a", "b"]) is None and order_of([], []) == []


def test_folders_that_print_alike_are_one_class_and_both_are_named(tmp_path):
    for name, count in (("café", 2), (NFD, 3), ("tea", 2), ("Tea", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("L", (4, 4)).save(tmp_path / name / f"{number}.png")
    source = open_images(str(tmp_path))
    assert source.classes == ["Tea", "café", "tea"] and source.targets.bincount().tolist() == [1, 5, 2]
    alike, case = source.notes
    assert alike.startswith("one class in 2 spellings: 'cafe\\u0301' (3 images) and 'caf\\xe9' (2 images); rename one")
    assert case == "classes that differ in case only: 'Tea' and 'tea'; rename one of them if they are the same"
    assert len(open_images(str(tmp_path), reading=Reading(by_content=False)).classes) == 4


def test_numbers_and_truths_of_a_table_are_one_class_however_they_are_written(tmp_path):
    source = open_texts(make_table(tmp_path, ["1", "1.0", "2", "2", "007", "7"]), "classification")
    assert source.classes == ["007", "1", "2", "7"] and source.targets.tolist() == [1, 1, 2, 2, 0, 3]
    assert source.notes[0].startswith("one class in 2 spellings: '1' (1 texts) and '1.0' (1 texts)")
    lines = [{"text": "a", "label": True}, {"text": "b", "label": "true"}, {"text": "c", "label": False}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert open_texts(str(tmp_path / "list.jsonl"), "classification").targets.tolist() == [1, 1, 0]


def test_other_data_is_matched_with_the_classes_trained_on_by_what_the_names_mean(tmp_path):
    place = make_table(tmp_path, [NFD, "1.0", "TRUE"])
    found = open_texts(place, "classification", classes=["1", "café", "true"])
    assert found.targets.tolist() == [1, 0, 2] and found.classes == ["1", "café", "true"]
    with pytest.raises(UsageError, match="class '2' is not among those trained on"):
        open_texts(make_table(tmp_path, ["2", "1"]), "classification", classes=["1", "3"])
    # Where two of the classes mean the same, as in runs of before, only the very spelling will do.
    assert open_texts(make_table(tmp_path, ["1.0", "1"]), "classification", classes=["1", "1.0"]).targets.tolist() == [
        1,
        0,
    ]


def test_several_labels_are_compared_alike(tmp_path):
    source = open_texts(make_table(tmp_path, ["1|a", "1.0", "a", "|"]), "multi-label", Columns(separator="|"))
    assert source.classes == ["1", "a"] and source.targets.tolist() == [[1, 1], [1, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize("spelling", ["nan", "NaN", "NA", "N/A", "null", "None", "<NA>", "#N/A", "NaT"])
def test_a_missing_value_is_no_class_unless_it_is_said_to_be_one(tmp_path, spelling):
    place = make_table(tmp_path, ["a", "b", spelling, "b", spelling])
    with pytest.raises(
        UsageError, match=r"line 4: column 'label' holds .* is how a missing value is written; .*leave-out"
    ):
        open_texts(place, "classification")
    source = open_texts(place, "classification", reading=Reading(missing_labels="leave-out"))
    assert source.classes == ["a", "b"] and source.names == ["line 2", "line 3", "line 5"]
    assert source.notes == ("2 row(s) without a label left out, like line 4",)
    source = open_texts(place, "classification", reading=Reading(missing_labels="class"))
    assert sorted(source.classes) == sorted(["a", "b", spelling])


def test_words_that_only_look_like_a_missing_value_are_classes(tmp_path):
    assert open_texts(make_table(tmp_path, ["none", "Nan", "na"]), "classification").classes == ["Nan", "na", "none"]


# ---- What may be meant otherwise ---------------------------------------------------------------------------------------


def test_labels_made_of_others_may_be_several_a_row(tmp_path):
    labels = ["scab", "complex", "scab complex", "healthy", "scab complex"]
    source = open_texts(make_table(tmp_path, labels), "classification")
    assert source.notes == (
        "1 label(s) are made of others, like 'scab complex' of 'scab' and 'complex': if a row has several labels, give "
        "--separator ' '",
    )
    assert open_texts(make_table(tmp_path, ["hot dog", "dog", "cat"]), "classification").notes == ()
    assert "--separator '|'" in open_texts(make_table(tmp_path, ["a|b", "a", "b"]), "classification").notes[0]
    assert open_texts(make_table(tmp_path, ["a|b", "a", "b"]), "multi-label", Columns(separator="|")).notes == ()


def test_a_column_that_is_chosen_among_several_is_said(tmp_path):
    (tmp_path / "a.csv").write_text("text,title,label,category\na,b,0,x\nc,d,1,y\n")
    source = open_texts(str(tmp_path / "a.csv"), "classification")
    assert source.notes == (
        "column 'text' is read, not 'title' (--text-column decides otherwise)",
        "column 'label' is read, not 'category' (--label-column decides otherwise)",
    )
    assert open_texts(str(tmp_path / "a.csv"), "classification", Columns("title", "category")).notes == ()


def test_folders_that_every_class_holds_may_be_the_classes(tmp_path):
    for outer in ("studio", "street"):
        for inner in ("cat", "dog"):
            (tmp_path / outer / inner).mkdir(parents=True)
            Image.new("L", (4, 4)).save(tmp_path / outer / inner / "x.png")
    source = open_images(str(tmp_path))
    assert source.classes == ["street", "studio"]
    assert source.notes[0].startswith(
        "every class holds the same folders ('cat', 'dog') and nothing else: if those are"
    )
    Image.new("L", (4, 4)).save(tmp_path / "street" / "y.png")
    assert open_images(str(tmp_path)).notes == ()
