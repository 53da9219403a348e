"""A small sentence encoder is distilled from a tiny teacher, resumes exactly, and is a backbone afterwards."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import Killed, assert_equal_runs, read, resume_run, train_run
from encoders import make_encoder, sentences, text_recipe, write_csv
from safetensors.torch import load_file, save_file

from finetune import RunError, UsageError
from finetune.base.cache_folders import features_folder
from finetune.cli import main
from finetune.data.tokens import TOKENIZER_FILE
from finetune.export.hf_folder import export_folder
from finetune.models.pretrained import find_pretrained, pretrained
from finetune.models.weight_files import read_weights
from finetune.recipe.scripts import load_recipe_function, shipped_recipes
from finetune.training.dataset import open_data


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Three layers; its folder says that it pools by the mean."""
    folder = make_encoder(tmp_path_factory.mktemp("teacher"), "minilm")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(text for text, _ in sentences(400)))
    return path


def recipe_for(teacher, texts, **changes):
    function = load_recipe_function(shipped_recipes()["distill_bert"])
    values = {"layers": 2, "vocabulary_size": 75, "max_length": 20, "epochs": 3, "batch_size": 32, "lr": 3e-3}
    return function(teacher=str(teacher), texts=str(texts), **values | changes)


def test_a_student_begins_as_evenly_spread_layers_and_the_most_frequent_tokens(teacher, texts):
    recipe = recipe_for(teacher, texts)
    backbone, _ = find_pretrained(recipe)
    smaller, weights, tensors = pretrained(recipe)
    theirs = read_weights(weights.path)
    assert smaller.options["config"]["num_hidden_layers"] == 2 and smaller.options["pooling"] == "mean"
    assert not any(".layer.2." in name for name in tensors)
    name = "encoder.layer.{}.attention.self.query.weight"
    for ours, from_layer in ((0, 0), (1, 2)):
        assert torch.equal(tensors["bert." + name.format(ours)], theirs["bert." + name.format(from_layer)])
    numbers = json.loads(smaller.preprocessing.files[TOKENIZER_FILE])["model"]["vocab"]
    old = json.loads(backbone.preprocessing.files[TOKENIZER_FILE])["model"]["vocab"]
    assert len(numbers) == smaller.preprocessing.vocabulary_size == 75 < len(old)
    embeddings = "bert.embeddings.word_embeddings.weight"
    for token, number in numbers.items():
        assert torch.equal(tensors[embeddings][number], theirs[embeddings][old[token]])
    # Words that stay are one token as before; those that had to go are spelt out.
    frequent = [word for word in ("the", "was", "one") if word in numbers]
    assert len(frequent) == 3 and all(token in numbers for token in ("[CLS]", "[PAD]", "a", "##z"))
    table = smaller.preprocessing.tokenize(["the was"])
    assert table.tokens.tolist() == [numbers[token] for token in ("[CLS]", "the", "was", "[SEP]")]


