"""Text encoders, tokenizers and exports that somebody else made, perhaps to do harm."""

import json
import shutil

import pytest
import torch
from conftest import train_run
from encoders import make_encoder, sentences, text_recipe, write_csv
from test_hostile import NAMES, gadgets, hostile_bytes

import finetune
from finetune import RunError
from finetune.cli import main
from finetune.export.weights import export


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("texts") / "texts.csv", sentences(60))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("exported")
    encoder = make_encoder(folder / "encoder")
    run = train_run(folder / "run", text_recipe(texts, encoder, pooling="stock", epochs=1), save_every_steps=0)
    export(run, "latest", folder / "model.pt")
    return folder


@pytest.fixture
def copied(exported, tmp_path):
    for name in ("model.pt", "model.json"):
        shutil.copyfile(exported / name, tmp_path / name)
    shutil.copytree(exported / "model-tokenizer", tmp_path / "model-tokenizer")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_whose_weights_would_run_code_is_refused_and_runs_nothing(tmp_path, exported, texts, capsys, name):
    folder = shutil.copytree(exported / "encoder", tmp_path / "encoder")
    (folder / "model.safetensors").unlink()
    gadget = gadgets(tmp_path / "ran")[name]
    (folder / "pytorch_model.bin").write_bytes(hostile_bytes(gadget, "zip"))
    words = ["bert_head", "--texts", str(texts), "--backbone", str(folder), "--run", str(tmp_path / "run")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "its weights cannot be read" in said and said.count("\n") == 1
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


def test_a_folder_that_asks_for_code_of_its_own_gets_none_run(tmp_path, exported, texts):
    folder = shutil.copytree(exported / "encoder", tmp_path / "encoder")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Model", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    words = ["bert_head", "--texts", str(texts), "--backbone", str(folder), "--run", str(tmp_path / "run")]
    assert main([*words, "--epochs", "1", "--quiet"]) == 0
    assert not (tmp_path / "ran").exists()


def changed(description, **changes):
    return json.dumps(description | changes | {"checksum": ""})


def test_a_description_that_asks_for_foreign_code_builds_the_plain_network(copied):
    description = json.loads(copied.with_suffix(".json").read_text())
    before = finetune.load(copied).state_dict()
    config = description["architecture"]["options"]["config"]
    config |= {"auto_map": {"AutoModelForSequenceClassification": "evil.Model"}, "_attn_implementation": "evil/kernel"}
    config |= {"attn_implementation": "evil/kernel", "quantization_config": {"quant_method": "evil"}}
    copied.with_suffix(".json").write_text(changed(description))
    after = finetune.load(copied).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 10**9}, {"max_length": -1}, {"max_length": "x"}, {"most_tokens": None},
        {"vocabulary_size": 0}, {"sha256": 7}, {"unknown": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_description_whose_tokenizer_makes_no_sense_is_one_error(copied, change):
    description = json.loads(copied.with_suffix(".json").read_text())
    preprocessing = description["preprocessing"] | change
    copied.with_suffix(".json").write_text(changed(description, preprocessing=preprocessing))
    with pytest.raises(RunError, match="describes no network"):
        finetune.load(copied)


@pytest.mark.parametrize(
    "change",
    [
        {"pooling": "evil"}, {"pooling": ["mean"]}, {"config": {}}, {"config": {"model_type": "../../x"}},
        {"config": "x"}, {"config": {"model_type": "bert", "hidden_size": 10**7}},
    ],
    ids=str,
)  # fmt: skip
def test_a_description_of_no_text_encoder_is_one_error(copied, change):
    description = json.loads(copied.with_suffix(".json").read_text())
    description["architecture"]["options"] |= change
    copied.with_suffix(".json").write_text(changed(description))
    with pytest.raises(RunError):
        finetune.load(copied)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_found(copied, name, capsys):
    path = copied.with_name("model-tokenizer") / name
    content = path.read_bytes()
    for damaged in (content[:-20], content.replace(b"e", b"f", 1), b"", b"\xff" + content):
        path.write_bytes(damaged)
        assert main(["predict", str(copied), "a cat"]) == 1
        said = capsys.readouterr().err
        assert "tokenizer" in said and said.count("\n") == 1, said


def test_texts_and_labels_with_escape_codes_are_shown_not_obeyed(tmp_path, exported, capsys):
    rows = [("\x1b[31mred\x07 cat\r", "\x1b]0;title\x07"), ("saw\u202e", "plain")] * 12
    place = write_csv(tmp_path / "t.csv", rows)
    words = ["bert_head", "--texts", str(place), "--backbone", str(exported / "encoder"), "--epochs", "1"]
    assert main([*words, "--run", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "model.pt")]) == 0
    assert main(["predict", str(tmp_path / "model.pt"), rows[0][0], str(place)]) == 0
    said = capsys.readouterr()
    assert not any(one in said.out + said.err for one in ("\x1b", "\x07", "\u202e"))
