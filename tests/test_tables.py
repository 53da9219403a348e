"""Tables as other people write them: by spreadsheets, pandas, other machines and in other encodings."""

import csv
import gzip
import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from PIL import Image

from finetune import UsageError, text_head
from finetune.base.table_names import is_table
from finetune.cli import main
from finetune.data.images import open_images
from finetune.data.inputs import image_files
from finetune.data.source import Reading
from finetune.data.table import Columns
from finetune.data.table_files import read_rows
from finetune.data.texts import open_texts
from finetune.store.restore import trained_network
from finetune.store.run_folder import RunFolder

ROWS = [("text", "label"), *((f"Größe {n} “naïve”", ("gut", "schön")[n % 2]) for n in range(12))]
WANTED = [text for text, _ in ROWS[1:]]
QUICK = ["--epochs", "1", "--finish", "none", "--device", "cpu", "--track", "none", "--no-report", "--quiet"]


def as_csv(delimiter: str = ",", rows=ROWS, end: str = "\r\n") -> str:
    return "".join(delimiter.join(map(str, row)) + end for row in rows)


def workbook(path: Path, rows=ROWS) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append([])  # people leave a line free
    for number, row in enumerate(rows):
        sheet.append([*row, None, None])
        if number == 5:
            sheet.append([None] * 4)
    book.create_sheet("notes").append(["nothing of it"])
    book.save(path)


def parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = dict(zip(ROWS[0], zip(*ROWS[1:], strict=True), strict=True))
    pyarrow.parquet.write_table(pyarrow.table({name: list(values) for name, values in columns.items()}), path)


AS_JSON = [dict(zip(ROWS[0], row, strict=True)) for row in ROWS[1:]]
FILES = {
    "plain.csv": lambda path: path.write_text(as_csv()),
    "excel.csv": lambda path: path.write_bytes(b"\xef\xbb\xbf" + ("sep=;\r\n" + as_csv(";")).encode()),
    "quoted sep.csv": lambda path: path.write_text('"sep=|"\n' + as_csv("|", end="\n")),
    "pipes.csv": lambda path: path.write_text(as_csv("|")),
    "tabs.csv": lambda path: path.write_text(as_csv("\t")),
    "utf-16.csv": lambda path: path.write_bytes(as_csv("\t").encode("utf-16")),
    "big-endian.tsv": lambda path: path.write_bytes(b"\xfe\xff" + as_csv("\t").encode("utf-16-be")),
    "packed.csv.gz": lambda path: path.write_bytes(gzip.compress(as_csv().encode())),
    "packed.JSONL.gz": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, AS_JSON)).encode())),
    "list.json": lambda path: path.write_text(json.dumps(AS_JSON)),
    "lines.json": lambda path: path.write_text("\n".join(map(json.dumps, AS_JSON))),
    "book.xlsx": workbook,
    "table.parquet": parquet,
    # What a spreadsheet leaves around the data.
    "blanks.csv": lambda path: path.write_text(
        as_csv(rows=[(*row, "", "") for row in ROWS[:4]] + [("", "", "", "")] * 2 + [(*row, "", "") for row in ROWS[4:]])
        + ",,,\r\n,,,\r\n"
    ),
    "longer rows.csv": lambda path: path.write_text(as_csv(rows=[ROWS[0], *((*row, "", "") for row in ROWS[1:])])),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_table_is_read_however_it_is_written(tmp_path, name):
    FILES[name](tmp_path / name)
    assert is_table(tmp_path / name)
    source = open_texts(str(tmp_path / name), "classification")
    assert source.texts == WANTED and source.classes == ["gut", "schön"]
    first = next(iter(read_rows(tmp_path / name)))
    assert first[0] == {"excel.csv": 3, "quoted sep.csv": 3, "book.xlsx": 3}.get(name, first[0])  # as an editor counts


