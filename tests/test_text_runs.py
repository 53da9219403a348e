"""Runs on texts: killed and resumed, with and without kept features; every kind of task, to the prediction."""

import csv
import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    DyingTerminal,
    Killed,
    assert_equal_runs,
    finish,
    kill_after_progress,
    metrics_lines,
    read,
    resume_run,
    start_in,
    train_run,
    train_with_deaths,
)
from conftest import finetune as run_finetune
from encoders import ANIMALS, TOOLS, make_encoder, sentences, text_recipe, write_csv

import finetune
from finetune import TextTable, Trainable, Training, UsageError
from finetune.base.cache_folders import features_folder
from finetune.base.files import read_json, write_json
from finetune.cli import main
from finetune.data.tokens import PADDING
from finetune.export.weights import export
from finetune.models.folding import scale_beside
from finetune.recipe.execution import Machine, Numerics, Settings
from finetune.recipe.spec import Finish, Regression
from finetune.report.examples import examples_of
from finetune.store.restore import backbone_of_run, trained_network
from finetune.store.run_folder import RunFolder

THAW = Trainable(
    rules=(("head", "trainable", 0), ("bert.encoder.layer.1", "trainable", 1), ("*", "frozen", 0)),
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("bert"), initializer_range=0.02)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("texts") / "texts.csv", sentences(120))


def numbers_csv(path, count=600):
    """Which share of the words of a text are animals: 1000 = none, 1500 = all."""
    rows = []
    for text, _ in sentences(count):
        words = text.split()
        rows.append((text, 1000 + 500 * sum(word in ANIMALS for word in words) / len(words)))
    return write_csv(path, rows, ("text", "score"))


def labels_csv(path, count=600):
    rows = []
    for text, _ in sentences(count):
        words = text.split()
        labels = [name for name, known in (("animal", ANIMALS), ("tool", TOOLS)) if any(w in known for w in words)]
        rows.append((text, "|".join([*labels, *(["long"] if len(words) > 11 else [])])))
    return write_csv(path, rows)


def said_by_start(path, recipe, **numerics):
    terminal = DyingTerminal()
    run, _ = start_in(path, "x", recipe, Numerics(**numerics), Machine("cpu"), Settings(), terminal)
    return run, terminal.lines


# ---- Exact resume -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        pytest.param({"pooling": "mean"}, {}, marks=pytest.mark.slow),
        pytest.param({"pooling": "stock", "head": "mlp"}, {}, marks=pytest.mark.slow),
        pytest.param({"pooling": "mean"}, {"cache": False}, marks=pytest.mark.slow),
        ({"pooling": "cls"}, {"cache": False, "precision": "bf16"}),
        ({"pooling": "mean", "trainable": THAW}, {}),
    ],
    ids=["kept", "kept, mlp", "not kept", "not kept, bf16", "thawed in the second epoch"],
)
def test_a_run_killed_four_times_ends_bit_for_bit_like_one_that_was_not(tmp_path, encoder, texts, changes, options):
    trainable = changes.pop("trainable", None)
    recipe = text_recipe(texts, encoder, **changes)
    recipe = dataclasses.replace(recipe, trainable=trainable) if trainable else recipe
    unbroken = train_run(tmp_path / "unbroken", recipe, **options)
    interrupted = train_with_deaths(tmp_path / "interrupted", recipe, [2, 5, 7, 11], **options)
    assert_equal_runs(interrupted, unbroken)
    assert read(unbroken)["step"] == 12


@pytest.mark.slow
def test_real_processes_killed_end_with_the_same_weights_in_every_bit(tmp_path, encoder, texts):
    words = ["bert_head", "--texts", str(texts), "--backbone", str(encoder), "--epochs", "15", "--batch-size", "8"]
    words += ["--save-every-steps", "1", "--dropout", "0.2", "--device", "cpu", "--quiet"]
    finish(run_finetune(*words, "--run", str(tmp_path / "unbroken")))
    run = RunFolder(tmp_path / "killed")
    for number in range(2):
        more = [] if number == 0 else ["--resume"]
        kill_after_progress(run_finetune(*words, "--run", str(run.path), *more), run, 20)
    finish(run_finetune("resume", str(run.path), "--quiet"))
    assert_equal_runs(run, RunFolder(tmp_path / "unbroken"))


