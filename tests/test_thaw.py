"""More than the head trains: by which words, from when on, at which rate, and what is refused."""

import dataclasses
import json

import pytest
import torch
from conftest import assert_equal_runs, make_network, read, small_recipe, train_run, train_with_deaths
from encoders import make_encoder, sentences, text_recipe, write_csv
from test_split import FAMILIES, TAKES_SECONDS
from torch import nn
from torchvision.models.resnet import BasicBlock

from finetune import Optimizer, RunError, Schedule, Stop, Trainable, Training, UsageError
from finetune.models.backbones import find_backbone, torchvision_names
from finetune.models.blocks import is_within
from finetune.models.network import Network, build_network
from finetune.recipe.head_options import ImageTraining
from finetune.recipe.heads import image_head
from finetune.recipe.thaws import rules_of

HEAD, REST = ("head", "trainable", 0), ("*", "frozen", 0)


# ---- Words to rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "rules"),
    [
        ({}, ()),
        ({"train": "last"}, (("last", "trainable", 0),)),
        ({"train": "last:2"}, (("last:2", "trainable", 0),)),
        ({"train": "all"}, (("all", "trainable", 0),)),
        ({"train": "layer4, layer3.1"}, (("layer4", "trainable", 0), ("layer3.1", "trainable", 0))),
        ({"thaw": "6:layer3,3:layer4"}, (("layer4", "trainable", 3), ("layer3", "trainable", 6))),
        ({"thaw": "plateau:last, 2:last:2"}, (("last:2", "trainable", 2), ("last", "at plateau", 1))),
        ({"thaw_last": 2, "thaw_every": 4}, (("last:1", "trainable", 4), ("last:2", "trainable", 8))),
    ],
)
def test_the_words_of_train_and_thaw_are_rules_in_the_order_in_which_they_come(words, rules):
    given = {"train": "head", "thaw": "", "thaw_last": 0, "thaw_every": 3} | words
    assert rules_of(**given) == (HEAD, *rules, REST)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"thaw": "layer4"}, r"--thaw layer4: 'layer4' says not when, or not what; give EPOCHS:PATTERN"),
        ({"thaw": "0:layer4"}, "says not when"),
        ({"thaw": "3:"}, "--thaw 3:: 'nothing' is no part of the backbone"),
        ({"thaw": "3:head"}, "'head' is no part of the backbone"),
        ({"train": "last:0"}, "--train last:0: 'last:0' is not allowed; give last, or last:N"),
        ({"train": "all", "thaw": "3:last"}, "--train all: leaves nothing to thaw"),
        ({"train": "all,layer4"}, "all is everything"),
        ({"thaw_last": -1}, "--thaw-last -1: not allowed; give 0 or more"),
        ({"thaw_last": 1, "thaw_every": 0}, "--thaw-every 0: not allowed; give 1 or more"),
        ({"thaw_every": 5}, "--thaw-every 5: has no effect without --thaw-last"),
        ({"lr_backbone": 0.5}, r"--lr-backbone 0\.5: has no effect, only the head trains"),
        ({"lr_decay": 0.5}, r"--lr-decay 0\.5: has no effect, only the head trains"),
        ({"train": "last", "lr_backbone": 2.0}, r"--lr-backbone 2\.0: not allowed; give more than 0, up to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, message):
    with pytest.raises(UsageError, match=message):
        image_head(images="digits", backbone="bundled/resnet", training=ImageTraining(**words))


def test_a_recipe_that_trains_the_head_alone_is_the_recipe_that_it_was():
    recipe = image_head(images="digits", backbone="bundled/resnet")
    assert recipe.trainable == Trainable() and recipe.optimizer.lr_backbone == 1.0
    assert Training().lr_backbone < 1


# ---- Blocks ---------------------------------------------------------------------------------------------------------

# By family: the first three that are thawed.
BLOCKS = {
    "alexnet": ("classifier.4", "classifier.1", "features.10"),
    "bundled/resnet": ("layer3", "layer2", "layer1"),
    "bundled/vgg": ("features.17", "features.14", "features.10"),
    "convnext_tiny": ("features.7", "features.6", "features.5"),
    "densenet121": ("features.denseblock4", "features.transition3", "features.denseblock3"),
    "efficientnet_b0": ("features.8", "features.7", "features.6"),
    "googlenet": ("inception5b", "inception5a", "inception4e"),
    "inception_v3": ("Mixed_7c", "Mixed_7b", "Mixed_7a"),
    "maxvit_t": ("blocks.3", "blocks.2", "blocks.1"),
    "mnasnet0_5": ("layers.14", "layers.13", "layers.12"),
    "mobilenet_v2": ("features.18", "features.17", "features.16"),
    "mobilenet_v3_small": ("classifier.0", "features.12", "features.11"),
    "regnet_y_400mf": ("trunk_output.block4", "trunk_output.block3", "trunk_output.block2"),
    "resnet18": ("layer4", "layer3", "layer2"),
    "resnext50_32x4d": ("layer4", "layer3", "layer2"),
    "shufflenet_v2_x0_5": ("conv5", "stage4", "stage3"),
    "squeezenet1_1": ("features.12", "features.11", "features.10"),
    "swin_t": ("features.7", "features.6", "features.5"),
    "swin_v2_t": ("features.7", "features.6", "features.5"),
    "vgg11": ("classifier.3", "classifier.0", "features.18"),
    "vit_b_32": tuple(f"encoder.layers.encoder_layer_{number}" for number in (11, 10, 9)),
}


def built(name: str):
    return build_network(
        find_backbone(name), None, "", head="linear", class_count=5, dropout=0.0, head_width=16, seed=0
    )


def assert_blocks_cover(network) -> None:
    """Each parameter is of the head, of one block, or an own one of what holds several blocks."""
    inside = [path for block in network.blocks for path in block.paths]
    for name, _ in network.module.named_parameters():
        holders = sum(block.holds(name) for block in network.blocks)
        is_new = any(is_within(name, path) for path in network._new_paths)
        above = any(path.startswith(name.rpartition(".")[0]) for path in inside)
        is_auxiliary = name.lower().startswith("aux")  # computed in training only
        assert holders == 1 or is_new or (holders == 0 and (above or is_auxiliary)), name


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.slow) if one in TAKES_SECONDS else one for one in FAMILIES]
)
def test_the_blocks_of_each_family_are_those_that_a_person_would_name_from_the_end(name):
    network = built(name)
    assert tuple(block.name for block in network.blocks)[:3] == BLOCKS[name]
    assert_blocks_cover(network)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in torchvision_names() if name not in FAMILIES])
