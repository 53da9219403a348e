"""Image encoders of transformers, from local folders in the format of its hub; nothing is downloaded."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import Killed, assert_equal_runs, finish, read, resume_run, small_recipe, train_run
from conftest import finetune as run_finetune
from PIL import Image

import finetune
from finetune import Images, Model, UsageError
from finetune.cli import main
from finetune.export.weights import export
from finetune.models.backbones import find_backbone
from finetune.models.weight_files import read_weights
from finetune.models.weights import choose_weights
from finetune.store.restore import trained_network
from finetune.store.run_folder import RunFolder

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32}


def configs():
    """A small one of each family."""
    return {
        "vit": transformers.ViTConfig(**SMALL, patch_size=8),
        "deit": transformers.DeiTConfig(**SMALL, patch_size=8),
        "deit with a teacher": transformers.DeiTConfig(**SMALL, patch_size=8),
        "dinov2": transformers.Dinov2Config(**SMALL, patch_size=8, mlp_ratio=2),
        "convnext": transformers.ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=32),
        "swin": transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4
        ),
    }


def processors():
    return {
        "vit": transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
        "deit": transformers.DeiTImageProcessor(
            size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}
        ),
        "deit with a teacher": transformers.DeiTImageProcessor(
            size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}
        ),
        "dinov2": transformers.BitImageProcessor(
            size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, do_convert_rgb=True
        ),
        "convnext": transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
        "swin": transformers.ViTImageProcessor(
            size={"height": 32, "width": 32}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
        ),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders as `save_pretrained` writes them: stock classification models with 5 classes, and processors."""
    torch.manual_seed(0)
    found = {}
    for name, config in configs().items():
        config.num_labels = 5
        config.architectures = ["DeiTForImageClassificationWithTeacher"] if "teacher" in name else []
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder)
        processors()[name].save_pretrained(folder)
        found[name] = folder
    return found


def recipe_for(folder, **changes):
    data = Images("digits", train_samples=40)
    return small_recipe(model=Model(str(folder), **changes.pop("model", {})), data=data, epochs=1, **changes)


USUAL = ("vit", "convnext", "dinov2")  # the others are slow tests


@pytest.mark.parametrize(
    "family", [one if one in USUAL else pytest.param(one, marks=pytest.mark.slow) for one in configs()]
)
def test_a_family_trains_resumes_without_its_folder_and_its_export_loads_into_transformers(tmp_path, folders, family):
    folder = shutil.copytree(folders[family], tmp_path / "model")
    recipe = recipe_for(folder)
    with pytest.raises(Killed):
        train_run(tmp_path / "run", recipe, die_after_steps=2)
    shutil.rmtree(folder)
    run = RunFolder(tmp_path / "run")
    resume_run(run)
    network, state = trained_network(run, "latest")
    heads = {"cls_classifier", "distillation_classifier"} if "teacher" in family else {"classifier"}
    assert {name.rpartition(".")[0] for name in state.model} == heads == set(network.head_paths)
    # What enters the head was measured, not the stub in the encoder's place.
    assert all(state.model[f"{path}.mean"].abs().max() > 0 for path in heads)

    report = export(run, "latest", tmp_path / "model.pt")
    assert not report.seen.error and report.seen.alike == report.seen.samples
    scope: dict = {"__name__": "receiver"}
    exec(report.program, scope)  # as printed, for people without this kit
    assert "ForImageClassification" in type(scope["model"]).__name__
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, stock = network.module(images), scope["model"](images).logits
        rebuilt = finetune.load(tmp_path / "model.pt")(images)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)
    assert torch.equal(stock, rebuilt)

    shutil.copytree(folders[family], folder)
    unbroken = train_run(tmp_path / "unbroken", recipe)
    assert_equal_runs(run, unbroken)


@pytest.mark.parametrize("family", list(configs()))
def test_preparation_is_that_of_the_models_own_processor(folders, family):
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    preparation = find_backbone(str(folders[family])).preprocessing
    ours = preparation.normalise(preparation.resize(torch.from_numpy(pixels).permute(2, 0, 1))[None])
    processor = transformers.AutoImageProcessor.from_pretrained(folders[family])
    theirs = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    level = 1 / 255 / min(preparation.std)
    # torch and PIL round resized bytes differently here and there, by one or two levels of 255.
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 2.1 * level and ((ours - theirs).abs() > 1e-4).float().mean() < 0.05


def test_an_encoder_without_a_head_gets_a_new_one_and_keeps_all_else(tmp_path):
    torch.manual_seed(1)
    encoder = transformers.ViTModel(configs()["vit"], add_pooling_layer=False)
    encoder.save_pretrained(tmp_path)
    backbone, weights = choose_weights(str(tmp_path), "default")
    tensors = read_weights(weights.path)
    assert not any(name.startswith("classifier") for name in tensors)
    own = encoder.state_dict()
    assert all(torch.equal(tensors[f"vit.{name}"], value) for name, value in own.items())
    assert backbone.preprocessing.mean == [0.5] * 3 and weights.preprocessing_of == "mean and deviation 0.5"


