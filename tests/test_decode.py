"""Large pictures are reduced while they are decoded; small ones, and those of older runs, keep every pixel."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from conftest import small_recipe
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional

import finetune
from finetune.cli import main
from finetune.data.batch import Request
from finetune.data.contents import Contents
from finetune.data.decode import BrokenImage, Decoding, decode, picture_tensor, read_image
from finetune.data.images import ImagePipeline, decoded_for
from finetune.data.loader import Loader
from finetune.data.preprocess import Preprocessing
from finetune.data.source import make_file_source
from finetune.recipe import Images
from finetune.recipe.data_spec import EXACT, SCALED
from finetune.recipe.serialize import from_plain, to_plain

EDGE = 64
SMALL = Decoding(least_edge=EDGE)
PREPARED = Preprocessing(28, 32, True, "bilinear", [0.5] * 3, [0.25] * 3, decode=SCALED)


def picture(width, height, seed=0):
    """Soft shapes and a little grain, as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (3, 6, 8), dtype=torch.uint8, generator=generator)
    soft = functional.resize(coarse, [height, width], antialias=True).float()
    grain = torch.randn(3, height, width, generator=generator) * 4
    return functional.to_pil_image((soft + grain).clamp(0, 255).byte())


def saved(image, kind="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(image, orientation):
    """The same as a camera would store it that was held otherwise."""
    exif = Image.Exif()
    exif[274] = orientation
    return saved(image, exif=exif, quality=92)


def by_pillow(content):
    """Every pixel of a picture in colours, by Pillow alone."""
    with Image.open(io.BytesIO(content)) as image:
        return functional.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize(("width", "height", "reduced"), [
    (600, 400, (4, 100, 150)), (1024, 1030, (16, 65, 64)), (300, 128, (2, 64, 150)), (127, 300, (1, 300, 127)),
])  # fmt: skip
def test_a_jpeg_is_decoded_at_a_part_of_its_size_that_is_still_large_enough(tmp_path, width, height, reduced):
    (tmp_path / "a.jpg").write_bytes(saved(picture(width, height)))
    factor, *size = reduced
    found = read_image(tmp_path / "a.jpg", SMALL)
    assert list(found.shape) == [3, *size] and min(size) >= EDGE
    whole = read_image(tmp_path / "a.jpg").float()
    means = torch.nn.functional.avg_pool2d(whole, factor, ceil_mode=True, count_include_pad=False)
    assert (found - means).abs().mean() < 1.5  # of 255 levels: its frequencies were cut, where we take means


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_other_files_are_reduced_by_whole_factors_before_they_become_tensors(tmp_path, kind):
    path, image = tmp_path / f"a.{kind.lower()}", picture(420, 330)
    path.write_bytes(saved(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    found = read_image(path, SMALL)
    assert found.shape == (3, 66, 84)  # a fifth
    whole = read_image(path).float()
    assert (found - torch.nn.functional.avg_pool2d(whole, 5)).abs().max() < 0.53  # rounded, from fixed point


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("edge", [0, EDGE])
def test_pictures_are_upright_at_any_size(tmp_path, orientation, edge):
    content = turned(picture(300, 400), orientation)
    found, whole = decode(content, tmp_path, Decoding(least_edge=edge)), by_pillow(content)
    if not edge:
        assert torch.equal(found, whole)
        return
    assert found.shape[1:] == tuple(size // 4 for size in whole.shape[1:])
    assert (found - torch.nn.functional.avg_pool2d(whole.float(), 4)).abs().mean() < 1.5


JPEGS = {
    "baseline": {}, "progressive": {"progressive": True}, "no-subsampling": {"subsampling": 0},
    "half": {"subsampling": 1}, "red-green-blue": {"keep_rgb": True}, "restart-markers": {"restart_marker_rows": 1}, "coarse": {"quality": 5},
}  # fmt: skip


@pytest.mark.parametrize("size", [(61, 47), pytest.param((1931, 1301), marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", JPEGS)
def test_every_pixel_of_a_jpeg_is_that_of_pillow(tmp_path, name, size):
    content = saved(picture(*size), **JPEGS[name])
    assert torch.equal(decode(content, tmp_path), by_pillow(content))
    assert torch.equal(decode(content, tmp_path, Decoding(least_edge=1300)), by_pillow(content))  # it is small enough


def test_every_pixel_of_a_large_jpeg_is_that_of_pillow(tmp_path):
    content = saved(picture(1700, 1300), progressive=True)
    assert torch.equal(decode(content, tmp_path), by_pillow(content))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_jpeg_of_other_colours_is_reduced_too(tmp_path, mode):
    content = saved(picture(400, 300).convert(mode))
    assert torch.equal(decode(content, tmp_path), by_pillow(content))
    assert decode(content, tmp_path, SMALL).shape == (3, 75, 100)


def test_of_a_picture_with_a_second_one_behind_it_the_first_is_reduced(tmp_path):
    first, second = picture(400, 300), picture(400, 300, seed=1)
    content = saved(first, "MPO", save_all=True, append_images=[second])
    assert torch.equal(decode(content, tmp_path), by_pillow(content))
    whole = decode(content, tmp_path).float()
    found = decode(content, tmp_path, SMALL)
    assert (found - torch.nn.functional.avg_pool2d(whole, 4)).abs().mean() < 1.5


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1"])
def test_transparency_lies_on_white_whether_reduced_or_not(tmp_path, mode):
    image = picture(400, 300).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((400, 300)))
    image = image.convert(mode)
    (tmp_path / "a.png").write_bytes(saved(image, "PNG"))
    whole, found = read_image(tmp_path / "a.png"), read_image(tmp_path / "a.png", SMALL)
    means = torch.nn.functional.avg_pool2d(whole.float(), 4)
    assert found.shape == means.shape and (found - means).abs().mean() < 1.5


@pytest.mark.parametrize("share", [0.2, 0.6, 0.97])
@pytest.mark.parametrize("edge", [0, EDGE])
def test_a_file_that_was_cut_off_is_broken_at_any_size(tmp_path, share, edge):
    content = saved(picture(600, 400))
    with pytest.raises(BrokenImage, match="truncated"):
        decode(content[: int(len(content) * share)], tmp_path / "a.jpg", Decoding(least_edge=edge))


def test_a_picture_in_memory_is_reduced_like_a_file_and_stays_as_it_is(tmp_path):
    image = picture(420, 330)
    (tmp_path / "a.png").write_bytes(saved(image, "PNG"))
    expected, before = read_image(tmp_path / "a.png", SMALL), np.asarray(image).copy()
    for given in (image, np.asarray(image), functional.pil_to_tensor(image)):
        assert torch.equal(picture_tensor(given, SMALL), expected)
    with Image.open(io.BytesIO(saved(picture(600, 400)))) as lazy:
        picture_tensor(lazy, SMALL)
        assert lazy.size == (600, 400)
    assert np.array_equal(np.asarray(image), before)


def test_preprocessing_keeps_twice_what_it_resizes_to_and_older_ones_keep_all():
    assert PREPARED.decoding.least_edge == 64 and PREPARED.at(56).decoding.least_edge == 128
    old = PREPARED.to_plain()
    assert old.pop("decode") == SCALED and Preprocessing(**old).decoding.least_edge == 0
    assert "decode" not in Preprocessing(**old).to_plain()
    with pytest.raises(ValueError, match="'half' is unknown"):
        dataclasses.replace(PREPARED, decode="half")


def test_a_recipe_without_it_means_every_pixel(tmp_path):
    recipe = small_recipe(data=Images(str(tmp_path)))
    plain = to_plain(recipe)
    assert plain["data"].pop("decode") == SCALED
    assert from_plain(plain).data.decode == EXACT


def files(folder, count=7, size=(300, 220)):
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(saved(picture(*size, seed=number)))
    names = [f"{number}.jpg" for number in range(count)]
    return make_file_source(folder, names, [str(number % 2) for number in range(count)], None, None, "these")


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_however_many_processes_share_their_files(tmp_path, monkeypatch, workers):
    source = decoded_for(files(tmp_path), PREPARED)
    (tmp_path / "3.jpg").write_bytes(b"nothing")
    pipeline = ImagePipeline(source, PREPARED, "light", 0.0, 0.0, 0)
    requests = [Request([0, 2, 3, 5, 6], epoch, tolerant=True) for epoch in (None, 0)] + [Request([1, 4])]
    monkeypatch.setattr("finetune.data.loader.PART_BYTES", 256 << 10)  # two of these files
    loader = Loader(pipeline, workers, "auto", False, Contents(source))
    alone = list(Loader(pipeline, 0, "auto", False, Contents(source)).batches(requests))
    found = list(loader.batches(requests))
    loader.close()
    assert len(found) == 3
    for one, other in zip(found, alone, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(one[:4], other[:4], strict=True))
        assert [tuple(pair) for pair in one.broken] == other.broken
    assert [index for index, _ in found[0].broken] == [3]


def test_blended_samples_stay_in_one_hand(tmp_path, monkeypatch):
    source = decoded_for(files(tmp_path), PREPARED)
    monkeypatch.setattr("finetune.data.loader.PART_BYTES", 1)
    pipeline = ImagePipeline(source, PREPARED, "none", 1.0, 0.0, 0)
    loader, request = Loader(pipeline, 2, "auto", False, Contents(source)), Request([0, 1, 2, 3], 0)
    (found,), (alone,) = (
        loader.batches([request]),
        Loader(pipeline, 0, "auto", False, Contents(source)).batches([request]),
    )
    loader.close()
    assert torch.equal(found.inputs, alone.inputs) and torch.equal(found.targets, alone.targets)


@pytest.mark.parametrize(("count", "megabytes", "workers"), [(500, 0, 2), (499, 0, 0), (20, 3.5, 2), (15, 3.5, 0)])
def test_processes_start_where_files_take_long_enough(tmp_path, monkeypatch, count, megabytes, workers):
    monkeypatch.setattr("finetune.data.loader.usable_cores", lambda: 2)
    for number in range(count):
        with (tmp_path / f"{number}.jpg").open("wb") as stream:
            stream.truncate(int(megabytes * (1 << 20)) + 1)
    names = [f"{number}.jpg" for number in range(count)]
    source = make_file_source(tmp_path, names, [str(number % 2) for number in range(count)], None, None, "these")
    assert (
        Loader(ImagePipeline(source, PREPARED, "none", 0.0, 0.0, 0), None, "auto", False, Contents(source)).workers
        == workers
    )


def test_an_export_and_its_program_decode_as_the_run_did(tmp_path, capsys):
    folder, found = tmp_path / "photos", {}
    for number in range(8):
        place = folder / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").write_bytes(saved(picture(1100, 900, seed=number)))
    options = ["--images", str(folder), "--image-size", "96", "--epochs", "1", "--workers", "0", "--track", ""]
    for way in (SCALED, EXACT):
        run = tmp_path / way
        assert main(["photo_head", *options, "--decode", way, "--run", str(run)]) == 0
        assert json.loads((run / "recipe.json").read_text())["config"]["data"]["decode"] == way
        assert main(["export", str(run)]) == 0
        described = json.loads((run / "model.json").read_text())["preprocessing"]
        assert described.get("decode", EXACT) == way
        program = (run / "model.md").read_text()
        model, file = finetune.load(run / "model.pt"), folder / "0" / "0.jpg"
        assert model.preprocessing.decoding.least_edge == (220 if way == SCALED else 0)
        pixels = model.preprocessing.resize(read_image(file, model.preprocessing.decoding))
        with torch.inference_mode():
            wanted = model.module(model.preprocessing.normalise(pixels[None])).softmax(1).max().item()
        found[way] = model.predict(file).probability
        assert found[way] == pytest.approx(wanted, abs=1e-6)
        capsys.readouterr()
        assert main(["predict", str(run), str(file)]) == 0
        assert json.loads(capsys.readouterr().out)["probability"] == pytest.approx(wanted, abs=2e-6)
        assert ("image.draft(None, (" in program) == (way == SCALED)
    assert abs(found[SCALED] - found[EXACT]) > 1e-5  # they do see other pixels
    assert main(["vgg_head", "--images", "digits", "--decode", "exact"]) == 2
    assert "--decode exact: has no effect on digits" in capsys.readouterr().err
