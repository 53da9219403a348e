"""A person's own images: every format and mode, folders, tables, parts, broken and changed files."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import (
    DyingTerminal,
    assert_equal_runs,
    metrics_lines,
    read,
    resume_run,
    small_recipe,
    train_run,
    train_with_deaths,
)
from PIL import Image

from finetune import Images, ImageTable, ImageTraining, MultiLabel, UsageError, image_head
from finetune.base.signals import StopRequest
from finetune.cli import main
from finetune.data.augment import augment, mix
from finetune.data.batch import Request
from finetune.data.contents import Contents
from finetune.data.decode import BrokenImage, formats_by_suffix, read_image
from finetune.data.images import open_images, split_source
from finetune.data.loader import Loader
from finetune.data.order import keyed_generator, stratified_split
from finetune.data.source import Reading
from finetune.data.table import Columns
from finetune.data.texts import open_texts
from finetune.data.walk import LeftAside
from finetune.errors import RunError
from finetune.models.backbones import find_backbone, members, torchvision_backbone
from finetune.models.pretrained import find_pretrained
from finetune.recipe.execution import Machine, Numerics
from finetune.runs.start import Plan, new_setup
from finetune.training import data_check as look
from finetune.training.dataset import open_data
from finetune.training.phase import Feed

CPU = torch.device("cpu")
FORMATS = ("jpg", "png", "webp", "bmp", "gif")


def make_folder(path, classes: dict[str, int], size=(12, 9)):
    """Pictures of one colour a class, each a little different."""
    for place, (label, count) in enumerate(classes.items()):
        (path / label).mkdir(parents=True)
        for number in range(count):
            colour = [40 + 5 * number] * 3
            colour[place % 3] = 255
            Image.new("RGB", size, tuple(colour)).save(path / label / f"{number:02}.png")
    return path


def folder_recipe(folder, **changes):
    """A quick run on a folder of pictures."""
    data = Images(
        str(folder), **{name: changes.pop(name) for name in ("augment", "mixup", "cutmix") if name in changes}
    )
    return small_recipe(data=data, **{"epochs": 1, "batch_size": 4, "augment": "none"} | changes)


# ---- Decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_read_by_its_content(tmp_path, suffix):
    Image.new("RGB", (4, 2), (255, 0, 0)).save(tmp_path / f"image.{suffix}")
    pixel = read_image(tmp_path / f"image.{suffix}")[:, 0, 0].int()
    # JPEG and WebP lose a little.
    assert (pixel - torch.tensor([255, 0, 0])).abs().max() <= (2 if suffix in ("jpg", "webp") else 0)


def test_images_of_every_mode_become_upright_rgb(tmp_path):
    def read(image, name="image.png", **options):
        image.save(tmp_path / name, **options)
        return read_image(tmp_path / name)

    red = Image.new("RGB", (4, 2), (255, 0, 0))
    assert read(red)[:, 0, 0].tolist() == [255, 0, 0]
    assert read(red.convert("P"))[:, 0, 0].tolist() == [255, 0, 0]
    assert read(Image.new("L", (4, 2), 77))[:, 0, 0].tolist() == [77] * 3
    assert read(Image.new("1", (4, 2), 1))[:, 0, 0].tolist() == [255] * 3
    assert read(Image.new("LA", (4, 2), (9, 255)))[:, 0, 0].tolist() == [9] * 3
    assert read(Image.new("RGBA", (4, 2), (255, 0, 0, 0)))[:, 0, 0].tolist() == [255] * 3
    assert read(Image.new("I;16", (4, 2), 0x8080))[:, 0, 0].tolist() == [0x80] * 3
    assert read(Image.new("CMYK", (4, 2)), "image.jpg")[:, 0, 0].tolist() == [255] * 3
    palette = red.convert("P")
    assert read(palette, transparency=bytes([0] * 256))[:, 0, 0].tolist() == [255] * 3
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    assert read(red, exif=exif).shape == (3, 4, 2)
    blue = Image.new("RGB", (4, 2), (0, 0, 255))
    assert read(red, "film.gif", save_all=True, append_images=[blue])[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xd8\xff\xe0 not an image", "cannot be decoded"),
        (b"", "empty"),
        (b"404 not found", "of no known image format"),
    ],
)
def test_a_broken_image_is_named_with_the_reason(tmp_path, content, reason):
    (tmp_path / "broken.jpg").write_bytes(content)
    with pytest.raises(RunError, match=rf"image .*broken\.jpg cannot be decoded .*{reason}|cannot be decoded"):
        read_image(tmp_path / "broken.jpg")


def test_only_image_formats_are_tried_so_that_no_other_program_is_started(tmp_path, monkeypatch):
    """PIL hands a PostScript file, whatever its name, to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "image.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(RunError, match="of no known image format"):
        read_image(tmp_path / "image.jpg")
    assert not (tmp_path / "ran").exists()


