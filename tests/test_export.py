import json
import re

import pytest
import torch
from conftest import make_network, small_recipe, train_run
from safetensors.torch import save_file

import finetune
from finetune import Images, RunError
from finetune.cli import main
from finetune.data.batch import Request
from finetune.export.graphs import write_onnx, write_torch_export
from finetune.export.verify import FOLDED_TOLERANCE, Own
from finetune.export.weights import GRAPH_TOLERANCE, export
from finetune.models.backbones import find_backbone
from finetune.models.bundled import bundled_weights
from finetune.models.heads import folded_state
from finetune.models.weight_files import read_weights
from finetune.store.restore import trained_network
from finetune.training.dataset import open_data


@pytest.mark.parametrize(
    ("backbone", "format"),
    [
        ("bundled/resnet", "safetensors"),
        pytest.param("bundled/vgg", "pt", marks=pytest.mark.slow),
        pytest.param("bundled/vgg", "safetensors", marks=pytest.mark.slow),
        pytest.param("bundled/resnet", "pt", marks=pytest.mark.slow),
    ],
)
def test_stock_torchvision_loads_the_export_strictly_and_gives_the_runs_logits(tmp_path, backbone, format):
    recipe = small_recipe(backbone, epochs=1)
    run = train_run(tmp_path / "run", recipe, save_every_steps=0)
    report = export(run, "best", tmp_path / "out" / f"model.{format}")
    data = open_data(recipe, find_backbone(backbone))
    images = data.pipeline.fetch(Request(data.split.validation[:40].tolist())).inputs
    network, _ = trained_network(run, "best")
    with torch.inference_mode():
        ours = network.module(images)
    scope: dict = {"__name__": "receiver"}
    exec(report.program, scope)  # where the kit is not installed: test_programs.py
    theirs = scope["model"](images).detach()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=FOLDED_TOLERANCE * max(ours.abs().max().item(), 1))
    assert 0 < report.largest_difference <= FOLDED_TOLERANCE * max(ours.abs().max().item(), 1)


@pytest.mark.parametrize("head", ["mlp", "append"])
def test_other_heads_are_rebuilt_by_load_and_of_stock_parts_by_the_program(tmp_path, head):
    run = train_run(tmp_path / "run", small_recipe(head=head, epochs=1), save_every_steps=0)
    report = export(run, "latest", tmp_path / "model.pt")
    assert f"a head of kind {head!r} has no stock counterpart" in report.text()
    assert "set_submodule" in report.program and report.seen.alike == report.seen.samples
    model = finetune.load(tmp_path / "model.pt")
    assert not model.training and model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_run_in_which_everything_trained_exports_bit_for_bit(tmp_path):
    recipe = small_recipe(
        head="keep", epochs=1, trainable=finetune.Trainable(rules=(("*", "trainable", 0),), batchnorm=True)
    )
    run = train_run(tmp_path / "run", recipe, save_every_steps=0)
    assert export(run, "best", tmp_path / "model.pt").largest_difference == 0


def test_the_json_says_what_the_file_is(trained, tmp_path):
    export(trained, "best", tmp_path / "model.pt")
    description = json.loads((tmp_path / "model.json").read_text())
    assert description["classes"] == [str(digit) for digit in range(10)]
    assert description["preprocessing"]["image_size"] == 32
    assert description["architecture"]["backbone"] == "bundled/vgg" and description["architecture"]["stock"]
    assert description["metrics"]["val/accuracy"] > 0.9
    assert description["source_run"] == "run"
    assert torch.load(tmp_path / "model.pt", weights_only=True)["classifier.1.weight"].shape == (10, 512)


def test_a_file_that_is_not_what_its_json_says_is_refused(trained, tmp_path):
    export(trained, "best", tmp_path / "model.pt")
    content = bytearray((tmp_path / "model.pt").read_bytes())
    content[5000] ^= 1
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(RunError, match=r"does not match its \.json"):
        finetune.load(tmp_path / "model.pt")
    (tmp_path / "model.json").unlink()
    with pytest.raises(RunError, match=r"model\.json does not exist"):
        finetune.load(tmp_path / "model.pt")