@pytest.mark.parametrize("encoding", ["windows-1252", "latin-1", "utf-16-le", "shift_jis", "cp1251"])
def test_another_encoding_is_said_to_be_one_and_read_when_it_is_named(tmp_path, encoding):
    words = {
        "shift_jis": "荷物がまだ届きません。注文の状況を確認してください",
        "cp1251": "Посылка до сих пор не пришла и я хочу вернуть деньги",
    }
    text = words.get(encoding, "Die Größe paßt nicht und ich möchte sie zurückgeben")
    rows = [("text", "label"), *((f"{text} {n}", "ab"[n % 2]) for n in range(20))]
    (tmp_path / "mail.csv").write_bytes(as_csv(rows=rows).encode(encoding))
    if encoding != "utf-16-le":
        with pytest.raises(
            UsageError, match=r"mail\.csv line 2: is not UTF-8, but looks like (\S+) \(--encoding"
        ) as error:
            open_texts(str(tmp_path / "mail.csv"), "classification")
        guess = str(error.value).partition("looks like ")[2].partition(" ")[0]
        if encoding == "shift_jis":  # of a few sentences a guess may be another one of the east
            assert "".encode(guess) == b""
        else:
            assert guess == {"latin-1": "windows-1252"}.get(encoding, encoding)
            read = open_texts(str(tmp_path / "mail.csv"), "classification", reading=Reading(encoding=guess))
            assert read.texts[3] == f"{text} 3"
    source = open_texts(str(tmp_path / "mail.csv"), "classification", reading=Reading(encoding=encoding))
    assert source.texts[3] == f"{text} 3"


def test_a_sheet_is_read_to_its_end_whatever_size_it_claims(tmp_path):
    workbook(tmp_path / "book.xlsx")
    with zipfile.ZipFile(tmp_path / "book.xlsx") as book, zipfile.ZipFile(tmp_path / "stale.xlsx", "w") as stale:
        for name in book.namelist():
            content = book.read(name)
            stale.writestr(name, re.sub(rb'<dimension ref="[^"]*"', b'<dimension ref="A1:B5"', content))
    assert open_texts(str(tmp_path / "stale.xlsx"), "classification").texts == WANTED


@pytest.mark.parametrize("encoding", ["utf-8", "UTF-8", "utf8", "U8"])
def test_utf_8_is_meant_however_it_is_spelled(tmp_path, encoding):
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + as_csv().encode())
    assert open_texts(str(tmp_path / "t.csv"), "classification", reading=Reading(encoding=encoding)).texts == WANTED
    (tmp_path / "t.csv").write_bytes(as_csv().encode("utf-32"))
    assert open_texts(str(tmp_path / "t.csv"), "classification").texts == WANTED


def test_a_run_of_before_has_its_rows_without_any_value(tmp_path):
    (tmp_path / "t.csv").write_text("text,labels\na,x|y\n,\nb,y\n")
    columns = Columns(label="labels", separator="|")
    assert open_texts(str(tmp_path / "t.csv"), "multi-label", columns).texts == ["a", "b"]
    strict = open_texts(str(tmp_path / "t.csv"), "multi-label", columns, reading=Reading(is_strict=True))
    assert strict.texts == ["a", "", "b"]
    (tmp_path / "lines.json").write_text("a text\nanother\n")
    lines = open_texts(str(tmp_path / "lines.json"), "distillation", reading=Reading(is_strict=True))
    assert lines.texts == ["a text", "another"]


