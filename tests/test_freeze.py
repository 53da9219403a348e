import pytest
import torch
from conftest import make_network, read, small_recipe, train_run, train_with_deaths
from torch import nn

from finetune import Trainable, UsageError
from finetune.models.freeze import FreezeMap, Rule, hash_tensors
from finetune.store.restore import trained_network

HEAD_ONLY = Trainable()
THAW = Trainable(rules=(("head", "trainable", 0), ("layer3", "trainable", 1), ("*", "frozen", 0)))


@pytest.mark.parametrize("backbone", ["bundled/vgg", "bundled/resnet"])
def test_after_a_run_with_kills_frozen_parameters_and_buffers_are_as_loaded_and_the_head_is_not(tmp_path, backbone):
    recipe = small_recipe(backbone)
    before = make_network(recipe)
    run = train_with_deaths(tmp_path / "run", recipe, [3, 5, 9])
    after, _ = trained_network(run, "latest")
    old, new = before.module.state_dict(), after.module.state_dict()
    head = before.head_paths[-1] + "."
    frozen = [name for name in old if not name.startswith(head)]
    assert any("running_mean" in name for name in frozen) and any("num_batches" in name for name in frozen)
    for name in frozen:
        assert torch.equal(old[name], new[name]), name
    assert not torch.equal(old[f"{head}weight"], new[f"{head}weight"])
    assert not torch.equal(old[f"{head}bias"], new[f"{head}bias"])


def test_only_the_matched_modules_are_in_train_mode_even_after_model_train():
    network = make_network(small_recipe("bundled/vgg"))
    network.module.train()
    held = network.freeze_map(HEAD_ONLY).at(0).modes()
    assert [path for path, module in network.module.named_modules() if module.training] == ["classifier.1"]
    assert "classifier.0" in held  # VGG's own Dropout


def test_batchnorm_learns_statistics_only_where_the_recipe_says_so():
    network = make_network(small_recipe("bundled/resnet"))
    rules = (Rule("layer3"), Rule("*", trainable=False))
    FreezeMap(network.module, rules).at(0).modes()
    assert network.module.layer3.training and not network.module.layer3[0].bn1.training
    FreezeMap(network.module, rules, batchnorm=True).at(0).modes()
    assert network.module.layer3[0].bn1.training and not network.module.bn1.training


def test_the_first_matching_rule_wins_and_a_pattern_covers_what_lies_below():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    names = FreezeMap(model, (Rule("0.1", trainable=False), Rule("0"), Rule("*", trainable=False))).at(0).apply()
    assert names == ["0.0.weight", "0.0.bias"]
    assert [name for name, value in model.named_parameters() if value.requires_grad] == names


def test_a_rule_that_matches_nothing_names_the_nearest_paths():
    network = make_network(small_recipe())
    with pytest.raises(UsageError, match=r"'clasifier' matches no module; the nearest are classifier"):
        FreezeMap(network.module, (Rule("clasifier"), Rule("*", trainable=False))).check()


def test_an_uncovered_module_and_a_map_that_trains_nothing_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(UsageError, match="no freeze rule covers module '1'"):
        FreezeMap(model, (Rule("0"),)).check()
    with pytest.raises(UsageError, match="nothing trains in epoch 0"):
        FreezeMap(model, (Rule("*", trainable=False),)).at(0).apply()


def test_frozen_and_changeable_tensors_share_nothing_and_miss_nothing():
    network = make_network(small_recipe("bundled/resnet"))
    for freeze_map in (network.freeze_map(HEAD_ONLY), network.freeze_map(THAW)):
        for epoch in (0, 1):
            frozen, changeable = freeze_map.at(epoch).frozen(), freeze_map.at(epoch).changeable()
            assert not set(frozen) & set(changeable)
            assert set(frozen) | set(changeable) == set(network.module.state_dict())


def test_the_hash_sees_one_flipped_bit_a_name_and_a_shape():
    tensors = {"a": torch.zeros(4), "b": torch.zeros((), dtype=torch.int64)}
    first = hash_tensors(tensors)
    flipped = torch.zeros(4)
    flipped.view(torch.int32)[2] = 1
    assert hash_tensors(tensors | {"a": flipped}) != first
    assert hash_tensors({"c": tensors["a"], "b": tensors["b"]}) != first
    assert hash_tensors(tensors | {"a": torch.zeros(2, 2)}) != first
    assert hash_tensors(dict(reversed(tensors.items()))) == first


def test_a_thaw_trains_the_layers_from_its_epoch_on_and_keeps_the_heads_optimizer_state(tmp_path):
    recipe = small_recipe("bundled/resnet", trainable=THAW, epochs=2)
    before = make_network(recipe)
    run = train_run(tmp_path / "run", recipe, save_every_steps=0)
    state = read(run)
    assert [before.freeze_map(THAW).at(epoch).number for epoch in (0, 1, 2)] == [0, 1, 1]
    assert state["frozen"]["phase"] == 1 and "layer3.0.conv1.weight" in state["frozen"]["trainable"]
    assert state["optimizer"]["state"]["fc.weight"]["step"] == 14
    assert state["optimizer"]["state"]["layer3.0.conv1.weight"]["step"] == 7
    after, _ = trained_network(run, "latest")
    assert not torch.equal(before.module.layer3[0].conv1.weight, after.module.layer3[0].conv1.weight)
    assert torch.equal(before.module.layer2[0].conv1.weight, after.module.layer2[0].conv1.weight)
    assert torch.equal(before.module.layer3[0].bn1.running_mean, after.module.layer3[0].bn1.running_mean)


def test_gradients_of_frozen_tensors_are_never_computed():
    network = make_network(small_recipe())
    names = network.freeze_map(HEAD_ONLY).at(0).apply()
    network.module(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert [name for name, value in network.module.named_parameters() if value.grad is not None] == names