def test_a_pipe_is_no_image_and_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / "image.png")
    with pytest.raises(RunError, match="is no file"):
        read_image(tmp_path / "image.png")


def test_a_truncated_image_is_broken_too(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for suffix in ("jpg", "png"):
        path = tmp_path / f"image.{suffix}"
        Image.fromarray(pixels).save(path)
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(RunError, match="truncated"):
            read_image(path)


# ---- Which images, which classes ----------------------------------------------------------------------------------


def test_a_folder_gives_a_class_a_sub_folder_and_notices_changed_files(tmp_path):
    source = open_images(str(make_folder(tmp_path / "data", {"zebra crossing": 3, "ümlaut 🦓": 2})))
    assert source.classes == ["zebra crossing", "ümlaut 🦓"]
    assert source.targets.tolist() == [0, 0, 0, 1, 1]
    assert source.read(2)[0].shape == (3, 9, 12) and source.name(2) == "zebra crossing/02.png"
    (tmp_path / "data" / "zebra crossing" / "02.png").unlink()
    assert open_images(str(tmp_path / "data")).fingerprint != source.fingerprint


def test_images_in_folders_below_a_class_belong_to_it(tmp_path):
    make_folder(tmp_path / "data", {"cat/monday": 2, "cat/tuesday": 1, "dog": 2})
    source = open_images(str(tmp_path / "data"))
    assert source.classes == ["cat", "dog"] and source.targets.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "validation", "testing")])
def test_parts_of_a_folder_are_kept_apart(tmp_path, names):
    for name, count in zip(names, (4, 2, 3), strict=True):
        make_folder(tmp_path / "data" / name, {"a": count, "b": count})
    source = open_images(str(tmp_path / "data"))
    split = split_source(source, 0.2, seed=0)
    assert source.classes == ["a", "b"]
    for part, name, count in zip(split, names, (4, 2, 3), strict=True):
        assert [source.name(index).split("/")[0] for index in part.tolist()] == [name] * 2 * count


def test_without_a_validation_part_some_of_the_training_part_validates_and_the_test_part_stays_apart(tmp_path):
    make_folder(tmp_path / "data" / "train", {"a": 10, "b": 10})
    make_folder(tmp_path / "data" / "test", {"a": 3, "b": 3})
    source = open_images(str(tmp_path / "data"))
    train, validation, test = split_source(source, 0.2, seed=0)
    assert (len(train), len(validation), len(test)) == (16, 4, 6)
    assert all(source.name(index).startswith("train/") for index in torch.cat([train, validation]).tolist())


def test_a_class_may_be_called_train(tmp_path):
    source = open_images(str(make_folder(tmp_path / "data", {"bus": 2, "train": 2})))
    assert source.classes == ["bus", "train"] and source.parts is None


def test_what_systems_and_programs_leave_is_no_class_and_the_rest_is_counted_by_suffix(tmp_path):
    service = [".ipynb_checkpoints", "__MACOSX", ".cache", ".thumbnails", ".idea", ".Trash-1000", ".dvc", "@eaDir"]
    service += ["$RECYCLE.BIN", "System Volume Information", "lost+found", "a/@eaDir", "a/.ipynb_checkpoints"]
    folder = make_folder(tmp_path / "data", {"a": 2, "b": 2} | dict.fromkeys(service, 1))
    (folder / "a" / "._00.png").write_bytes(b"a shadow of 00.png")
    for name in ("notes.txt", "clip.mov", "IMG_1.CR2", "IMG_2.cr2", "scan.tif.bak", "README"):
        (folder / "b" / name).write_text("")
    source = open_images(str(folder))
    assert source.paths == ["a/00.png", "a/01.png", "b/00.png", "b/01.png"]
    for part in ("2 .cr2", "1 without a suffix", "1 .mov", "1 .txt", "1 more", "13 folder(s) ("):
        assert part in source.left, (part, source.left)
    phone = LeftAside(Counter({".heic": 2, ".txt": 1}))
    assert phone.notes == ["2 .heic left aside: to read that format, pip install pillow-heif"]
    before = open_images(str(make_folder(tmp_path / "old", {"a": 1, ".b": 1})), reading=Reading(by_content=False))
    assert before.classes == [".b", "a"]


