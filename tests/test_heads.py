import pytest
import torch
from conftest import small_recipe
from torch import nn

from finetune import UsageError
from finetune.build import new_network, open_data, standardise_head
from finetune.data.images import Request
from finetune.models.backbones import BUILDERS, find_backbone
from finetune.models.heads import StandardisedLinear, find_head, folded_state, plain_head, standardise


@pytest.mark.parametrize(("backbone", "path"), [("bundled/vgg", "classifier.1"), ("bundled/resnet", "fc")])
def test_the_head_is_found_where_shapes_change_with_the_classes(backbone, path):
    assert find_head(find_backbone(backbone).build) == [path]
    assert len(BUILDERS) == 2


def test_a_stock_network_of_torchvision_has_its_head_found_too():
    import torchvision

    assert find_head(lambda classes: torchvision.models.vgg16(num_classes=classes)) == ["classifier.6"]
    assert find_head(lambda classes: torchvision.models.mobilenet_v2(num_classes=classes)) == ["classifier.1"]


def test_standardised_features_have_mean_zero_and_deviation_one_and_constant_ones_stay_finite():
    torch.manual_seed(0)
    layer = StandardisedLinear(4, 2, dropout=0.0)
    batches = [
        torch.randn(50, 4) * torch.tensor([1.0, 10.0, 0.1, 0.0]) + torch.tensor([5.0, -3.0, 0.0, 7.0]) for _ in range(3)
    ]
    standardise(layer, batches)
    features = (torch.cat(batches) - layer.mean) / layer.deviation
    # Sums are in float64; what is left is float32's rounding of the features themselves.
    torch.testing.assert_close(features.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std(0, correction=0), torch.tensor([1.0, 1, 1, 0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "mlp", "append"])
@pytest.mark.parametrize("backbone", ["bundled/vgg", "bundled/resnet"])
def test_a_folded_head_gives_the_same_logits(backbone, kind):
    recipe = small_recipe(backbone, head=kind, augment="none")
    data = open_data(recipe, find_backbone(backbone))
    network, _ = new_network(recipe, data.class_count)
    standardise_head(network.module, data, torch.device("cpu"))
    plain = find_backbone(backbone).build(network.old_class_count)
    plain_head(plain, network.head_path, kind, data.class_count, recipe.model.head_width)
    plain.load_state_dict(folded_state(network.module), strict=True)
    images, _ = data.pipeline.fetch(Request(data.validation[:32].tolist()))
    with torch.inference_mode():
        ours, theirs = network.module.eval()(images), plain.eval()(images)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(ours.abs().max().item(), 1))


def test_a_linear_head_keeps_the_stock_names():
    network, _ = new_network(small_recipe("bundled/resnet"), 10)
    assert set(folded_state(network.module)) == set(find_backbone("bundled/resnet").build(10).state_dict())


def test_an_appended_head_leaves_the_old_layer_as_it_was_pretrained():
    backbone = find_backbone("bundled/vgg")
    from finetune.models.weights import read_weights

    pretrained = read_weights(backbone.weights_file)
    network, _ = new_network(small_recipe(head="append"), 10)
    state = network.module.state_dict()
    assert torch.equal(state["classifier.1.0.weight"], pretrained["classifier.1.weight"])
    assert network.rules((("head", "trainable", 0),))[0].pattern == "classifier.1.1"


def test_dropout_works_while_training_only():
    layer = StandardisedLinear(100, 3, dropout=0.5)
    features = torch.ones(2, 100)
    layer.train()
    assert not torch.equal(layer(features), layer(features))
    layer.eval()
    assert torch.equal(layer(features), nn.functional.linear(features, layer.weight, layer.bias))


def test_append_without_pretrained_weights_is_refused():
    from finetune import Model

    recipe = small_recipe(model=Model("bundled/vgg", weights="none", head="append"))
    with pytest.raises(UsageError, match="--head append needs pretrained weights"):
        new_network(recipe, 10)


def test_weights_of_another_architecture_are_refused_with_what_differs():
    from finetune import Model

    other = str(find_backbone("bundled/resnet").weights_file)
    with pytest.raises(
        UsageError, match=r"(?s)does not fit the architecture.*- features\.0\.weight.*\+ conv1\.weight|more"
    ):
        new_network(small_recipe(model=Model("bundled/vgg", weights=other)), 10)
