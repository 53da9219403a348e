"""DataFrames as data, and tables that hold their images themselves, as the hub's data sets do."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

import finetune
from finetune import ImageTable, TextTable, UsageError, image_head, text_head
from finetune.cli import main
from finetune.data.digits import load_digits
from finetune.data.images import open_images
from finetune.data.open import open_source
from finetune.data.source import Reading
from finetune.data.table import Columns
from finetune.recipe.frames import place_of

QUIET = {"track": "none", "report": False, "device": "cpu", "quiet": True}


class Frame:
    """What of pandas is needed: columns, and rows as dicts."""

    def __init__(self, rows: list[dict]):
        self.rows, self.columns = rows, list(rows[0]) if rows else ["text"]

    def to_dict(self, kind: str) -> list[dict]:
        assert kind == "records"
        return self.rows


class Polars(Frame):
    """And of polars."""

    to_dict = None

    def to_dicts(self) -> list[dict]:
        return self.rows


def kinds(rows: list[dict]) -> list:
    """The same as each kind of DataFrame that is here."""
    found = [Frame(rows), Polars(rows)]
    for name in ("pandas", "polars"):
        try:
            found.append(__import__(name).DataFrame(rows))
        except ImportError:  # both are heavy, and what is needed of them is in the two above
            continue
    return found


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing is written below the user's own folders."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_a_frame_of_texts_trains_resumes_and_is_found_again_by_its_content():
    rows = [
        {"text": f"where is {n} of my parcels", "label": ("late", "lost")[n % 2], "n": np.int64(n)} for n in range(40)
    ]
    places = {text_head(texts=frame, backbone="bundled/bert").data.texts for frame in kinds(rows)}
    assert len(places) == 1
    recipe = text_head(texts=Frame(rows), backbone="bundled/bert", epochs=1)
    source = open_source(recipe.data, "classification")
    assert source.texts[3] == rows[3]["text"] and source.classes == ["late", "lost"]
    finetune.fit(recipe, "run", **QUIET)
    finetune.resume("run", epochs=2, lr=1e-3, quiet=True, device="cpu")
    other = text_head(texts=Frame(rows[1:]), backbone="bundled/bert").data.texts
    assert other not in places


def test_what_frames_hold_is_written_as_it_is_meant():
    rows = [
        {"text": "a", "stars": np.float64(4.5), "when": np.datetime64("2026-01-02"), "tags": np.array(["x", "y"])},
        {"text": None, "stars": float("nan"), "when": None, "tags": ["x"]},
    ]
    with open(place_of(Frame(rows), "texts"), encoding="utf-8") as stream:
        first, second = map(json.loads, stream)
    assert (first["stars"], first["tags"], second) == (
        4.5,
        ["x", "y"],
        {"text": None, "stars": None, "when": None, "tags": ["x"]},
    )
    numbers = [{"text": f"text {n}", "stars": n % 5} for n in range(20)]
    recipe = text_head(
        texts=Frame(numbers), backbone="bundled/bert", task="regression", table=TextTable(label_column="stars")
    )
    assert open_source(recipe.data, "regression").targets[7] == 2
    with pytest.raises(UsageError, match="texts: the DataFrame has no rows"):
        text_head(texts=Frame([]), backbone="bundled/bert")
    with pytest.raises(UsageError, match="images: list is no path and no DataFrame; give one of them"):
        image_head(images=["a.png"], backbone="bundled/vgg")


def test_what_no_table_can_hold_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match="column 'image' of the DataFrame holds pictures themselves; give their paths"):
        image_head(images=Frame([{"image": {"bytes": b"x", "path": None}, "label": "a"}]), backbone="bundled/vgg")
    with pytest.raises(UsageError, match="holds pictures themselves"):
        image_head(images=Frame([{"image": Image.new("L", (2, 2)), "label": "a"}]), backbone="bundled/vgg")
    twice = Frame([{"text": "a", "label": "b"}])
    twice.columns = ["text", "label", "label"]
    with pytest.raises(UsageError, match="has several columns called 'label'; rename all but one"):
        text_head(texts=twice, backbone="bundled/bert")
    rows = [{"text": f"broken \ud800 letter {n}", "label": "ab"[n % 2]} for n in range(4)]
    assert (
        open_source(text_head(texts=Frame(rows), backbone="bundled/bert").data, "classification").texts[1]
        == rows[1]["text"]
    )


def save(path, index: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(load_digits().images[index, 0].numpy()).save(path)
    return str(path)


def test_a_frame_of_images_names_files_wherever_they_lie(tmp_path):
    targets = load_digits().targets
    chosen = [(digit, int(index)) for digit in (0, 1) for index in (targets == digit).nonzero().flatten()[:15]]
    rows = [{"photo": save(tmp_path / "shots" / f"{i}.png", i), "what": f"digit {digit}"} for digit, i in chosen]
    rows[0]["photo"] = os.path.relpath(rows[0]["photo"])  # as the program that made it sees it
    table = ImageTable(image_column="photo", label_column="what")
    recipe = image_head(images=Frame(rows), backbone="bundled/vgg", epochs=1, table=table)
    os.chdir("/")  # a resume may be typed elsewhere
    source = open_source(recipe.data, "classification")
    assert source.classes == ["digit 0", "digit 1"] and source.read(0)[0].shape[0] == 3
    run = finetune.fit(recipe, tmp_path / "run", **QUIET)
    assert run.evaluate(device="cpu")["samples"] == 6


# ---- Images in a table -----------------------------------------------------------------------------------------------


def hub_table(path, count: int = 40, *, names: bool = True) -> None:
    """As `datasets.Dataset.to_parquet` writes images with their classes."""
    import pyarrow
    import pyarrow.parquet

    images, labels = [], []
    targets = load_digits().targets
    for digit in (0, 1):
        for index in (targets == digit).nonzero().flatten().tolist()[: count // 2]:
            stream = io.BytesIO()
            Image.fromarray(load_digits().images[index, 0].numpy()).save(stream, "PNG")
            images.append({"bytes": stream.getvalue(), "path": f"{index}.png" if index % 2 else None})
            labels.append(digit)
    table = pyarrow.table({"image": images, "label": labels})
    features = {"image": {"_type": "Image"}, "label": {"names": ["zero", "one"], "_type": "ClassLabel"}}
    if names:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path)


def test_a_parquet_of_the_hub_with_images_in_it_is_trained_on_and_predicted(tmp_path, capsys):
    hub_table(tmp_path / "train.parquet")
    source = open_images("train.parquet")
    assert source.classes == ["one", "zero"] and len(source.paths) == 40
    assert {os.path.splitext(path)[1] for path in source.paths} == {".png", ""}
    assert (source.read(0)[0][0] == load_digits().images[0, 0]).all()
    before = {path: (source.folder / path).stat().st_mtime_ns for path in source.paths}
    again = open_images("train.parquet")
    assert again.fingerprint == source.fingerprint
    assert {path: (source.folder / path).stat().st_mtime_ns for path in source.paths} == before  # unpacked once
    words = [
        "vgg_head",
        "--images",
        "train.parquet",
        "--epochs",
        "1",
        "--track",
        "none",
        "--no-report",
        "--device",
        "cpu",
    ]
    assert main([*words, "--run", "run"]) == 0
    assert main(["export", "run"]) == 0
    capsys.readouterr()
    assert main(["predict", "run", "train.parquet", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["label"] for line in lines] == ["zero"] * 20 + ["one"] * 20
    assert main(["cache"]) == 0
    assert "images of 1 table(s), unpacked, " in " ".join(capsys.readouterr().out.split())
    assert main(["cache", "clear"]) == 0
    assert not list((tmp_path / "cache").glob("unpacked/*"))
    # Another column of it, and fewer of its rows, are other pictures.
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table("train.parquet")
    backwards = pyarrow.array(table["image"].to_pylist()[::-1])
    pyarrow.parquet.write_table(table.append_column("mask", backwards), "two.parquet")
    first, second = (open_images("two.parquet", columns=Columns(content=name)) for name in ("image", "mask"))
    assert (first.read(0)[0] != second.read(0)[0]).any() and (second.read(0)[0] == first.read(39)[0]).all()
    (second.folder / second.paths[3]).unlink()  # by whatever cleans caches
    assert (open_images("two.parquet", columns=Columns(content="mask")).read(3)[0] == first.read(36)[0]).all()
    # A run of before has numbers for classes.
    hub_table(tmp_path / "plain.parquet", names=False)
    assert open_images("plain.parquet").classes == ["0", "1"]
    assert open_images("train.parquet", reading=Reading(is_strict=True)).classes == ["0", "1"]


def test_a_row_without_its_image_is_named_and_nothing_half_unpacked_is_left(tmp_path):
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    images = [{"bytes": stream.getvalue(), "path": "a.png"}, {"bytes": None, "path": "b.png"}]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": ["a", "b"]}), tmp_path / "t.parquet")
    with pytest.raises(UsageError, match=r"t\.parquet line 2: its image has no bytes, unlike those of other rows"):
        open_images("t.parquet")
    assert not list((tmp_path / "cache").glob("unpacked/*"))


def test_numbers_of_a_frame_are_files_of_the_current_folder(tmp_path, monkeypatch):
    """As a csv's are that pandas read: without the zeros before them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for number in (1, 2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"0000{number}.png")
    for frame in kinds([{"image_id": 1, "label": "ant"}, {"image_id": 2.0, "label": "bee"}]):
        source = open_source(image_head(images=frame, backbone="bundled/vgg").data, "classification")
        assert [os.path.basename(path) for path in source.paths] == ["00001.png", "00002.png"]