def test_a_class_without_images_says_what_it_holds_instead(tmp_path):
    folder = make_folder(tmp_path / "data", {"a": 2})
    (folder / "b").mkdir()
    (folder / "b" / "IMG_1.cr2").write_text("")
    with pytest.raises(UsageError, match=r"'b' holds no images .*; it holds 1 \.cr2; fill or remove it"):
        open_images(str(folder))


def test_a_file_without_a_suffix_is_known_by_its_content_and_copies_that_programs_left_are_none(tmp_path):
    folder = make_folder(tmp_path / "data", {"a": 1, "b": 1})
    picture = (folder / "a" / "00.png").read_bytes()
    for name in ("scan", "photo.jpg_original", "IMG_1.JPG.1", "page.html"):
        (folder / "a" / name).write_bytes(picture)
    (folder / "a" / "LICENSE").write_text("no picture")
    os.mkfifo(folder / "a" / "pipe")
    source = open_images(str(folder))
    assert source.paths == ["a/00.png", "a/scan", "b/00.png"] and source.read(1)[0].shape == (3, 9, 12)
    assert source.left == "2 without a suffix, 1 .1, 1 .html, 1 .jpg_original"
    assert source.notes[0].startswith("1 file(s) without a suffix are images by their content, like scan; move away")


@pytest.mark.parametrize("suffix", ["tif", "tiff", "jfif", "ppm", "tga", "jp2", "ico", "avif"])
def test_whatever_pillow_decodes_by_itself_is_read(tmp_path, suffix):
    folder = make_folder(tmp_path / "data", {"a": 1, "b": 1})
    if suffix == "avif" and ".avif" not in formats_by_suffix():
        pytest.skip("this Pillow was built without AVIF")
    Image.new("RGB", (16, 16), (200, 30, 60)).save(folder / "a" / f"x.{suffix}")
    source = open_images(str(folder))
    assert f"a/x.{suffix}" in source.paths
    pixel = source.read(source.paths.index(f"a/x.{suffix}"))[0][:, 8, 8].int()
    assert (pixel - torch.tensor([200, 30, 60])).abs().max() <= 6


@pytest.mark.slow
def test_photos_of_a_phone_are_read_where_their_package_is_there(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="pip install '.[test-all]' brings pillow-heif")
    folder = make_folder(tmp_path / "data", {"a": 1, "b": 1})
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 60))).save(folder / "a" / "IMG_1.HEIC")
    source = open_images(str(folder))
    assert source.paths == ["a/00.png", "a/IMG_1.HEIC", "b/00.png"] and source.left == ""
    image = source.read(1)[0]
    assert image.shape == (3, 48, 64) and (image[:, 20, 20].int() - torch.tensor([200, 30, 60])).abs().max() <= 6


