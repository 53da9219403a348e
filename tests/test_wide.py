"""Pictures of more than 8 bits a value keep what they hold: a data set's own range becomes black to white."""

import json
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from conftest import assert_equal_runs, small_recipe, train_run, train_with_deaths
from PIL import Image

from finetune import Finish, Images, UsageError
from finetune.base.files import read_json
from finetune.cli import main
from finetune.data.decode import BrokenImage, Decoding, read_image
from finetune.data.preprocess import Preprocessing
from finetune.data.wide import survey
from finetune.recipe.execution import Machine, Numerics
from finetune.runs.start import Plan, new_setup

LOW, HIGH = 51_241, 52_181
FORMATS = ("PNG", "TIFF")


def pattern(seed=0, low=LOW, high=HIGH, shape=(12, 8)):
    return np.random.default_rng(seed).integers(low, high, shape, endpoint=True).astype(np.uint16)


def write_colours(path, pixels):
    """A PNG of 16 bits a colour, which Pillow cannot write."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


def thermal(folder, count=12, low=LOW, high=HIGH, name="png"):
    """Two classes that differ in a few hundred of 65,536 levels: stripes along and across."""
    for label, axis in (("along", 0), ("across", 1)):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            stripes = np.indices((24, 24))[axis] // 3 % 2 * (high - low) * 0.8
            noise = np.random.default_rng(number).uniform(0, (high - low) * 0.2, (24, 24))
            pixels = np.round(low + stripes + noise).astype(np.uint16)
            Image.fromarray(pixels).save(folder / label / f"{number:02}.{name}")
    return folder


# ---- One picture -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits_keeps_every_level_of_its_range(tmp_path, suffix):
    values = pattern()
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    found = read_image(tmp_path / f"x.{suffix}", Decoding((LOW, HIGH)))
    assert found.dtype == torch.float32 and found.shape == (3, 12, 8)
    wanted = (values.astype(np.float64) - LOW) / (HIGH - LOW) * 255
    torch.testing.assert_close(found[1].double(), torch.from_numpy(wanted), rtol=0, atol=1e-4)
    assert len(found[0].unique()) == len(np.unique(values)) > 80
    assert len(read_image(tmp_path / f"x.{suffix}")[0].unique()) <= 5  # of 8 bits


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_colours_of_16_bits_keep_theirs(tmp_path, suffix):
    values = np.stack([pattern(seed) for seed in range(3)], axis=2)
    path = tmp_path / f"x.{suffix}"
    write_colours(path, values) if suffix == "png" else tifffile.imwrite(path, values, photometric="rgb")
    found = read_image(path, Decoding((LOW, HIGH)))
    wanted = (values.astype(np.float64).transpose(2, 0, 1) - LOW) / (HIGH - LOW) * 255
    torch.testing.assert_close(found.double(), torch.from_numpy(wanted), rtol=0, atol=1e-4)


def test_planes_of_a_tiff_and_transparency_of_a_png_are_understood(tmp_path):
    values = np.stack([pattern(seed) for seed in range(3)], axis=2)
    tifffile.imwrite(tmp_path / "x.tif", values.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    whole = read_image(write_colours(tmp_path / "y.png", values), Decoding((LOW, HIGH)))
    assert torch.equal(read_image(tmp_path / "x.tif", Decoding((LOW, HIGH))), whole)
    alpha = np.zeros((12, 8, 1), dtype=np.uint16)
    alpha[:6] = 65_535
    mixed = read_image(
        write_colours(tmp_path / "z.png", np.concatenate([values, alpha], axis=2)), Decoding((LOW, HIGH))
    )
    assert torch.equal(mixed[:, :6], whole[:, :6]) and (mixed[:, 6:] == 255).all()
    grey = read_image(
        write_colours(tmp_path / "g.png", np.concatenate([values[:, :, :1], alpha], axis=2)), Decoding((LOW, HIGH))
    )
    assert torch.equal(grey[0, :6], whole[0, :6]) and torch.equal(grey[0], grey[2]) and (grey[:, 6:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_whatever_they_hold(tmp_path, orientation):
    grey = pattern()
    colours = np.stack([grey] * 3, axis=2)
    eight = Image.fromarray(((grey - LOW) // 4).astype(np.uint8))
    tags = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "colours.tif", colours, photometric="rgb", extratags=tags)
    tifffile.imwrite(tmp_path / "grey.tif", grey, extratags=tags)
    tifffile.imwrite(tmp_path / "eight.tif", np.asarray(eight), extratags=tags)
    wanted = read_image(tmp_path / "eight.tif")
    for name in ("colours", "grey"):
        found = read_image(tmp_path / f"{name}.tif", Decoding((LOW, HIGH)))
        assert found.shape == wanted.shape
        levels = (found[0].double() / 255 * (HIGH - LOW)).round() // 4
        assert torch.equal(levels, wanted[0].double()), name


def test_floats_of_a_tiff_are_scaled_and_what_is_no_number_is_black(tmp_path):
    values = np.linspace(-3.0, 5.0, 96, dtype=np.float32).reshape(12, 8)
    values[0, 0] = np.nan
    tifffile.imwrite(tmp_path / "x.tif", values)
    found = read_image(tmp_path / "x.tif", Decoding((-3.0, 5.0)))
    assert len(found[0].unique()) >= 95 and found.min() == 0 and found.max() == 255 and found.isfinite().all()


@pytest.mark.parametrize("compression", ["lzw", "zlib", "packbits", "deflate"])
def test_compressed_colours_of_a_tiff_are_read(tmp_path, compression):
    values = np.stack([pattern(seed) for seed in range(3)], axis=2)
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="rgb", compression=compression)
    assert torch.equal(
        read_image(tmp_path / "x.tif", Decoding((LOW, HIGH))),
        read_image(write_colours(tmp_path / "y.png", values), Decoding((LOW, HIGH))),
    )


def test_a_picture_that_is_cut_off_is_broken(tmp_path):
    path = write_colours(tmp_path / "x.png", np.stack([pattern()] * 3, axis=2))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BrokenImage, match="cannot be decoded"):
        read_image(path, Decoding((LOW, HIGH)))


# ---- A data set --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(LOW, HIGH), (12, 4_095), (30_000, 30_040)])
def test_the_range_that_is_used_is_found_and_a_hot_pixel_does_not_decide(tmp_path, low, high):
    folder = thermal(tmp_path / "data", low=low, high=high)
    hot = np.asarray(Image.open(folder / "along" / "00.png")).copy()
    hot[3, 3], hot[4, 4] = 65_535, 0
    Image.fromarray(hot).save(folder / "along" / "00.png")
    found = survey(folder, [f"{label}/{n:02}.png" for label in ("along", "across") for n in range(12)], FORMATS)
    assert (found.wide, found.looked_at, found.is_full) == (24, 24, False)
    assert low <= found.used[0] <= low + 0.02 * (high - low) and high - 0.02 * (high - low) <= found.used[1] <= high


def test_whole_numbers_beyond_16_bits_and_a_few_bright_spots_have_a_range_too(tmp_path):
    (tmp_path / "a").mkdir()
    values = np.random.default_rng(0).integers(300_000, 800_000, (24, 24)).astype(np.int32)
    tifffile.imwrite(tmp_path / "a" / "x.tif", values)
    found = survey(tmp_path, ["a/x.tif"], FORMATS)
    assert not found.is_full and 300_000 <= found.used[0] < found.used[1] <= 800_000
    spots = np.zeros((100, 100), dtype=np.uint16)
    spots[3, 5], spots[9, 9] = 150, 190
    Image.fromarray(spots).save(tmp_path / "a" / "y.png")
    assert survey(tmp_path, ["a/y.png"], FORMATS).used == (0, 190)


def setup_of(folder, pixel_range="auto"):
    recipe = small_recipe(data=Images(str(folder), pixel_range=pixel_range))
    return new_setup(Plan(recipe, Numerics(), Machine(device="cpu")))[0]


def test_files_of_a_full_range_and_of_8_bits_stay_as_they_are_in_every_bit(tmp_path):
    folder = thermal(tmp_path / "full", low=0, high=65_535)
    setup = setup_of(folder)
    assert setup.backbone.preprocessing.pixel_range == [] and setup.data.source.read(0)[0].dtype == torch.uint8
    assert "8 bits are kept of them" in setup.data.source.notes[0]
    assert "pixel_range" not in setup.backbone.preprocessing.to_plain()
    eight = thermal(tmp_path / "eight", low=0, high=255)
    for path in eight.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint8)).save(path)
    assert setup_of(eight).data.source.notes == ()


def test_a_range_is_given_or_found_and_said(tmp_path):
    folder = thermal(tmp_path / "data")
    found = setup_of(folder)
    low, high = found.backbone.preprocessing.pixel_range
    assert abs(low - LOW) < 10 and abs(high - HIGH) < 10
    assert f"{low:,g} becomes black and {high:,g} white (--pixel-range LOW,HIGH or full" in found.data.source.notes[0]
    assert setup_of(folder, "50000,53000").backbone.preprocessing.pixel_range == [50_000, 53_000]
    assert setup_of(folder, "full").backbone.preprocessing.pixel_range == []
    for path in folder.rglob("*.png"):
        Image.fromarray(np.zeros((9, 9), dtype=np.uint8)).save(path)
    with pytest.raises(UsageError, match=r"--pixel-range 0,9: none of the .* images looked at has more than 8 bits"):
        setup_of(folder, "0,9")
    with pytest.raises(UsageError, match="--pixel-range 9,0: not allowed; give auto, full, or LOW,HIGH"):
        Images(str(folder), pixel_range="9,0"), small_recipe(data=Images(str(folder), pixel_range="9,0"))
    with pytest.raises(UsageError, match="is for image files only"):
        setup_of("digits", "0,9")


def test_pages_and_frames_beyond_the_first_are_said(tmp_path):
    folder = thermal(tmp_path / "data", count=4)
    pages = [Image.new("L", (9, 9), shade) for shade in (10, 200)]
    pages[0].save(folder / "along" / "stack.tif", save_all=True, append_images=pages[1:])
    assert (read_image(folder / "along" / "stack.tif") == 10).all()
    for _ in range(3):  # whichever of the samples validates
        (folder / "along" / "stack.tif").rename(folder / "along" / "stack2.tif")
        notes = setup_of(folder).data.source.notes
        (folder / "along" / "stack2.tif").rename(folder / "along" / "stack.tif")
    pages[0].save(folder / "across" / "moves.gif", save_all=True, append_images=pages[1:])
    notes = setup_of(folder).data.source.notes
    assert any("hold several pictures, like" in note and "the first of each is taken" in note for note in notes)


@pytest.mark.parametrize("limits", [[1.0], [2.0, 1.0], [0.0, float("inf")], ["0", "9"]])
def test_a_range_that_is_none_is_refused_wherever_it_comes_from(limits):
    with pytest.raises(ValueError, match="pixel_range"):
        Preprocessing(8, 8, False, "bilinear", [0.5] * 3, [0.5] * 3, limits)


def test_a_run_on_thermal_pictures_learns_resumes_exactly_and_predicts_as_it_validated(tmp_path, capsys):
    folder = thermal(tmp_path / "data")
    finish = Finish(calibrate=False)  # what is exported gives what the validation gave
    recipe = small_recipe(data=Images(str(folder), augment="light", validation_fraction=0.25), epochs=8, finish=finish)
    whole = train_run(tmp_path / "whole", recipe)
    broken = train_with_deaths(tmp_path / "broken", recipe, deaths=[3, 7])
    assert_equal_runs(broken, whole)
    assert json.loads(whole.metrics_file.read_text().splitlines()[-1])["val/accuracy"] == 1.0
    assert main(["export", str(whole.path)]) == 0
    capsys.readouterr()
    assert main(["predict", str(whole.path / "model.pt"), str(folder)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 24
    validation = read_json(whole.validation_file, "validation")
    shown = {row["file"]: row["probability"] for row in rows}
    for sample in validation["worst"]:
        assert shown[str(folder / sample["name"])] == pytest.approx(sample["probabilities"][0][1], abs=1e-5)


def test_what_a_folder_holds_beside_images_is_said_when_it_is_predicted(tmp_path, capsys):
    folder = thermal(tmp_path / "data", count=4)
    run = train_run(tmp_path / "run", small_recipe(data=Images(str(folder)), epochs=1))
    (folder / "along" / "IMG_1.cr2").write_text("no picture that Pillow reads")
    (folder / "along" / "clip.mov").write_text("")
    assert main(["export", str(run.path)]) == 0
    capsys.readouterr()
    assert main(["predict", str(run.path / "model.pt"), str(folder / "along")]) == 0
    assert "along: left aside: 1 .cr2, 1 .mov" in capsys.readouterr().err
