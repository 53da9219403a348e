"""Backbones of timm: by name, from its folders, from the hub's cache; what they export loads in timm alone."""

import importlib.util
import json
import os
import shutil

import pytest
import timm
import torch
from conftest import finetune as run_finetune
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torchvision.models import resnet18

from finetune import ImageTraining, UsageError, image_head
from finetune.cli import main
from finetune.export.weights import export
from finetune.models.backbones import backbone_from_plain, check_image_size, find_backbone, find_text_backbone
from finetune.models.heads import attach_head, find_head
from finetune.models.split import CannotSplit, split
from finetune.models.timm_models import licence_of
from finetune.models.weight_files import read_weights
from finetune.models.weights import choose_weights
from finetune.recipe.spec import Model
from finetune.store.restore import trained_network
from finetune.store.run_folder import RunFolder

from conftest import assert_equal_runs, finish, read, small_recipe, train_run, train_with_deaths  # isort: skip

SMALL = ("test_resnet", "test_vit")  # of timm's own tests: less than a million parameters


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """As timm writes them for the hub."""
    torch.manual_seed(0)
    found = {}
    for name in SMALL:
        found[name] = tmp_path_factory.mktemp(name)
        save_for_hf(timm.create_model(name, num_classes=7).eval(), found[name], safe_serialization=True)
    return found


def recipe_for(backbone, **changes):
    training = ImageTraining(finish="none", train_samples=60, validation_fraction=0.05)
    return image_head(images="digits", backbone=str(backbone), epochs=1, training=training, **changes)


@pytest.mark.parametrize("name", SMALL)
def test_a_folder_of_timm_is_its_network_to_the_bit(folders, tmp_path, name):
    run = train_run(tmp_path / "run", recipe_for(folders[name]), save_every_steps=0)
    network, _ = trained_network(run, "best")
    theirs = timm.create_model(f"local-dir:{folders[name]}", pretrained=True).eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        before = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        head = network.module.get_submodule(network.first_layer_path)
        assert torch.equal(network.module.eval()(images), head(before))
    report = export(run, "best", tmp_path / "model.pt")
    assert f"timm.create_model('{name}', num_classes=10" in report.program and report.seen.alike == report.seen.samples


def test_its_features_are_kept_and_a_killed_run_goes_on_to_the_same_bits(folders, tmp_path, capsys):
    words = ["vgg_head", "--backbone", str(folders["test_vit"]), "--epochs", "1", "--track", "none", "--no-report"]
    assert main([*words, "--train-samples", "60", "--device", "cpu", "--run", str(tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "features: kept" in said and "weights for stock timm" in said and "(as of its config.json)" in said
    recipe = small_recipe(model=Model(str(folders["test_resnet"])), augment="none")
    unbroken = train_run(tmp_path / "unbroken", recipe)
    assert_equal_runs(train_with_deaths(tmp_path / "broken", recipe, [3, 7]), unbroken)
    # The run stands alone, and says which timm it was trained with.
    assert (tmp_path / "unbroken" / "frozen" / "model" / "config.json").is_file()
    assert read(unbroken)["versions"]["timm"] == timm.__version__


def test_a_name_is_the_full_one_needs_no_network_without_weights_and_is_recorded(tmp_path):
    run = train_run(tmp_path / "run", recipe_for("timm:test_resnet", weights="none"), save_every_steps=0)
    backbone = read(run)["network"]["backbone"]
    assert backbone["name"] == "timm:test_resnet.r160_in1k" and backbone["options"] == {"timm": "test_resnet.r160_in1k"}
    report = export(run, "best", tmp_path / "model.pt")
    card = (tmp_path / "model.md").read_text()
    assert "none: nothing was pretrained" in card and report.seen.alike == report.seen.samples
    assert licence_of(backbone["options"]) == "apache-2.0" and licence_of({}) == ""
    assert find_backbone("timm:test_resnet.r160_in1k").name == find_backbone("timm:test_resnet").name


def test_local_weights_of_others_load_into_a_model_of_timm(tmp_path):
    """timm's ResNets call their tensors as torchvision does; of another number of classes, in a training script's nest."""
    theirs = resnet18(num_classes=4).state_dict()
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in theirs.items()}, "epoch": 3}, tmp_path / "a.pth"
    )
    backbone, weights = choose_weights("timm:resnet18", str(tmp_path / "a.pth"))
    state = read_weights(weights.path)
    from finetune.models.network import build_network

    network = build_network(
        backbone, state, "a", head="linear", class_count=3, dropout=0.0, head_width=8, seed=0
    )  # fmt: skip
    own = network.module.state_dict()
    assert all(torch.equal(own[name], value) for name, value in theirs.items() if not name.startswith("fc."))