def test_a_program_is_never_started_for_a_picture(tmp_path):
    (tmp_path / "x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(BrokenImage, match="of no known image format"):
        read_image(tmp_path / "x.eps")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.eps").read_bytes())
    with pytest.raises(BrokenImage, match="of no known image format"):
        read_image(tmp_path / "x.png")
    assert not {".eps", ".ps", ".wmf", ".mpg", ".h5"} & set(formats_by_suffix())


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    make_folder(tmp_path / "elsewhere", {"more": 2})
    folder = make_folder(tmp_path / "data", {"a": 1, "b": 1})
    (folder / "a" / "link").symlink_to(tmp_path / "elsewhere" / "more")
    (folder / "b" / "circle").symlink_to(folder / "b")
    assert open_images(str(folder), allow_outside=True).paths == [
        "a/00.png",
        "a/link/00.png",
        "a/link/01.png",
        "b/00.png",
    ]


def test_parts_by_half_are_refused_with_the_folder_that_is_in_the_way(tmp_path):
    def refused(name: str, *folders: str) -> str:
        make_folder(tmp_path / name, dict.fromkeys(folders, 2))
        with pytest.raises(UsageError) as error:
            open_images(str(tmp_path / name))
        return str(error.value)

    assert "holds test/, val/ but no train/ with one sub-folder a class; add it" in refused("a", "val/a", "test/a")
    assert "val/ and valid/ are the same part" in refused("b", "train/a", "train/b", "val/a", "valid/a")
    # A class called train, whose images lie in folders of their own, beside another class.
    said = refused("c", "train/steam", "train/diesel", "ship")
    assert "ship/ stands beside train/ and holds images: move it away, or into train/ if it is a class" in said


def test_what_cannot_be_a_part_is_left_aside_and_named(tmp_path):
    folders = ("train/cat", "train/dog", "val/cat", "val/dog", "test", "backup", "annotations", ".cache")
    folder = make_folder(tmp_path / "kaggle", dict.fromkeys(folders, 2))
    for image in (folder / "annotations").iterdir():
        image.rename(image.with_suffix(".xml"))
    for name in ("sample_submission.csv", "train/cover.png"):
        shutil.copy(folder / "test" / "00.png", folder / name)
    source = open_images(str(folder))
    assert source.paths == [
        f"{part}/{name}/0{n}.png" for part in ("train", "val") for name in ("cat", "dog") for n in (0, 1)
    ]
    assert source.left == "1 .csv, 4 folder(s) (.cache, annotations, backup, ...)"
    assert source.notes == (
        "1 image(s) beside the class folders of train/ have no class: left aside",
        "test/ holds no folder of a class to train on, so its images are unlabelled and left aside; after the training: "
        f"finetune predict RUN {folder / 'test'}",
        "backup/ is no part, and its images are left aside",
    )
    # Strays may be more than classes, and still no class.
    for number in range(2):
        shutil.copy(folder / "train" / "cat" / "00.png", folder / "train" / f"stray{number}.png")
    assert open_images(str(folder)).paths == source.paths
    shutil.copy(folder / "train" / "cat" / "00.png", folder / "train" / "stray2.png")
    with pytest.raises(UsageError, match=r"train/ holds 4 image\(s\) beside its class folders, as many as in them"):
        open_images(str(folder))
    for number in range(3):
        (folder / "train" / f"stray{number}.png").unlink()
    # Unlabelled in a folder of a name that is no class, as some archives unpack.
    (folder / "test").rename(folder / "inner")
    (folder / "test").mkdir()
    (folder / "inner").rename(folder / "test" / "test")
    assert open_images(str(folder)).notes == source.notes
    # A run of before goes on as it was begun: with such a folder there was none.
    with pytest.raises(UsageError, match="to bring parts along it must hold train/"):
        open_images(str(folder), reading=Reading(by_content=False))


def test_beside_class_folders_lists_and_loose_pictures_are_left_aside_and_named(tmp_path):
    folder = make_folder(tmp_path / "data", {"cat": 2, "dog": 2, "labels": 1, "train": 1})
    (folder / "labels" / "00.png").rename(folder / "labels" / "all.json")
    for name in ("cover.png", "README.md"):
        shutil.copy(folder / "cat" / "00.png", folder / name)
    source = open_images(str(folder))
    assert source.classes == ["cat", "dog", "train"] and source.left == "1 .md, 1 folder(s) (labels)"
    assert source.notes == (
        "1 image(s) in no class folder, like cover.png: left aside", "labels/ holds 1 .json, so it is no class"
    )  # fmt: skip


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz"])
def test_an_archive_says_how_it_is_unpacked_and_that_line_works(tmp_path, suffix, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "photos", {"cat": 1, "dog": 1})
    kind = {"zip": "zip", "tar": "tar", "tar.gz": "gztar"}[suffix]
    shutil.make_archive("my photos", kind, tmp_path, "photos")
    with pytest.raises(UsageError) as error:
        open_images(f"my photos.{suffix}")
    found = re.fullmatch(
        r"--images my photos\.\S+: is an archive: unpack it by (.*) and give --images (.*)", str(error.value)
    )
    words = [sys.executable, *shlex.split(found[1])[1:]]
    subprocess.run(words, check=True)
    assert open_images(*shlex.split(found[2])).classes == ["cat", "dog"]
    with pytest.raises(UsageError, match=r"--texts .*: is an archive: unpack it by"):
        open_texts(f"my photos.{suffix}", "classification")


def test_an_image_named_twice_is_refused_for_it_could_be_trained_on_and_validate(tmp_path):
    rows = "pictures/x/00.png,a\npictures/x/01.png,b\n./pictures/x/00.png,b\n"
    with pytest.raises(UsageError, match=r"list\.csv line 4: names 'pictures/x/00\.png' like line 2"):
        open_images(write_table(tmp_path, "list.csv", "image,label\n" + rows))


def test_a_column_twice_is_refused_and_names_are_stripped(tmp_path):
    with pytest.raises(UsageError, match="has several columns called 'label'"):
        open_images(write_table(tmp_path, "a.csv", "image,label, label\nx.png,a,b\n"))
    table = write_table(tmp_path / "b", "a.csv", "image , label\npictures/x/00.png,a\npictures/x/01.png,b\n")
    assert open_images(table, columns=Columns(label="label")).classes == ["a", "b"]


def test_unusable_folders_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(UsageError, match="no such folder; give 'digits', a folder with one sub-folder"):
        open_images(str(tmp_path / "nowhere"))
    make_folder(tmp_path / "one", {"only": 3})
    with pytest.raises(UsageError, match=r"1 class\(es\) found \(only\), at least 2"):
        open_images(str(tmp_path / "one"))
    (tmp_path / "one" / "empty").mkdir()
    with pytest.raises(UsageError, match="class folder 'empty' holds no images"):
        open_images(str(tmp_path / "one"))
    make_folder(tmp_path / "parts" / "train", {"a": 2, "b": 2})
    make_folder(tmp_path / "parts" / "val", {"a": 2, "c": 2})
    with pytest.raises(UsageError, match=r"class 'c' is not among those trained on \('a', 'b'\)"):
        open_images(str(tmp_path / "parts"))


def write_table(folder, name: str, text: str):
    make_folder(folder / "pictures", {"x": 6})
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_a_csv_names_images_relative_to_itself_and_its_columns_are_found(tmp_path):
    table = write_table(
        tmp_path, "list.csv", "id,Path,Label\n" + "".join(f"{n},pictures/x/0{n}.png,{'ab'[n % 2]}\n" for n in range(6))
    )
    source = open_images(table)
    assert source.classes == ["a", "b"] and source.targets.tolist() == [0, 1] * 3
    assert source.read(5)[0].shape == (3, 9, 12)


@pytest.mark.parametrize(("name", "separator"), [("a.tsv", "\t"), ("a.csv", ";"), ("a.csv", ",")])
def test_other_separators_of_columns_quotes_and_named_columns_are_understood(tmp_path, name, separator):
    rows = [
        ["which", "what", "part"],
        ['"pictures/x/00.png"', '"b, c"', "train"],
        ["pictures/x/01.png", "a", "val"],
        ["pictures/x/02.png", "a", "train"],
    ]
    table = write_table(tmp_path, name, "\ufeff" + "\r\n".join(separator.join(row) for row in rows))
    source = open_images(table, columns=Columns("which", "what", "part"))
    assert source.classes == ["a", "b, c"] and source.parts.tolist() == [0, 1, 0]


def test_jsonl_with_lists_or_a_separator_gives_several_labels(tmp_path):
    lines = [
        {"image": "pictures/x/00.png", "labels": ["cat", "dog"]},
        {"image": "pictures/x/01.png", "labels": []},
        {"image": "pictures/x/02.png", "labels": "dog , bird"},
    ]
    table = write_table(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)))
    source = open_images(table, columns=Columns(separator=","))
    assert source.classes == ["bird", "cat", "dog"]
    assert source.targets.tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 1]]
    with pytest.raises(UsageError, match=r"a\.jsonl line 1: 'labels' is a list; several labels a row need --separator"):
        open_images(table)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "image,label\nx.png,a\ny.png\n", "line 3: has 1 values, the header 2 columns"),
        ("a.csv", "image,label\nx.png,\n", "line 2: column 'label' is empty"),
        ("a.csv", "image,label\n,a\n", "line 2: column 'image' is empty"),
        ("a.csv", 'image,label\n"x.png,a\n', "check the quotes from there on"),
        ("a.csv", "x.png,a\ny.png,b\n", "its columns are 'x.png', 'a': give --image-column"),
        ("a.csv", "image,label\n", "holds no rows"),
        ("a.csv", "image,label\nx.png,a\n", "1 class"),
        ("a.jsonl", '{"image": "x.png", "label": "a"}\n{"image"\n', "line 2: is not JSON"),
        ("a.jsonl", "[1]\n", "line 1: must be a JSON object"),
        ("a.jsonl", '{"image": "x.png"}\n', "no column is called label"),
    ],
)
def test_a_table_that_cannot_be_used_names_the_line(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as error:
        open_images(str(tmp_path / name))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_other_tables_are_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes("image,label\nä.png,a\n".encode("latin-1"))
    with pytest.raises(UsageError, match="is not UTF-8"):
        open_images(str(tmp_path / "a.csv"))
    with pytest.raises(UsageError, match="--split-column when: no such column"):
        open_images(write_table(tmp_path, "b.csv", "image,label\nx.png,a\n"), columns=Columns(split="when"))
    with pytest.raises(UsageError, match="part 'later' is not allowed; give train, val or test"):
        open_images(
            write_table(tmp_path / "c", "b.csv", "image,label,part\nx.png,a,later\n"), columns=Columns(split="part")
        )
    with pytest.raises(UsageError, match=r"--images digits: columns and --separator belong to a \.csv"):
        open_images("digits", columns=Columns(separator=","))
    with pytest.raises(UsageError, match=r"columns and --separator belong to a \.csv"):
        open_images(str(make_folder(tmp_path / "data", {"a": 2, "b": 2})), columns=Columns(separator=","))


def test_a_task_that_does_not_fit_the_labels_is_refused(tmp_path):
    recipe = folder_recipe(make_folder(tmp_path / "data", {"a": 4, "b": 4}), task=MultiLabel())
    with pytest.raises(UsageError, match="has one label a sample, which is no multi-label task"):
        open_data(recipe, find_pretrained(recipe)[0])


# ---- Splits ---------------------------------------------------------------------------------------------------------


def test_a_multi_label_split_gives_every_label_its_share_rare_ones_too():
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(1000, 4, generator=generator) < torch.tensor([0.5, 0.3, 0.1, 0.01])).to(torch.uint8)
    train, validation = stratified_split(targets, 0.2, seed=0)
    assert sorted(torch.cat([train, validation]).tolist()) == list(range(1000))
    share = targets[validation].sum(0) / targets.sum(0)
    assert targets[:, 3].sum() < 20 and (share - 0.2).abs().max() < 0.05
    again, _ = stratified_split(targets, 0.2, seed=0)
    other, _ = stratified_split(targets, 0.2, seed=1)
    assert torch.equal(train, again) and not torch.equal(train, other)


