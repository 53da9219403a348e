"""Weights as other people's training scripts write them: the network is found, what is over is left aside and named."""

import argparse
import copy
import datetime
import json
import sys
import time
from collections import OrderedDict, defaultdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import transformers
from encoders import make_encoder, sentences, write_csv
from safetensors.torch import save_file
from torchvision.models import get_model

import finetune
from finetune import RunError, UsageError, image_head
from finetune.base.files import BadFile
from finetune.cli import main
from finetune.models.state_dicts import pick
from finetune.models.weight_files import read_weights
from finetune.models.weights import load_backbone_weights
from finetune.store.restore import trained_network
from finetune.store.run_folder import RunFolder

from conftest import read, train_run  # isort: skip

NAME = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(0)
    return get_model(NAME, num_classes=7)


def below(prefix: str, state) -> dict:
    return OrderedDict((prefix + name, value) for name, value in state.items())


def other_numbers(state) -> dict:
    return OrderedDict((name, value + 1 if value.is_floating_point() else value) for name, value in state.items())


def bodies(state) -> dict:
    return OrderedDict((name, value) for name, value in state.items() if not name.startswith("fc."))


class AttributeDict(dict):
    """As Lightning keeps hyperparameters: a dict of its own, of a package that is not here."""

    __module__ = "lightning.fabric.utilities.data"


@pytest.fixture
def lightning(monkeypatch):
    """The package, as far as to write a file with that dict in it."""
    names = AttributeDict.__module__.split(".")
    for length in range(1, len(names) + 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:length]), ModuleType(".".join(names[:length])))
    sys.modules[AttributeDict.__module__].AttributeDict = AttributeDict