def test_every_model_of_torchvision_has_four_blocks_or_more(name):
    network = built(name)
    assert len(network.blocks) >= 4
    assert_blocks_cover(network)


# ---- What is refused before the first step --------------------------------------------------------------------------


def resnet(**changes):
    """Seven steps an epoch; all of bundled/resnet can train."""
    rules = changes.pop("rules", ())
    return small_recipe("bundled/resnet", trainable=Trainable((HEAD, *rules, REST)), **changes)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            (("layer4", "trainable", 1),),
            r"layer4 \(after 1 epoch\(s\)\) adds no tensor to what trains: it is of the kind Identity, without "
            r"parameters; the blocks of bundled/resnet, from its end, are layer3, layer2, layer1, conv1",
        ),
        ((("layer4", "trainable", 0),), r"layer4 \(from the beginning\) adds no tensor"),
        (
            (("layer3", "trainable", 1), ("last", "at plateau", 1)),
            r"last \(at a plateau\) adds no tensor .* rules before",
        ),
        (
            (("layer3", "trainable", 2),),
            r"layer3 is thawed after 2 epoch\(s\), and the run ends after 2: it never would; give --epochs 3 or more",
        ),
        ((("last:9", "trainable", 1),), r"last:9: the backbone has 4 blocks \(layer3, layer2, layer1, conv1\)"),
        ((("layerx", "trainable", 1),), r"freeze rule 'layerx' matches no module; the nearest are layer"),
        ((("layer3", "thawed", 1),), "'thawed' is not allowed; give 'trainable', 'frozen' or 'at plateau'"),
    ],
)
def test_what_would_never_train_is_an_error_before_there_is_a_folder(tmp_path, rules, message):
    with pytest.raises(UsageError, match=message):
        train_run(tmp_path / "run", resnet(rules=rules))
    assert not (tmp_path / "run").exists()


# ---- Rates ----------------------------------------------------------------------------------------------------------


def test_each_group_learns_at_its_own_rate_by_value_after_one_step(tmp_path):
    sgd = Optimizer("sgd", lr=0.5, momentum=0.0, weight_decay=0.0, lr_backbone=0.1, lr_decay=0.5)
    rules = (("last:2", "trainable", 0),)
    plain = Schedule("constant", warmup_fraction=0.0)
    common = {"rules": rules, "schedule": plain, "max_steps": 1, "augment": "none", "dropout": 0.0}
    slow = read(train_run(tmp_path / "slow", resnet(optimizer=sgd, **common)))
    fast = read(train_run(tmp_path / "fast", resnet(optimizer=Optimizer("sgd", 0.5, 0.0, 0.0), **common)))
    begin = make_network(resnet(rules=rules)).module.state_dict()
    factors = {"fc.weight": 1.0, "layer3.0.conv1.weight": 0.1, "layer3.0.bn2.bias": 0.1, "layer2.0.conv1.weight": 0.05}
    for name, factor in factors.items():
        moved, whole = slow["model"][name] - begin[name], fast["model"][name] - begin[name]
        assert whole.abs().max() > 0
        torch.testing.assert_close(moved, whole * factor, rtol=1e-3, atol=1e-6 * factor)
    rates = {name: group["lr"] for group in slow["optimizer"]["groups"] for name in group["names"]}
    assert {name: rates[name] for name in factors} == {name: 0.5 * factor for name, factor in factors.items()}


