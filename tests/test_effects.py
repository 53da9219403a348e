"""An option without effect is an error that names it, before anything is done; or its line says what becomes of it."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import finetune as finetune_process
from conftest import finish, small_recipe, train_run
from PIL import Image

from finetune import (
    Classification,
    Distillation,
    Images,
    Model,
    Optimizer,
    Recipe,
    Regression,
    Stop,
    Texts,
    UsageError,
)
from finetune.cli import main
from finetune.recipe.effects import check_effects, chosen, idle_lines

QUICK = ["--epochs", "1", "--train-samples", "40", "--device", "cpu", "--quiet", "--track", "none", "--no-report"]


def split_photos() -> str:
    """train/ and val/ of two classes."""
    for part, count in (("train", 4), ("val", 2)):
        for label in ("cat", "dog"):
            Path("data", part, label).mkdir(parents=True)
            for number in range(count):
                grey = 40 * number + len(label)
                Image.new("RGB", (12, 12), (grey, grey, 99)).save(Path("data", part, label, f"{number}.png"))
    return "data"


def texts(name: str = "t.csv", header: str = "text,label", numbers: bool = False) -> str:
    rows = [f"word{number} here,{number if numbers else 'ab'[number % 2]}" for number in range(20)]
    Path(name).write_text("\n".join([header, *rows]))
    return name


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run on images, on texts and on numbers, each exported."""
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(folder):
        digits = ["vgg_head", "--train-samples", "40"]
        numbers = ["bert_head", "--texts", texts(numbers=True), "--task", "regression"]
        for name, words in (
            ("images", digits),
            ("texts", ["bert_head", "--texts", texts("u.csv")]),
            ("numbers", numbers),
        ):
            assert main([*words, "--epochs", "1", "--run", name, "--quiet", "--track", "none", "--no-report"]) == 0
            assert main(["export", name]) == 0
    return folder