# ---- Kept features ------------------------------------------------------------------------------------------------------


def test_a_second_run_computes_no_features_and_another_length_or_tokenizer_does(tmp_path, encoder, texts):
    texts = write_csv(tmp_path / "texts.csv", sentences(120, seed=77))  # nobody else's

    def features_line(name, folder, **changes):
        _, lines = said_by_start(tmp_path / name, text_recipe(texts, folder, epochs=1, seed=9, **changes))
        return next(line for line in lines if line.startswith("features:"))

    assert "runs over 120 texts once" in features_line("first", encoder)
    assert "does not run" in features_line("second", encoder)
    assert "runs over 120 texts once" in features_line("shorter", encoder, max_length=10)
    other = shutil.copytree(encoder, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["cat"], vocabulary["saw"] = vocabulary["saw"], vocabulary["cat"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "runs over 120 texts once" in features_line("another tokenizer", other)
    assert any(features_folder().glob("*.safetensors"))


def test_features_of_a_head_are_measured_so_that_it_learns_from_standardised_ones(tmp_path, encoder, texts):
    """The stub in the encoder's place must not be what is measured."""
    for pooling in ("mean", "stock"):
        model = read(train_run(tmp_path / pooling, text_recipe(texts, encoder, pooling=pooling, epochs=1)))["model"]
        assert model["classifier.mean"].abs().min() > 0
        assert (model["classifier.deviation"] != 1).all()


# ---- Tasks --------------------------------------------------------------------------------------------------------------


def test_numbers_are_learnt_and_predicted_in_their_own_unit(tmp_path, encoder, capsys):
    table = TextTable(label_column="score")
    place = numbers_csv(tmp_path / "numbers.csv")
    recipe = text_recipe(place, encoder, task="regression", epochs=20, dropout=0.0, pooling="mean", table=table)
    run = train_run(tmp_path / "run", recipe, save_every_steps=0)
    best = read(run)["best_metric"]
    assert best["metric"] == "loss" and best["value"] < 0.3
    assert main(["evaluate", str(run.path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["r2"] > 0.7 and 5 < figures["mae"] < 60 and "accuracy" not in figures
    assert main(["evaluate", str(run.path)]) == 0
    assert "variance explained" in capsys.readouterr().out
    assert export(run, "best", tmp_path / "model.pt").largest_difference < 1e-2
    assert main(["predict", str(tmp_path / "model.pt"), "the hammer saw", "cat dog cow"]) == 0
    few, many = (json.loads(line)["value"] for line in capsys.readouterr().out.splitlines())
    assert 850 < few < 1150 < 1250 < many < 1700


@pytest.fixture(scope="module")
def distant(tmp_path_factory, encoder):
    """A run on numbers of which float32 knows one only: 1e9 and 1e9 + 1."""
    place = tmp_path_factory.mktemp("distant")
    rows = [(text, repr(1e9 + (label == "animal"))) for text, label in sentences(240)]
    numbers = write_csv(place / "distant.csv", rows, ("text", "score"))
    options = {"epochs": 16, "dropout": 0.0, "pooling": "stock", "table": TextTable(label_column="score")}
    run = train_run(place / "run", text_recipe(numbers, encoder, task="regression", **options), save_every_steps=0)
    return run, ["the cat saw a horse", "the hammer was near my drill"]


def test_numbers_far_from_zero_are_exported_and_predicted_as_exactly_as_any(tmp_path, distant, capsys):
    run, texts = distant
    assert main(["evaluate", str(run.path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["mae"] < 0.25 and figures["r2"] > 0.7
    report = export(run, "best", tmp_path / "model.pt")
    mean, deviation = report.description["scale"]
    assert (mean, deviation) == (pytest.approx(1e9 + 0.5, abs=0.1), pytest.approx(0.5, abs=0.01))
    assert f"value = output * {deviation!r} + {mean!r}, in float64" in report.text()
    assert report.largest_difference < 1e-4  # of a deviation
    assert main(["predict", str(tmp_path / "model.pt"), *texts, "--device", "cpu"]) == 0
    animal, tool = (json.loads(line)["value"] for line in capsys.readouterr().out.splitlines())
    assert animal == pytest.approx(1e9 + 1, abs=0.4) and tool == pytest.approx(1e9, abs=0.4)
    scope: dict = {"__name__": "receiver"}
    exec(report.program, scope)
    inputs = scope["tokenizer"](texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        loaded = finetune.load(tmp_path / "model.pt")(**inputs)
    assert loaded.dtype == torch.float64 and all(isinstance(scope["predict"](text), float) for text in texts)
    for values in ([scope["predict"](text) for text in texts], loaded.flatten().tolist()):
        torch.testing.assert_close(values, [animal, tool], rtol=0, atol=1e-4)  # of batches of other shapes
    words = ["export", str(run.path), "--from", "best", "--format", "hf", "--output", str(tmp_path / "folder")]
    assert main(words) == 0
    program = capsys.readouterr().err.partition("\nimport json\n")
    exec(program[1] + program[2], scope)  # as printed
    assert scope["predict"](texts[0]) == pytest.approx(animal, abs=1e-4)
    # This encoder's features lie too far from zero for 16 bits, and that is measured in deviations too.
    assert main([*words, "--half"]) == 1
    assert (
        "deviations of the targets, allowed is 0.0" in (said := capsys.readouterr().err) and "leave --half out" in said
    )
    near_zero = [(text, 100 + number % 3) for number, (text, _) in enumerate(sentences(9))]
    place = write_csv(tmp_path / "near zero.csv", near_zero, ("text", "score"))
    assert main(["evaluate", str(run.path), "--texts", str(place), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)  # they are not all the same, however far from here
    assert figures["r2"] == pytest.approx(-1.5e18, rel=1e-3) and figures["mae"] == pytest.approx(1e9 - 100.5, abs=1)
    examples = read_json(run.validation_file, "")["worst"]
    assert {1e9, 1e9 + 1} == {round(one["true"], 6) for one in examples}
    assert len({one.predicted for one in examples_of(examples, [], None)}) > 5


def test_a_scale_that_float32_holds_is_folded_and_one_that_it_cannot_stands_beside():
    assert scale_beside([]) == scale_beside([2010.0, 10.0]) == scale_beside([3.0, 1.5], torch.float16) == []
    assert scale_beside([1e-30, 1e-31]) == []
    for scale in ([1e9, 1.0], [-1e9, 1.0], [1e-7, 1e-14], [1.7e9, 3600.0], [0.0, 1e200], [0.0, 1e-44]):
        assert scale_beside(scale) == scale
    for scale in ([2010.0, 10.0], [7e4, 2e4], [0.0, 1e-4]):  # the last digit, too large, too small
        assert scale_beside(scale, torch.float16) == scale


def test_numbers_that_are_all_the_same_have_no_r2_and_cannot_be_learnt(tmp_path, encoder, capsys):
    rows = [(text, number % 3, "train") for number, (text, _) in enumerate(sentences(30))]
    rows += [(text, 4, "val") for text, _ in sentences(8)]
    table = TextTable(label_column="score", split_column="split")
    options = {"task": "regression", "pooling": "mean", "table": table, "epochs": 1}
    numbers = write_csv(tmp_path / "same.csv", rows, ("text", "score", "split"))
    with pytest.raises(
        UsageError, match=r"--stop-metric r2: the 8 number\(s\) that validate are all 4, so there is no"
    ):
        train_run(tmp_path / "run", text_recipe(numbers, encoder, training=Training(stop_metric="r2"), **options))
    assert not (tmp_path / "run").exists()
    run = train_run(tmp_path / "run", text_recipe(numbers, encoder, **options))
    logged = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert any("val/mae" in line for line in logged) and not any("val/r2" in line for line in logged)
    assert "no R2, for the 8 number(s) that validate are all 4" in read_json(run.validation_file, "")["facts"]["data"]
    assert main(["evaluate", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["r2"] is None
    assert main(["evaluate", str(run.path)]) == 0
    assert "undefined: the numbers are all the same" in capsys.readouterr().out
    assert main(["report", str(run.path)]) == 0
    same = [(text, 4, part) for text, _, part in rows]
    write_csv(tmp_path / "same.csv", same, ("text", "score", "split"))
    with pytest.raises(UsageError, match=r"the 30 number\(s\) to train on are all 4, so there is nothing to learn"):
        train_run(tmp_path / "other", text_recipe(numbers, encoder, **options))


def test_a_record_that_names_no_moments_goes_on_with_the_scale_and_the_figures_of_then(tmp_path, encoder):
    numbers = write_csv(tmp_path / "n.csv", [(text, "0.1") for text, _ in sentences(40)], ("text", "score"))
    table = TextTable(label_column="score")
    recipe = text_recipe(numbers, encoder, task="regression", pooling="mean", table=table, epochs=1)
    plain = dataclasses.replace(recipe, task=Regression(moments="plain"), finish=Finish(way="none"))
    unbroken = train_run(tmp_path / "unbroken", plain)
    with pytest.raises(Killed):
        train_run(tmp_path / "old", plain, die_after_steps=1)
    run = RunFolder(tmp_path / "old")
    record = read_json(run.recipe_file, "recipe")
    assert record["config"]["task"].pop("moments") == "plain"
    write_json(run.recipe_file, record)
    resume_run(run)
    assert metrics_lines(run) == metrics_lines(unbroken) and "val/r2" in metrics_lines(run)[-1]
    mean, deviation = read(run)["data"]["scale"]  # of numbers that are all the same, as they used to be added up
    values = np.full(32, 0.1)
    assert [mean, deviation] == [float(values.mean()), float(values.std()) or 1.0]


def test_a_folder_for_transformers_predicts_numbers_in_their_own_unit(tmp_path, encoder, capsys):
    table = TextTable(label_column="score")
    place = numbers_csv(tmp_path / "numbers.csv")
    run = train_run(tmp_path / "run", text_recipe(place, encoder, task="regression", pooling="stock", table=table))
    assert main(["export", str(run.path), "--format", "hf", "--output", str(tmp_path / "hf")]) == 0
    assert main(["export", str(run.path), "--output", str(tmp_path / "model.pt")]) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "model.pt"), "the old hammer"]) == 0
    ours = json.loads(capsys.readouterr().out)["value"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    with torch.inference_mode():
        theirs = model(**tokenizer("the old hammer", return_tensors="pt")).logits.item()
    assert model.config.problem_type == "regression" and theirs == pytest.approx(ours, rel=1e-5) and ours > 500


def test_several_labels_are_learnt_and_predicted_each_on_its_own(tmp_path, encoder, capsys):
    place = labels_csv(tmp_path / "labels.csv")
    table = TextTable(separator="|")
    recipe = text_recipe(place, encoder, epochs=20, dropout=0.0, pooling="mean", table=table)
    run = train_run(tmp_path / "run", recipe, save_every_steps=0)
    assert read(run)["data"]["classes"] == ["animal", "long", "tool"]
    assert read(run)["best_metric"]["value"] > 0.5  # of texts with all three right; a guess gets a quarter
    assert main(["export", str(run.path), "--output", str(tmp_path / "model.pt")]) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "model.pt"), "cat dog cat horse was", "hammer saw drill nail was"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert "animal" in first["labels"] and "tool" in second["labels"] and "animal" not in second["labels"]
    run = train_run(
        tmp_path / "stock",
        dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, pooling="stock"), epochs=1),
    )
    assert main(["export", str(run.path), "--format", "hf", "--output", str(tmp_path / "hf")]) == 0
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.problem_type == "multi_label_classification"
    assert config.id2label == {0: "animal", 1: "long", 2: "tool"}


def test_options_that_belong_to_another_task_are_refused(tmp_path, encoder, texts, capsys):
    words = ["bert_head", "--texts", str(texts), "--backbone", str(encoder), "--run", str(tmp_path / "run")]
    for more, said in (
        (["--task", "regression", "--class-weights", "balanced"], "has no classes"),
        (["--task", "regression", "--stop-metric", "accuracy"], "--stop-metric accuracy: not allowed; give auto, loss, mae, r2"),
        (["--stop-metric", "r2"], "--stop-metric r2: not allowed; give auto, accuracy, f1, loss"),
        (["--task", "regression", "--separator", ","], "--separator ,: not allowed"),
        (["--task", "regression"], "is no number"),
        (["--max-length", "2"], "this backbone takes 3 to 40 tokens"),
        (["--max-length", "-1"], "--max-length -1: not allowed"),
        (["--revision", "main"], "belongs to a model on the hub"),
        (["--head", "append"], "needs pretrained weights with their old head"),
        (["--text-column", "words"], "--text-column words: no such column"),
        (["--images", "digits"], "--images: bert_head reads texts; for images: finetune photo_head --images digits"),
        (["--mixup", "0.2"], "Unrecognized options: --mixup"),
    ):  # fmt: skip
        assert main([*words, *more]) == 2, more
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, (more, error)
    assert not (tmp_path / "run").exists()


# ---- Around a run -------------------------------------------------------------------------------------------------------


def test_empty_texts_are_named_and_left_out_when_asked(tmp_path, encoder, capsys):
    rows = sentences(60)
    rows[7], rows[21] = ("", "tool"), ("  ", "tool")
    words = [
        "bert_head",
        "--texts",
        str(write_csv(tmp_path / "t.csv", rows)),
        "--backbone",
        str(encoder),
        "--epochs",
        "1",
    ]
    for more in ([], ["--no-cache"]):
        assert main([*words, *more, "--run", str(tmp_path / "run")]) == 1
        assert "2 broken text(s): text of line 9 is empty, and 1 more" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        assert main([*words, *more, "--skip-broken", "--run", str(tmp_path / f"left out{len(more)}")]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "2 left out" in said and "line 23 is empty" in said
        run = RunFolder(tmp_path / f"left out{len(more)}")
        assert read(run)["data"]["skipped"] == ["line 23", "line 9"]
        resume_run(run, epochs=2)


def test_texts_that_moved_are_found_again_and_others_are_refused(tmp_path, encoder, capsys):
    place = write_csv(tmp_path / "t.csv", sentences(60))
    run = train_run(tmp_path / "run", text_recipe(place, encoder, epochs=1))
    place.rename(tmp_path / "moved.csv")
    assert main(["resume", str(run.path), "--epochs", "2", "--texts", str(tmp_path / "moved.csv"), "--quiet"]) == 0
    other = write_csv(tmp_path / "other.csv", sentences(60, seed=1))
    capsys.readouterr()
    assert main(["resume", str(run.path), "--epochs", "3", "--texts", str(other), "--quiet"]) == 1
    assert "the data is not what run" in capsys.readouterr().err
    assert main(["evaluate", str(run.path), "--texts", str(other), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["texts"] == str(other) and figures["part"] == "all" and figures["samples"] == 60
    renamed = write_csv(tmp_path / "renamed.csv", sentences(60), ("words", "kind"))
    words = ["evaluate", str(run.path), "--texts", str(renamed), "--text-column", "words", "--label-column", "kind"]
    assert main(words) == 0
    assert "texts" in capsys.readouterr().out


def test_the_start_says_how_many_texts_are_cut_and_how_they_are_pooled(tmp_path, encoder, texts, capsys):
    words = ["bert_head", "--texts", str(texts), "--backbone", str(encoder), "--epochs", "1", "--max-length", "10"]
    assert main([*words, "--run", str(tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    longer = sum(len(text.split()) > 8 for text, _ in sentences(120))
    assert f"up to 10 tokens (as of its tokenizer), {longer} of 120 are longer and cut off; pooling stock" in said


def test_another_runs_weights_start_a_run_on_texts(tmp_path, encoder, texts):
    folder = shutil.copytree(encoder, tmp_path / "model")
    first = train_run(tmp_path / "first", text_recipe(texts, folder))
    shutil.rmtree(folder)  # that run's own tokenizer and weights will do
    second = train_run(tmp_path / "second", text_recipe(texts, folder, lr=1e-6, seed=3), init_from=str(first.path))
    before, after = read(first, "best.pt")["model"], read(second)["model"]
    assert torch.equal(before["classifier.mean"], after["classifier.mean"])
    assert (before["classifier.weight"] - after["classifier.weight"]).abs().max() < 1e-3


def test_another_runs_weights_predict_the_same_numbers_though_those_here_have_another_scale(tmp_path, encoder):
    table = TextTable(label_column="score")
    place = numbers_csv(tmp_path / "numbers.csv")
    recipe = text_recipe(place, encoder, task="regression", epochs=2, dropout=0.0, pooling="mean", table=table)
    first = train_run(tmp_path / "first", recipe)
    rows = [line.split(",") for line in place.read_text().splitlines()]
    kept = [rows[0], *(row for row in rows[1:] if float(row[-1]) > 1250)]
    other = tmp_path / "other.csv"
    other.write_text("".join(",".join(row) + "\n" for row in kept))
    recipe = text_recipe(other, encoder, task="regression", epochs=1, lr=1e-9, pooling="mean", table=table)
    second = train_run(tmp_path / "second", recipe, init_from=f"{first.path}:latest")
    (before, old), (after, new) = (
        (network.module.eval(), state.data.scale)
        for network, state in (trained_network(run, "latest") for run in (first, second))
    )
    assert new[0] > old[0] + 50
    tokens = (
        backbone_of_run(first, trained_network(first, "latest")[1])
        .preprocessing.tokenize(["the hammer saw", "cat dog cow"])
        .batch([0, 1])
    )
    with torch.inference_mode():
        torch.testing.assert_close(after(tokens) * new[1] + new[0], before(tokens) * old[1] + old[0], rtol=1e-4, atol=0)


# ---- Prediction ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory, encoder):
    folder = tmp_path_factory.mktemp("exported")
    texts = write_csv(folder / "texts.csv", sentences(600))
    recipe = text_recipe(texts, encoder, pooling="mean", epochs=20, dropout=0.0)
    run = train_run(folder / "run", recipe, save_every_steps=0)
    export(run, "best", folder / "model.pt")
    shutil.rmtree(run.path)
    return folder / "model.pt"


def predict_lines(capsys, *words, code=0):
    assert main(["predict", *map(str, words)]) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_texts_files_tables_and_folders_are_predicted_in_order(tmp_path, exported, capsys):
    table = write_csv(tmp_path / "t.csv", [(1, "a cat was"), (2, ""), (3, "a saw was")], ("id", "text"))
    (tmp_path / "folder").mkdir()
    for name, text in (("b", "my hammer nail saw was"), ("a", "my dog cat horse was")):
        (tmp_path / "folder" / f"{name}.txt").write_text(text)
    rows = predict_lines(capsys, exported, "we saw the cow was", table, tmp_path / "folder", "a drill was", code=1)
    assert [row.get("label") for row in rows] == ["animal", "animal", None, "tool", "animal", "tool", "tool"]
    assert rows[0]["text"] == "we saw the cow was" and "file" not in rows[0]
    assert rows[2] == {"file": str(table), "line": 3, "error": "is empty; write a text"}
    assert rows[3]["line"] == 4 and rows[4]["file"].endswith("a.txt") and rows[4]["text"] == "my dog cat horse was"
    words = [exported, "we saw the cow was", table, "--csv", "--top-k", "2", "--batch-size", "2"]
    assert main(["predict", *map(str, words)]) == 1
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["label"] for row in found] == ["animal", "animal", "", "tool"] and found[1]["line"] == "2"


def test_a_prediction_does_not_depend_on_what_else_is_asked(exported, capsys):
    asked = [text for text, _ in sentences(30, seed=5)]
    together = predict_lines(capsys, exported, *asked)
    alone = [predict_lines(capsys, exported, text)[0] for text in asked[:6]]
    for one, other in zip(alone, together, strict=False):
        assert one["label"] == other["label"] and one["probability"] == pytest.approx(other["probability"], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.csv"], "nowhere.csv: no such file"),
        (["nowhere.txt"], "nowhere.txt: cannot be read"),
        (["{folder}"], "holds no .txt files"),
        ([], "give images, texts, folders or a csv"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(tmp_path, exported, words, said, capsys):
    words = [word.format(folder=tmp_path) for word in words]
    assert main(["predict", str(exported), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_an_export_without_its_tokenizer_says_what_is_missing(tmp_path, exported, capsys):
    for name in ("model.pt", "model.json"):
        shutil.copyfile(exported.with_name(name), tmp_path / name)
    assert main(["predict", str(tmp_path / "model.pt"), "a cat"]) == 1
    assert "tokenizer.json does not exist; put the file back" in capsys.readouterr().err


def test_a_loaded_model_takes_what_the_tokenizer_gives(exported):
    model = finetune.load(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported.with_name("model-tokenizer"))
    inputs = tokenizer(["a cat was", "the very old saw we had"], padding=True, return_tensors="pt")
    tokens = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, PADDING)
    with torch.inference_mode():
        assert torch.equal(model(**inputs), model(tokens))


def test_a_file_is_a_file_whatever_its_name_and_no_text_is_none(tmp_path, exported, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my files"
    folder.mkdir()
    write_csv(folder / "new reviews.csv", [("a cat was", "x")])
    (folder / "one letter.txt").write_text("a saw was")
    rows = predict_lines(capsys, exported, "my files/new reviews.csv", "my files/one letter.txt", "0")
    assert [row.get("file") for row in rows] == ["my files/new reviews.csv", "my files/one letter.txt", None]
    (tmp_path / "note.md").write_text("a note")
    for name in ("note.md", "missing_dir/"):
        assert main(["predict", str(exported), name]) == 2
        assert "is no folder, and no file of texts" in capsys.readouterr().err
    assert predict_lines(capsys, exported, "", code=1)[0]["error"] == "is empty; write a text"
    assert len(predict_lines(capsys, exported, "a cat was " * 500)) == 1


def test_a_file_that_was_renamed_is_the_same_data_though_some_of_it_was_left_out(tmp_path, encoder):
    rows = sentences(60)
    rows[7] = ("", "tool")
    place = write_csv(tmp_path / "t.csv", rows)
    run = train_run(tmp_path / "run", text_recipe(place, encoder, epochs=1), skip_broken=True)
    resume_run(run, epochs=2, place=str(place.rename(tmp_path / "other name.csv")))
    assert read(run)["epoch"] == 2
    numbers = numbers_csv(tmp_path / "n.csv", 60)
    numbers.write_text(numbers.read_text() + ",1e6\n")  # empty, and far off: its number must not count at one time only
    table = TextTable(label_column="score")
    recipe = text_recipe(numbers, encoder, task="regression", table=table, epochs=1)
    resume_run(train_run(tmp_path / "numbers", recipe, skip_broken=True), epochs=2)
