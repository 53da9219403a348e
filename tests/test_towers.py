"""Vision towers without a classification class of their own: of CLIP and SigLIP, and DINOv3, from folders."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, CLIPImageProcessor, SiglipImageProcessor

import finetune
from finetune import ImageTraining, UsageError, image_head
from finetune.cli import main
from finetune.data.digits import load_digits
from finetune.export.weights import export
from finetune.models.backbones import find_backbone
from finetune.store.restore import trained_network

from conftest import assert_equal_runs, small_recipe, train_run, train_with_deaths  # isort: skip

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32}
CROPPED = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
TOWERS = {
    "clip": (lambda: transformers.CLIPVisionConfig(**SMALL, patch_size=8), lambda: CLIPImageProcessor(**CROPPED)),
    "siglip": (
        lambda: transformers.SiglipVisionConfig(**SMALL, patch_size=8),
        lambda: SiglipImageProcessor(size={"height": 32, "width": 32}),
    ),
    "dinov3": (lambda: transformers.DINOv3ViTConfig(**SMALL, patch_size=8, num_register_tokens=2), None),
    "dinov3 convnext": (
        lambda: transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=32), None,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """As `save_pretrained` writes them."""
    torch.manual_seed(0)
    found = {}
    for name, (config, processor) in TOWERS.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        AutoModel.from_config(config()).save_pretrained(folder)
        if processor is not None:
            processor().save_pretrained(folder)
        found[name] = folder
    return found


def recipe_for(folder, **changes):
    training = ImageTraining(finish="none", train_samples=60, validation_fraction=0.05)
    return image_head(images="digits", backbone=str(folder), epochs=1, training=training, **changes)


USUAL = ("clip", "dinov3 convnext")  # the others are slow tests


@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in TOWERS])
def test_a_head_reads_the_towers_pooled_output(folders, tmp_path, name):
    run = train_run(tmp_path / "run", recipe_for(folders[name]), save_every_steps=0)
    network, _ = trained_network(run, "best")
    images = torch.randn(2, 3, 32, 32)
    theirs = AutoModel.from_pretrained(folders[name]).eval()
    with torch.inference_mode():
        pooled = theirs(pixel_values=images).pooler_output
        assert torch.equal(network.module(images), network.module.classifier(pooled))
    # Whoever has no such kit builds it of stock parts; the program was run on samples that validate.
    report = export(run, "best", tmp_path / "model.pt")
    assert "model.tower = AutoModel.from_config(config).float()" in report.program
    assert report.seen.alike == report.seen.samples and report.seen.difference < 1e-4, report.seen
    assert "a vision tower with a linear layer on its pooled output has no stock counterpart" in report.text()
    model, picture = finetune.load(tmp_path / "model.pt"), load_digits().images[3, 0].numpy()
    scope: dict = {"__name__": "elsewhere"}
    exec(compile(report.program, "program", "exec"), scope)
    from PIL import Image

    Image.fromarray(picture).save(tmp_path / "3.png")
    label, probability = scope["predict"](tmp_path / "3.png")
    assert label == model.predict(picture).label
    assert probability == pytest.approx(model.predict(picture).probability, abs=1e-5)


def test_its_features_are_kept_and_a_killed_run_goes_on_to_the_same_bits(folders, tmp_path, capsys):
    words = [
        "vgg_head",
        "--backbone",
        str(folders["clip"]),
        "--epochs",
        "2",
        "--track",
        "none",
        "--no-report",
        "--device",
        "cpu",
    ]
    assert main([*words, "--run", str(tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "features: kept" in said and "weights, built of stock parts" in said
    recipe = small_recipe(model=finetune.Model(str(folders["clip"])), augment="none")
    unbroken = train_run(tmp_path / "unbroken", recipe)
    broken = train_with_deaths(tmp_path / "broken", recipe, [3, 7])
    assert_equal_runs(broken, unbroken)
    # The run stands alone: its folder of weights is a copy.
    assert (tmp_path / "unbroken" / "frozen" / "model" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("form", [".onnx", ".pt2", ".safetensors"])
def test_other_formats_of_a_tower(folders, tmp_path, form):
    run = train_run(tmp_path / "run", recipe_for(folders["siglip"]), save_every_steps=0)
    report = export(run, "best", tmp_path / f"model{form}")
    assert not report.seen.error and report.seen.alike == report.seen.samples


def test_the_towers_weights_are_its_own_and_what_is_no_tower_is_refused(folders, tmp_path):
    backbone = find_backbone(str(folders["siglip"]))
    assert backbone.options["tower"] is True and backbone.options["width"] == 24
    network, _ = trained_network(train_run(tmp_path / "run", recipe_for(folders["siglip"]), save_every_steps=0), "best")
    stored = load_file(folders["siglip"] / "model.safetensors")
    own = network.module.state_dict()
    name = next(name for name in stored if name.endswith("layers.0.mlp.fc1.weight"))
    assert any(torch.equal(value, stored[name]) for value in own.values() if value.shape == stored[name].shape)
    (tmp_path / "sound").mkdir()
    transformers.Wav2Vec2Config(hidden_size=8, num_attention_heads=2, num_hidden_layers=1).save_pretrained(
        tmp_path / "sound"
    )
    with pytest.raises(
        UsageError, match="a wav2vec2 has no image classification class in transformers, and gives no pooled"
    ):
        find_backbone(str(tmp_path / "sound"))
    record = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert record["config"]["model"]["backbone"] == str(folders["siglip"])