WITHOUT_EFFECT: dict[str, tuple[Callable[[], list[str]], str]] = {
    # ---- Of a recipe
    "a decay that the optimizer has none of": (lambda: ["vgg_head", "--optimizer", "rprop", "--weight-decay", "0.1"], "--weight-decay 0.1: has no effect, --optimizer rprop takes none"),
    "a share of data that brings its own": (lambda: ["vgg_head", "--images", split_photos(), "--validation-fraction", "0.3"], "--validation-fraction 0.3: has no effect, data brings 4 images along"),
    "leave to go outside of what ships": (lambda: ["vgg_head", "--allow-outside"], "--allow-outside: has no effect on digits"),
    "leave to go outside of a table of texts": (lambda: ["bert_head", "--texts", texts(), "--allow-outside"], "--allow-outside: has no effect on a table of texts"),
    "a column of what ships": (lambda: ["vgg_head", "--image-column", "photo"], "--images digits: columns and --separator belong to"),
    "a column of a folder of texts": (lambda: [Path("mail").mkdir(), ["bert_head", "--texts", "mail", "--text-column", "body"]][1], "columns and --separator belong to a table"),
    "several labels of a number": (lambda: ["bert_head", "--texts", texts(), "--task", "regression", "--separator", "|"], "--separator |: not allowed"),
    "classes of a number": (lambda: ["bert_head", "--texts", texts(), "--task", "regression", "--label-smoothing", "0.1"], "has no classes; leave --label-smoothing"),
    "views of no augmentation": (lambda: ["vgg_head", "--views", "4"], "--views 4: without --augment"),
    "a revision of what ships": (lambda: ["bert_head", "--revision", "main"], "--revision main: belongs to a model on the hub"),
    "an old head of random weights": (lambda: ["vgg_head", "--weights", "none", "--head", "append"], "--head append"),
    # ---- Of a run
    "to go on with a run of no name": (lambda: ["vgg_head", "--resume"], "--resume: has no effect without --run DIR"),
    "weights beside those of a run": (lambda: ["vgg_head", "--init-from", "images", "--weights", "none"], "--weights: has no effect with --init-from images"),
    "a limit of nothing": (lambda: ["vgg_head", "--no-cache", "--cache-limit", "2GB"], "--cache-limit 2GB: has no effect with --no-cache"),
    "a way to start no workers": (lambda: ["vgg_head", "--workers", "0", "--worker-start", "spawn"], "--worker-start spawn: has no effect with --workers 0"),
    "messages to nobody": (lambda: ["vgg_head", "--notify-every-epochs", "2"], "--notify-every-epochs 2: has no effect without --notify URL"),
    "a precision of no backbone": (lambda: ["vgg_head", "--precision", "fp16", "--device", "cpu"], "--precision fp16: not on cpu"),
    "fewer bits than few": (lambda: ["vgg_head", "--precision", "bf16", "--tf32", "all"], "--tf32 all: has no effect with --precision bf16"),
    "a GPU's arithmetic elsewhere": (lambda: ["vgg_head", "--device", "cpu", "--tf32", "convolutions"], "--tf32 convolutions: has no effect on cpu"),
    "what is of a run, in a summary": (lambda: ["summary", "vgg_head", "--precision", "bf16"], "--precision bf16: has no effect on a summary"),
    # ---- Of other commands
    "texts of a run on images": (lambda: ["resume", "images", "--texts", "t.csv"], "--texts t.csv: has no effect on a run on images"),
    "images of a run on texts": (lambda: ["resume", "texts", "--images", "photos"], "--images photos: has no effect on a run on texts"),
    "messages to nobody, at a resume": (lambda: ["resume", "images", "--notify-every-epochs", "2"], "--notify-every-epochs 2: has no effect without"),
    "texts to judge images on": (lambda: ["evaluate", "images", "--texts", "t.csv"], "--texts t.csv: has no effect on a run on images"),
    "a column of the run's own data": (lambda: ["evaluate", "images", "--label-column", "kind"], "--label-column kind: has no effect on the run's own data; for other data give --images"),
    "a column of texts to judge images on": (lambda: ["evaluate", "images", "--images", "t.csv", "--text-column", "b"], "--text-column b: has no effect on a run on images"),
    "texts of a report on images": (lambda: ["report", "images", "--texts", "t.csv"], "--texts t.csv: has no effect on a run on images"),
    "a format of a copy": (lambda: ["export", "images", "--no-weights-only", "--format", "onnx"], "--format onnx: has no effect with --no-weights-only"),
    "half of a copy": (lambda: ["export", "images", "--no-weights-only", "--half"], "--half: has no effect with --no-weights-only"),
    "half of a file": (lambda: ["export", "images", "--half"], "--half: goes with --format hf only"),
    "a text column of images": (lambda: ["predict", "images/model.pt", "t.csv", "--text-column", "body"], "--text-column body: has no effect, images/model.pt reads images"),
    "an image column of texts": (lambda: ["predict", "texts/model.pt", texts(), "--image-column", "photo"], "--image-column photo: has no effect, texts/model.pt reads texts"),
    "a column where no table is": (lambda: ["predict", "texts/model.pt", "some words", "--text-column", "body"], "--text-column body: has no effect where no table is given"),
    "classes of a predicted number": (lambda: ["predict", "numbers/model.pt", "some words", "--top-k", "5"], "--top-k 5: has no effect, numbers/model.pt predicts a number"),
    "an order of two runs": (lambda: ["runs", "images", "images", "--sort", "time"], "--sort time: has no effect on two runs side by side"),
}  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused_by_name_before_anything_is_done(runs, monkeypatch, capsys, case):
    monkeypatch.chdir(runs)
    make, said = WITHOUT_EFFECT[case]
    words = make()
    capsys.readouterr()
    before = sorted(path for path in runs.rglob("*") if "lock" not in path.name)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("finetune: ")
    assert sorted(path for path in runs.rglob("*") if "lock" not in path.name) == before


