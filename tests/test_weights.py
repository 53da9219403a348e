"""Whose weights, from where, under which names; and whose preprocessing goes with them."""

import dataclasses
import json
from collections import OrderedDict

import pytest
import torch
from conftest import (
    Killed,
    assert_equal_values,
    comparable,
    finetune,
    finish,
    kill_after_progress,
    make_network,
    metrics_lines,
    read,
    resume_run,
    small_recipe,
    train_run,
)
from safetensors.torch import save_file
from torchvision.models import get_model

import finetune as kit
from finetune import Images, Model, RunError, UsageError
from finetune.base.files import BadFile
from finetune.cli import main
from finetune.export.weights import export
from finetune.models.backbones import find_backbone
from finetune.models.heads import find_head
from finetune.models.network import build_network
from finetune.models.pretrained import find_pretrained
from finetune.models.weight_files import read_weights
from finetune.models.weights import choose_weights, load_backbone_weights
from finetune.store.restore import trained_network
from finetune.store.run_folder import RunFolder


@pytest.fixture(scope="module")
def stock():
    """A small network of torchvision with random values, as somebody might have pretrained it."""
    torch.manual_seed(0)
    return get_model("shufflenet_v2_x0_5", num_classes=7)


def fresh(name="shufflenet_v2_x0_5", classes=3):
    return get_model(name, num_classes=classes)