def test_what_cannot_be_a_table_says_what_it_is(tmp_path):
    good = gzip.compress(as_csv().encode())
    cases = {
        "f.csv.gz": (good[:20] + b"\x00\xff\x00" + good[23:], "cannot be unpacked"),
        "b.json": (
            b'{"images": [], "annotations": []}',
            r"is JSON, but an object with 'images', 'annotations'; give a list",
        ),
        "c.json": (b"{", "is not JSON"),
        "d.xlsx": (b"no workbook", "cannot be read .*; save it anew, or as csv"),
        "e.csv": (b"text,label\r\na\r\n", "line 2: has 1 values, the header 2 columns"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=words):
            list(read_rows(tmp_path / name))
    assert main(["bert_head", "--texts", str(tmp_path / "e.csv"), "--encoding", "klingon"]) == 2


def test_texts_in_files_of_another_encoding_are_read_left_out_or_named(tmp_path, capsys):
    for number in range(24):
        file = tmp_path / "texts" / ("gut", "schlecht")[number % 2] / f"{number:02}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"Die Größe {number} paßt".encode("windows-1252" if number == 4 else "utf-8"))
    words = ["bert_head", "--texts", str(tmp_path / "texts"), *QUICK]
    assert main([*words, "--run", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "gut/04.txt line 1: is not UTF-8, but looks like" in said and "--skip-broken" in said
    assert main([*words, "--skip-broken", "--run", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert record["config"]["data"]["encoding"] == "utf-8"
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "texts" / "gut"), "--device", "cpu"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [("error" in line) for line in lines] == [n == 4 for n in range(0, 24, 2)]
    for file in (tmp_path / "texts").glob("*/*.txt"):
        file.write_bytes(f"Die Größe {file.stem} paßt".encode("windows-1252"))
    assert main([*words, "--encoding", "windows-1252", "--run", str(tmp_path / "other")]) == 0
    capsys.readouterr()
    place = ["predict", str(tmp_path / "run"), str(tmp_path / "texts" / "gut"), "--device", "cpu"]
    assert main([*place, "--encoding", "cp1252"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["text"] == "Die Größe 00 paßt"
    for words, said in (
        (["vgg_head", "--images", "digits", "--encoding", "latin-1"], "--encoding latin-1: has no effect on digits"),
        (["bert_head", "--encoding", "klingon"], "--encoding klingon: not allowed; give utf-8, windows-1252"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err


# ---- Labels ----------------------------------------------------------------------------------------------------------


def several(path: Path, label: str, separator: str = "", **options) -> list[set[str]]:
    source = open_texts(str(path), "multi-label", Columns(label=label, separator=separator), **options)
    return [{name for name, one in zip(source.classes, row, strict=True) if one} for row in source.targets.tolist()]


def test_lists_as_pandas_and_numpy_print_them_are_lists_of_labels(tmp_path):
    labels = [["cat", "dog"], ["dog"], [], ["it's", "cat"]]
    shown = [str(labels[0]), "['dog']", "[]", str(labels[3])]
    (tmp_path / "t.csv").write_text("")
    with (tmp_path / "t.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "labels"), *((f"text {n}", one) for n, one in enumerate(shown))])
    assert several(tmp_path / "t.csv", "labels", ",") == [set(one) for one in labels]
    with (tmp_path / "t.csv").open("w", newline="") as stream:
        rows = [(f"text {n}", str(np.array(one))) for n, one in enumerate([["cat", "dog"], ["dog"], ["cat"]])]
        csv.writer(stream).writerows([("text", "labels"), *rows])
    assert several(tmp_path / "t.csv", "labels", "|") == [{"cat", "dog"}, {"dog"}, {"cat"}]
    (tmp_path / "n.csv").write_text("text,labels\na,[0 1 1]\nb,[2]\n")
    assert several(tmp_path / "n.csv", "labels", "|") == [{"0", "1"}, {"2"}]
    (tmp_path / "n.csv").write_text("text,labels\na,\"['a' 'b' ... 'z']\"\nb,['c']\n")
    with pytest.raises(UsageError, match=r"line 2: .* was cut short \(\.\.\.\) when it was printed|was cut short when"):
        several(tmp_path / "n.csv", "labels", "|")
    with pytest.raises(UsageError, match="'labels' is a list; several labels a row need --separator"):
        open_texts(str(tmp_path / "t.csv"), "classification")
    before = open_texts(str(tmp_path / "t.csv"), "classification", reading=Reading(is_strict=True))
    assert "['dog']" in before.classes  # as a run of before has it


def test_a_column_a_label_with_ones_and_zeros_is_several_labels(tmp_path, capsys):
    words = [("1", "0"), ("true", "False"), ("yes", ""), ("1.0", "0.0"), ("x", "-")]
    rows = [(f"text number {n} is here", *(words[n % 5][one] for one in ((n % 2), (n // 2) % 2, 0))) for n in range(40)]
    (tmp_path / "t.csv").write_text(as_csv(rows=[("text", "late", "rude", "any"), *rows]))
    found = several(tmp_path / "t.csv", "late, rude,any")
    wanted = [
        {name for name, one in (("late", n % 2 == 0), ("rude", (n // 2) % 2 == 0), ("any", True)) if one}
        for n in range(40)
    ]
    assert found == wanted
    recipe = text_head(texts=str(tmp_path / "t.csv"), backbone="bundled/bert")
    assert recipe.task.kind == "classification"
    options = ["bert_head", "--texts", str(tmp_path / "t.csv"), "--label-column", "late,rude"]
    assert main([*options, *QUICK, "--run", str(tmp_path / "run")]) == 0
    assert trained_network(RunFolder(tmp_path / "run"), "best")[1].data.classes == ["late", "rude"]
    capsys.readouterr()
    assert main([*options[:-1], "late,rudd"]) == 2
    assert (
        "--label-column late,rudd: no such column; its columns are 'text', 'late', 'rude', 'any'"
        in capsys.readouterr().err
    )
    (tmp_path / "t.csv").write_text(as_csv(rows=[("text", "late", "rude"), ("a", "1", "-1")]))
    with pytest.raises(UsageError, match=r"line 2: column 'rude' holds '-1'; the column of a label holds 1 or 0"):
        several(tmp_path / "t.csv", "late,rude")


# ---- Paths -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "set" / "photos" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / "set" / "photos" / name / f"{name}{number}.jpg")
    return tmp_path / "set"


PATHS = {
    "as they are": lambda name, n: f"photos/{name}/{name}{n}.jpg",
    "of Windows": lambda name, n: f"C:\\Users\\Ann\\set\\photos\\{name}\\{name}{n}.jpg",
    "of another machine": lambda name, n: f"/home/ann/projects/set/photos/{name}/{name}{n}.jpg",
    "of a folder that was renamed": lambda name, n: f"images/{name}/{name}{n}.jpg",
    "without a suffix": lambda name, n: f"photos/{name}/{name}{n}",
    "of another machine without one": lambda name, n: f"D:\\set\\photos\\{name}\\{name}{n}",
    "names alone": lambda name, n: f"{name}{n}.jpg",
    "numbers of a competition": lambda name, n: f"{name}{n}",
    "with another suffix": lambda name, n: f"{name}{n}.png",
}


@pytest.mark.parametrize("kind", PATHS)
def test_paths_of_another_machine_are_found_below_the_tables_folder(photos, kind):
    rows = [(PATHS[kind](name, n), name) for name in ("cat", "dog") for n in range(3)]
    (photos / "list.csv").write_text(as_csv(rows=[("image", "label"), *rows]))
    source = open_images(str(photos / "list.csv"))
    assert source.paths == [f"photos/{name}/{name}{n}.jpg" for name in ("cat", "dog") for n in range(3)]
    said = [note for note in source.notes if "found below" in note]
    assert bool(said) == (kind != "as they are")
    assert not said or f"6 image(s) found below {photos} by other paths:" in said[0]
    assert [path.name for path in image_files([str(photos / "list.csv")])][:2] == ["cat0.jpg", "cat1.jpg"]
    if said:  # a run of before read them to the letter, and found none
        strict = open_images(str(photos / "list.csv"), allow_outside=True, reading=Reading(is_strict=True))
        assert not any((photos / path).exists() for path in strict.paths)


def test_captions_beside_pictures_are_none_and_each_name_has_its_own_suffix(photos):
    folder = photos / "photos" / "cat"
    for file in list(folder.iterdir()):
        file.with_suffix(".txt").write_text("a cat")
    (folder / "cat2.jpg").rename(folder / "cat2.png")
    rows = [("id", "label"), *((f"photos/{name}/{name}{n}", name) for name in ("cat", "dog") for n in range(3))]
    (photos / "list.csv").write_text(as_csv(rows=rows))
    source = open_images(str(photos / "list.csv"), columns=Columns(content="id"))
    assert [path.rpartition("/")[2] for path in source.paths][:3] == ["cat0.jpg", "cat1.jpg", "cat2.png"]


def test_two_rows_are_never_predicted_as_one_picture(photos, capsys):
    (photos / "list.csv").write_text("image\nbatch1/dog0.jpg\nbatch2/dog0.jpg\n")
    with pytest.raises(UsageError, match="several of its lines mean"):
        image_files([str(photos / "list.csv")])
    (photos / "list.csv").write_text("image\nx/dog0.jpg\nx/dog0.jpg\nx/cat1.5\n")
    said: list[str] = []
    found = image_files([str(photos / "list.csv")], say=said.append)
    assert [path.name for path in found] == ["dog0.jpg", "dog0.jpg", "cat1.5"]  # what is no suffix is not cut off
    assert "image(s) found below" in said[0]


def test_a_path_that_could_be_several_files_is_none_of_them(photos):
    shutil.copy(photos / "photos" / "cat" / "cat0.jpg", photos / "photos" / "dog" / "cat0.jpg")
    (photos / "list.csv").write_text(as_csv(rows=[("image", "label"), ("cat0.jpg", "cat"), ("dog0.jpg", "dog")]))
    source = open_images(str(photos / "list.csv"))
    assert source.paths == ["cat0.jpg", "photos/dog/dog0.jpg"]  # the first is then missing, and named so
    (photos / "list.csv").write_text(
        as_csv(rows=[("image", "label"), ("a/x/dog1.jpg", "cat"), ("b/x/dog1.jpg", "dog"), ("c/cat1", "cat")])
    )
    with pytest.raises(UsageError, match=r"several of its lines mean 'photos/dog/dog1\.jpg'; give paths relative to"):
        open_images(str(photos / "list.csv"))
