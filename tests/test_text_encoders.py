"""Text encoders of transformers of every family, small, from local folders in the format of its hub."""

import copy
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    DyingTerminal,
    Killed,
    assert_equal_runs,
    assert_equal_values,
    finish,
    read,
    resume_run,
    start_in,
    train_run,
)
from conftest import finetune as run_finetune
from encoders import (
    FAMILIES,
    LACKING,
    SIZES,
    VOCABULARY,
    make_encoder,
    make_tokenizer,
    sentences,
    text_recipe,
    write_csv,
)
from safetensors.torch import load_file

import finetune
from finetune import RunError, UsageError, text_head
from finetune.cli import main
from finetune.data.tokens import PADDING
from finetune.export.hf_folder import export_folder
from finetune.export.weights import export
from finetune.models.backbones import find_text_backbone
from finetune.models.pretrained import find_pretrained
from finetune.models.stock import reason_against_folder
from finetune.store.restore import trained_network
from finetune.store.run_folder import RunFolder
from finetune.training.dataset import open_data
from finetune.training.phase import cut


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: make_encoder(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("texts") / "texts.csv", sentences(120))


def network_of(recipe):
    from finetune.models.pretrained import new_network

    backbone, weights = find_pretrained(recipe)
    data = open_data(recipe, backbone)
    return new_network(recipe, backbone, weights, data.output_count), backbone, data


def lacking_modules(folder) -> set[str]:
    """As transformers itself counts them."""
    _, found = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    return {name.rpartition(".")[0] for name in found["missing_keys"]}


# A family of each way to a head; the others are slow where a run of each is trained.
USUAL = ("minilm", "distilbert", "roberta", "deberta-v2", "albert")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_trains_is_exactly_what_the_pretrained_file_lacks(folders, texts, family):
    recipe = text_recipe(texts, folders[family], pooling="stock")
    network, *_ = network_of(recipe)
    names = network.freeze_map(recipe.trainable).at(0).apply()
    assert {name.rpartition(".")[0] for name in names} == LACKING[family] == lacking_modules(folders[family])


@pytest.mark.parametrize(
    "family", [one if one in USUAL else pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES]
)
def test_a_family_trains_resumes_without_its_folder_and_its_export_loads_into_transformers(
    tmp_path, folders, texts, family
):
    folder = shutil.copytree(folders[family], tmp_path / "model")
    recipe = text_recipe(texts, folder, pooling="stock")
    with pytest.raises(Killed):
        train_run(tmp_path / "run", recipe, die_after_steps=2)
    shutil.rmtree(folder)
    run = RunFolder(tmp_path / "run")
    resume_run(run)
    network, _ = trained_network(run, "latest")

    report = export(run, "latest", tmp_path / "model.pt")
    assert not report.seen.error and report.seen.alike == report.seen.samples
    scope: dict = {"__name__": "receiver"}
    exec(report.program, scope)  # as printed
    assert "ForSequenceClassification" in type(scope["model"]).__name__
    inputs = scope["tokenizer"](["a text", "my dog was"], padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    tokens = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, PADDING)
    scope["logits"] = scope["model"](**inputs).logits.detach()
    with torch.inference_mode():
        ours, rebuilt = network.module(tokens), finetune.load(tmp_path / "model.pt")(tokens)
    torch.testing.assert_close(ours, scope["logits"], rtol=0, atol=1e-5)
    assert torch.equal(scope["logits"], rebuilt)

    hf = export_folder(run, "latest", tmp_path / "hf", half=False).folder
    classify = transformers.pipeline("text-classification", model=str(hf), top_k=None)
    found = {row["label"]: row["score"] for row in classify(["a text"])[0]}
    assert set(found) == {"animal", "tool"}
    assert found["tool"] == pytest.approx(ours.softmax(1)[0, 1].item(), abs=1e-5)

    shutil.copytree(folders[family], folder)
    assert_equal_runs(run, train_run(tmp_path / "unbroken", recipe))