def test_a_multi_label_class_that_went_with_rarer_ones_gets_an_image_back_to_train_on():
    """A always comes with a rarer class, so every A could validate."""
    targets = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1]])
    for seed in range(64):
        train, validation = stratified_split(targets.to(torch.uint8), 0.2, seed)
        assert (targets[train].sum(0) > 0).all() and len(train) + len(validation) == 6


# ---- Preparation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b1", "vit_b_16", "convnext_tiny"])
def test_preparation_is_what_torchvisions_own_transforms_do_to_a_picture(name):
    pixels = np.random.default_rng(0).integers(0, 255, (300, 420, 3), dtype=np.uint8)
    for member in members(name):
        preparation = torchvision_backbone(name, member).preprocessing
        ours = preparation.normalise(preparation.resize(torch.from_numpy(pixels).permute(2, 0, 1))[None])[0]
        difference = (ours - member.transforms()(Image.fromarray(pixels))).abs()
        # torch rounds its resized bytes otherwise than PIL: one pixel in a hundred, by one level of 255, rarely two.
        level = 1 / 255 / min(preparation.std)
        assert difference.max() < 2.1 * level and (difference > 1e-4).float().mean() < 0.02


def test_another_image_size_keeps_the_share_that_is_cropped_away():
    half = find_backbone("mobilenet_v2").preprocessing.at(112)
    assert (half.image_size, half.resize_size) == (112, 116)  # 232 and 224, halved


