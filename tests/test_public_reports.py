"""What people reported to the trackers of other projects, repeated here: each by the project and the report's number."""

import csv
import gzip
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from openpyxl import Workbook
from PIL import Image
from torchvision.models import resnet18

from finetune import UsageError
from finetune.base.files import BadFile
from finetune.data.images import open_images
from finetune.data.open import check_data_effects, open_source
from finetune.data.source import Reading
from finetune.data.table import Columns
from finetune.data.texts import open_texts
from finetune.errors import FinetuneError
from finetune.models.backbones import find_backbone
from finetune.models.network import build_network
from finetune.models.weight_files import read_weights
from finetune.models.weights import choose_weights
from finetune.recipe.heads import image_head, text_head

CLASSES = ("ant", "bee", "cat")
TEXTS = [(f"a text that has number {number}", "good" if number % 2 else "bad") for number in range(20)]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 46827520\n"
PAGE = "<!DOCTYPE html><html><head><title>Sign in</title></head></html>"


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), sum(map(ord, str(path))) % 250, np.uint8)).save(
        path, {".JPG": "jpeg"}.get(path.suffix)
    )


def pictures(folder: Path, count: int = 3) -> None:
    for name in CLASSES:
        for number in range(count):
            picture(folder / name / f"{number}.png")


