"""Texts and labels from files, as tokens, in batches of about equal length."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from encoders import make_encoder, sentences, text_recipe, write_csv

from finetune import RunError, TextTable, Training, UsageError
from finetune.data.batch import Request
from finetune.data.order import epoch_order, side_by_side
from finetune.data.source import PARTS
from finetune.data.table import Columns
from finetune.data.texts import BrokenText, open_texts
from finetune.data.tokens import PADDING
from finetune.models.pretrained import find_pretrained
from finetune.tasks.losses import scale_of
from finetune.training.dataset import open_data

ROWS = [
    ("a red, small cat", "animal"),
    ('he said "saw"', "tool"),
    ("two\nlines of dog", "animal"),
    ("drill é ü 猫", "tool"),
]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def write_parquet(path: Path, rows, names=("text", "label")) -> Path:
    import pyarrow
    import pyarrow.parquet

    columns = [list(column) for column in zip(*rows, strict=True)]
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(names, columns, strict=True))), path)
    return path


def write_folder(path: Path, rows) -> Path:
    for number, (text, label) in enumerate(rows):
        (path / label).mkdir(parents=True, exist_ok=True)
        write(path / label / f"{number}.txt", text)
    return path


def open_(place, kind="classification", **columns):
    return open_texts(str(place), kind, Columns(**columns))


# ---- Formats ----------------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_texts_and_labels(tmp_path):
    quoted = "\n".join(f'"{text.replace(chr(34), chr(34) * 2)}";{label}' for text, label in ROWS)
    places = {
        "csv": write_csv(tmp_path / "a.csv", ROWS),
        "csv with a byte order mark": write(tmp_path / "b.csv", b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes()),
        "semicolons": write(tmp_path / "c.csv", f"text;label\n{quoted}\n"),
        "tsv": write(tmp_path / "a.tsv", "text\tlabel\n" + quoted.replace(";", "\t") + "\n"),
        "jsonl": write(tmp_path / "a.jsonl", "\n".join(json.dumps({"label": b, "text": a}) for a, b in ROWS)),
        "parquet": write_parquet(tmp_path / "a.parquet", ROWS),
    }
    for name, place in places.items():
        source = open_(place)
        assert source.texts == [text for text, _ in ROWS], name
        assert [source.classes[target] for target in source.targets] == [label for _, label in ROWS], name
    source = open_(write_folder(tmp_path / "folder", ROWS))
    assert sorted(zip(source.texts, (source.classes[one] for one in source.targets), strict=True)) == sorted(ROWS)


def test_the_set_that_ships_is_meant_by_its_name_whatever_lies_here(tmp_path, monkeypatch):
    write_folder(tmp_path / "messages", ROWS)
    monkeypatch.chdir(tmp_path)
    assert len(open_("messages").classes) == 8 and len(open_("./messages").classes) == 2


def test_columns_are_found_by_their_names_or_named(tmp_path):
    place = write_csv(tmp_path / "a.csv", [("x", "Cat", "tool"), ("y", "Saw", "animal")], ("id", "Message", "Intent"))
    assert open_(place).texts == ["Cat", "Saw"]
    place = write_csv(tmp_path / "b.csv", [("cat", "tool"), ("saw", "animal")], ("what", "kind"))
    with pytest.raises(UsageError, match=r"no column is called text, sentence.*'what', 'kind': give --text-column"):
        open_(place)
    with pytest.raises(UsageError, match="give --label-column"):
        open_(place, content="what")
    assert open_(place, content="what", label="kind").classes == ["animal", "tool"]


def test_labels_that_are_numbers_of_a_parquet_file_are_classes(tmp_path):
    source = open_(write_parquet(tmp_path / "a.parquet", [("cat", 3), ("saw", 12), ("dog", 3)]))
    assert source.classes == ["12", "3"] and source.targets.tolist() == [1, 0, 1]


def test_a_split_column_and_folders_of_parts_bring_the_split_along(tmp_path):
    rows = [("cat", "a", "train"), ("saw", "b", "train"), ("dog", "a", "val"), ("nail", "b", "Test")]
    source = open_(write_csv(tmp_path / "a.csv", rows, ("text", "label", "part")), split="part")
    assert [PARTS[part] for part in source.parts] == ["train", "train", "validation", "test"]
    for part in ("train", "dev"):
        write_folder(tmp_path / "folder" / part, ROWS)
    assert sorted(PARTS[part] for part in open_(tmp_path / "folder").parts) == ["train"] * 4 + ["validation"] * 4


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"text,label\ncat,animal\nd\xe4gg,animal\n", "a.csv line 3: is not UTF-8"),
        ("a.jsonl", b'{"text": "a", "label": "b"}\n{"text": "\xff"}\n', "a.jsonl line 2: is not UTF-8"),
        ("a.csv", 'text,label\ncat,animal\n"dog,animal\nsaw,tool\n', "a.csv line 3: unexpected end of data; check the quotes"),
        ("a.csv", 'text,label\ncat,animal\n"dog" barks,animal\n', "a.csv line 3"),
        ("a.csv", "text,label\ncat, the small one,animal\n", "a.csv line 2: has 3 values, the header 2 columns"),
        ("a.csv", 'text,label\n"two\nlines",animal\ncat,\n', "a.csv line 4: column 'label' is empty"),
        ("a.csv", "text,text,label\na,b,c\n", "several columns called 'text'"),
        ("a.csv", "text,label\n", "holds no rows"),
        ("a.csv", "", "holds no rows"),
        ("a.csv", "text,label\ncat,animal\n", "1 class(es) found (animal), at least 2 are needed"),
        ("a.jsonl", '{"text": "a", "label": "b"}\nnot json\n', "a.jsonl line 2: is not JSON"),
        ("a.jsonl", '{"text": {"en": "a"}, "label": "b"}\n', "a.jsonl line 1: its text is a dict"),
        ("a.jsonl", '{"text": "a", "label": ["b", "c"]}\n', "several labels a row need --separator"),
        ("a.parquet", b"PAR1 is not enough", "a.parquet: cannot be read"),
        ("a.txt", "cat\n", "a.txt: is a file, and no table (.csv, .tsv"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_names_the_line(tmp_path, name, content, words):
    with pytest.raises(UsageError) as raised:
        open_(write(tmp_path / name, content))
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_text_file_in_another_encoding_names_file_and_line(tmp_path):
    folder = write_folder(tmp_path / "data", ROWS)
    write(folder / "tool" / "1.txt", b"one\ntw\xf6\n")
    source = open_(folder)
    ((number, reason),) = source.unreadable.items()
    assert source.names[number] == "tool/1.txt" and source.texts[number] == ""
    assert "tool/1.txt line 2: is not UTF-8, but looks like windows-1252 (--encoding windows-1252 reads it)" in reason


def test_a_folder_says_what_is_wrong_with_it(tmp_path):
    folder = write_folder(tmp_path / "data", ROWS)
    (folder / "empty").mkdir()
    with pytest.raises(UsageError, match=r"class folder 'empty' holds no texts \(\.txt\)"):
        open_(folder)
    with pytest.raises(UsageError, match="belong to a table"):
        open_(folder, label="x")
    (folder / "empty").rmdir()
    write(tmp_path / "secret.txt", "a secret")
    os.symlink(tmp_path / "secret.txt", folder / "tool" / "x.txt")
    with pytest.raises(UsageError, match=r"1 text\(s\) lie outside"):
        open_(folder)
    assert "a secret" in open_texts(str(folder), "classification", allow_outside=True).texts


def test_parquet_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install pyarrow"):
        open_(write(tmp_path / "a.parquet", b"PAR1"))


def test_the_fingerprint_is_that_of_texts_labels_and_parts(tmp_path):
    names = ("text", "label", "part")
    rows = [("cat", "a", "train"), ("saw", "b", "train"), ("dog", "a", "val"), ("nail", "b", "val")]
    changes = {
        "nothing": rows, "a text": [("cats", *rows[0][1:]), *rows[1:]], "a label": [*rows[:2], ("dog", "b", "val"), rows[3]],
        "a part": [*rows[:3], ("nail", "b", "test")], "the order": rows[::-1],
    }  # fmt: skip
    found = {}
    for name, changed in changes.items():
        place = write_csv(tmp_path / f"{name}.csv", changed, names)
        found[name] = open_(place, split="part").fingerprint
    assert len(set(found.values())) == len(found)
    assert open_(write_csv(tmp_path / "x.csv", rows, names), split="part").fingerprint == found["nothing"]


def test_numbers_to_predict_are_read_and_what_is_none_names_the_line(tmp_path):
    source = open_(write_csv(tmp_path / "a.csv", [("cat", "1.5"), ("saw", "-2e3")]), "regression")
    assert source.targets.tolist() == [1.5, -2000] and source.classes == []
    with pytest.raises(
        UsageError, match=r"line 3: column 'label' holds 'nan', which is how a missing value is written"
    ):
        open_(write_csv(tmp_path / "a.csv", [("cat", "1.5"), ("saw", "nan")]), "regression")
    for bad in ("many", "inf"):
        with pytest.raises(UsageError, match=f"line 3: '{bad}' is no number"):
            open_(write_csv(tmp_path / "a.csv", [("cat", "1.5"), ("saw", bad)]), "regression")
    place = write_csv(tmp_path / "b.csv", [(f"cat {n}", f"{n / 7:.4f}") for n in range(1, 40) if n % 7])
    with pytest.raises(UsageError, match="to predict numbers, give --task regression"):
        open_(place)


# ---- Split ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("bert"))


def data_of(place, encoder, **changes):
    recipe = text_recipe(place, encoder, **changes)
    return open_data(recipe, find_pretrained(recipe)[0])


def test_numbers_are_split_so_that_both_parts_have_small_and_large_ones(tmp_path, encoder):
    place = write_csv(tmp_path / "a.csv", [(f"cat {n}", n**3) for n in range(200)])
    data = data_of(place, encoder, task="regression")
    assert len(data.split.validation) == 40
    ranks = data.source.targets.argsort().argsort()
    tenths = torch.bincount(ranks[data.split.validation] * 10 // 200, minlength=10)
    assert tenths.tolist() == [4] * 10


# ---- Tokens -----------------------------------------------------------------------------------------------------------


def test_what_is_too_long_is_cut_counted_and_keeps_its_end_mark(tmp_path, encoder):
    rows = [("cat " * 3, "a"), ("cat " * 8, "a"), ("cat " * 6, "b"), ("saw " * 9, "b")]
    data = data_of(write_csv(tmp_path / "a.csv", rows), encoder, max_length=8)
    table = data.pipeline.table
    assert table.truncated.tolist() == [False, True, False, True]
    assert table.lengths.tolist() == [5, 8, 8, 8]
    tokens = table.batch([0, 1])
    assert tokens.shape == (2, 8) and tokens[0].tolist()[5:] == [PADDING] * 3
    assert tokens[1, -1] == tokens[0, 4] == 3  # [SEP]


def test_strange_characters_are_tokens_too(tmp_path, encoder):
    rows = [("\ud83d half a pair", "a"), ("\x00\x1b[31m", "a"), ("🎉 e\u0301 \u202e", "b"), ("猫" * 300, "b")]
    place = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": a, "label": b}) for a, b in rows))
    data = data_of(place, encoder)
    assert data.pipeline.lengths.min() >= 2


def test_a_tokenizer_of_another_network_is_refused(tmp_path, encoder):
    recipe = text_recipe(write_csv(tmp_path / "a.csv", sentences(20)), encoder)
    backbone, _ = find_pretrained(recipe)
    few = dataclasses.replace(backbone.preprocessing, vocabulary_size=10)
    with pytest.raises(RunError, match="the network has 10 embeddings"):
        few.tokenize(["cat"])


def test_an_empty_text_is_broken_like_an_image_that_cannot_be_read(tmp_path, encoder):
    rows = [("cat", "a"), ("  ", "a"), ("saw", "b"), ("nail", "b"), ("dog", "a")]
    data = data_of(write_csv(tmp_path / "a.csv", rows), encoder, training=Training(validation_fraction=0.4))
    with pytest.raises(BrokenText, match="text of line 3 is empty"):
        data.pipeline.fetch(Request([0, 1]))
    batch = data.pipeline.fetch(Request([0, 1, 2], tolerant=True))
    assert batch.indices.tolist() == [0, 2] and batch.broken == [(1, "text of line 3 is empty; write or remove it")]
    assert len(batch.inputs) == len(batch.targets) == 2


# ---- Order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 511, 512, 513, 2000])
def test_an_order_by_length_is_a_permutation_with_full_batches(count):
    lengths = torch.randint(3, 200, (3000,), generator=torch.Generator().manual_seed(0))
    shuffled = epoch_order(7, 3, count)
    order = side_by_side(shuffled, lengths, 16)
    assert order.sort().values.tolist() == list(range(count))
    assert torch.equal(order, side_by_side(shuffled.clone(), lengths.clone(), 16))


def test_batches_of_equal_length_pad_little_and_differ_in_every_epoch():
    lengths = torch.randint(3, 200, (3000,), generator=torch.Generator().manual_seed(0))

    def padded(order):
        return sum(int(lengths[batch].max()) * len(batch) for batch in order.split(16)) / int(lengths[order].sum())

    orders = [side_by_side(epoch_order(7, epoch, 3000), lengths, 16) for epoch in range(2)]
    assert padded(epoch_order(7, 0, 3000)) > 1.7
    assert max(map(padded, orders)) < 1.06
    batches = [{tuple(sorted(batch.tolist())) for batch in order.split(16)} for order in orders]
    assert not batches[0] & batches[1]
    # Neither short batches nor those with samples of small numbers come first.
    firsts = torch.stack([order.split(16)[n].float().mean() for order in orders for n in range(32)])
    assert 1100 < firsts.mean() < 1900
    longest = torch.tensor([int(lengths[batch].max()) for batch in orders[0].split(16)[:64]]).float()
    ranks = torch.corrcoef(torch.stack([torch.arange(64).float(), longest]))[0, 1]
    assert abs(ranks) < 0.4


def test_samples_of_an_epoch_are_those_that_train_whether_features_are_kept_or_not(tmp_path, encoder):
    data = data_of(write_csv(tmp_path / "a.csv", sentences(100)), encoder)
    samples = data.epoch_samples(3, 0, 16, data.split.train)
    assert samples.sort().values.tolist() == data.split.train.tolist()
    lengths = data.pipeline.lengths[samples]
    assert all((batch.max() - batch.min()) < 12 for batch in lengths.split(16)[:-1])
    table = TextTable(separator="|")
    assert text_recipe("x", "y", table=table).task.kind == "multi-label"


# ---- Values that other programs write ------------------------------------------------------------------------------------


def test_bytes_are_texts_and_no_number_is_nothing(tmp_path):
    rows = [(b"cat", b"animal"), ("drill \u00e9".encode(), b"tool")]
    source = open_(write_parquet(tmp_path / "a.parquet", rows))
    assert source.texts == ["cat", "drill \u00e9"] and source.classes == ["animal", "tool"]
    with pytest.raises(UsageError, match="line 1: holds bytes that are not UTF-8"):
        open_(write_parquet(tmp_path / "b.parquet", [(b"\xff", b"a"), (b"saw", b"b")]))
    with pytest.raises(UsageError, match="line 2: column 'label' is empty"):
        open_(write_parquet(tmp_path / "c.parquet", [("cat", 1.0), ("saw", float("nan"))]))
    source = open_(write(tmp_path / "a.jsonl", '{"text": NaN, "label": "a"}\n{"text": "saw", "label": "b"}\n'))
    assert source.texts == ["", "saw"]
    with pytest.raises(UsageError, match="line 1: column 'label' holds a dict"):
        open_(write(tmp_path / "b.jsonl", '{"text": "cat", "label": {"x": 1}}\n'))
    source = open_(write(tmp_path / "c.jsonl", '{"text": 0, "label": false}\n{"text": "b", "label": true}\n'))
    assert source.texts == ["0", "b"] and source.classes == ["False", "True"]


def test_numbers_keep_their_digits_however_large_they_are(tmp_path, encoder):
    rows = [("cat " * (number % 3 + 1), 1_700_000_000 + number) for number in range(40)]
    data = data_of(write_csv(tmp_path / "a.csv", rows), encoder, task="regression")
    mean, deviation = data.scale
    assert 10 < deviation < 14
    exact = torch.tensor([1_700_000_000 + number for number in range(40)], dtype=torch.float64)
    torch.testing.assert_close(data.source.targets.double(), (exact - mean) / deviation, rtol=0, atol=1e-6)


def test_the_scale_of_numbers_does_not_depend_on_the_number_of_threads():
    targets = torch.randn(125_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e3 + 7
    threads, scales = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        scales.append(scale_of(targets))
    torch.set_num_threads(threads)
    assert scales[0] == scales[1] == scales[2]


def test_few_numbers_are_split_too_and_too_few_say_so(tmp_path, encoder):
    for count, held_out in ((5, 1), (9, 2), (11, 2), (40, 8)):
        rows = [(f"cat {number}", number) for number in range(count)]
        data = data_of(write_csv(tmp_path / "a.csv", rows), encoder, task="regression")
        assert len(data.split.validation) == held_out, count
    with pytest.raises(UsageError, match="there are 1 texts, so nothing is left to validate with"):
        data_of(write_csv(tmp_path / "a.csv", [("cat", 1)]), encoder, task="regression")