def test_strips_are_squeezed_instead_of_blown_up():
    preparation = find_backbone("mobilenet_v2").preprocessing
    assert preparation.resize(torch.zeros(3, 2, 1000, dtype=torch.uint8)).shape == (3, 224, 224)


@pytest.mark.parametrize("preset", ["light", "standard"])
def test_augmentation_is_a_function_of_the_key_and_leaves_the_generator_alone(preset):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 90, 70), dtype=np.uint8))

    def changed(*parts):
        with keyed_generator(*parts):
            return augment(image, 32, preset)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    several = [changed("augment", 0, epoch, 5) for epoch in range(8)]
    assert torch.equal(before, torch.get_rng_state())
    assert all(one.shape == (3, 32, 32) and one.dtype == torch.uint8 for one in several)
    assert len({one.numpy().tobytes() for one in several}) == 8
    assert torch.equal(changed("augment", 0, 3, 5), several[3])


def test_mixed_images_and_targets_are_mixed_alike():
    images, targets = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8), torch.arange(4)
    for alphas in ({"mixup": 0.4, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}):
        with keyed_generator("test"):
            mixed, shares = mix(images, targets, 4, **alphas)
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        # A picture of the number n with target n: whatever share of pixels is another one, so is the target.
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), shares @ torch.arange(4.0), rtol=0, atol=1e-5)
        assert not torch.equal(shares, torch.eye(4))


