import inspect
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import finetune as finetune_process
from conftest import finish, read
from encoders import make_encoder, sentences

from finetune import Recipe
from finetune.cli import main
from finetune.recipe.scripts import load_recipe_function, shipped_recipes
from finetune.recipe.serialize import from_plain, to_plain
from finetune.store.run_folder import RunFolder
from finetune.store.state import Progress
from finetune.store.steps import count_steps

RECIPES = sorted(Path(__file__).parents[1].joinpath("recipes").glob("*.py"))


def test_the_kit_ships_every_recipe():
    names = ["bert_head", "distill_bert", "photo_head", "pretrain_glyphs", "resnet_head", "vgg_head"]
    assert [path.stem for path in RECIPES] == names
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
        words += ["--epochs", "1", "--train-samples", "100", "--validation-fraction", "0.05"]
        words += ["--image-size", "96"] if path.stem == "photo_head" else []
    elif "distill" in path.stem:
        teacher = make_encoder(tmp_path / "teacher")
        (teacher / "1_Pooling").mkdir()
        (teacher / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
        (tmp_path / "texts.txt").write_text("\n".join(text for text, _ in sentences(130)))
        words += ["--teacher", str(teacher), "--texts", str(tmp_path / "texts.txt"), "--max-length", "20"]
        words += ["--vocabulary-size", "75", "--epochs", "1", "--keep", "9"]
        words += ["--batch-size", "16"]
    else:
        words += ["--max-steps", "3", "--keep", "3"]
    assert main(words) == 0
    first, second = (read(run, name) for name in ("step-000001.pt", "step-000002.pt"))
    assert read(run)["status"] == "finished"
    for name in second["frozen"]["trainable"]:
        assert not torch.equal(first["model"][name], second["model"][name]), name


def test_a_recipe_in_the_current_folder_trains_and_is_kept_with_its_run(tmp_path):
    """Some inner modules of torch call themselves by a relative name, as if they lay in the current folder."""
    shutil.copyfile(Path(__file__).parent.parent / "recipes" / "vgg_head.py", tmp_path / "my.py")
    (tmp_path / "helper.py").write_text("EPOCHS = 1\n")
    text = (
        (tmp_path / "my.py")
        .read_text()
        .replace("from finetune import", "from helper import EPOCHS\nfrom finetune import")
    )
    (tmp_path / "my.py").write_text(text.replace("epochs: int = 0", "epochs: int = EPOCHS"))
    said = finish(finetune_process("my.py", "--train-samples", "40", cwd=tmp_path))
    assert said.splitlines()[-1] == "runs/my-1"
    assert sorted(path.name for path in (tmp_path / "runs/my-1/code").iterdir()) == ["helper.py", "my.py"]


@pytest.mark.parametrize(
    ("name", "usual"), [("photo_head", 15), ("vgg_head", 15), ("resnet_head", 15), ("bert_head", 30)]
)
def test_few_samples_get_more_epochs_unless_somebody_says_how_many(name, usual):
    function = load_recipe_function(shipped_recipes()[name])
    recipe, asked = function(), function(epochs=3)
    assert (recipe.epochs, recipe.least_steps) == (usual, 300) and (asked.epochs, asked.least_steps) == (3, 0)
    assert count_steps(recipe, 40, Progress()).epochs == 300
    assert count_steps(recipe, 65, Progress()).end == 300
    assert count_steps(recipe, 64_000, Progress()).epochs == usual
    assert count_steps(asked, 40, Progress()).end == 3


def test_what_somebody_asks_for_and_has_no_effect_on_the_last_stage_is_refused(capsys, tmp_path):
    for words, said in (
        (["vgg_head", "--final", "train", "--finish", "none"], "--final train: has no effect with --finish none"),
        (["vgg_head", "--final", "train", "--head", "mlp"], "--final train: has no effect with --head mlp"),
        (["vgg_head", "--thresholds", "half"], "--thresholds half: has no effect"),
        (["bert_head", "--texts", str(tmp_path), "--task", "regression", "--no-calibrate"], "--no-calibrate: has no effect"),
    ):  # fmt: skip
        assert main(words) == 2
        assert said in capsys.readouterr().err


# ---- A recipe of one's own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg_head", "resnet_head", "photo_head", "bert_head"])
def test_new_writes_every_value_out_and_describes_the_very_same_training(name, tmp_path, capsys):
    assert main(["new", name, str(tmp_path / "mine.py")]) == 0
    text = (tmp_path / "mine.py").read_text()
    mine, shipped = load_recipe_function(tmp_path / "mine.py"), load_recipe_function(shipped_recipes()[name])
    assert mine() == shipped() and mine(epochs=3, lr=1e-4, seed=2) == shipped(epochs=3, lr=1e-4, seed=2)
    for part in (
        "model=Model(",
        "rules=(",
        '("head", "trainable", 0)',
        "optimizer=Optimizer(",
        "weight_decay=0.01",
        "task=",
    ):
        assert part in text
    values = [line for line in text.splitlines() if re.match(r" {12}\w+=(?!(images|texts|lr|train_samples),)", line)]
    commented = len(re.findall(r" {12}#.*\n {12}\w+=", text))
    assert len(values) > 25 and commented == len(values)
    for command in (
        ["ruff", "check", "--isolated", "--line-length", "120"],
        ["ruff", "format", "--isolated", "--line-length", "120", "--check"],
    ):
        if shutil.which(command[0]):
            subprocess.run([*command, str(tmp_path / "mine.py")], check=True, capture_output=True)


def test_a_new_recipe_trains_the_same_bits_as_the_shipped_one_and_a_changed_value_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--epochs", "1", "--train-samples", "100", "--device", "cpu", "--track", "none", "--no-report"]
    assert main(["new", "vgg_head", "mine.py"]) == 0
    Path("other.py").write_text(Path("mine.py").read_text().replace("weight_decay=0.01", "weight_decay=0.5"))
    states = []
    for recipe in ("vgg_head", "mine.py", "other.py"):
        assert main([recipe, *options, "--run", Path(recipe).stem]) == 0
        states.append(torch.load(Path(recipe).stem + "/checkpoints/latest.pt", weights_only=True)["model"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_what_the_author_wrote_out_himself_is_copied_as_it_is(tmp_path):
    assert main(["new", "distill_bert", str(tmp_path / "mine.py")]) == 0
    assert (tmp_path / "mine.py").read_text() == shipped_recipes()["distill_bert"].read_text()