def test_a_comparison_that_fails_leaves_no_file(trained, tmp_path, monkeypatch):
    from finetune.export import verify as trained_module

    def wrong(module, apart):
        state = folded(module, apart)
        return {name: value + 1e-3 if name.endswith("bias") else value for name, value in state.items()}

    folded = trained_module.folded_state
    monkeypatch.setattr(trained_module, "folded_state", wrong)
    with pytest.raises(RunError, match="logits differ from the run's"):
        export(trained, "best", tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_valid_weights_for_the_next_run(trained, tmp_path):
    export(trained, "best", tmp_path / "model.pt")
    recipe = small_recipe(
        model=finetune.Model("bundled/vgg", weights=str(tmp_path / "model.pt")), epochs=1,
        data=Images("digits", train_samples=100),
    )  # fmt: skip
    run = train_run(tmp_path / "next", recipe, save_every_steps=0)
    network, _ = trained_network(run, "latest")
    first, _ = trained_network(trained, "best")
    assert torch.equal(network.module.features[0].weight, first.module.features[0].weight)


def test_an_unfinished_run_without_a_checkpoint_cannot_be_exported(tmp_path):
    from conftest import Killed

    from finetune.store.run_folder import RunFolder

    with pytest.raises(Killed):
        train_run(tmp_path / "run", small_recipe(), die_after_steps=1)
    with pytest.raises(RunError, match="has no best checkpoint yet"):
        export(RunFolder(tmp_path / "run"), "best", tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


def shifted(tmp_path, by: float) -> str:
    """Weights whose features lie `by` from zero, and deviate as they always do."""
    weights = read_weights(bundled_weights("bundled/vgg"))
    last = [name for name in weights if name.startswith("features") and name.endswith("bias")][-1]
    file = tmp_path / "shifted.safetensors"
    save_file(weights | {last: weights[last] + by}, file)
    return str(file)


def test_features_that_deviate_little_from_a_large_mean_are_learnt_from_and_exported_without_loss(tmp_path):
    model = finetune.Model("bundled/vgg", weights=shifted(tmp_path, 3000))
    recipe = small_recipe(model=model, augment="none", dropout=0.0, epochs=4, task=finetune.Classification())
    run = train_run(tmp_path / "run", recipe, save_every_steps=0)
    report = export(run, "best", tmp_path / "model.pt")
    assert report.description["metrics"]["val/accuracy"] > 0.8
    assert report.description["architecture"]["standardised"] == ["classifier.1"]
    assert report.largest_difference == 0 and not report.description["architecture"]["stock"]
    assert "what classifier.1 reads deviates so little from its mean that it has no stock" in report.text()
    images = open_data(recipe, find_backbone("bundled/vgg")).pipeline.fetch(Request(list(range(8)))).inputs
    with torch.inference_mode():
        wanted = trained_network(run, "best")[0].module(images)
        assert torch.equal(finetune.load(tmp_path / "model.pt")(images), wanted)
        # What a stock layer would have given:
        state = folded_state(trained_network(run, "best")[0].module)
        plain = find_backbone("bundled/vgg").build(10).eval()
        plain.load_state_dict(state)
        assert (plain(images) - wanted).abs().max() > 1e-4
    export(run, "best", tmp_path / "model.onnx")
    make_network(
        small_recipe(model=finetune.Model("bundled/vgg", str(tmp_path / "model.pt")))
    )  # weights for a next run


@pytest.mark.parametrize(("precision", "backbone"), [("bf16", ""), ("fp32", "bf16")])
def test_an_export_says_how_far_what_the_run_computed_lies_from_what_its_weights_give(tmp_path, precision, backbone):
    recipe = small_recipe(epochs=1, augment="none")
    run = train_run(tmp_path / "run", recipe, precision=precision, backbone_precision=backbone, save_every_steps=0)
    text = export(run, "best", tmp_path / "model.pt").text()
    assert "its logits equal the run's within" in text and ", both computed in fp32\n" in text
    said = re.search(
        r"the run computed in bf16: what it gave lies within (\S+) of the spread; decided alike: (\d+) of 16 sam", text
    )
    assert 1e-4 < float(said[1]) < 0.05 and int(said[2]) >= 14 and "more than rounding explains" not in text


def test_what_rounding_does_not_explain_is_said():
    assert Own("bf16", 0.1, 15, 16).text().endswith("; decided alike: 15 of 16 samples")
    assert "more than rounding explains, so judge the file anew" in Own("bf16", 0.2, 12, 16).text()
    assert Own("fp16", 0.1, None, 16).text() == (
        "the run computed in fp16: what it gave lies within 0.1 of the spread: more than rounding explains, so judge the "
        "file anew, or compute it in fp16 too"
    )


# ---- Other formats --------------------------------------------------------------------------------------------------


def test_an_onnx_file_gives_the_runs_logits_in_onnxruntime_for_any_number_of_images(trained, tmp_path):
    import onnxruntime

    report = export(trained, "best", tmp_path / "model.onnx")
    assert report.largest_difference <= GRAPH_TOLERANCE
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    model = trained_network(trained, "best")[0].module
    for count in (1, 7):
        images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        (found,) = session.run(None, {"images": images.numpy()})
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=0, atol=GRAPH_TOLERANCE)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["model.json", "model.md", "model.onnx"]
    with pytest.raises(RunError, match=r"is a file for onnxruntime"):
        finetune.load(tmp_path / "model.onnx")


@pytest.mark.parametrize("write", [write_onnx, write_torch_export])
def test_a_network_that_was_written_with_a_single_sample_takes_any_number(write, tmp_path):
    network, path = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)).eval(), tmp_path / "model"
    sample = torch.randn(1, 3, 2, 2)
    assert write(network, sample, path).shape == (1, 2)
    images = torch.randn(5, 3, 2, 2)
    if write is write_onnx:
        import onnxruntime

        found = onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})[0]
    else:
        found = torch.export.load(path).module()(images).detach().numpy()
    torch.testing.assert_close(torch.from_numpy(found), network(images).detach(), rtol=0, atol=1e-5)