def table(path: Path, rows: list[tuple[object, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def loaded(backbone: str, file: Path) -> dict[str, torch.Tensor]:
    """The network's tensors after a file of somebody else was loaded into it; and what was said of that."""
    found, weights = choose_weights(backbone, str(file))
    network = build_network(
        found, read_weights(weights.path), "it", head="linear", class_count=3, dropout=0.0, head_width=8, seed=0
    )
    return network.module.state_dict()


# ---- Weights --------------------------------------------------------------------------------------------------------


def test_simsiam_8_a_siamese_encoder_with_its_projector_in_the_heads_place(tmp_path):
    theirs = resnet18().state_dict()
    body = {name: value for name, value in theirs.items() if not name.startswith("fc.")}
    state = {f"module.encoder.{name}": value for name, value in body.items()}
    state |= {f"module.encoder.fc.{place}.weight": torch.ones(4, 4) for place in (0, 3, 6)}
    state["module.predictor.0.weight"] = torch.ones(4, 4)
    torch.save({"epoch": 99, "arch": "resnet18", "state_dict": state, "optimizer": {}}, tmp_path / "checkpoint.pth.tar")
    own = loaded("resnet18", tmp_path / "checkpoint.pth.tar")
    assert all(torch.equal(own[name], value) for name, value in body.items())


def test_pytorch_image_models_2003_a_compiled_model_within_a_parallel_one(tmp_path):
    theirs = resnet18().state_dict()
    torch.save({"state_dict": {f"_orig_mod.module.{k}": v for k, v in theirs.items()}}, tmp_path / "last.pth.tar")
    own = loaded("resnet18", tmp_path / "last.pth.tar")
    assert all(torch.equal(own[name], value) for name, value in theirs.items() if not name.startswith("fc."))


def test_retfound_34_a_masked_autoencoder_is_the_encoder_and_its_decoder_is_left_aside(tmp_path):
    theirs = timm.create_model("test_vit", num_classes=0).state_dict()
    state = theirs | {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8)}
    state |= {f"decoder_{name}": value for name, value in theirs.items() if name.startswith("blocks.0.")}
    torch.save({"model": state, "optimizer": {}, "epoch": 800}, tmp_path / "mae.pth")
    own = loaded("timm:test_vit", tmp_path / "mae.pth")
    assert all(torch.equal(own[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "weights.pth"])
def test_transformers_27923_a_pointer_of_git_lfs_is_said_to_be_one(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(
        BadFile, match=rf"{name} is a pointer of Git LFS, not the file itself; fetch that: git lfs pull"
    ):
        read_weights(tmp_path / name)
    (tmp_path / name).write_text(PAGE)
    with pytest.raises(BadFile, match=r"is a web page, not the file itself; download it anew"):
        read_weights(tmp_path / name)


def test_transformers_27923_also_of_a_cloned_folder(tmp_path):
    from transformers import ViTConfig

    config = ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=8
    )
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text(POINTER)
    find_backbone(str(tmp_path))
    with pytest.raises(UsageError, match=r"its model\.safetensors is a pointer of Git LFS"):
        read_weights(tmp_path)


# ---- Layouts --------------------------------------------------------------------------------------------------------


def test_mmpretrain_507_copies_that_a_notebook_keeps_are_no_class(tmp_path):
    pictures(tmp_path)
    shutil.copytree(tmp_path / "ant", tmp_path / ".ipynb_checkpoints")
    source = open_images(str(tmp_path))
    assert source.classes == list(CLASSES) and "1 folder(s) (.ipynb_checkpoints)" in source.left


def test_vision_4925_all_empty_folders_of_classes_are_named_at_once(tmp_path):
    pictures(tmp_path)
    for name in ("1057", "1100", "1116"):
        (tmp_path / name).mkdir()
    with pytest.raises(
        UsageError, match=r"class folder '1057' holds no images .*and so do 2 more: 1100, 1116; fill or remove them"
    ):
        open_images(str(tmp_path))


def new_data(place: Path, option: str = "--images"):
    """As a run begins: the data opened, and held to be what it should."""

    recipe = (
        image_head(images=str(place), backbone="bundled/vgg")
        if option == "--images"
        else text_head(texts=str(place), backbone="bundled/bert")
    )
    source = open_source(recipe.data, recipe.task.kind)
    check_data_effects(source, recipe, [])
    return source


def test_datasets_4311_images_with_a_metadata_file_in_each_part(tmp_path):
    """Before, the network learnt to tell train/ from test/."""
    for part, count in (("train", 6), ("test", 3)):
        names = [f"{number}.png" for number in range(count)]
        for name in names:
            picture(tmp_path / part / name)
        table(
            tmp_path / part / "metadata.csv",
            [(name, CLASSES[i % 3]) for i, name in enumerate(names)],
            ("file_name", "label"),
        )
    with pytest.raises(UsageError) as error:
        new_data(tmp_path)
    assert "its folders test/, train/ are called like parts of a data set, not like classes" in str(error.value)
    given = str(tmp_path / "train" / "metadata.csv")
    assert f"give --images {given}" in str(error.value)
    assert new_data(Path(given)).classes == list(CLASSES)
    for place in (tmp_path / "train", tmp_path / "test"):
        with pytest.raises(UsageError, match=rf"0 class\(es\) found, .*give --images {place}/metadata\.csv"):
            new_data(place)


def test_fastai_894_labels_beside_images_of_which_some_were_moved_to_test(tmp_path):
    for number in range(8):
        picture(tmp_path / ("test" if number < 2 else "images") / f"{number}.png")
    rows = [(f"images/{number}.png", CLASSES[number % 3]) for number in range(8)]
    table(tmp_path / "labels.csv", rows, ("image", "label"))
    with pytest.raises(
        UsageError, match=rf"its folders images/, test/ are called like parts.*give --images {tmp_path}/labels\.csv"
    ):
        new_data(tmp_path)
    source = new_data(tmp_path / "labels.csv")
    with pytest.raises(FinetuneError, match=r"images/0\.png does not exist"):
        source.read(0)


def test_classes_that_are_called_like_parts_among_others_are_classes(tmp_path):
    for name in ("train", "bus", "car"):
        picture(tmp_path / name / "1.png")
    assert new_data(tmp_path).classes == ["bus", "car", "train"]


@pytest.mark.parametrize("inner", ["images", "my photos/images"])
def test_edje_147_an_archive_that_unpacked_into_a_folder_of_its_own(tmp_path, inner):
    pictures(tmp_path / "unpacked" / inner)
    with pytest.raises(UsageError) as error:
        new_data(tmp_path / "unpacked")
    place = tmp_path / "unpacked" / inner
    quoted = f"'{place}'" if " " in inner else str(place)
    assert f"{place} holds ant, bee, cat: give --images {quoted}" in str(error.value)


def test_a_link_that_leads_back_is_followed_no_further(tmp_path):
    (tmp_path / "again").symlink_to(tmp_path)
    with pytest.raises(UsageError, match=r"holds no images"):
        new_data(tmp_path)
    picture(tmp_path / "cat" / "1.png")
    (tmp_path / "again").unlink()
    (tmp_path / "cat" / "again").symlink_to(tmp_path / "cat")
    with pytest.raises(UsageError, match=r"1 class\(es\) found \(cat\), at least 2 are needed; put the images"):
        new_data(tmp_path)


def test_advice_leads_to_other_folders_than_the_one_that_was_named(tmp_path):
    for part in ("train", "test"):
        picture(tmp_path / "flat" / part / "1.png")
    with pytest.raises(UsageError, match=r"not like classes; put the images of each class into a folder of its own"):
        new_data(tmp_path / "flat")
    pictures(tmp_path / "both" / "images")
    pictures(tmp_path / "both" / "masks")
    with pytest.raises(UsageError, match=r"both/images holds folders of classes: give --images \S+both/images;"):
        new_data(tmp_path / "both")


@pytest.mark.parametrize("name", ["xl/workbook.xml", "[Content_Types].xml", "a.txt"])
def test_a_damaged_workbook_is_one_line(tmp_path, name):
    path = tmp_path / "book.xlsx"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "x")
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\x01\x02")
    content[place + 6 : place + 8] = (99).to_bytes(2, "little")  # the version that is needed to read it
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot be read|is a zip archive by its content"):
        open_images(str(path))


def test_vision_707_images_without_folders(tmp_path):
    for number in range(3):
        picture(tmp_path / f"{number}.png")
    with pytest.raises(UsageError, match=r"holds no images with a class; 3 image\(s\) lie in it themselves"):
        open_images(str(tmp_path), classes=["ant", "bee"])
    with pytest.raises(
        UsageError, match=r"0 class\(es\) found, at least 2 are needed; 3 image\(s\) lie in it themselves"
    ):
        new_data(tmp_path)


def test_of_texts_too(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "1.txt").write_text("a text")
    with pytest.raises(UsageError, match=r"--texts .*its folders test/, train/ are called like parts"):
        new_data(tmp_path, "--texts")


# ---- Tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "xlsx"])
def test_fastai_1008_numbers_that_lost_their_zeros_name_files_that_have_them(tmp_path, kind):
    rows = [(number, CLASSES[number % 3]) for number in range(12)]
    for number, _ in rows:
        picture(tmp_path / "images" / f"{number:05}.JPG")
    if kind == "xlsx":
        book = Workbook()
        for row in [("image_id", "label"), *rows]:
            book.active.append(row)
        book.save(tmp_path / "labels.xlsx")
    else:
        table(tmp_path / "labels.csv", rows, ("image_id", "label"))
    source = open_images(str(tmp_path / f"labels.{kind}"))
    assert source.paths == [f"images/{number:05}.JPG" for number, _ in rows]
    assert any("12 image(s) found below" in note and "0 as images/00000.JPG" in note for note in source.notes)


def test_a_name_that_is_there_as_it_is_wins_and_of_several_with_zeros_none_is_taken(tmp_path):
    from finetune.data.table_paths import found_below

    for name in ("1.png", "2.jpg", "01.png", "02.png", "007.png", "0007.png", "009.png"):
        picture(tmp_path / name)
    assert found_below(tmp_path, ["1", "2"])[0] == ["1.png", "2.jpg"]
    assert found_below(tmp_path, ["7", "9"])[0] == ["7", "009.png"]
    assert found_below(tmp_path, ["7.png"])[0] == ["7.png"]


@pytest.mark.parametrize(("value", "said"), [(1.5, "holds 1.5"), (True, "holds True"), (None, "is empty")])
def test_what_names_no_image_is_shown(tmp_path, value, said):
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": value, "label": "a"}) + "\n")
    with pytest.raises(UsageError, match=rf"line 1: column 'image' {said}; name an image"):
        open_images(str(tmp_path / "a.jsonl"))


def test_fastai_1008_beside_the_table_and_with_a_suffix(tmp_path):
    """The first fifty are found by their zeros, the last one needs none."""
    rows = [(f"{number}.png", CLASSES[number % 3]) for number in (*range(60), 12345)]
    for number in (*range(60), 12345):
        picture(tmp_path / f"{number:05}.png")
    source = open_images(str(table(tmp_path / "labels.csv", rows, ("image", "label"))))
    assert source.paths == [f"{number:05}.png" for number in (*range(60), 12345)]


def test_keras_preprocessing_92_a_column_a_label_and_ids_without_a_suffix(tmp_path):
    names = [f"Train_{number}" for number in range(6)]
    for name in names:
        picture(tmp_path / "images" / f"{name}.JPG")
    rows = [(name, number % 2, (number + 1) % 2) for number, name in enumerate(names)]
    path = table(tmp_path / "train.csv", rows, ("image_id", "healthy", "rust"))
    source = open_images(str(path), columns=Columns(label="healthy,rust", separator=","))
    assert source.paths == [f"images/{name}.JPG" for name in names] and source.targets[0].tolist() == [0, 1]


def test_a_data_set_of_the_hub_in_several_files_is_read_whole(tmp_path):
    import pyarrow
    import pyarrow.parquet

    from finetune.data.table import Found, sample_rows

    for shard in range(3):
        rows = TEXTS[shard * 6 : shard * 6 + 6]
        columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        hashed = "-0a1b2c3d4e5f6071" if shard == 1 else ""
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"train-{shard:05}-of-00003{hashed}.parquet")
    first = tmp_path / "train-00000-of-00003.parquet"
    source = open_texts(str(first), "classification", reading=Reading(is_whole=True))
    assert source.texts == [text for text, _ in TEXTS[:18]] and source.names[-1] == "line 18"
    assert any("all 3 files are read, train-00000-of-00003.parquet to train-00002" in note for note in source.notes)
    # What is to be predicted is what was named.
    rows = sample_rows(first, Columns(), ["text"], "--text-column", labelled=False, found=Found())
    assert len(list(rows)) == 6
    (tmp_path / "train-00002-of-00003.parquet").unlink()
    with pytest.raises(
        UsageError, match=r"is one of 3 files, and train-00002-of-00003\.parquet is not there; fetch it"
    ):
        open_texts(str(first), "classification", reading=Reading(is_whole=True))
    # A run begun before, which read the one, goes on with it.
    assert len(open_texts(str(first), "classification").texts) == 6
    assert text_head(texts=str(first), backbone="bundled/bert").data.tables == "whole"
    shutil.copy(first, tmp_path / "train-00002-of-00003.parquet")
    (tmp_path / "train-00001-of-00003-0a1b2c3d4e5f6071.parquet").write_text(POINTER)
    with pytest.raises(UsageError, match=r"train-00001-of-00003-0a1b2c3d4e5f6071\.parquet: is a pointer of Git LFS"):
        open_texts(str(first), "classification", reading=Reading(is_whole=True))
    with pytest.raises(UsageError, match=r"give --images .*train-00000-of-00003\.parquet"):
        open_images(str(tmp_path))


@pytest.mark.parametrize("packed", [True, False])
def test_datasets_6851_a_gzipped_table_by_another_name_and_an_unpacked_one_that_kept_its_name(tmp_path, packed):
    plain = table(tmp_path / "plain.csv", TEXTS).read_bytes()
    path = tmp_path / ("reviews.csv" if packed else "reviews.csv.gz")
    path.write_bytes(gzip.compress(plain) if packed else plain)
    assert open_texts(str(path), "classification").texts == [text for text, _ in TEXTS]


def test_tables_that_are_something_else_say_what(tmp_path):
    path = tmp_path / "reviews.csv"
    plain = table(tmp_path / "plain.csv", TEXTS)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(plain, "reviews.csv")
    said = {
        r"is a zip archive by its content; unpack it: python -m zipfile -e .*reviews\.csv .*reviews$": path.read_bytes()
    }
    said[r"is a pointer of Git LFS, not the file itself; fetch that: git lfs pull"] = POINTER.encode()
    said[r"is a web page, not the file itself; download it anew"] = PAGE.encode()
    said[r"is in Excel's format of before 2007, or locked by a password; save it as csv"] = (
        b"\xd0\xcf\x11\xe0\xa1\xb1" + bytes(600)
    )
    for match, content in said.items():
        path.write_bytes(content)
        with pytest.raises(UsageError, match=match):
            open_texts(str(path), "classification")
    book = Workbook()
    for row in [("text", "label"), *TEXTS]:
        book.active.append(row)
    book.save(tmp_path / "book.xlsx")
    (tmp_path / "book.xlsx").rename(path)  # as somebody renamed it
    assert open_texts(str(path), "classification").texts == [text for text, _ in TEXTS]


def test_ludwig_113_a_table_that_was_cut_off_within_a_letter_is_not_in_another_encoding(tmp_path):
    path = table(tmp_path / "reviews.csv", [*TEXTS, ("na\u00efve caf\u00e9", "good")])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex("\u00e9".encode()) + 1])
    with pytest.raises(
        UsageError, match=r"line 22: ends in the middle of a letter: the file was cut off; fetch or save it anew"
    ):
        open_texts(str(path), "classification")
    path.write_bytes(whole.decode().encode("windows-1252"))
    with pytest.raises(UsageError, match=r"looks like windows-1252"):
        open_texts(str(path), "classification")
    # In a file without any other letter of more than one byte the last one tells nothing.
    path.write_bytes(b"text,label\nabc,a\nun joli caf\xe9")
    with pytest.raises(UsageError, match=r"looks like windows-1252"):
        open_texts(str(path), "classification")


