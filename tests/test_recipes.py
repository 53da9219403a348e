import inspect
import json
from pathlib import Path

import pytest
import torch
from conftest import read

from finetune import Recipe
from finetune.cli import main
from finetune.plain import from_plain, to_plain
from finetune.recipe_files import load_recipe_function, shipped_recipes
from finetune.run import RunFolder

RECIPES = sorted(Path(__file__).parents[1].joinpath("recipes").glob("*.py"))


def test_there_are_three_recipes_and_the_kit_ships_them_all():
    assert [path.stem for path in RECIPES] == ["pretrain_glyphs", "resnet_head", "vgg_head"]
    assert list(shipped_recipes()) == [path.stem for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_describes_as_a_plain_value_that_json_and_back_leave_equal(path):
    function = load_recipe_function(path)
    recipe = function()
    assert isinstance(recipe, Recipe)
    assert from_plain(json.loads(json.dumps(to_plain(recipe)))) == recipe
    assert all(p.default is not inspect.Parameter.empty for p in inspect.signature(function).parameters.values())
    assert len(path.read_text().splitlines()) < 80


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_two_steps_of_every_recipe_move_what_trains(path, tmp_path):
    run = RunFolder(tmp_path / "run")
    words = [str(path), "--run", str(run.path), "--device", "cpu", "--quiet", "--save-every-steps", "1"]
    if "head" in path.stem:
        words += ["--epochs", "1", "--train-samples", "100"]
    else:
        words += ["--max-steps", "3", "--keep", "3"]
    assert main(words) == 0
    first, second = (read(run, name) for name in ("step-000001.pt", "step-000002.pt"))
    assert read(run)["status"] == "finished"
    for name in second["frozen"]["trainable"]:
        assert not torch.equal(first["model"][name], second["model"][name]), name