def test_names_of_old_folders_are_todays(tmp_path, folders):
    """timm's own loading renames them: a Swin's downsampling stood at the end of a stage once."""
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=2)
    save_for_hf(model, tmp_path, safe_serialization=False)
    old = {
        name.replace("layers.1.downsample", "layers.0.downsample")
        .replace("layers.2.downsample", "layers.1.downsample").replace("layers.3.downsample", "layers.2.downsample")
        .replace("head.fc.", "head."): value
        for name, value in model.state_dict().items()
    }  # fmt: skip
    torch.save(old, tmp_path / "pytorch_model.bin")
    found = read_weights(tmp_path)
    own = model.state_dict()
    assert set(found) == set(own) and all(torch.equal(found[name], own[name]) for name in own)


def test_weights_of_a_folder_whose_images_we_could_not_prepare_load_into_another_network(tmp_path):
    """What timm would do with pictures says nothing of the tensors."""
    torch.manual_seed(0)
    save_for_hf(timm.create_model("resnet18", num_classes=2), tmp_path, safe_serialization=True)
    plain = json.loads((tmp_path / "config.json").read_text())
    plain["pretrained_cfg"]["crop_mode"] = "border"
    (tmp_path / "config.json").write_text(json.dumps(plain))
    with pytest.raises(UsageError, match="its images are prepared in a way that this kit cannot"):
        find_backbone(str(tmp_path))
    _, weights = choose_weights("resnet18", str(tmp_path))
    assert set(read_weights(weights.path)) == set(resnet18().state_dict())
    # One that timm does not know is read as it is.
    (tmp_path / "config.json").write_text(json.dumps(plain | {"architecture": "resnet_of_tomorrow"}))
    assert set(read_weights(weights.path)) == set(resnet18().state_dict())


def test_a_model_in_the_hubs_cache_is_linked_and_other_files_beside_it_are_not_read(tmp_path, folders):
    """In a process of its own, for the hub's library reads its settings when it is imported."""
    snapshot = tmp_path / "cache" / "models--timm--test_resnet.r160_in1k" / "snapshots" / "abc"
    shutil.copytree(folders["test_resnet"], snapshot)
    (snapshot / "open_clip_model.safetensors").write_bytes(b"of another library")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    offline = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    words = ["vgg_head", "--backbone", "timm:test_resnet", "--epochs", "1", "--train-samples", "40"]
    run = RunFolder(tmp_path / "run")
    variables = os.environ | offline | {"HF_HUB_CACHE": str(tmp_path / "cache")}
    finish(run_finetune(*words, "--run", str(run.path), env=variables))
    record = json.loads((run.frozen / "frozen.json").read_text())
    assert record["reference"] == "hf:timm/test_resnet.r160_in1k" and record["kind"] == "source"
    assert (run.frozen / "model" / "model.safetensors").samefile(snapshot / "model.safetensors")


def test_what_cannot_be_had_says_what_to_do(tmp_path, monkeypatch, capsys, folders):
    for name, said in {
        "timm:resnet81": r"timm [\d.]+ has no such model; did you mean timm:resnet",
        "timm:resnet18.never": r"has no such model; did you mean timm:resnet18",
        "timm:": r"has no such model",
        "timm:deepseek_vit_412m.deepseek_v4_1_flash": r"its images are prepared in a way that this kit cannot",
        "timm:vit_base_patch16_sapiens2.fb": r"1024 x 768 px",
    }.items():
        with pytest.raises(UsageError, match=said):
            find_backbone(name)
    with pytest.raises(
        UsageError, match=r"not on timm's own page of the hub; fetch them and give --weights FILE, or none"
    ):
        choose_weights("timm:fastvit_mci0.apple_mclip", "default")
    with pytest.raises(UsageError, match=r"--image-size 100: .* cannot take it; it can take .*160"):
        check_image_size(find_backbone("timm:test_vit2"), 100)
    with pytest.raises(UsageError, match=r"is of timm and reads images, not texts"):
        find_text_backbone(str(folders["test_vit"]), "auto")
    changed = shutil.copytree(folders["test_vit"], tmp_path / "folder")
    plain = json.loads((changed / "config.json").read_text())
    for change, said in (
        ({"architecture": "resnet_of_tomorrow"}, r"timm [\d.]+ has no resnet_of_tomorrow; upgrade it"),
        ({"model_args": {"in_chans": 1}}, r"reads images of 1 channels; give one of 3"),
        (
            {"model_args": {"checkpoint_path": "/etc/passwd"}},
            r"its arguments hold 'checkpoint_path', which is none of an architecture",
        ),
        ({"model_args": {"pretrained_strict": False}}, r"its arguments hold 'pretrained_strict'"),
        ({"model_args": {"no_such": 1}}, r"cannot be built \(.*no_such"),
        ({"pretrained_cfg": []}, r"is not as timm writes it; fetch it anew"),
    ):
        (changed / "config.json").write_text(json.dumps(plain | change))
        with pytest.raises(UsageError, match=said):
            find_head(find_backbone(str(changed)).build)
    (changed / "config.json").write_text(json.dumps(plain))
    (changed / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"holds no model\.safetensors or pytorch_model\.bin; put it there"):
        read_weights(changed)
    # An export's description may be of anybody: nothing is fetched or looked up.
    for odd in ("hf-hub:timm/resnet18.a1_in1k", f"local-dir:{folders['test_vit']}"):
        plain = {
            "name": "timm:x",
            "options": {"timm": odd},
            "preprocessing": find_backbone("timm:test_vit").to_plain()["preprocessing"],
        }
        with pytest.raises(UsageError, match=r"has no such model; upgrade it"):
            backbone_from_plain(plain).build(2)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "timm" else real(name, *rest))
    assert main(["vgg_head", "--backbone", "timm:resnet18", "--run", str(tmp_path / "run")]) == 2
    assert "timm:resnet18: needs timm; install with: pip install timm" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    # Others' networks can be called as timm calls them: such a folder's weights need no timm.
    assert set(read_weights(folders["test_resnet"])) == set(timm.create_model("test_resnet").state_dict())