# What a script writes, of a network's state dict; what is taken of it; and what is said to be left aside.
SCRIPTS = {
    "Lightning": (lambda s: {"state_dict": below("model.", s), "loops": {}, "optimizer_states": [{"state": {0: 1}}]}, ""),
    "Lightning, net": (lambda s: {"state_dict": below("net.", s)}, ""),
    "Lightning, a loss": (lambda s: {"state_dict": below("model.", s) | {"loss.weight": torch.ones(7)}}, "state_dict.loss.weight"),
    "Lightning, a metric": (
        lambda s: {"state_dict": below("model.", s) | {"val_acc.confmat": torch.zeros(7, 7, dtype=torch.int64)}},
        "state_dict.val_acc.confmat",
    ),
    "Lightning, settings": (
        lambda s: {"state_dict": below("model.", s), "hyper_parameters": AttributeDict(lr=1e-3, root=Path("data"))}, "",
    ),
    "torchvision's references": (
        lambda s: {"model": s, "optimizer": {}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, "",
    ),
    "timm": (lambda s: {"state_dict": s, "state_dict_ema": below("module.", s), "metric": 71.2}, ""),
    "timm, averaged only": (lambda s: {"state_dict_ema": below("module.", s)}, ""),
    "mmpretrain": (
        lambda s: {"state_dict": below("backbone.", bodies(s)) | below("head.", {"fc.bias": s["fc.bias"]}), "meta": {}},
        "state_dict.head.fc.bias",
    ),
    "MoCo": (
        lambda s: {"state_dict": below("module.encoder_q.", s) | {"module.queue": torch.zeros(8, 4)}}, "state_dict.module.queue",
    ),
    "DINO": (lambda s: {"teacher": below("backbone.", s), "student": below("module.backbone.", other_numbers(s))}, ""),
    "averaged by torch": (lambda s: below("module.", s) | {"n_averaged": torch.tensor(5)}, "n_averaged"),
    "averaged by ema_pytorch": (
        lambda s: {"ema": below("ema_model.", s) | {"initted": torch.tensor(True), "step": torch.tensor(9)}}, "ema.initted",
    ),
    "compiled within": (
        lambda s: {name.replace("stage2.", "stage2._orig_mod."): value for name, value in s.items()}, "",
    ),
    "an epoch among tensors": (lambda s: dict(s) | {"epoch": 3}, ""),
    "figures of numpy": (
        lambda s: {"net": s, "best": np.float64(71.2), "curve": np.arange(3.0), "when": datetime.date(2026, 1, 2)}, "",
    ),
    "a dict with defaults": (lambda s: {"net": s, "log": defaultdict(list, {"loss": [0.5]})}, ""),
    "parameters": (lambda s: {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()}, ""),
    "halves": (lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()}, ""),
    "no counts of batches": (lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")}, ""),
    "deep down": (lambda s: {"trainer": {"agent": {"networks": {"encoder": s}}}}, ""),
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_training_script_writes_is_loaded_and_what_is_over_is_named(tmp_path, stock, lightning, script):
    write, left = SCRIPTS[script]
    torch.save(write(stock.state_dict()), tmp_path / "weights.pth")
    model = get_model(NAME, num_classes=3)
    picked = load_backbone_weights(model, read_weights(tmp_path / "weights.pth"), ["fc"], "weights.pth")
    found, wanted = model.state_dict(), stock.state_dict()
    for name in bodies(wanted):
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-3 if script == "halves" else 0, atol=1e-4)
    assert (f"left aside: {left}" in picked.text) if left else not picked.left


def test_of_several_networks_one_is_taken_the_others_are_named_and_key_decides(tmp_path, stock):
    plain, averaged = stock.state_dict(), other_numbers(stock.state_dict())
    torch.save({"state_dict_ema": below("module.", averaged), "state_dict": plain}, tmp_path / "timm.pth")
    model = get_model(NAME, num_classes=3)
    state = read_weights(tmp_path / "timm.pth")
    picked = load_backbone_weights(model, state, ["fc"], "")
    assert torch.equal(model.conv1[0].weight, plain["conv1.0.weight"])  # whichever stands first
    torch.save(state, tmp_path / "again.pth")  # for whoever has no such class
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert type(again) is OrderedDict and again.keys() == state.keys() and again._metadata == state._metadata
    assert picked.text == "taken is state_dict, not state_dict_ema.module (FILE:KEY decides)"
    for key in ("state_dict_ema", "state_dict_ema.module"):
        picked = load_backbone_weights(model, read_weights(tmp_path / "timm.pth", key), ["fc"], "")
        assert torch.equal(model.conv1[0].weight, averaged["conv1.0.weight"]) and not picked.text
    with pytest.raises(UsageError) as error:
        read_weights(tmp_path / "timm.pth", "model")
    assert "holds nothing below 'model'; it has" in str(error.value) and "state_dict_ema.module: " in str(error.value)


def test_averages_come_last_whatever_they_are_called_and_rivals_need_not_be_complete(tmp_path, stock):
    plain, averaged = stock.state_dict(), other_numbers(stock.state_dict())
    counted = {name for name in plain if name.endswith("num_batches_tracked")}
    without = {name: value for name, value in plain.items() if name not in counted}
    for name in ("modelEma", "EMA", "exp_avg", "init_state"):
        torch.save({name: averaged, "net": without}, tmp_path / "w.pth")
        model = get_model(NAME, num_classes=3)
        picked = load_backbone_weights(model, read_weights(tmp_path / "w.pth"), ["fc"], "")
        assert torch.equal(model.conv1[0].weight, plain["conv1.0.weight"]), name
        assert picked.text == f"taken is net, not {name} (FILE:KEY decides)"


def test_of_two_nests_that_runs_of_before_knew_the_same_one_is_taken(tmp_path, stock):
    plain, other = stock.state_dict(), other_numbers(stock.state_dict())
    torch.save({"model": other, "state_dict": below("module.", plain)}, tmp_path / "w.pth")
    model = get_model(NAME, num_classes=3)
    picked = load_backbone_weights(model, read_weights(tmp_path / "w.pth"), ["fc"], "")
    assert torch.equal(model.conv1[0].weight, plain["conv1.0.weight"])
    assert picked.text == "taken is state_dict.module, not model (FILE:KEY decides)"


def test_a_class_of_transformers_own_names_are_no_rival_of_themselves():
    own = {f"vit.layer.{n}.weight": torch.full((2,), float(n)) for n in range(4)} | {"classifier.weight": torch.ones(2)}
    picked = pick(own, own, ["classifier"], "a file", "vit")
    assert picked.prefix == "" and not picked.text and picked.state.keys() == own.keys()
    bare = {name.removeprefix("vit."): value for name, value in own.items()}
    assert pick(bare, own, ["classifier"], "a file", "vit").state.keys() == own.keys()


def test_a_file_made_to_hang_or_to_confuse_is_read_at_once(tmp_path):
    mine = {"net": {"w": torch.ones(1)}}
    for number in range(60):
        mine[f"self{number}"] = mine
    torch.save(mine, tmp_path / "fan.pt")
    started = time.monotonic()
    assert set(read_weights(tmp_path / "fan.pt")) == {"net.w"} and time.monotonic() - started < 5
    for strange in ([1], {"conv1": 7}, {3: {}}):
        state = OrderedDict(w=torch.ones(1))
        state._metadata = strange
        torch.save(state, tmp_path / "m.pt")
        assert read_weights(tmp_path / "m.pt")._metadata == {}


def test_of_texts_too_it_is_said_what_was_taken_and_a_deeper_encoder_is_none(tmp_path):
    from finetune.models.backbones import find_text_backbone
    from finetune.models.network import build_network

    folder = make_encoder(tmp_path / "bert")
    backbone, _ = find_text_backbone(str(folder), "mean")
    state = dict(read_weights(folder))
    options = {"head": "linear", "class_count": 2, "dropout": 0.0, "head_width": 8, "seed": 0}
    assert not build_network(backbone, state, "", **options).picked_text.startswith("taken")
    two = {f"a_net.{name}": value + 1 for name, value in state.items()} | {f"b_net.{n}": v for n, v in state.items()}
    assert "taken is a_net, not b_net" in build_network(backbone, two, "", **options).picked_text
    layer = next(name for name in state if ".layer.0." in name)
    deeper = state | {layer.replace(".layer.0.", ".layer.9."): state[layer]}
    with pytest.raises(UsageError, match=r"my\.pt does not fit the architecture") as error:
        build_network(backbone, deeper, "my.pt", **options)
    assert ".layer.9." in str(error.value)


def test_a_deeper_network_and_one_with_other_layers_are_no_smaller_one():
    deep, small = get_model("resnet34", num_classes=2), get_model("resnet18", num_classes=2)
    with pytest.raises(UsageError, match="does not fit the architecture") as error:
        load_backbone_weights(small, deep.state_dict(), ["fc"], "resnet34.pth")
    assert "  + layer1.2.conv1.weight" in str(error.value)
    state = small.state_dict() | {"layer1.0.se.fc1.weight": torch.zeros(4, 4)}
    with pytest.raises(UsageError, match=r"\+ layer1\.0\.se\.fc1\.weight"):
        load_backbone_weights(copy.deepcopy(small), state, ["fc"], "")


def test_where_nothing_fits_both_sides_are_shown(tmp_path, stock):
    children = torch.nn.ModuleDict({"features": torch.nn.Sequential(*list(stock.children())[:-1])})
    torch.save({"net": children.state_dict()}, tmp_path / "renamed.pth")
    with pytest.raises(UsageError) as error:
        load_backbone_weights(get_model(NAME), read_weights(tmp_path / "renamed.pth"), ["fc"], "--weights renamed.pth")
    said = str(error.value)
    assert "of this network's names, so it is of another, or calls its tensors otherwise" in said
    assert "this network has:\n    conv1: 6 tensor(s), like conv1.0.weight" in said
    assert "the file has:\n    net.features: " in said and "--weights FILE:KEY names a part" in said


class Thing:
    pass


def test_classes_that_are_no_settings_are_refused_by_name_and_a_whole_model_says_what_to_save(tmp_path, stock):
    torch.save({"state_dict": stock.state_dict(), "thing": Thing()}, tmp_path / "thing.pth")
    with pytest.raises(BadFile, match=r"holds more than plain tensors \(\S*Thing\), which could run code"):
        read_weights(tmp_path / "thing.pth")
    torch.save(stock, tmp_path / "whole.pth")
    with pytest.raises(BadFile, match=r"a whole model, .* torch\.save\(model\.state_dict\(\), FILE\)"):
        read_weights(tmp_path / "whole.pth")


def test_which_version_a_nested_state_dict_is_of_is_not_forgotten():
    vit = get_model("vit_b_32", num_classes=2)
    old = OrderedDict(
        (f"net.{name.replace('mlp.0', 'mlp.linear_1').replace('mlp.3', 'mlp.linear_2')}", v)
        for name, v in vit.state_dict().items()
    )
    old._metadata = OrderedDict({f"net.{name}".rstrip("."): {"version": 1} for name, _ in vit.named_modules()})
    model = get_model("vit_b_32", num_classes=2)
    load_backbone_weights(model, old, ["heads.head"], "")
    assert torch.equal(model.encoder.layers[3].mlp[0].weight, vit.encoder.layers[3].mlp[0].weight)
    with pytest.raises(UsageError, match="holds conv1 twice, with and without a wrapper's name"):
        pick({"conv1": torch.ones(1), "_orig_mod.conv1": torch.ones(1)}, {"conv1": torch.ones(1)}, [], "a file")


# ---- Files that name others, folders ---------------------------------------------------------------------------------


def write_shards(folder: Path, state: dict, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names, places = list(state), {}
    for number in range(3):
        shard = f"part-{number + 1}-of-3.safetensors"
        save_file({one: state[one] for one in names[number::3]}, folder / shard)
        places |= dict.fromkeys(names[number::3], shard)
    index = folder / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_shards_with_an_index_a_bin_and_a_folder_are_weights(tmp_path, stock):
    index = write_shards(tmp_path / "shards", stock.state_dict())
    (tmp_path / "bin").mkdir()
    torch.save(stock.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for place in (index, index.parent, tmp_path / "bin", tmp_path / "bin" / "pytorch_model.bin"):
        model = get_model(NAME, num_classes=3)
        load_backbone_weights(model, read_weights(place), ["fc"], "")
        assert torch.equal(model.conv5[0].weight, stock.conv5[0].weight)
    (index.parent / "part-2-of-3.safetensors").unlink()
    with pytest.raises(BadFile, match=r"names part-2-of-3\.safetensors, which is not beside it"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": {"conv1.0.weight": "../bin/pytorch_model.bin"}}))
    with pytest.raises(BadFile, match="which is not beside it"):
        read_weights(index)
    index.write_text("[]")
    with pytest.raises(BadFile, match=r"is no index of weights: it has no weight_map"):
        read_weights(index)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="is a folder that holds no weights; name the file itself"):
        read_weights(tmp_path / "empty")


def test_a_run_on_such_a_file_needs_it_no_more_and_says_what_it_took(tmp_path, stock, capsys):
    options = {"images": "digits", "epochs": 1, "training": finetune.ImageTraining(train_samples=60, finish="none")}
    bottom = {"loss.weight": torch.ones(1)}
    torch.save(
        {"a": below("net.", stock.state_dict()), "b": other_numbers(stock.state_dict())} | bottom, tmp_path / "w.ckpt"
    )
    index = write_shards(tmp_path / "shards", stock.state_dict())
    for name, weights in (("key", f"{tmp_path / 'w.ckpt'}:a"), ("index", str(index)), ("folder", str(index.parent))):
        recipe = image_head(backbone=NAME, weights=weights, image_size=32, **options)
        run = train_run(tmp_path / name, recipe, save_every_steps=0)
        (tmp_path / "w.ckpt").rename(tmp_path / "gone")
        index.parent.rename(tmp_path / "gone-shards")
        found = trained_network(RunFolder(run.path), "best")[0].module.state_dict()
        assert torch.equal(found["conv1.0.weight"], stock.state_dict()["conv1.0.weight"])
        (tmp_path / "gone").rename(tmp_path / "w.ckpt")
        (tmp_path / "gone-shards").rename(index.parent)
    words = ["vgg_head", "--backbone", NAME, "--weights", str(tmp_path / "w.ckpt"), "--epochs", "1", "--finish", "none"]
    words += ["--train-samples", "60", "--track", "none", "--no-report", "--device", "cpu", "--image-size", "32"]
    assert main([*words, "--run", str(tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "taken is b, not a.net (FILE:KEY decides); left aside: loss.weight" in said or "taken is a.net, not b" in said
    )
    assert main([*words[:4], f"{tmp_path / 'w.ckpt'}:c", "--run", str(tmp_path / "other")]) == 2
    assert "holds nothing below 'c'" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_a_folder_of_transformers_is_weights_for_another_of_its_kind(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    for name in ("first", "second"):
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / name)
    transformers.ViTModel(config).save_pretrained(tmp_path / "body")
    options = {"images": "digits", "epochs": 1, "training": finetune.ImageTraining(train_samples=60, finish="none")}
    for weights in (tmp_path / "second", tmp_path / "body" / "model.safetensors"):
        recipe = image_head(backbone=str(tmp_path / "first"), weights=str(weights), **options)
        run = train_run(tmp_path / f"run of {weights.name}", recipe, save_every_steps=0)
        found = trained_network(run, "best")[0].module.state_dict()
        theirs = read_weights(weights)
        name = "vit.embeddings.cls_token"
        assert torch.equal(found[name], theirs[name] if name in theirs else theirs[name.removeprefix("vit.")])
    encoder, other = make_encoder(tmp_path / "bert"), make_encoder(tmp_path / "other", initializer_range=0.1)
    recipe = finetune.text_head(
        texts=str(write_csv(tmp_path / "texts.csv", sentences(60))), backbone=str(encoder), weights=str(other), epochs=1
    )
    run = train_run(tmp_path / "texts", recipe, save_every_steps=0)
    assert read(run)["step"] > 0
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(trained_network(run, "best")[0].module.state_dict()[name], read_weights(other)[name])


def test_weights_of_another_architecture_are_refused_before_anything_is_begun(tmp_path, capsys):
    torch.save({"state_dict": get_model("resnet18").state_dict()}, tmp_path / "resnet.pth")
    words = ["vgg_head", "--backbone", NAME, "--weights", str(tmp_path / "resnet.pth"), "--run", str(tmp_path / "run")]
    assert main(words) == 2
    assert "calls its tensors otherwise" in capsys.readouterr().err and not (tmp_path / "run").exists()
    with pytest.raises((UsageError, RunError)):
        load_backbone_weights(get_model(NAME), {"epoch": torch.ones(1)}, ["fc"], "")