@pytest.mark.parametrize(
    ("family", "pooling"),
    [
        pytest.param(family, pooling, marks=() if family in USUAL or pooling == "stock" else pytest.mark.slow)
        for family in FAMILIES
        for pooling in ("stock", "mean", "cls")
    ],
)
def test_the_encoder_runs_once_and_padding_does_not_show_in_its_features(folders, texts, family, pooling):
    recipe = text_recipe(texts, folders[family], pooling=pooling)
    network, backbone, data = network_of(recipe)
    freeze = network.freeze_map(recipe.trainable).at(0)
    freeze.apply()
    freeze.modes()
    found = cut(network.module, backbone, torch.device("cpu"))
    assert found.width == 48
    order = data.pipeline.lengths.argsort()
    both = order[[0, -1]].tolist()  # two words, and twenty-two
    with torch.inference_mode():
        together = found.prefix(data.pipeline.table.batch(both))
        alone = torch.cat([found.prefix(data.pipeline.table.batch([index])) for index in both])
        assert (together - alone).abs().max() / alone.abs().max() < 1e-5
        network.module.eval()
        whole = network.module(data.pipeline.table.batch(both))
        assert (found.suffix(together) - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_mean_pooling_is_that_of_the_tokens_without_padding(folders, texts):
    network, backbone, _ = network_of(text_recipe(texts, folders["bert"], pooling="mean", head="linear"))
    tokens = backbone.preprocessing.tokenize(["my dog", "the very old horse we had was near"]).batch([0, 1])
    model = transformers.AutoModel.from_pretrained(folders["bert"]).eval()
    short = tokens[0][tokens[0] != PADDING]
    with torch.inference_mode():
        wanted = model(short[None]).last_hidden_state[0].mean(0)
        seen = []
        network.module.classifier.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        network.module.eval()(tokens)
    torch.testing.assert_close(seen[0][0], wanted, rtol=0, atol=1e-6)


# ---- Pooling: auto ----------------------------------------------------------------------------------------------------


def pooling_of(folder, texts, pooling="auto"):
    return find_pretrained(text_recipe(texts, folder, pooling=pooling))[0].options["pooling"]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_auto_is_stock_only_where_the_stock_class_would_train_no_pooler_from_nothing(folders, texts, family):
    assert pooling_of(folders[family], texts) == ("stock" if LACKING[family] == {"classifier"} else "mean")


def test_auto_follows_the_file_of_sentence_transformers(tmp_path, folders, texts):
    for mode in ("mean", "cls"):
        folder = shutil.copytree(folders["bert"], tmp_path / mode)
        (folder / "1_Pooling").mkdir()
        modes = {"pooling_mode_mean_tokens": mode == "mean", "pooling_mode_cls_token": mode == "cls"}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
        assert pooling_of(folder, texts) == mode
        assert pooling_of(folder, texts, "stock") == "stock"


def test_a_bert_without_a_pooler_trains_one_when_stock_pooling_is_asked_for_and_still_keeps_features(tmp_path, texts):
    folder = make_encoder(tmp_path / "model", "bert", pooler=False)
    assert pooling_of(folder, texts) == "mean"
    recipe = text_recipe(texts, folder, pooling="stock")
    network, *_ = network_of(recipe)
    names = network.freeze_map(recipe.trainable).at(0).apply()
    assert {name.rpartition(".")[0] for name in names} == {"bert.pooler.dense", "classifier"}
    run = train_run(tmp_path / "run", recipe)
    assert read(run)["frozen"]["features_kept"]
    assert_equal_values(read(run)["network"]["new_paths"], ["bert.pooler.dense"])
    assert export(run, "latest", tmp_path / "model.pt").largest_difference < 1e-5


def test_a_folder_that_was_trained_to_classify_keeps_all_but_its_last_layer(tmp_path, folders, texts):
    folder = tmp_path / "model"
    config = transformers.AutoConfig.from_pretrained(folders["distilbert"], num_labels=5)
    torch.manual_seed(0)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    make_tokenizer(folder)
    recipe = text_recipe(texts, folder)
    network, backbone, _ = network_of(recipe)
    assert backbone.options["pooling"] == "stock" and network.new_paths == ()
    names = network.freeze_map(recipe.trainable).at(0).apply()
    assert set(names) == {"classifier.weight", "classifier.bias"}


# ---- What cannot be done ------------------------------------------------------------------------------------------------


def test_training_inside_the_encoder_says_that_nothing_is_kept(tmp_path, folders, texts):
    rules = (("head", "trainable", 0), ("bert.encoder.layer.1", "trainable", 0), ("*", "frozen", 0))
    recipe = text_recipe(texts, folders["bert"], epochs=1)
    recipe = dataclasses.replace(recipe, trainable=finetune.Trainable(rules=rules))
    terminal = DyingTerminal()
    from finetune.recipe.execution import Machine, Numerics, Settings

    run, _ = start_in(tmp_path / "run", "x", recipe, Numerics(), Machine("cpu"), Settings(), terminal)
    assert any(
        "not kept, the backbone runs in every epoch, because of a model of transformers" in line
        for line in terminal.lines
    )
    first = read(run, "step-000006.pt")
    assert any(name.startswith("bert.encoder.layer.1") for name in first["model"])


def test_with_another_pooling_the_folder_is_an_encoder_with_its_head_beside_it(tmp_path, folders, texts):
    run = train_run(tmp_path / "run", text_recipe(texts, folders["bert"], pooling="mean", epochs=1))
    report = export_folder(run, "latest", tmp_path / "hf", half=False)
    assert report.seen.alike == report.seen.samples == 16 and "SentenceTransformer(" in report.text()
    kinds = [one["type"] for one in json.loads((tmp_path / "hf" / "modules.json").read_text())]
    assert kinds == ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
    assert json.loads((tmp_path / "hf" / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"]
    head, network = load_file(tmp_path / "hf" / "head.safetensors"), trained_network(run, "latest")[0]
    tokens = torch.tensor([[2, 50, 40, 3]])
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "hf")
    with torch.inference_mode():
        features = encoder(input_ids=tokens).last_hidden_state.mean(1)
        logits = features @ head["weight"].T + head["bias"]
        torch.testing.assert_close(logits, network.module(tokens), rtol=0, atol=1e-5)
    export(run, "latest", tmp_path / "model.pt")
    description = json.loads((tmp_path / "model.json").read_text())
    assert "averaged" in description["preprocessing_text"] and description["architecture"]["stock"] is False


@pytest.mark.parametrize("head", ["mlp", "append"])
def test_a_head_that_transformers_has_no_class_for_is_refused_for_a_folder_with_the_reason(tmp_path, head):
    recipe = text_head(texts="messages", backbone="bundled/bert", pooling="stock", head=head)
    backbone, _ = find_text_backbone("bundled/bert", "stock")
    assert "no class of transformers has a head of kind" in reason_against_folder(recipe, backbone)


@pytest.mark.parametrize(
    ("break_folder", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink() or (folder / "tokenizer_config.json").unlink(), "holds no tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no .safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "its config.json cannot be used"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'), "is no text encoder with a classification class"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"nonsense"), "its weights cannot be read"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_used_says_why_in_one_line(tmp_path, folders, texts, break_folder, words, capsys):
    folder = shutil.copytree(folders["roberta"], tmp_path / "model")
    break_folder(folder)
    assert main(["bert_head", "--texts", str(texts), "--backbone", str(folder), "--run", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_cached_says_what_to_do_in_one_line(tmp_path, texts, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = ["bert_head", "--texts", str(texts), "--backbone", "nobody/no-such-bert", "--revision", "v1"]
    assert main([*words, "--run", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "nobody/no-such-bert@v1: not cached and cannot be fetched" in said and "hf download" in said
    assert said.count("\n") == 1


def test_a_longer_text_than_the_backbone_has_positions_for_is_refused(folders, texts):
    for family, limit in (("bert", 40), ("roberta", 39), ("xlm-roberta", 38)):
        with pytest.raises(UsageError, match=f"this backbone takes 3 to {limit} tokens"):
            find_pretrained(text_recipe(texts, folders[family], max_length=limit + 1))
        assert find_pretrained(text_recipe(texts, folders[family]))[0].preprocessing.max_length == limit


def test_an_image_backbone_for_texts_and_the_other_way_round_are_refused(folders, texts):
    with pytest.raises(UsageError, match="bundled/vgg: is no text encoder"):
        find_pretrained(text_recipe(texts, "bundled/vgg"))
    recipe = finetune.Recipe(model=finetune.Model(str(folders["bert"])), data=finetune.Images("digits"))
    with pytest.raises(UsageError, match="a bert has no image classification class"):
        find_pretrained(recipe)


def test_a_tokenizer_that_was_swapped_in_a_run_is_found(tmp_path, folders, texts):
    run = train_run(tmp_path / "run", text_recipe(texts, folders["bert"], epochs=1))
    file = run.tokenizer / "tokenizer.json"
    file.write_text(file.read_text().replace('"cat"', '"cap"'))
    with pytest.raises(RunError, match="does not hold the tokenizer that it did"):
        resume_run(run, epochs=2)


# ---- Encoders with ways of their own ------------------------------------------------------------------------------------


def folder_of(path, config, **tokenizer_settings):
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(path)
    make_tokenizer(path)
    settings = json.loads((path / "tokenizer_config.json").read_text()) | tokenizer_settings
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def test_a_tokenizer_that_pads_and_cuts_on_the_left_is_made_to_do_as_the_kit_does(tmp_path, texts, capsys):
    sides = {"padding_side": "left", "truncation_side": "left"}
    folder = folder_of(tmp_path / "model", FAMILIES["bert"], **sides, auto_map={"AutoTokenizer": ["x.Y", None]})
    run = train_run(tmp_path / "run", text_recipe(texts, folder, pooling="stock", max_length=8))
    hf = export_folder(run, "latest", tmp_path / "hf", half=False).folder
    export(run, "latest", tmp_path / "model.pt")
    for place in (hf, tmp_path / "model-tokenizer"):
        settings = json.loads((place / "tokenizer_config.json").read_text())
        assert (settings["padding_side"], settings["truncation_side"]) == ("right", "right")
        assert "auto_map" not in settings
    asked = ["a cat was", "the old hammer and the saw and the nail were near the dog"]
    assert main(["predict", str(tmp_path / "model.pt"), *asked]) == 0
    ours = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    classify = transformers.pipeline("text-classification", model=str(hf))
    for one, other in zip(ours, classify(asked, truncation=True, padding=True), strict=True):
        assert one["label"] == other["label"] and one["probability"] == pytest.approx(other["score"], abs=1e-5)


def test_a_config_that_returns_tuples_and_hidden_states_is_an_encoder_like_others(tmp_path, texts):
    config = copy.deepcopy(FAMILIES["bert"])
    config.output_hidden_states, config.return_dict = True, False
    folder = folder_of(tmp_path / "model", config)
    for pooling in ("stock", "mean"):
        recipe = text_recipe(texts, folder, pooling=pooling, epochs=1)
        assert read(train_run(tmp_path / pooling, recipe))["frozen"]["features_kept"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.ConvBertConfig(**SIZES, embedding_size=48), "depends on the texts beside it"),
        (transformers.XLNetConfig(vocab_size=len(VOCABULARY), d_model=48, n_layer=2, n_head=2, d_inner=32), "depends on the texts beside it"),
        (transformers.GPT2Config(vocab_size=len(VOCABULARY), n_embd=48, n_layer=2, n_head=2, n_positions=40), "give another encoder"),
        (transformers.BartConfig(vocab_size=len(VOCABULARY), d_model=48, encoder_layers=1, decoder_layers=1), "is no text encoder"),
        (transformers.CanineConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32), "has no vocabulary"),
    ],
    ids=["padding shows", "XLNet", "GPT-2", "BART", "characters"],
)  # fmt: skip
def test_what_is_no_encoder_of_padded_texts_is_refused_in_one_line(tmp_path, texts, config, words, capsys):
    folder = folder_of(tmp_path / "model", config)
    capsys.readouterr()
    command = ["bert_head", "--texts", str(texts), "--backbone", str(folder), "--run", str(tmp_path / "run")]
    assert main([*command, "--pooling", "stock"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1, said
    assert not (tmp_path / "run").exists()


def test_a_wrong_name_of_a_shipped_or_an_image_backbone_is_not_looked_for_on_the_hub(texts):
    for name in ("bundled/brt", "vgg16", "bundled/resnet"):
        with pytest.raises(UsageError, match=f"{name}: is no text encoder; give bundled/bert"):
            find_pretrained(text_recipe(texts, name))


def test_another_runs_weights_come_with_its_pooling(tmp_path, folders, texts):
    run = train_run(tmp_path / "run", text_recipe(texts, folders["bert"], pooling="stock", epochs=1))
    with pytest.raises(RunError, match="pools by 'stock', not 'cls'"):
        train_run(tmp_path / "x", text_recipe(texts, folders["bert"], pooling="cls"), init_from=str(run.path))


@pytest.mark.slow
def test_a_model_of_the_hub_by_its_plain_name_resumes_though_its_cache_is_another_disk(tmp_path, folders, texts):
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(dir=shm) as cache:
        model = Path(cache) / "models--own--tiny"
        shutil.copytree(folders["bert"], model / "snapshots" / "abc")
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("abc")
        environment = os.environ | {"HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        words = ["bert_head", "--texts", str(texts), "--backbone", "own/tiny", "--epochs", "1", "--quiet"]
        finish(run_finetune(*words, "--run", str(tmp_path / "run"), env=environment))
        record = json.loads((tmp_path / "run" / "frozen" / "frozen.json").read_text())
        assert (record["file"], record["reference"]) == ("", "hf:own/tiny")
        finish(run_finetune("resume", str(tmp_path / "run"), "--epochs", "2", "--quiet", env=environment))


def test_a_folder_with_other_things_in_it_is_never_replaced(tmp_path, folders, texts):
    run = train_run(tmp_path / "run", text_recipe(texts, folders["bert"], pooling="stock", epochs=1))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "finetune.json").write_text('{"mine": 1}')
    for extra in (None, "thesis.txt"):
        if extra:
            (mine / extra).write_text("do not touch")
        with pytest.raises(UsageError, match="holds something else"):
            export_folder(run, "latest", mine, half=False)
    folder = export_folder(run, "latest", tmp_path / "hf", half=False).folder
    (folder / ".git").mkdir()
    with pytest.raises(UsageError, match=r"holds something else \(\.git\)"):
        export_folder(run, "latest", folder, half=False)
    assert (mine / "thesis.txt").read_text() == "do not touch" and (folder / ".git").is_dir()
    (folder / ".git").rmdir()
    assert export_folder(run, "latest", folder, half=False).largest_difference < 1e-5