@pytest.fixture
def no_network(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


# ---- Names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nest", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "_orig_mod.", "module._orig_mod.", "model.backbone."])
def test_a_state_dict_is_found_in_its_nest_and_under_the_prefixes_of_wrappers(tmp_path, stock, nest, prefix):
    state = {prefix + name: value for name, value in stock.state_dict().items()}
    torch.save({nest: state, "epoch": 3, "lr": [0.1]} if nest else state, tmp_path / "weights.pth")
    model = fresh()
    load_backbone_weights(model, read_weights(tmp_path / "weights.pth"), ["fc"], "weights.pth")
    assert torch.equal(model.conv1[0].weight, stock.conv1[0].weight)
    assert model.fc.out_features == 3


def test_safetensors_are_read_too(tmp_path, stock):
    save_file({f"module.{name}": value for name, value in stock.state_dict().items()}, tmp_path / "weights.safetensors")
    model = fresh()
    load_backbone_weights(model, read_weights(tmp_path / "weights.safetensors"), ["fc"], "")
    assert torch.equal(model.conv5[0].weight, stock.conv5[0].weight)


def test_anything_but_the_head_that_is_missing_unknown_or_of_another_shape_is_listed(stock):
    state = dict(stock.state_dict())
    del state["conv1.0.weight"]
    state["conv5.extra.weight"] = torch.zeros(1)
    state["conv5.1.bias"] = torch.zeros(2)
    with pytest.raises(UsageError) as error:
        load_backbone_weights(fresh(), state, ["fc"], "my.pt")
    lines = str(error.value).splitlines()
    assert lines[0] == "my.pt does not fit the architecture (- missing, + unknown, ~ other shape):"
    assert sorted(lines[1:]) == [
        "  + conv5.extra.weight",
        "  - conv1.0.weight",
        "  ~ conv5.1.bias (2,) instead of (1024,)",
    ]


def test_a_file_without_a_head_and_one_with_another_head_load_all_but_the_head(stock):
    headless = {name: value for name, value in stock.state_dict().items() if not name.startswith("fc.")}
    other = headless | {"fc.0.weight": torch.zeros(1), "fc.weight": torch.zeros(9, 9)}
    for state in (headless, other):
        model = fresh()
        head = model.fc.weight.clone()
        load_backbone_weights(model, state, ["fc"], "")
        assert all(torch.equal(model.state_dict()[name], value) for name, value in headless.items())
        assert torch.equal(model.fc.weight, head)


def test_values_that_are_no_numbers_are_refused(stock):
    state = dict(stock.state_dict())
    state["conv1.0.weight"] = torch.full_like(state["conv1.0.weight"], float("nan"))
    with pytest.raises(UsageError, match=r"my\.pt: conv1\.0\.weight holds values that are no numbers"):
        load_backbone_weights(fresh(), state, ["fc"], "my.pt")


def test_names_from_before_torchvision_renamed_its_modules_load():
    """Its own files of DenseNet and of the vision transformers still have them."""
    dense = get_model("densenet121", num_classes=2)
    old = {name.replace("norm1", "norm.1").replace("conv2", "conv.2"): v for name, v in dense.state_dict().items()}
    assert any("norm.1" in name for name in old)
    model = fresh("densenet121")
    load_backbone_weights(model, old, ["classifier"], "")
    assert torch.equal(
        model.features.denseblock1.denselayer2.conv2.weight, dense.features.denseblock1.denselayer2.conv2.weight
    )

    vit = get_model("vit_b_32", num_classes=2)
    old = OrderedDict(
        (name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"), v)
        for name, v in vit.state_dict().items()
    )
    old._metadata = OrderedDict({name: {"version": 1} for name, _ in vit.named_modules()})
    model = fresh("vit_b_32")
    load_backbone_weights(model, old, ["heads.head"], "")
    assert torch.equal(model.encoder.layers[3].mlp[0].weight, vit.encoder.layers[3].mlp[0].weight)


def test_values_of_another_kind_and_names_that_meet_are_refused(tmp_path, stock):
    state = dict(stock.state_dict())
    for wrong in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(UsageError, match=r"my\.pt: conv1\.0\.weight holds torch\.\w+, not torch\.float32"):
            load_backbone_weights(
                fresh(), state | {"conv1.0.weight": state["conv1.0.weight"].to(wrong)}, ["fc"], "my.pt"
            )


@pytest.mark.parametrize(
    "change",
    [
        {"fc.weight": torch.zeros(7, 5)},
        {"fc.weight": torch.full((7, 1024), float("nan"))},
        {"fc.weight": torch.tensor(1.0)},
        {"fc.bias": None},
    ],
    ids=["another width", "no numbers", "a number", "without bias"],
)
def test_an_old_head_that_stays_must_be_whole(stock, change):
    backbone, _ = choose_weights("shufflenet_v2_x0_5", "none")
    state = {name: value for name, value in (stock.state_dict() | change).items() if value is not None}
    with pytest.raises(UsageError):
        build_network(backbone, state, "my.pt", head="append", class_count=3, dropout=0.0, head_width=0, seed=0)
    build_network(backbone, state, "my.pt", head="linear", class_count=3, dropout=0.0, head_width=0, seed=0)


def test_an_empty_file_and_one_with_strange_names_are_one_line(tmp_path):
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(BadFile, match=r"empty\.pt cannot be read"):
        read_weights(tmp_path / "empty.pt")
    torch.save({3: torch.zeros(1)}, tmp_path / "numbers.pt")
    with pytest.raises(BadFile, match="does not hold a state dict"):
        read_weights(tmp_path / "numbers.pt")


def test_files_that_hold_something_else_say_what_they_are(tmp_path, trained):
    torch.save({"losses": [1, 2]}, tmp_path / "log.pt")
    with pytest.raises(BadFile, match="does not hold a state dict"):
        read_weights(tmp_path / "log.pt")
    with pytest.raises(BadFile, match="is a checkpoint of a run; give what `finetune export RUN` writes"):
        read_weights(trained.checkpoints / "latest.pt")


# ---- Which, and whose preprocessing -------------------------------------------------------------------------------


def test_a_file_of_unknown_origin_is_prepared_like_the_default_weights(tmp_path, stock):
    torch.save(stock.state_dict(), tmp_path / "mine.pth")
    backbone, weights = choose_weights("shufflenet_v2_x0_5", str(tmp_path / "mine.pth"))
    assert weights.preprocessing_of == "IMAGENET1K_V1, the file being none of torchvision's own"
    assert backbone.preprocessing.resize_size == 256


def test_the_json_of_another_file_is_not_believed(tmp_path, trained):
    export(trained, "best", tmp_path / "model.pt")
    assert choose_weights("bundled/vgg", str(tmp_path / "model.pt"))[1].preprocessing_of == "model.json"
    torch.save(find_backbone("bundled/vgg").build(10).state_dict(), tmp_path / "model.pt")
    assert choose_weights("bundled/vgg", str(tmp_path / "model.pt"))[1].preprocessing_of == "bundled/vgg's own weights"


def test_a_file_of_the_users_own_is_copied_so_that_it_may_change_under_the_run(tmp_path, stock):
    path = tmp_path / "mine.pth"
    torch.save(stock.state_dict(), path)
    recipe = small_recipe(
        model=Model("shufflenet_v2_x0_5", weights=str(path)), data=Images("digits", image_size=32, train_samples=40)
    )
    with pytest.raises(Killed):
        train_run(tmp_path / "run", recipe, die_after_steps=2)
    with path.open("r+b") as stream:  # written over in place, as torch.save does
        stream.write(b"something else")
    resume_run(RunFolder(tmp_path / "run"))
    assert read(RunFolder(tmp_path / "run"))["status"] == "finished"


def test_a_run_from_another_runs_weights_needs_no_pretrained_file_and_prepares_images_as_that_run(tmp_path, stock):
    path = tmp_path / "mine.pth"
    torch.save(stock.state_dict(), path)
    recipe = small_recipe(
        model=Model("shufflenet_v2_x0_5", weights=str(path)),
        data=Images("digits", image_size=32, train_samples=40),
        epochs=1,
    )
    first = train_run(tmp_path / "first", recipe, save_every_steps=0)
    path.unlink()
    again = dataclasses.replace(recipe, data=Images("digits", train_samples=40), max_steps=1)
    second = train_run(tmp_path / "second", again, init_from=f"{first.path}:latest")
    assert read(second)["network"]["backbone"] == read(first)["network"]["backbone"]
    before, after = trained_network(first, "latest")[0].module, trained_network(second, "latest")[0].module
    assert torch.equal(before.conv1[0].weight, after.conv1[0].weight) and torch.equal(before.fc.mean, after.fc.mean)
    assert not torch.equal(before.fc.weight, after.fc.weight)


def test_weights_that_were_never_pretrained_say_so(tmp_path, capsys):
    words = ["vgg_head", "--weights", "none", "--epochs", "1", "--train-samples", "20", "--run", str(tmp_path / "run")]
    assert main(words) == 0
    assert "random: nothing is pretrained" in capsys.readouterr().out


def test_without_network_and_cache_one_line_says_which_file_belongs_where(tmp_path, monkeypatch, no_network, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert main(["vgg_head", "--backbone", "vgg16", "--run", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not cached and cannot be fetched" in error
    assert "put https://download.pytorch.org/models/vgg16-397923af.pth into" in error
    assert str(tmp_path / "torch" / "hub" / "checkpoints") in error and "--backbone bundled/mobilenet" in error
    assert not list((tmp_path / "torch").rglob("*.pth*")) and not (tmp_path / "run").exists()


def test_a_damaged_file_in_the_cache_is_found_by_the_hash_in_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a download")
    assert main(["vgg_head", "--backbone", "resnet18", "--run", str(tmp_path / "run")]) == 1
    assert "is damaged: sha256" in (error := capsys.readouterr().err) and "delete it" in error


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("IMAGENET1K_V9", r"allowed are default, IMAGENET1K_V1, IMAGENET1K_V2 \(did you mean IMAGENET1K_V"),
        ("no/such.pth", r"no such file; allowed are default, IMAGENET1K_V1"),
    ],
)
def test_weights_that_do_not_exist_are_answered_with_those_that_do(weights, said):
    with pytest.raises(UsageError, match=said):
        choose_weights("resnet50", weights)


# ---- Real public weights --------------------------------------------------------------------------------------------


def mobilenet_words(path, run: RunFolder) -> list[str]:
    return [
        "vgg_head", "--backbone", "mobilenet_v2", "--weights", str(path), "--image-size", "96", "--epochs", "2",
        "--train-samples", "800", "--validation-fraction", "0.1", "--batch-size", "50", "--lr", "1e-2",
        "--dropout", "0.1", "--save-every-steps", "1", "--device", "cpu", "--run", str(run.path),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_head_on_imagenets_mobilenet_learns_the_digits_is_killed_resumed_and_exported(tmp_path, mobilenet_file):
    broken, unbroken = RunFolder(tmp_path / "broken"), RunFolder(tmp_path / "unbroken")
    kill_after_progress(finetune(*mobilenet_words(mobilenet_file, broken)), broken, 14)
    finish(finetune("resume", str(broken.path)))
    said = finish(finetune(*mobilenet_words(mobilenet_file, unbroken)))
    assert "(as of IMAGENET1K_V1, whose file it is)" in " ".join(said.split())
    for name in ("latest.pt", "best.pt"):
        ours, theirs = read(broken, name), read(unbroken, name)
        assert_equal_values(comparable(ours), comparable(theirs), name)
    assert metrics_lines(broken) == metrics_lines(unbroken)
    assert read(broken, "best.pt")["best_metric"]["value"] >= 0.90
    assert read(broken)["network"]["backbone"]["preprocessing"]["resize_size"] == 110  # 256 of V1, not 232 of V2

    network, _ = trained_network(broken, "latest")
    state, file = network.module.state_dict(), torch.load(mobilenet_file, weights_only=True)
    frozen = [name for name in file if not name.startswith("classifier.1.")]
    assert len(frozen) == len(file) - 2 and all(torch.equal(state[name], file[name]) for name in frozen)

    report = export(broken, "latest", tmp_path / "model.pt")
    loaded = get_model("mobilenet_v2", num_classes=10)
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    images = torch.randn(8, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = network.module(images), loaded.eval()(images)
    allowed = 1e-5 * max(ours.abs().max().item(), 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=allowed)
    assert report.largest_difference <= allowed


def test_torchvisions_cache_is_used_by_the_name_of_the_weights(tmp_path, monkeypatch, no_network, mobilenet_file):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / mobilenet_file.name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(mobilenet_file.read_bytes())
    backbone, weights = choose_weights("mobilenet_v2", "imagenet1k_v1")
    assert weights.path == cached and weights.reference == "torchvision:mobilenet_v2:IMAGENET1K_V1"
    assert backbone.preprocessing.resize_size == 256
    recipe = small_recipe(
        model=Model("mobilenet_v2", weights="IMAGENET1K_V1"),
        data=Images("digits", image_size=32, train_samples=32),
        epochs=1,
    )
    run = train_run(tmp_path / "run", recipe)
    record = json.loads((run.frozen / "frozen.json").read_text())
    assert (run.frozen / record["file"]).samefile(cached)  # a link, not a second copy


@pytest.mark.slow
def test_two_transfers_in_a_chain_start_the_second_from_the_export_of_the_first(tmp_path, mobilenet_file):
    """The second has other classes and gets the preprocessing of the first, from the JSON beside its weights."""
    data = Images("digits", image_size=64, train_samples=40)
    rules = (("head", "trainable", 0), ("features.18", "trainable", 0), ("*", "frozen", 0))
    first = train_run(
        tmp_path / "first",
        small_recipe(
            model=Model("mobilenet_v2", weights=str(mobilenet_file)),
            data=data,
            epochs=1,
            trainable=kit.Trainable(rules),
        ),
        save_every_steps=0,
    )
    export(first, "latest", tmp_path / "first.pt")
    file = torch.load(tmp_path / "first.pt", weights_only=True)
    public = torch.load(mobilenet_file, weights_only=True)
    assert not torch.equal(file["features.18.0.weight"], public["features.18.0.weight"])

    recipe = small_recipe(
        model=Model("mobilenet_v2", weights=str(tmp_path / "first.pt")),
        data=Images("glyphs", train_samples=0, validation_fraction=0.5, image_size=0),
        epochs=0, max_steps=2,
    )  # fmt: skip
    backbone, weights = find_pretrained(recipe)
    assert weights.preprocessing_of == "first.json"
    assert backbone.preprocessing.image_size == 64 and backbone.preprocessing.resize_size == 73
    network = make_network(recipe, 62)
    state = network.module.state_dict()
    frozen = [name for name in file if not name.startswith("classifier.1.")]
    assert all(torch.equal(state[name], file[name]) for name in frozen)
    second = train_run(tmp_path / "second", recipe, save_every_steps=0)
    report = export(second, "latest", tmp_path / "second.pt")
    last = torch.load(tmp_path / "second.pt", weights_only=True)
    assert all(torch.equal(last[name], file[name]) for name in frozen) and len(last["classifier.1.bias"]) == 62
    assert report.description["preprocessing"]["image_size"] == 64


def test_an_export_with_another_kind_of_head_is_weights_too(tmp_path):
    for head in ("mlp", "append"):
        run = train_run(tmp_path / head, small_recipe(head=head, epochs=1), save_every_steps=0)
        export(run, "latest", tmp_path / f"{head}.pt")
        network = make_network(small_recipe(model=Model("bundled/vgg", weights=str(tmp_path / f"{head}.pt"))))
        file = torch.load(tmp_path / f"{head}.pt", weights_only=True)
        assert torch.equal(network.module.features[0].weight, file["features.0.weight"])


def test_a_moved_cache_is_named_when_a_resume_needs_it(tmp_path, monkeypatch, stock):
    """Where no hard link could be made, the run holds a reference; the file must then be where it was, or fetched."""
    from finetune.models import network as network_module
    from finetune.models.network import load_frozen, store_frozen
    from finetune.models.weights import Weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(network_module, "on_one_file_system", lambda *_: False)
    path = tmp_path / "hub" / "checkpoints" / "shufflenetv2_x0.5-f707e7126e.pth"
    path.parent.mkdir(parents=True)
    torch.save(stock.state_dict(), path)
    reference = "torchvision:shufflenet_v2_x0_5:IMAGENET1K_V1"
    store_frozen(tmp_path / "frozen", Weights(path, "0" * 64, reference, ""), {}, copy=False)
    with pytest.raises(RunError, match=r"is damaged: sha256 .*, expected f707e7126e"):
        load_frozen(tmp_path / "frozen")


def test_a_network_built_from_a_state_dict_finds_its_appended_heads_size_under_any_prefix(stock):
    backbone, _ = choose_weights("shufflenet_v2_x0_5", "none")
    state = {f"module.{name}": value for name, value in stock.state_dict().items()}
    network = build_network(backbone, state, "", head="append", class_count=3, dropout=0.0, head_width=0, seed=0)
    assert network.old_class_count == 7 and find_head(backbone.build) == ["fc"]
    assert torch.equal(network.module.fc[0].weight, stock.fc.weight)
