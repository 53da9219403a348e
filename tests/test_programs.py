"""What `finetune export` prints is a whole program: each is run, word for word, where this kit is not installed."""

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from elsewhere import make_environment, run_programs
from encoders import ANIMALS, FILLERS, TOOLS, make_encoder, sentences, write_csv
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf

import finetune
from finetune import ImageTraining, TextTable, image_head, text_head
from finetune.data.decode import read_image
from finetune.export.hf_folder import export_folder
from finetune.export.load import prepared, read_description
from finetune.export.receiver import receive
from finetune.export.weights import ExportReport, export

from conftest import train_run  # isort: skip

TEXT = "a text"  # as the programs have it
STEM = """it's "mine" """  # of files: people call them anything
FEW = ImageTraining(finish="none", train_samples=60, validation_fraction=0.05)


def save_photo(folder: Path) -> None:
    """photo.jpg, as a telephone writes it: lying on its side, wider than high."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 16, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((320, 180), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[274] = 6
    photo.save(folder / "photo.jpg", exif=exif, quality=90)


def vit_folder(folder: Path) -> str:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return str(folder)


def timm_folder(folder: Path) -> str:
    torch.manual_seed(0)
    save_for_hf(timm.create_model("test_vit", num_classes=7).eval(), folder, safe_serialization=True)
    return str(folder)


def labels_csv(path: Path) -> str:
    """Texts with an animal, a tool, both or neither."""
    generator, rows = np.random.default_rng(0), ["text,labels"]
    for number in range(120):
        labels = [["animal"], ["tool"], ["animal", "tool"]][number % 3]
        words = list(generator.choice(FILLERS, 3))
        words += [generator.choice(ANIMALS)] * ("animal" in labels) + [generator.choice(TOOLS)] * ("tool" in labels)
        rows.append(f"{' '.join(words)},{'|'.join(labels)}")
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def numbers_csv(path: Path) -> str:
    """Texts with a price that the word in them decides."""
    generator, rows = np.random.default_rng(1), ["text,price"]
    for number in range(120):
        word, price = (generator.choice(ANIMALS), 900) if number % 2 else (generator.choice(TOOLS), 100)
        rows.append(f"{' '.join(generator.choice(FILLERS, 3))} {word},{price + generator.normal() * 20:.2f}")
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def recipes(place: Path) -> dict[str, finetune.Recipe]:
    """By what the program is to be tried for."""
    bert, texts = make_encoder(place / "bert"), write_csv(place / "texts.csv", sentences(100))
    digits = {"images": "digits", "epochs": 1}
    some = {"epochs": 1, "lr": 1e-2}
    return {
        "vgg": image_head(backbone="bundled/vgg", **digits, training=ImageTraining(validation_fraction=0.05)),
        "resnet": image_head(backbone="bundled/resnet", **digits, training=FEW),
        "mobilenet": image_head(backbone="bundled/mobilenet", image_size=64, **digits, training=FEW),
        "vit": image_head(backbone=vit_folder(place / "vit"), **digits, training=FEW),
        "timm": image_head(backbone=timm_folder(place / "timm"), **digits, training=FEW),
        "mlp": image_head(backbone="bundled/vgg", head="mlp", **digits, training=FEW),
        "append": image_head(backbone="bundled/vgg", head="append", **digits, training=FEW),
        "unit rows": image_head(
            backbone="bundled/resnet", **digits, training=dataclasses.replace(FEW, unit_rows=True)
        ),
        "bert stock": text_head(texts=str(texts), backbone=str(bert), pooling="stock", **some),
        "bert mean": text_head(texts=str(texts), backbone=str(bert), pooling="mean", **some),
        "bert cls, mlp": text_head(texts=str(texts), backbone=str(bert), pooling="cls", head="mlp", **some),
        "multi-label": text_head(
            texts=labels_csv(place / "labels.csv"), backbone=str(bert), pooling="mean",
            table=TextTable(separator="|", label_column="labels"), **some,
        ),
        "regression": text_head(
            texts=numbers_csv(place / "prices.csv"), backbone=str(bert), pooling="mean", task="regression",
            table=TextTable(label_column="price"), **some,
        ),
    }  # fmt: skip


# Of each run what is written: files by their ends, folders for transformers. The others take long, or are alike.
USUAL = {
    "vgg": [".pt"], "resnet": [".pt"], "mobilenet": [".pt"], "vit": [".pt"], "timm": [".pt"],
    "bert stock": [".pt"], "bert mean": [".pt", "hf"], "multi-label": [".pt"], "regression": [".pt"],
}  # fmt: skip
MORE = {
    "vgg": [".pt", ".onnx", ".pt2"], "mobilenet": [".pt", ".onnx"], "timm": [".pt", ".onnx", ".pt2"], "mlp": [".pt"],
    "append": [".pt"], "unit rows": [".pt"],
    "bert stock": [".pt", "hf"], "bert mean": [".pt", ".onnx", ".pt2"], "bert cls, mlp": [".pt"],
    "multi-label": [".pt", ".onnx", "hf"], "regression": [".pt", ".onnx", "hf"],
}  # fmt: skip


def tried(place: Path, cases: dict[str, list[str]]) -> dict:
    """By name and kind: what the program printed elsewhere, the report of the export, and what the kit predicts."""
    python, found, programs = make_environment(place / "environment"), {}, []
    for name, recipe in recipes(place).items():
        if name not in cases:
            continue
        run = train_run(place / "runs" / name.replace(" ", "-"), recipe, save_every_steps=0)
        which = "final" if (run.checkpoints / "final.pt").exists() else "best"
        for kind in cases[name]:
            folder = place / "out" / f"{len(programs)}"
            folder.mkdir(parents=True)
            save_photo(folder)
            with contextlib.chdir(folder):
                if kind == "hf":
                    report = export_folder(run, which, Path("hf"), half=False)
                else:
                    report = export(run, which, Path(f"{STEM}{kind}"))
                program, said = report.program, report.text()
                assert said.endswith(f"\n{program}") and 'Path("' in program
                assert f"run on {report.seen.samples} samples of those that validate" in said
                sample = TEXT if TEXT in program.splitlines()[-1] else "photo.jpg"
                ours = finetune.load(f"{STEM}.pt").predict(sample) if kind == ".pt" else found[name, ".pt"][2]
            programs.append((folder, program))
            found[name, kind] = [None, report, ours]
    for key, printed in zip(found, run_programs(python, programs, place), strict=True):
        found[key][0] = printed
    return found


def check(printed, report, ours) -> None:
    # Pillow resizes bytes, torchvision tensors: a level here or there.
    by_pillow = isinstance(report, ExportReport) and report.file.suffix in (".onnx", ".pt2")
    tolerance = 2e-2 if by_pillow and not report.trained.backbone.reads_texts else 2e-5
    if ours.value is not None:
        assert printed == pytest.approx(ours.value, rel=1e-5)
    elif ours.labels is not None:
        assert [label for label, _ in printed] == ours.labels
        chances = dict(ours.top)
        assert all(chances[label] == pytest.approx(chance, abs=tolerance) for label, chance in printed)
    else:
        assert printed[0] == ours.label and printed[1] == pytest.approx(ours.probability, abs=tolerance)
    assert report.seen.validate and report.seen.difference <= max(tolerance, 1e-4)
    assert report.seen.alike in (None, report.seen.samples)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return tried(tmp_path_factory.mktemp("programs"), USUAL)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return tried(tmp_path_factory.mktemp("programs"), MORE)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in USUAL.items() for kind in kinds])
def test_the_printed_program_gives_what_the_kit_predicts_where_the_kit_is_not_installed(usual, name, kind):
    check(*usual[name, kind])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in MORE.items() for kind in kinds])
def test_so_do_the_programs_of_other_heads_and_formats(more, name, kind):
    check(*more[name, kind])


def test_a_program_that_is_not_what_the_run_is_says_what_to_do(trained, tmp_path):
    report = export(trained, "best", tmp_path / "a\nb.pt")
    assert not report.seen.error and "finetune.load" not in report.seen.text()  # a name of two lines ends no comment
    assert receive(report.program, report.trained, report.description).difference == report.seen.difference
    swapped = report.program.replace("return image.float()", "return (0 * image.float())")
    assert swapped != report.program
    seen = receive(swapped, report.trained, report.description)
    assert seen.alike < seen.samples and "more than rounding and resizing explain, so please report it" in seen.text()
    nothing = receive("def predict(path):\n    return '3', float('nan')", report.trained, report.description)
    assert "more than rounding" in nothing.text()


@pytest.mark.slow
def test_sentence_transformers_loads_the_folder_as_an_encoder_to_which_the_head_beside_it_belongs(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install '.[test-all]'")
    recipe = text_head(texts="messages", backbone="bundled/bert", epochs=1)
    run = train_run(tmp_path / "run", recipe, save_every_steps=0)
    report = export_folder(run, "final", tmp_path / "hf", half=False)
    export(run, "final", tmp_path / "model.pt")
    texts = ["where is my parcel", "I want my money back for what I sent back in June, please"]
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path / "hf"), device="cpu")
    features = torch.from_numpy(encoder.encode(texts))
    head = load_file(tmp_path / "hf" / "head.safetensors")
    probabilities = (features @ head["weight"].T + head["bias"]).softmax(1)
    ours = finetune.load(tmp_path / "model.pt").predict(texts)
    for row, one in zip(probabilities, ours, strict=True):
        assert report.trained.state.data.classes[int(row.argmax())] == one.label
        assert float(row.max()) == pytest.approx(one.probability, abs=1e-5)


def save_wide(folder: Path, shape: tuple[int, ...], suffix: str) -> None:
    """Pictures of 16 bits a value, of which few are used; dark ones and bright ones."""
    import imagecodecs
    import tifffile

    generator = np.random.default_rng(0)
    for number in range(24):
        low = 3000 if number % 2 else 5000
        pixels = generator.integers(low, low + 1500, shape, dtype=np.uint16)
        if shape[2:] in ((2,), (4,)):
            pixels[:, :, -1] = 65535 - 600 * number
        place = folder / ("dark" if number % 2 else "bright")
        place.mkdir(parents=True, exist_ok=True)
        if suffix == ".png":
            (place / f"{number}.png").write_bytes(imagecodecs.png_encode(pixels))
        else:
            tifffile.imwrite(place / f"{number}.tif", pixels, photometric="rgb" if len(shape) == 3 else "minisblack")


@pytest.mark.parametrize(
    ("shape", "suffix"),
    [
        ((160, 90), ".png"),
        ((40, 64, 3), ".tif"),
        pytest.param((160, 90, 4), ".png", marks=pytest.mark.slow),
        pytest.param((40, 64, 2), ".png", marks=pytest.mark.slow),
    ],
)
def test_pictures_of_16_bits_are_read_by_the_program_as_by_the_kit(shape, suffix, tmp_path):
    save_wide(tmp_path / "wide", shape, suffix)
    recipe = image_head(
        images=str(tmp_path / "wide"), backbone="bundled/vgg", epochs=1, training=ImageTraining(finish="none")
    )
    run = train_run(tmp_path / "run", recipe, save_every_steps=0)
    for kind in (".pt", ".pt2"):
        report = export(run, "best", tmp_path / f"model{kind}")
        assert "from_black_to_white" in report.program and not report.seen.error
        assert report.seen.alike == report.seen.samples and report.seen.difference < (1e-5 if kind == ".pt" else 1e-2)


@pytest.mark.parametrize("mode", [
    "CMYK", "P", "1", "L", "LA", "RGBA", "LAB", "I;16", "animated", "strip", "turned", "large JPEG", "large RGBA",
    "large turned",
])  # fmt: skip
def test_whatever_a_picture_is_the_program_sees_what_the_kit_sees(mode, tmp_path, decoders):
    colours = np.random.default_rng(0).integers(0, 256, (9, 16, 3), dtype=np.uint8)
    size = (1920, 1080) if "large" in mode else (64, 36)
    picture, file, mode = Image.fromarray(colours).resize(size), tmp_path / "a.tif", mode.rpartition(" ")[2]
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        picture.save(file)
    elif mode in ("animated", "strip", "turned"):
        file = tmp_path / "a.png"
        picture = picture.resize((900, 20)) if mode == "strip" else picture
        exif = Image.Exif()
        exif[274] = 8 if mode == "turned" else 1
        more = [picture.rotate(180)] if mode == "animated" else []
        picture.save(file, save_all=bool(more), append_images=more, exif=exif)
    elif mode == "JPEG":
        file = tmp_path / "a.jpg"
        picture.save(file)
    elif mode in ("P", "LA", "RGBA"):
        file = tmp_path / "a.png"
        picture.convert(mode).save(file, **({"transparency": 3} if mode == "P" else {}))
    else:
        picture.convert("RGB" if mode == "LAB" else mode).convert(mode).save(file)
    preprocessing, tensors, arrays = decoders
    expected = preprocessing.normalise(
        preprocessing.resize(read_image(file, preprocessing.decoding)).float().unsqueeze(0)
    )
    assert torch.equal(tensors["prepare"](tensors["read"](file)), expected)
    # Pillow rounds to whole levels after each direction.
    found = torch.from_numpy(arrays["prepare"](arrays["read"](file)))
    assert (found - expected).abs().max() <= 1.5 / 255 / min(preprocessing.std)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """How bundled/mobilenet prepares pictures, and the two ways in which a program does."""
    place = tmp_path_factory.mktemp("decoders")
    run = train_run(place / "run", recipes(place)["mobilenet"], save_every_steps=0)
    found = []
    for kind in (".pt", ".pt2"):
        scope = {"__name__": "receiver"}
        exec(export(run, "best", place / f"model{kind}").program, scope)
        found.append(scope)
    return prepared(place / "model.pt", read_description(place / "model.pt")), *found