def test_cellxgene_1115_a_country_that_is_spelled_like_a_missing_value_is_asked_about(tmp_path):
    path = table(tmp_path / "countries.csv", [(text, "NA" if label == "good" else "DE") for text, label in TEXTS])
    with pytest.raises(UsageError, match=r"holds 'NA', which is how a missing value is written; .* or class"):
        open_texts(str(path), "classification")
    assert open_texts(str(path), "classification", reading=Reading(missing_labels="class")).classes == ["DE", "NA"]


def test_csvbase_11_whole_numbers_with_a_point_are_the_same_class(tmp_path):
    rows = [(text, ("1", "0", "1.0", "0.0")[number % 4]) for number, (text, _) in enumerate(TEXTS)]
    assert open_texts(str(table(tmp_path / "a.csv", rows)), "classification").classes == ["0", "1"]


@pytest.mark.parametrize(("option", "header"), [("--texts", ("img", "lbl")), ("--images", ("review", "lbl"))])
def test_autogluon_3856_a_table_of_the_other_kind_says_which_recipe_reads_it(tmp_path, option, header):
    path = table(tmp_path / "a.csv", [("1.png", "ant"), ("2.png", "bee")], header)
    other = ("photo_head", "images") if option == "--texts" else ("bert_head", "texts")
    with pytest.raises(UsageError, match=rf"if its {other[1]} are meant: finetune {other[0]} --{other[1]} {path}"):
        new_data(path, option)


def test_a_picture_that_is_a_pointer_is_said_to_be_one(tmp_path):
    pictures(tmp_path)
    (tmp_path / "ant" / "0.png").write_text(POINTER)
    with pytest.raises(FinetuneError, match=r"0\.png is a pointer of Git LFS, not the file itself"):
        open_images(str(tmp_path)).read(0)