def test_without_the_packages_for_onnx_the_line_says_what_to_install(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", str(trained.path), "--output", str(tmp_path / "model.onnx")]) == 2
    assert (
        "needs onnx, onnxscript, onnxruntime; install with: pip install onnx onnxscript onnxruntime"
        in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_a_second_format_beside_the_first_leaves_the_first_loadable(trained, tmp_path):
    export(trained, "best", tmp_path / "model.pt")
    export(trained, "best", tmp_path / "model.safetensors")
    images = torch.zeros(1, 3, 32, 32)
    assert torch.equal(
        finetune.load(tmp_path / "model.pt")(images), finetune.load(tmp_path / "model.safetensors")(images)
    )
    # Other weights under the same name: what is no longer described is no longer loaded.
    export(trained, "latest", tmp_path / "model.safetensors")
    finetune.load(tmp_path / "model.safetensors")
    with pytest.raises(RunError, match=r"does not match its \.json"):
        finetune.load(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"task": None},
        {"scale": [1.0]},
        {"scale": [1.0, 0.0]},
        {"scale": [1.0, "2"]},
        {"architecture.standardised": ["features.0"]},
        {"architecture.standardised": ["nowhere"]},
        {"task": "sideways"},
        {"task": ["classification"]},
        {"schema_version": "2"},
        {"schema_version": 1},
        {"files": []},
        {"classes": "abc"},
        {"classes": ["a"] * 10},
        {"classes": ["a", "b"]},
        {"preprocessing.image_size": 0},
        {"preprocessing.image_size": "32"},
        {"preprocessing.interpolation": "foo"},
        {"preprocessing.mean": [0.5]},
        {"preprocessing.std": [0, 0, 0]},
        {"architecture.old_classes": -1},
        {"architecture.head": "sideways"},
        {"architecture.head_paths": ["features.0"]},
        {"architecture.backbone": "vit_b_16"},
        {"architecture.backbone": "no_such"},
    ],
    ids=str,
)
def test_a_json_that_was_tampered_with_is_one_line(trained, tmp_path, change, capsys):
    export(trained, "best", tmp_path / "model.pt")
    description = json.loads((tmp_path / "model.json").read_text())
    for path, value in change.items():
        place = description
        *parents, last = path.split(".")
        for parent in parents:
            place = place[parent]
        place[last] = value
        if value is None:
            del place[last]
    (tmp_path / "model.json").write_text(json.dumps(description))
    assert main(["predict", str(tmp_path / "model.pt"), str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("finetune: ") and error.count("\n") == 1


def test_an_output_that_cannot_be_written_is_one_line(trained, tmp_path, capsys):
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "file").write_text("")
    for output in ("folder.pt", "file/model.pt"):
        assert main(["export", str(trained.path), "--output", str(tmp_path / output)]) in (1, 2)
        assert (error := capsys.readouterr().err).startswith("finetune: ") and error.count("\n") == 1
    assert main(["export", str(trained.path), "--no-weights-only", "--output", str(tmp_path / "folder.pt")]) == 2