def test_what_is_thawed_warms_up_over_its_own_first_steps(tmp_path):
    sgd = Optimizer("sgd", lr=0.5, lr_backbone=0.1)
    schedule = Schedule("constant", warmup_fraction=0.2)  # of fourteen steps three
    run = train_run(tmp_path / "run", resnet(rules=(("layer3", "trainable", 1),), optimizer=sgd, schedule=schedule))
    lines = [line for line in map(json.loads, run.metrics_file.read_text().splitlines()) if "lr" in line]
    assert [line["lr"] for line in lines][:4] == pytest.approx([0.5 / 3, 1 / 3, 0.5, 0.5])
    assert [line["lr/layer3"] for line in lines[7:11]] == pytest.approx([0.05 / 3, 0.1 / 3, 0.05, 0.05])
    assert all(line["lr/head"] == 0.5 for line in lines[7:])


# ---- Through kills --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_kills_in_each_phase_and_at_its_boundaries_lose_no_bit_where_a_plateau_thaws(tmp_path, cached):
    recipe = resnet(
        rules=(("last:1", "trainable", 1), ("last:2", "at plateau", 1)),
        optimizer=Optimizer(lr=1e-9, lr_backbone=0.1, lr_decay=0.5, accumulate=2),  # nothing improves
        schedule=Schedule(patience=2),
        stop=Stop(ties="first"),
        augment="none" if cached else "light",
        epochs=6,
    )
    unbroken = train_run(tmp_path / "unbroken", recipe)
    events = [(one["event"], one["epoch"]) for one in read(unbroken)["history"]]
    assert events == [("start", 0), ("thaw", 1), ("thaw", read(unbroken)["plateaus"][0])]
    begin = 7 * read(unbroken)["plateaus"][0]
    run = train_with_deaths(tmp_path / "run", recipe, [3, 7, 8, 12, begin, begin + 1, begin + 4])
    assert_equal_runs(run, unbroken)


def test_patience_begins_anew_at_a_thaw_and_runs_of_before_go_on_counting(tmp_path):
    common = {"rules": (("last:1", "trainable", 2),), "optimizer": Optimizer(lr=1e-9), "epochs": 8}
    new = train_run(tmp_path / "new", resnet(stop=Stop(patience=3, ties="first"), **common))
    old = train_run(tmp_path / "old", resnet(stop=Stop(patience=3, ties="first", anew=False), **common))
    assert read(old)["epoch"] < read(new)["epoch"] <= 5


class WithPooler(nn.Module):
    """A network whose forward never reads one of its layers."""

    def __init__(self):
        super().__init__()
        self.body, self.pooler, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, inputs):
        return self.head(self.body(inputs))


def test_of_everything_only_what_outputs_depend_on_trains():
    network = Network(WithPooler(), ["head"], "linear", 2, example=lambda count: torch.ones(count, 4))
    assert network.unread == ("pooler",)
    names = network.freeze_map(Trainable((("all", "trainable", 0),))).at(0).apply()
    assert names == ["body.weight", "body.bias", "head.weight", "head.bias"]
    assert [value.requires_grad for value in network.module.pooler.parameters()] == [False, False]


ENCODERS = ("bert", "minilm", "distilbert", "roberta", "deberta-v2", "electra", "albert", "mpnet")


@pytest.mark.parametrize(
    "family", [one if one in ("bert", "deberta-v2") else pytest.param(one, marks=pytest.mark.slow) for one in ENCODERS]
)
def test_of_a_text_encoder_the_last_layer_trains_with_the_head_and_a_kill_loses_no_bit(tmp_path, family):
    texts = write_csv(tmp_path / "texts.csv", sentences(120))
    folder = make_encoder(tmp_path / family, family)
    recipe = text_recipe(texts, folder, pooling="mean", training=Training(train="last", lr_backbone=0.5))
    unbroken = train_run(tmp_path / "unbroken", recipe)
    trainable = read(unbroken)["frozen"]["trainable"]
    if family != "albert":
        assert any(".layer." in name for name in trainable)
        assert {name.rpartition(".layer.")[2][:2] for name in trainable if ".layer." in name} == {
            f"{FAMILY_LAYERS.get(family, 2) - 1}."
        }
    assert_equal_runs(train_with_deaths(tmp_path / "run", recipe, [2, 7]), unbroken)


FAMILY_LAYERS = {"minilm": 3}


def test_a_tensor_that_gets_no_gradient_stops_a_run_by_name_and_a_run_of_before_goes_on(tmp_path, monkeypatch):
    """As a network whose forward never reads one of its layers, of which the rules say that it trains."""
    monkeypatch.setattr(BasicBlock, "forward", lambda self, x: self.downsample(x) if self.downsample else x)
    recipe = resnet(rules=(("layer3", "trainable", 0),), epochs=3)
    names = r"layer3\.0\.bn1\.bias, layer3\.0\.bn1\.weight, layer3\.0\.bn2\.bias"
    with pytest.raises(RunError, match=rf"6 tensor\(s\) that are to train had no gradient in 8 batches: {names}"):
        train_run(tmp_path / "run", recipe)
    before = dataclasses.replace(recipe, trainable=dataclasses.replace(recipe.trainable, checked=False))
    assert read(train_run(tmp_path / "before", before))["status"] == "finished"