def test_mixing_depends_on_seed_epoch_and_batch_only(tmp_path):
    recipe = folder_recipe(make_folder(tmp_path / "data", {"a": 8, "b": 8}), mixup=0.3, cutmix=0.5)
    pipeline = open_data(recipe, find_pretrained(recipe)[0]).pipeline

    def batch(indices, epoch):
        return pipeline.fetch(Request(indices, augment_epoch=epoch)).inputs

    assert torch.equal(batch([1, 2, 9], 0), batch([1, 2, 9], 0))
    assert not torch.equal(batch([1, 2, 9], 0), batch([1, 2, 9], 1))
    assert pipeline.fetch(Request([1, 2])).targets.dim() == 1  # validation is never mixed


# ---- Broken and changed files --------------------------------------------------------------------------------------


def test_broken_images_of_every_part_stop_the_run_at_the_start_and_are_all_named(tmp_path):
    folder = make_folder(tmp_path / "data", {"a": 20, "b": 20})
    for name in ("a/03.png", "b/11.png", "b/12.png"):
        (folder / name).write_bytes(b"broken")
    with pytest.raises(RunError, match=r"3 broken image\(s\).*--skip-broken") as error:
        train_run(tmp_path / "run", folder_recipe(folder))
    assert all(name in str(error.value) for name in ("03.png", "11.png", "12.png"))
    assert not (tmp_path / "run").exists()


def test_broken_images_are_left_out_when_asked_and_a_resume_leaves_out_the_same(tmp_path):
    folder = make_folder(tmp_path / "data", {"a": 20, "b": 20})
    (folder / "b/11.png").write_bytes(b"")
    recipe = folder_recipe(folder, epochs=2)
    run = train_run(tmp_path / "run", recipe, skip_broken=True)
    data = read(run)["data"]
    assert data["skipped"] == ["b/11.png"]
    assert data["train_samples"] + data["validation_samples"] == 39
    assert "finished" in resume_run(run)[0]
    resume_run(run, epochs=3, lr=1e-3)
    assert metrics_lines(run)[-1]["epoch"] == 3


def test_a_class_of_broken_images_only_is_an_error_even_if_they_may_be_left_out(tmp_path):
    folder = make_folder(tmp_path / "data", {"a": 4, "b": 4, "c": 2})
    for name in ("c/00.png", "c/01.png"):
        (folder / name).write_bytes(b"")
    with pytest.raises(UsageError, match="class 'c' has no image to train on"):
        train_run(tmp_path / "run", folder_recipe(folder), skip_broken=True)


def test_a_row_that_names_a_missing_file_is_a_broken_image(tmp_path):
    rows = "".join(f"pictures/x/0{n}.png,{'ab'[n % 2]}\n" for n in range(6))
    table = write_table(tmp_path, "list.csv", "image,label\n" + rows + "pictures/gone.png,a\n")
    with pytest.raises(RunError, match=r"1 broken image.*(.|\n)*gone\.png does not exist"):
        train_run(tmp_path / "run", folder_recipe(table))


def test_a_broken_image_met_by_a_worker_is_one_line(tmp_path):
    folder = make_folder(tmp_path / "data", {"a": 4, "b": 4})
    (folder / "b" / "00.png").write_bytes(b"broken")
    recipe = folder_recipe(folder)
    data = open_data(recipe, find_pretrained(recipe)[0])
    loader = Loader(data.pipeline, 1, "auto", False, Contents(data.source))
    with pytest.raises(RunError, match=r"image .*00\.png cannot be decoded") as error:
        list(loader.batches([Request(list(range(8)))]))
    loader.close()
    assert "\n" not in str(error.value)


