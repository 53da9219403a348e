"""What ships inside the wheel is what its cards say."""

import re
from importlib import resources
from pathlib import Path

import pytest
from conftest import DyingTerminal, read

from finetune import Training, launch
from finetune.build import Numerics
from finetune.files import sha256_of_file
from finetune.launch import Machine
from finetune.recipe_files import load_recipe_function, shipped_recipes
from finetune.train import Settings

BUNDLED = Path(str(resources.files("finetune"))) / "bundled"
FILES = sorted(path for path in BUNDLED.iterdir() if path.suffix in (".safetensors", ".npz"))


def test_every_file_has_a_card_with_its_sha256_source_and_licence():
    assert [path.name for path in FILES] == ["digits.npz", "resnet.safetensors", "vgg.safetensors"]
    for path in FILES:
        card = path.with_suffix(".md").read_text(encoding="utf-8")
        assert sha256_of_file(path) in card, path.name
        assert re.search(r"(?i)licen[cs]e", card) and re.search(r"(?i)how .*made|command", card), path.name


def test_both_backbones_together_are_under_six_megabytes():
    assert sum(path.stat().st_size for path in FILES if path.suffix == ".safetensors") < 6_000_000


@pytest.mark.parametrize("name", ["vgg_head", "resnet_head"])
def test_a_linear_head_on_the_pretrained_backbone_reads_the_digits(name, tmp_path):
    recipe = load_recipe_function(shipped_recipes()[name])()
    run, _ = launch.start(tmp_path / "run", name, recipe, Numerics(), Machine("cpu"), Settings(), DyingTerminal())
    assert read(run)["metrics"]["last_validation"]["val/accuracy"] >= 0.98


@pytest.mark.parametrize("name", ["vgg_head", "resnet_head"])
def test_with_fifty_labels_the_pretrained_backbone_reads_the_digits_better_than_a_random_one(name, tmp_path):
    function = load_recipe_function(shipped_recipes()[name])
    accuracy = {}
    for weights in ("default", "none"):
        recipe = function(weights=weights, epochs=30, training=Training(train_samples=50))
        run, _ = launch.start(tmp_path / weights, name, recipe, Numerics(), Machine("cpu"), Settings(), DyingTerminal())
        accuracy[weights] = read(run)["metrics"]["last_validation"]["val/accuracy"]
    assert accuracy["default"] >= 0.9
    # Twelve points in the mean over seeds, says the card; one seed is eight to six away.
    assert accuracy["default"] > accuracy["none"] + 0.04