def test_the_targets_are_the_teachers_mean_pooled_tokens_and_training_comes_close_to_them(tmp_path, teacher, texts):
    recipe = recipe_for(teacher, texts, epochs=8)
    run = train_run(tmp_path / "run", recipe, save_every_steps=0)
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    losses = [line["val/loss"] for line in lines if "val/loss" in line]
    assert losses[-1] < 0.8 * losses[0] and losses[-1] < 0.15
    # By transformers alone: teacher against student, on texts that neither trained on.
    folder = export_folder(run, "best", tmp_path / "small", half=False).folder
    found = []
    for place in (teacher, folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        model = transformers.AutoModel.from_pretrained(place).eval()
        inputs = tokenizer([text for text, _ in sentences(50, seed=3)], padding=True, truncation=True, max_length=20,
                           return_tensors="pt")  # fmt: skip
        mask = inputs["attention_mask"].unsqueeze(-1)
        with torch.inference_mode():
            found.append((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1))
    distance = (found[0] - found[1]).square().sum(1) / found[0].square().sum(1)
    assert distance.mean() < 1.5 * losses[-1]


def test_killed_in_the_middle_it_ends_bit_for_bit_the_same_without_its_teacher_at_hand(tmp_path, teacher, texts):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    recipe = recipe_for(folder, texts)
    unbroken = train_run(tmp_path / "unbroken", recipe)
    with pytest.raises(Killed):
        train_run(tmp_path / "run", recipe, die_after_steps=15)
    run = type(unbroken)(tmp_path / "run")
    shutil.rmtree(folder)
    with pytest.raises((RunError, UsageError), match="teacher"):
        resume_run(run)
    shutil.copytree(teacher, folder)
    resume_run(run)
    assert_equal_runs(run, unbroken)
    assert any(features_folder().glob("*.safetensors"))


def test_what_was_distilled_is_a_backbone_that_pools_as_its_folder_says(tmp_path, teacher, texts, capsys):
    run = train_run(tmp_path / "run", recipe_for(teacher, texts, epochs=1), save_every_steps=0)
    words = ["export", str(run.path), "--format", "hf", "--output", str(tmp_path / "small")]
    assert main([*words, "--half"]) == 0
    assert "AutoModel.from_pretrained" in capsys.readouterr().err
    halved = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert main(words) == 0  # an earlier export is replaced
    assert halved < 0.6 * (tmp_path / "small" / "model.safetensors").stat().st_size
    assert {path.name for path in (tmp_path / "small").iterdir()} >= {"modules.json", "1_Pooling", "tokenizer.json"}
    place = write_csv(tmp_path / "labelled.csv", sentences(120))
    recipe = text_recipe(place, tmp_path / "small", epochs=10)
    backbone, _ = find_pretrained(recipe)
    assert backbone.options["pooling"] == "mean" and backbone.preprocessing.max_length == 20
    assert len(open_data(recipe, backbone).source.texts) == 120
    headed = train_run(tmp_path / "headed", recipe, save_every_steps=0)
    assert read(headed)["best_metric"]["value"] > 0.6
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("do not touch")
    with pytest.raises(UsageError, match="holds something else"):
        export_folder(run, "best", tmp_path / "mine", half=False)


def test_what_a_distillation_cannot_do_is_one_line(tmp_path, teacher, texts, capsys):
    plain = make_encoder(tmp_path / "plain")
    words = ["distill_bert", "--texts", str(texts), "--run", str(tmp_path / "run"), "--max-length", "20"]
    capsys.readouterr()
    for more, said in (
        (["--teacher", str(plain)], "makes no sentence embeddings"),
        (["--teacher", str(teacher), "--layers", "4"], "--layers 4: the teacher has 3; give 1 to 3"),
        (["--teacher", str(tmp_path / "nothing")], f"--teacher {tmp_path / 'nothing'}: is no text encoder"),
        (["--teacher", str(teacher), "--vocabulary-size", "10"], "--vocabulary-size 10: not allowed"),
        (["--teacher", str(teacher), "--texts", str(tmp_path / "no.txt")], "no such data"),
    ):
        assert main([*words, *more]) == 2, more
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, (more, error)
    assert not (tmp_path / "run").exists()
    run = train_run(tmp_path / "run", recipe_for(teacher, texts, epochs=1), save_every_steps=0)
    assert main(["evaluate", str(run.path)]) == 2
    assert "is a distillation" in capsys.readouterr().err
    assert main(["export", str(run.path), "--output", str(tmp_path / "model.pt")]) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "model.pt"), "a text"]) == 2
    assert "an encoder without a head, which predicts nothing" in capsys.readouterr().err


def test_a_teacher_that_is_another_now_is_refused(tmp_path, teacher, texts):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    run = train_run(tmp_path / "run", recipe_for(folder, texts, epochs=1), save_every_steps=0)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["embeddings.word_embeddings.weight"] *= -1.5
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(RunError, match="is not the one that the run began with"):
        resume_run(run, epochs=2, lr=1e-4)
    shutil.copyfile(teacher / "model.safetensors", path)
    resume_run(run, epochs=2, lr=1e-4)


def test_a_distilbert_is_a_teacher_too(tmp_path, texts):
    folder = make_encoder(tmp_path / "teacher", "distilbert")
    recipe = recipe_for(folder, texts, layers=1, epochs=1)
    smaller, _, tensors = pretrained(recipe)
    assert smaller.options["config"]["n_layers"] == 1 and not any(".layer.1." in name for name in tensors)
    run = train_run(tmp_path / "run", recipe, save_every_steps=0)
    assert export_folder(run, "latest", tmp_path / "small", half=False).largest_difference < 1e-5


def test_a_file_without_texts_says_so(tmp_path, teacher):
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(UsageError, match="is empty; give a line a text"):
        train_run(tmp_path / "run", recipe_for(teacher, tmp_path / "none.txt"))
