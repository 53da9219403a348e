"""Photographs get a network that learnt from photographs: bundled/mobilenet, photo_head, and what leads there."""

import importlib.util
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from finetune.cli import main
from finetune.models.bundled import BUNDLED, bundled_weights, knows_glyphs_only
from finetune.models.pretrained import new_network
from finetune.models.weights import choose_weights
from finetune.recipe.scripts import load_recipe_function, shipped_recipes

QUIET = ["--track", "none", "--no-report", "--device", "cpu"]


def pictures(folder: Path, edge: int, *, coloured: bool, mode: str = "RGB", count: int = 8) -> Path:
    """Two classes; of shades of grey, also where they are stored as colours."""
    random = np.random.default_rng(0)
    for number, label in enumerate(("calm", "wild")):
        (folder / label).mkdir(parents=True)
        for index in range(count):
            shape = (4 + 12 * number, 4 + 12 * number, 3 if coloured else 1)
            values = np.broadcast_to(random.integers(0, 256, shape, dtype=np.uint8), (*shape[:2], 3))
            picture = Image.fromarray(np.ascontiguousarray(values)).resize((edge, edge)).convert(mode)
            picture.save(folder / label / f"{index}.jpg", quality=95)
    return folder


def script(name: str):
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_bundled_file_is_made_of_torchvisions_own_bit_for_bit_and_keeps_its_features(tmp_path, mobilenet_file):
    script("bundle_mobilenet").bundle(mobilenet_file, tmp_path / "made.safetensors")
    assert (tmp_path / "made.safetensors").read_bytes() == bundled_weights("bundled/mobilenet").read_bytes()
    original = torchvision.models.mobilenet_v2()
    original.load_state_dict(torch.load(mobilenet_file, weights_only=True))
    recipe = load_recipe_function(shipped_recipes()["photo_head"])()
    ours = new_network(recipe, *choose_weights("bundled/mobilenet", "default"), 3).module
    assert {value.dtype for value in ours.state_dict().values()} == {torch.float32, torch.int64}
    images = torch.nn.functional.interpolate(torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(0)), 224)
    with torch.inference_mode():
        rows = [network.eval().features(images).mean((2, 3)) for network in (original, ours)]
    assert torch.nn.functional.cosine_similarity(*rows).min() > 0.9999
    member = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    prepared = BUNDLED["bundled/mobilenet"].preprocessing
    assert ([prepared.image_size], [prepared.resize_size]) == (member.crop_size, member.resize_size)
    assert (prepared.mean, prepared.std, prepared.interpolation) == (
        member.mean,
        member.std,
        member.interpolation.value,
    )


@pytest.mark.slow
def test_on_crops_of_photographs_it_is_far_better_than_a_network_for_characters(tmp_path, monkeypatch, capsys):
    """98.3 % against 59.7 % in the mean over seeds, says the card."""
    script("crops").write_crops(tmp_path / "crops")
    monkeypatch.chdir(tmp_path)
    words = ["photo_head", "--images", "crops", "--backbone", "bundled/mobilenet,bundled/vgg", *QUIET]
    assert main(words) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("bundled/")]
    accuracy = {row[0]: float(row[1]) for row in rows}
    assert accuracy["bundled/mobilenet"] > 0.95 and accuracy["bundled/vgg"] < 0.75


def test_another_file_than_torchvisions_own_is_not_bundled(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"no weights")
    with pytest.raises(SystemExit, match="expected b0353104"):
        script("bundle_mobilenet").bundle(tmp_path / "x.pth", tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


def test_photo_head_trains_on_a_folder_and_stock_torchvision_loads_its_export(tmp_path, capsys):
    folder = pictures(tmp_path / "photos", 80, coloured=True)
    words = ["photo_head", "--images", str(folder), "--image-size", "96", "--epochs", "4", *QUIET]
    assert main([*words, "--run", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "bundled/mobilenet" in said and "for photographs type" not in said
    assert main(["export", str(tmp_path / "run")]) == 0
    model = torchvision.models.mobilenet_v2(num_classes=2)
    state = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    model.load_state_dict(state, strict=True)
    assert all(value.dtype in (torch.float32, torch.int64) for value in state.values())
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run" / "model.pt"), str(folder / "wild" / "0.jpg")]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "wild"


@pytest.mark.parametrize(
    ("edge", "coloured", "mode", "what"),
    [
        (32, True, "RGB", "in colour"),
        (200, False, "L", "larger than 64 px"),
        (200, True, "RGB", "in colour and larger than 64 px"),
        (32, False, "RGB", ""),  # grey, stored as colours
        (60, False, "L", ""),
    ],
)
def test_a_backbone_of_printed_characters_that_meets_photographs_says_what_to_type(
    tmp_path, capsys, edge, coloured, mode, what
):
    folder = pictures(tmp_path / "my photos", edge, coloured=coloured, mode=mode)
    words = ["resnet_head", "--images", str(folder), "--epochs", "1", *QUIET, "--run", str(tmp_path / "run")]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    expected = (
        f"these pictures are {what}; for photographs type: finetune photo_head --images {shlex.quote(str(folder))}"
    )
    assert (expected in said) if what else ("for photographs type" not in said)


def test_other_weights_in_its_place_are_not_taken_for_those_of_characters(tmp_path, capsys):
    folder = pictures(tmp_path / "photos", 80, coloured=True)
    words = ["vgg_head", "--images", str(folder), "--weights", "none", "--epochs", "1", *QUIET]
    assert main([*words, "--run", str(tmp_path / "run")]) == 0
    assert "for photographs type" not in capsys.readouterr().out
    assert [name for name in BUNDLED if knows_glyphs_only(name)] == ["bundled/vgg", "bundled/resnet"]


# ---- Lists of what there is ------------------------------------------------------------------------------------------


def test_recipes_and_backbones_are_listed_with_a_sentence_each(capsys):
    assert main(["recipes"]) == 0
    # A sentence goes on below itself.
    listed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in listed] == sorted(shipped_recipes())
    assert all(len(line.split()) > 5 for line in listed)
    assert main(["backbones", "mobilenet", "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert list(found) == ["bundled/mobilenet", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"]
    assert found["bundled/mobilenet"]["parameters"] == 2_223_872 and found["bundled/mobilenet"]["is_at_hand"]
    assert found["mobilenet_v2"]["accuracy"] == pytest.approx(72.154) and found["mobilenet_v2"]["size"] == 224
    assert found["bundled/mobilenet"]["accuracy"] == pytest.approx(71.878)
    assert main(["backbones", "texts"]) == 0
    assert "sentence-transformers/all-MiniLM-L6-v2" in capsys.readouterr().out
    assert main(["backbones"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 100
    assert main(["backbones", "zebra"]) == 2 and "backbones zebra: none" in capsys.readouterr().err
    assert main(["recipes", "zebra"]) == 2
