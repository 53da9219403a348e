"""What ships inside the wheel is what its cards say."""

import functools
import re
import statistics
from importlib import resources
from pathlib import Path

import pytest
import torch
import transformers
from conftest import DyingTerminal, read, start_in

from finetune import ImageTraining, Training
from finetune.base.files import sha256_of_file
from finetune.data.texts import open_texts
from finetune.models.backbones import find_text_backbone
from finetune.models.pretrained import find_pretrained
from finetune.recipe.execution import Numerics, Settings
from finetune.recipe.scripts import load_recipe_function, shipped_recipes
from finetune.runs.start import Machine
from finetune.training.dataset import open_data

BUNDLED = Path(str(resources.files("finetune"))) / "bundled"
FILES = sorted(path for path in BUNDLED.iterdir() if path.suffix in (".safetensors", ".npz", ".csv"))
BERT = BUNDLED / "bert"


COUNTS = (
    {"ngram_range": (1, 1)},
    {"ngram_range": (1, 2), "sublinear_tf": True},
    {"analyzer": "char_wb", "ngram_range": (2, 5)},
)


def accuracy_of_counting(data, **options) -> float:
    """Of tf-idf and LogisticRegression, on the validation part."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    parts = [([data.source.texts[n] for n in part.tolist()], data.source.targets[part]) for part in data.split[:2]]
    model = make_pipeline(TfidfVectorizer(**options), LogisticRegression(C=10, max_iter=2_000))
    return model.fit(*parts[0]).score(*parts[1])


def test_every_file_has_a_card_with_its_sha256_source_and_licence():
    assert [path.name for path in FILES] == [
        "digits.npz", "messages.csv", "mobilenet.safetensors", "resnet.safetensors", "vgg.safetensors"
    ]  # fmt: skip
    cards = {path: path.with_suffix(".md") for path in FILES} | {BERT / "model.safetensors": BUNDLED / "bert.md"}
    for path, card_file in cards.items():
        card = card_file.read_text(encoding="utf-8")
        assert sha256_of_file(path) in card, path.name
        assert re.search(r"(?i)licen[cs]e", card) and re.search(r"(?i)how .*made|command", card), path.name


def test_the_bert_is_a_plain_one_of_twelve_megabytes_at_most_that_transformers_loads():
    assert sum(path.stat().st_size for path in BERT.rglob("*") if path.is_file()) <= 12_000_000
    assert all(path.suffix in (".json", ".safetensors") for path in BERT.rglob("*") if path.is_file())
    model, found = transformers.AutoModel.from_pretrained(BERT, output_loading_info=True, dtype=torch.float32)
    assert type(model) is transformers.BertModel
    # Without a pooler: nothing would read it.
    assert {name.partition(".")[0] for name in found["missing_keys"]} == {"pooler"} and not found["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(BERT)
    tokens = tokenizer("My parcel never came!")["input_ids"]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "my parcel never came!"
    ours, _ = find_text_backbone("bundled/bert", "auto")
    assert ours.options["pooling"] == "mean"
    assert ours.preprocessing.tokenize(["My parcel never came!"]).tokens.tolist() == tokens


@pytest.mark.slow
def test_with_twenty_labels_an_intent_a_head_on_the_bert_is_better_than_counting_words_and_than_a_random_one(tmp_path):
    """Twenty points better than counts and seven than a random one in the mean over seeds, says the card."""
    function = functools.partial(
        load_recipe_function(shipped_recipes()["bert_head"]), training=Training(train_samples=160)
    )
    accuracy = {}
    for weights in ("default", "none"):
        run, _ = start_in(
            tmp_path / weights, "x", function(weights=weights), Numerics(), Machine("cpu"), Settings(), DyingTerminal()
        )
        accuracy[weights] = read(run)["metrics"]["last_validation"]["val/accuracy"]
    data = open_data(function(), find_pretrained(function())[0])
    assert accuracy["default"] > accuracy_of_counting(data) + 0.1
    assert accuracy["default"] > accuracy["none"] + 0.04


@pytest.mark.slow
def test_counting_words_does_not_solve_the_messages():
    function = load_recipe_function(shipped_recipes()["bert_head"])
    for seed in range(3):
        data = open_data(function(seed=seed), find_pretrained(function())[0])
        assert all(accuracy_of_counting(data, **options) <= 0.9 for options in COUNTS)


@pytest.mark.slow
def test_the_bert_keeps_nine_tenths_of_its_teachers_margin_over_an_untrained_twin(tmp_path, minilm_folder, news_folder):
    """On news that neither was trained on; the recipe as it comes, the mean over three splits."""
    function = load_recipe_function(shipped_recipes()["bert_head"])
    encoders = {"teacher": {"backbone": str(minilm_folder)}, "student": {}, "twin": {"weights": "none"}}
    accuracy = {}
    for name, options in encoders.items():
        found = []
        for seed in range(3):
            recipe = function(texts=str(news_folder), max_length=128, seed=seed, **options)
            path = tmp_path / f"{name}{seed}"
            run, _ = start_in(path, "x", recipe, Numerics(), Machine("cpu"), Settings(), DyingTerminal())
            found.append(read(run)["metrics"]["last_validation"]["val/accuracy"])
        accuracy[name] = statistics.mean(found)
    margin = accuracy["teacher"] - accuracy["twin"]
    assert margin > 0.05 and accuracy["student"] - accuracy["twin"] >= 0.9 * margin


def test_no_two_of_the_messages_are_alike():
    source = open_texts("messages", "classification")
    counts = torch.bincount(source.targets)
    assert len(source.texts) >= 800 and len(source.classes) == 8 and counts.min() >= 100
    words = [set(re.findall(r"[a-z0-9']+", text.lower())) for text in source.texts]
    assert len({frozenset(one) for one in words}) == len(words)
    place = {word: number for number, word in enumerate(sorted(set.union(*words)))}
    matrix = torch.zeros(len(words), len(place))
    for row, one in zip(matrix, words, strict=True):
        row[[place[word] for word in one]] = 1
    shared = matrix @ matrix.T
    sizes = shared.diagonal()
    likeness = shared / (sizes[:, None] + sizes[None] - shared)
    assert (likeness - torch.eye(len(words))).max() <= 0.6


def test_the_backbones_for_images_together_are_under_nine_megabytes():
    assert sum(path.stat().st_size for path in FILES if path.suffix == ".safetensors") < 9_000_000


@pytest.mark.parametrize("name", ["vgg_head", pytest.param("resnet_head", marks=pytest.mark.slow)])
def test_a_linear_head_on_the_pretrained_backbone_reads_the_digits(name, tmp_path):
    recipe = load_recipe_function(shipped_recipes()[name])()
    run, _ = start_in(tmp_path / "run", name, recipe, Numerics(), Machine("cpu"), Settings(), DyingTerminal())
    assert read(run)["metrics"]["last_validation"]["val/accuracy"] >= 0.98


@pytest.mark.parametrize("name", ["vgg_head", pytest.param("resnet_head", marks=pytest.mark.slow)])
def test_with_fifty_labels_the_pretrained_backbone_reads_the_digits_better_than_a_random_one(name, tmp_path):
    function = load_recipe_function(shipped_recipes()[name])
    accuracy = {}
    for weights in ("default", "none"):
        recipe = function(weights=weights, epochs=30, training=ImageTraining(train_samples=50))
        run, _ = start_in(tmp_path / weights, name, recipe, Numerics(), Machine("cpu"), Settings(), DyingTerminal())
        accuracy[weights] = read(run)["metrics"]["last_validation"]["val/accuracy"]
    assert accuracy["default"] >= 0.9
    # Twelve points in the mean over seeds, says the card; one seed is eight to six away.
    assert accuracy["default"] > accuracy["none"] + 0.04
