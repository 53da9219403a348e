"""The kit on a real, public sentence encoder: all-MiniLM-L6-v2, out of a wheel on the package index."""

import dataclasses
import shutil
import statistics

import pytest
import torch
import transformers
from conftest import assert_equal_runs, read, train_run, train_with_deaths
from encoders import text_recipe, write_csv
from safetensors.torch import load_file

from finetune.data.open import open_source
from finetune.data.texts import bundled_file, open_texts
from finetune.data.tokens import PADDING
from finetune.export.hf_folder import export_folder
from finetune.export.weights import export
from finetune.features.cache import entries
from finetune.features.feature_file import RowFile, read_layout
from finetune.models.pretrained import find_pretrained
from finetune.recipe.scripts import load_recipe_function, shipped_recipes
from finetune.store.restore import backbone_of_run, trained_network
from finetune.training.dataset import open_data


def kept_features(recipe) -> torch.Tensor:
    """(texts, 384): what the head was trained on, a few of them held against the mean of the tokens that transformers
    gives."""
    (entry,) = entries()
    file = RowFile(entry.path, read_layout(entry.path))
    features = torch.zeros(file.layout.count, file.layout.width)
    for block in range(file.layout.blocks):
        rows = file.rows_of(block)
        assert file.read_block(block, features[rows.start : rows.stop])
    file.close()
    tokenizer = transformers.AutoTokenizer.from_pretrained(recipe.model.backbone)
    model = transformers.AutoModel.from_pretrained(recipe.model.backbone).eval()
    texts = open_source(recipe.data, recipe.task.kind).texts
    for number in range(0, len(texts), 50):
        tokens = tokenizer(
            texts[number], truncation=True, max_length=recipe.data.max_length or 256, return_tensors="pt"
        )
        with torch.inference_mode():
            mean = model(**tokens).last_hidden_state.mean(1)[0]
        torch.testing.assert_close(features[number], mean, rtol=0, atol=1e-5)
    return features


@pytest.mark.slow
@pytest.mark.parametrize("name", ["messages", "news"])
def test_a_head_is_within_half_a_point_of_logistic_regression_on_the_same_features(
    tmp_path, minilm_folder, news_folder, monkeypatch, name
):
    """The recipe as it comes, against scikit-learn with its own defaults; the mean over three splits, since half a point
    of one is two texts."""
    from sklearn.linear_model import LogisticRegression

    place, length = {"messages": ("messages", 0), "news": (str(news_folder), 40)}[name]
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "features"))
    function = load_recipe_function(shipped_recipes()["bert_head"])
    ours, theirs, features = [], [], None
    for seed in range(3):
        recipe = function(texts=place, backbone=str(minilm_folder), max_length=length, seed=seed)
        state = read(train_run(tmp_path / str(seed), recipe, save_every_steps=0))
        assert state["network"]["backbone"]["options"]["pooling"] == "mean"  # as its own folder says
        ours.append(state["metrics"]["last_validation"]["val/accuracy"])
        features = kept_features(recipe) if features is None else features
        data = open_data(recipe, find_pretrained(recipe)[0])
        parts = [(features[part].numpy(), data.source.targets[part].numpy()) for part in data.split[:2]]
        theirs.append(LogisticRegression(max_iter=5_000).fit(*parts[0]).score(*parts[1]))
    assert statistics.mean(ours) >= statistics.mean(theirs) - 0.005
    assert statistics.mean(ours) > 0.9


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A hundred of the messages."""
    source = open_texts(str(bundled_file()), "classification")
    rows = [(source.texts[n], source.classes[source.targets[n]]) for n in range(100)]
    return write_csv(tmp_path_factory.mktemp("few") / "few.csv", rows)


@pytest.mark.slow
def test_killed_and_resumed_it_ends_bit_for_bit_and_its_frozen_tensors_are_those_of_the_file(
    tmp_path, minilm_folder, few
):
    folder = shutil.copytree(minilm_folder, tmp_path / "model")
    recipe = text_recipe(few, folder)
    unbroken = train_run(tmp_path / "unbroken", recipe)
    interrupted = train_with_deaths(tmp_path / "interrupted", recipe, [2, 5, 7])
    assert_equal_runs(interrupted, unbroken)
    shutil.rmtree(folder)
    network, _ = trained_network(interrupted, "latest")
    tensors = network.module.state_dict()
    pretrained = load_file(minilm_folder / "model.safetensors")
    compared = [name for name in pretrained if not name.startswith("pooler") and "position_ids" not in name]
    assert len(compared) > 90
    for name in compared:
        assert torch.equal(tensors[f"bert.{name}"], pretrained[name]), name


@pytest.mark.slow
def test_with_stock_pooling_its_export_is_a_stock_model_with_equal_logits(tmp_path, minilm_folder, few):
    run = train_run(tmp_path / "run", text_recipe(few, minilm_folder, pooling="stock", epochs=1), save_every_steps=0)
    network, state = trained_network(run, "latest")
    backbone = backbone_of_run(run, state)
    texts = ["my parcel never came", "you charged me twice for one lamp, and now your support is silent"]
    tokens = backbone.preprocessing.tokenize(texts).batch([0, 1])
    export(run, "latest", tmp_path / "model.pt")
    folder = export_folder(run, "latest", tmp_path / "hf", half=False).folder
    with torch.inference_mode():
        ours = network.module.eval()(tokens)
        inputs = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
        assert torch.equal(inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, PADDING), tokens)
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        stock = transformers.AutoModelForSequenceClassification.from_config(loaded.config).eval()
        stock.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
        for model in (loaded, stock):
            torch.testing.assert_close(model(**inputs).logits, ours, rtol=0, atol=1e-5 * max(1, ours.abs().max()))
    classify = transformers.pipeline("text-classification", model=str(folder))
    assert classify(texts[0])[0]["label"] == state.data.classes[int(ours[0].argmax())]
    assert dataclasses.replace(backbone, name="").reads_texts