def test_images_are_prepared_as_timm_does_it():
    """By every way that a registered model has; what the kit cannot is refused."""
    done, refused = set(), set()
    for name in timm.list_pretrained():
        config = timm.get_pretrained_cfg(name).to_dict()
        given = resolve_data_config(pretrained_cfg=config)
        key = str(sorted(given.items()))
        if key in done or given["input_size"][-1] > 300:  # larger ones are of the same kinds
            continue
        done.add(key)
        try:
            preprocessing = find_backbone(f"timm:{name}").preprocessing
        except UsageError:
            refused.add(given["crop_mode"])
            continue
        picture = Image.radial_gradient("L").convert("RGB").resize((400, 300))
        theirs = create_transform(**given, is_training=False)(picture)
        image = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(300, 400, 3).permute(2, 0, 1)
        ours = preprocessing.normalise(preprocessing.resize(image)[None])[0]
        assert (ours - theirs).abs().max() < 0.1, name
    assert len(done) > 20 and refused <= {"border"}


def test_they_are_listed_by_a_word(capsys):
    assert main(["backbones", "timm:test_resnet"]) == 0
    assert capsys.readouterr().out == "timm:test_resnet.r160_in1k  160 px\n"
    assert main(["backbones", "timm", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) > 1700
    assert (
        main(["backbones", "timm:no such"]) == 2
        and "without what follows timm: all are listed" in capsys.readouterr().err
    )


# The smallest of each of timm's files that stands for how its networks are built, and one with two heads.
USUAL = ["test_convnext", "test_efficientnet", "test_mambaout", "test_coatnet", "deit_tiny_distilled_patch16_224"]


@pytest.mark.parametrize("name", USUAL)
def test_the_frozen_part_is_cut_off_where_what_trains_begins(name):
    assert cut_of(name)[0] <= 1024


@pytest.mark.slow
def test_the_frozen_part_of_every_family_is_cut_off_at_its_head():
    by_file: dict[str, list[str]] = {}
    for name in timm.list_models():
        by_file.setdefault(timm.models.model_entrypoint(name).__module__, []).append(name)
    known = ("test_", "atto", "femto", "pico", "nano", "_xxs", "_xs", "tiny", "18", "_s", "small", "0")
    whole, widest = [], 0
    for names in by_file.values():
        name = next((one for word in known for one in names if word in one), names[0])
        if "412m" in name or "570m" in name or "306m" in name or "300m" in name:
            continue  # gigabytes
        try:
            widest = max(widest, cut_of(name)[0])
        except CannotSplit:
            whole.append(name)
    assert len(by_file) > 80 and widest <= 80_000 and set(whole) <= {"crossvit_tiny_240"}, (whole, widest)


def cut_of(name):
    """Width of a row, and the places, of a fresh head on a frozen network of timm."""
    backbone = find_backbone(f"timm:{name}")
    torch.manual_seed(0)
    module, heads = backbone.build(3), find_head(backbone.build)
    assert heads, name
    for path in heads:
        attach_head(module, path, "linear", 3, 0.1, 8)
    module.eval().requires_grad_(False)
    for path in heads:
        module.get_submodule(path).train().requires_grad_(True)
    found = split(module, backbone.preprocessing.example(2))
    return found.width, found.places