def test_half_precision_weights_are_loaded_as_single_precision(tmp_path):
    torch.manual_seed(1)
    model = transformers.ViTForImageClassification(configs()["vit"]).to(torch.float16)
    model.save_pretrained(tmp_path)
    tensors = read_weights(tmp_path)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert find_backbone(str(tmp_path)).build(2).classifier.weight.dtype == torch.float32


def test_random_weights_and_a_file_work_as_for_any_other_backbone(tmp_path, folders):
    backbone, weights = choose_weights(str(folders["vit"]), "none")
    assert weights is None and backbone.build(4)(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    torch.save({"model": read_weights(folders["vit"])}, tmp_path / "mine.pt")
    run = train_run(tmp_path / "run", recipe_for(folders["vit"], model={"weights": str(tmp_path / "mine.pt")}))
    assert json.loads((run.frozen / "frozen.json").read_text())["file"] == "weights.pt"


def test_a_model_that_is_not_for_images_is_refused(tmp_path):
    transformers.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="a bert has no image classification class in transformers"):
        find_backbone(str(tmp_path))


def test_damaged_folders_are_one_line(tmp_path, folders, capsys):
    folder = shutil.copytree(folders["vit"], tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert main(["vgg_head", "--backbone", str(folder), "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "its weights cannot be read" in error and error.count("\n") == 1
    (folder / "model.safetensors").unlink()
    assert main(["vgg_head", "--backbone", str(folder), "--run", str(tmp_path / "run")]) == 2
    assert "holds no .safetensors" in capsys.readouterr().err
    (folder / "config.json").write_text("{")
    assert main(["vgg_head", "--backbone", str(folder), "--run", str(tmp_path / "run")]) == 2
    assert "its config.json cannot be used" in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_model_of_the_hub_that_is_neither_cached_nor_reachable_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    words = ["vgg_head", "--backbone", "hf:facebook/dinov2-small", "--run", str(tmp_path / "run")]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "hf:facebook/dinov2-small: not cached and cannot be fetched" in error
    assert "hf download facebook/dinov2-small --local-dir FOLDER" in error
    assert main(["vgg_head", "--backbone", "hf:not a name", "--run", str(tmp_path / "run")]) == 2


def test_a_model_in_the_hubs_cache_needs_no_network_and_is_linked_not_copied(tmp_path, folders):
    """In a process of its own, for the hub's library reads its settings when it is imported."""
    cache, revision = tmp_path / "cache", "0123456789abcdef0123456789abcdef01234567"
    model = cache / "models--owner--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(revision)
    (model / "blobs").mkdir()
    snapshot = model / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folders["vit"].iterdir())):
        shutil.copyfile(path, model / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    offline = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    words = ["vgg_head", "--backbone", "hf:owner/name", "--epochs", "1", "--train-samples", "40"]
    run = RunFolder(tmp_path / "run")
    process = run_finetune(*words, "--run", str(run.path), env=os.environ | offline | {"HF_HUB_CACHE": str(cache)})
    finish(process)
    assert (run.frozen / "model" / "model.safetensors").samefile(snapshot / "model.safetensors")
    network = read(run)["network"]
    assert network["backbone"]["name"] == "hf:owner/name" and str(cache) not in json.dumps(network)


@pytest.mark.parametrize("model_type", ["vit", "something_new"])
def test_code_from_a_models_folder_is_never_run(tmp_path, folders, model_type):
    folder = shutil.copytree(folders["vit"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = model_type
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    if model_type == "vit":
        backbone, weights = choose_weights(str(folder), "default")
        read_weights(weights.path)
        assert backbone.build(2)(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
        assert "auto_map" not in backbone.options["config"]
    else:
        with pytest.raises(UsageError, match=r"its config\.json cannot be used") as error:
            choose_weights(str(folder), "default")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "processor",
    [
        {"image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
        {"image_processor_type": "MobileViTImageProcessor", "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 64}},
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_rescale": False},
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "image_std": [0, 0, 0]},
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "image_mean": None},
        {"image_processor_type": "NoSuchProcessor"},
        [],
    ],
    ids=["LeViT", "MobileViT", "not square", "no rescaling", "std 0", "no mean", "unknown", "a list"],
)  # fmt: skip
def test_a_processor_that_prepares_images_otherwise_is_refused(tmp_path, folders, processor):
    folder = shutil.copytree(folders["vit"], tmp_path / "model")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(UsageError, match=r"its preprocessor_config\.json cannot be used") as error:
        find_backbone(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change", [{"hidden_size": 0}, {"patch_size": 0}, {"image_size": None}, {"hidden_act": "nope"}]
)
def test_a_config_that_makes_no_network_is_one_line(tmp_path, folders, change, capsys):
    folder = shutil.copytree(folders["vit"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["vgg_head", "--backbone", str(folder), "--run", str(tmp_path / "run")]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("finetune: ") and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_resume_finds_the_same_libraries_as_the_run_had(tmp_path, folders):
    run = RunFolder(tmp_path / "run")
    finish(
        run_finetune(
            "vgg_head",
            "--backbone",
            str(folders["vit"]),
            "--epochs",
            "1",
            "--train-samples",
            "40",
            "--run",
            str(run.path),
        )
    )
    said = finish(run_finetune("resume", str(run.path), "--epochs", "2"))
    assert "not bit for bit" not in said and read(run)["versions"]["transformers"]