def test_an_image_that_changes_under_a_run_is_named_though_its_size_is_the_same(tmp_path):
    folder = make_folder(tmp_path / "data", {"a": 8, "b": 8})
    run = train_run(tmp_path / "run", folder_recipe(folder, epochs=1))
    path = folder / "a" / "02.png"
    content = path.read_bytes()
    Image.new("RGB", (12, 9), (1, 2, 3)).save(path)
    path.write_bytes(path.read_bytes().ljust(len(content), b"\0")[: len(content)])
    assert os.path.getsize(path) == len(content)
    with pytest.raises(RunError, match=r"image a/02\.png is not what it was when the run first read it"):
        resume_run(run, epochs=2, lr=1e-3)


def test_a_damaged_record_of_contents_only_begins_anew(tmp_path):
    folder = make_folder(tmp_path / "data", {"a": 8, "b": 8})
    run = train_run(tmp_path / "run", folder_recipe(folder, epochs=1))
    assert run.contents_file.stat().st_size > 16 * 8
    run.contents_file.write_bytes(b"damaged")
    resume_run(run, epochs=2, lr=1e-3)
    assert read(run)["status"] == "finished"


def test_of_a_large_data_set_files_beyond_the_first_look_are_met_in_the_first_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "CHECKED_FILES", 6)
    monkeypatch.setattr(look, "MEASURED_SAMPLES", 4)
    folder = make_folder(tmp_path / "data", {"a": 30, "b": 30})
    recipe = folder_recipe(folder)
    job, _ = new_setup(Plan(recipe, Numerics(cache=False), Machine("cpu", workers=0)))
    data, contents = job.data, job.loaders.train.contents
    feed = Feed(job.network.module, *job.loaders)
    assert not look.look(job, feed, measure=True, all_files=False, terminal=DyingTerminal(), stop=StopRequest())
    assert (contents.digests != 0).sum() == 6
    unread = [index for index in data.split.train.tolist() if contents.digests[index] == 0]
    (folder / data.source.name(unread[0])).write_bytes(b"broken")
    with pytest.raises(RunError, match=r"image .* cannot be decoded"):
        train_run(tmp_path / "run", recipe, cache=False)
    run = train_run(tmp_path / "other", recipe, skip_broken=True, cache=False)
    assert read(run)["data"]["skipped"] == [data.source.name(unread[0])]


# ---- Whole runs -----------------------------------------------------------------------------------------------------


def test_a_run_on_a_folder_with_everything_random_resumes_exactly(tmp_path):
    recipe = folder_recipe(
        make_folder(tmp_path / "data", {"a": 12, "b": 12, "c": 12}),
        augment="standard", mixup=0.2, cutmix=1.0, epochs=2, accumulate=2, dropout=0.2,
    )  # fmt: skip
    unbroken = train_run(tmp_path / "unbroken", recipe)
    broken = train_with_deaths(tmp_path / "broken", recipe, [3, 8, 11], workers=2)
    assert_equal_runs(broken, unbroken)


def test_several_labels_are_learnt_exported_evaluated_and_predicted(tmp_path, capsys):
    """Red and bright are two labels of their own: a picture may have both, one or none."""
    rows, pictures = ["picture,labels"], tmp_path / "pictures"
    pictures.mkdir()
    for number in range(48):
        red, bright = number % 2, number // 2 % 2
        level = 120 + number if bright else 20 + number // 4
        Image.new("RGB", (16, 16), (255 if red else level, level, level)).save(pictures / f"{number}.png")
        rows.append(f"pictures/{number}.png,{'|'.join(['red'] * red + ['bright'] * bright)}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    recipe = image_head(
        images=str(tmp_path / "list.csv"), backbone="bundled/vgg", weights="default", image_size=0, augment="none",
        head="linear", dropout=0.0, epochs=15, batch_size=8, lr=1e-2, seed=0,
        table=ImageTable(image_column="picture", separator="|"), training=ImageTraining(stop_metric="f1"),
    )  # fmt: skip
    run = train_run(tmp_path / "run", recipe, save_every_steps=0)
    assert read(run)["data"]["classes"] == ["bright", "red"]
    assert read(run, "best.pt")["best_metric"]["value"] > 0.95
    assert main(["evaluate", str(run.path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["accuracy"] > 0.9 and figures["confusion_matrix"] is None and len(figures["classes"]) == 2
    assert main(["export", str(run.path)]) == 0
    capsys.readouterr()
    assert main(["predict", str(run.path / "model.pt"), str(pictures / "3.png"), str(pictures / "0.png")]) == 0
    both, neither = map(json.loads, capsys.readouterr().out.splitlines())
    assert both["labels"] == ["bright", "red"] and neither["labels"] == []
    assert sum(entry["probability"] for entry in both["top"]) > 1  # each on its own