TEXTS = Recipe(Model("bundled/bert"), Texts("messages"))
IMAGES = Recipe(Model("bundled/vgg"), Images("digits"))
DISTILLED = dataclasses.replace(TEXTS, model=Model("bundled/bert", head="none"), task=Distillation("bundled/bert"))


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        (IMAGES, {"model": Model("bundled/vgg", revision="main")}, "--revision main"),
        (IMAGES, {"model": Model("bundled/vgg", pooling="mean")}, "--pooling mean"),
        (IMAGES, {"data": Images("digits", fonts="here")}, "--fonts here"),
        (IMAGES, {"data": Images("glyphs", train_samples=9)}, "--train-samples 9"),
        (DISTILLED, {"model": Model("bundled/bert", head="none", dropout=0.1)}, "--dropout 0.1: has no effect without"),
        (DISTILLED, {"model": Model("bundled/bert", weights="none", head="none")}, "--weights none"),
        (DISTILLED, {"data": Texts("messages", label_column="kind")}, "--label-column kind"),
    ],
)
def test_a_value_without_effect_in_a_recipe_of_ones_own_is_refused_where_it_was_chosen(recipe, changes, said):
    check_effects(recipe, chosen(recipe))
    changed = dataclasses.replace(recipe, **changes)
    with pytest.raises(UsageError, match=said):
        check_effects(changed, chosen(changed))
    # What the recipe itself always says was not asked for by whoever runs it.
    check_effects(changed, chosen(changed, usual=changed))


def test_chosen_is_what_is_neither_the_default_nor_the_recipe_s_own():
    usual = dataclasses.replace(IMAGES, optimizer=Optimizer("sgd", lr=0.1), epochs=5)
    given = dataclasses.replace(usual, optimizer=Optimizer("sgd", lr=0.2, weight_decay=0.5), seed=0)
    assert chosen(usual, usual) == frozenset()
    assert chosen(given, usual) == {"optimizer.lr", "optimizer.weight_decay"}
    assert chosen(given) == {"optimizer.lr", "optimizer.weight_decay", "optimizer.name", "epochs"}
    assert chosen(dataclasses.replace(TEXTS, task=Regression()), TEXTS) == frozenset()
    assert chosen(dataclasses.replace(IMAGES, task=Classification(label_smoothing=0.1))) == {"task.label_smoothing"}


def test_what_never_comes_to_pass_is_said_in_a_line_and_what_may_is_not():
    def lines(steps_per_epoch=10, end_step=30, **changes):
        recipe = dataclasses.replace(IMAGES, **changes)
        return idle_lines(recipe, chosen(recipe), steps_per_epoch, end_step)

    assert lines() == lines(validate_every_steps=30) == lines(stop=Stop(patience=2)) == []
    assert "--validate-every-steps 31: does not come" in lines(validate_every_steps=31)[0]
    assert "--patience 3: cannot stop this run early, which validates 3 time(s)" in lines(stop=Stop(patience=3))[0]
    assert lines(stop=Stop(patience=5), validate_every_steps=5) == []
    assert "validates 6 time(s)" in lines(stop=Stop(patience=6), validate_every_steps=5)[0]
    assert "only the first 3" in lines(data=Images("digits", augment="light", views=4))[0]
    assert lines(data=Images("digits", augment="light", views=3)) == []


def test_the_lines_come_before_the_first_step_of_a_real_run(tmp_path):
    words = [
        "vgg_head",
        *QUICK,
        "--train-samples",
        "5000",
        "--patience",
        "4",
        "--worker-start",
        "spawn",
        "--run",
        str(tmp_path / "run"),
    ]
    words.remove("--quiet")
    said = finish(finetune_process(*words))
    assert said.index("--patience 4: cannot stop this run early") < said.index("epoch 1/1")
    assert "--train-samples 5000: there are 1,438 images to train on, all are taken" in said
    assert "--worker-start spawn: no worker process is started" in said


def test_an_old_run_with_a_value_without_effect_goes_on(tmp_path, monkeypatch, capsys):
    """What was taken when it began is taken still."""
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(epochs=2, data=Images("digits", fonts="nowhere", train_samples=100))
    run = train_run(Path("run"), recipe, save_every_steps=0)
    assert json.loads(run.recipe_file.read_text())["config"]["data"]["fonts"] == "nowhere"
    assert main(["resume", "run", "--epochs", "3", "--quiet"]) == 0
    for path in run.checkpoints.glob("*.pt"):
        path.unlink()
    assert main(["resume", "run", "--quiet"]) == 0
