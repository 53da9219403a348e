import pytest
import torch
from conftest import make_network, small_recipe
from torch import nn

from finetune import Trainable, UsageError
from finetune.data.batch import Request
from finetune.models.backbones import find_backbone
from finetune.models.bundled import BUNDLED, bundled_weights
from finetune.models.heads import (
    StandardisedConv2d,
    StandardisedLinear,
    find_head,
    folded,
    folded_state,
    plain_head,
)
from finetune.models.standardisation import ROWS_A_FEATURE, standardise
from finetune.training.dataset import open_data


@pytest.mark.parametrize(
    ("backbone", "path"),
    [("bundled/mobilenet", "classifier.1"), ("bundled/vgg", "classifier.1"), ("bundled/resnet", "fc")],
)
def test_the_head_is_found_where_shapes_change_with_the_classes(backbone, path):
    assert find_head(find_backbone(backbone).build) == [path]
    assert len(BUNDLED) == 3


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
    standardise(layer, batches, way="centred")
    features = (torch.cat(batches) - layer.mean) / layer.deviation
    # Sums are in float64; what is left is float32's rounding of the features themselves.
    torch.testing.assert_close(features.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std(0, correction=0), torch.tensor([1.0, 1, 1, 0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("rows", "is_one"), [(ROWS_A_FEATURE * 4 - 1, True), (ROWS_A_FEATURE * 4, False)])
def test_of_few_rows_a_feature_one_deviation_is_measured_for_all_that_vary(rows, is_one):
    torch.manual_seed(0)
    layer = StandardisedLinear(4, 2, dropout=0.0)
    features = torch.randn(rows, 4) * torch.tensor([1.0, 10.0, 0.1, 0.0]) + torch.tensor([5.0, -3.0, 0.0, 7.0])
    standardise(layer, features.split(50))
    variances = features[:, :3].var(0, correction=0)
    expected = variances.mean().expand(3) if is_one else variances
    torch.testing.assert_close(layer.deviation, torch.cat([expected.sqrt(), torch.ones(1)]))
    torch.testing.assert_close(layer.mean, features.mean(0))


def test_a_convolution_as_head_is_standardised_by_channel_and_folds_into_a_plain_one():
    torch.manual_seed(0)
    layer = StandardisedConv2d(4, 3, dropout=0.0)
    maps = torch.randn(20, 4, 5, 5) * torch.tensor([1.0, 10.0, 0.1, 2.0]).view(-1, 1, 1) + 3
    standardise(layer, maps.split(7))
    rows = layer.by_feature(maps)
    torch.testing.assert_close(layer.mean, rows.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.deviation, rows.std(0, correction=0), rtol=1e-5, atol=0)
    plain = layer.plain()
    plain.load_state_dict(folded(layer), strict=True)
    torch.testing.assert_close(plain(maps), layer(maps), rtol=0, atol=1e-5)


def test_a_head_without_bias_is_scaled_but_not_centred_for_there_is_nothing_to_fold_a_mean_into():
    torch.manual_seed(0)
    layer = StandardisedLinear(4, 3, dropout=0.0, bias=False)
    features = torch.randn(100, 4) * 5 + 2
    standardise(layer, [features])
    assert layer.mean.tolist() == [0] * 4 and (layer.deviation > 3).all()
    plain = layer.plain()
    plain.load_state_dict(folded(layer), strict=True)
    torch.testing.assert_close(plain(features), layer(features), rtol=0, atol=1e-5)


def test_features_are_standardised_by_how_they_deviate_however_large_or_small_they_are():
    torch.manual_seed(0)
    layer = StandardisedLinear(4, 1, dropout=0.0)
    features = torch.randn(200, 4) * torch.tensor([1e-8, 1e-3, 0.5, 1e-3]) + torch.tensor([1e-8, 5.0, 1e5, -80.0])
    standardise(layer, features.split(7))
    assert layer.deviation[0] < 2e-8
    torch.testing.assert_close(layer.deviation, features.double().std(0, correction=0).float(), rtol=1e-6, atol=0)
    seen = (features - layer.mean) / layer.deviation
    torch.testing.assert_close(seen.std(0, correction=0), torch.ones(4), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_feature_whose_deviation_is_but_rounding_is_not_blown_up(dtype):
    """What differs in its last place only, as in a layer that gives the same for every sample."""
    torch.manual_seed(0)
    layer = StandardisedLinear(3, 1, dropout=0.0)
    unit = torch.finfo(dtype).eps
    last = torch.randint(0, 2, (200, 1)) * unit
    features = torch.cat([1 + last, 1 + 100 * last, torch.full((200, 1), 7.0)], dim=1)
    assert torch.equal(features.to(dtype).float(), features)
    standardise(layer, [features], dtype=dtype)
    assert layer.deviation[0] == 1 and layer.deviation[1] < 1 and layer.deviation[2] == 1
    assert ((features - layer.mean) / layer.deviation)[:, 0].abs().max() <= unit


def test_the_plain_way_measures_in_every_bit_what_it_always_did():
    torch.manual_seed(0)
    features = torch.randn(100, 4) * torch.tensor([1e-8, 1e-3, 1.0, 0.0]) + torch.tensor([1e-8, 5.0, 3.0, 7.0])
    for bias in (True, False):
        layer = StandardisedLinear(4, 1, dropout=0.0, bias=bias)
        standardise(layer, features.split(7), way="plain")
        total, squares = 0.0, 0.0
        for batch in features.double().split(7):
            total, squares = total + batch.sum(0), squares + batch.square().sum(0)
        mean = total / 100 if bias else torch.zeros_like(total)
        deviation = (squares / 100 - mean.square()).clamp(min=0).sqrt()
        varies = deviation > (1e-3 * (total / 100).abs()).clamp(min=1e-12)
        assert torch.equal(layer.mean, mean.float())
        assert torch.equal(layer.deviation, torch.where(varies, deviation, 1.0).float())
        assert not bias or (layer.deviation[0] < 2e-8 and layer.deviation[1] == 1)


@pytest.mark.parametrize("kind", ["linear", "mlp", "append"])
@pytest.mark.parametrize("backbone", ["bundled/vgg", "bundled/resnet"])
def test_a_folded_head_gives_the_same_logits(backbone, kind):
    recipe = small_recipe(backbone, head=kind, augment="none")
    data = open_data(recipe, find_backbone(backbone))
    network = make_network(recipe)
    standardise(network.module, [data.pipeline.fetch(Request(data.split.train.tolist())).inputs])
    plain = find_backbone(backbone).build(network.old_class_count)
    plain_head(plain, network.head_paths[-1], kind, data.class_count, recipe.model.head_width)
    plain.load_state_dict(folded_state(network.module), strict=True)
    images = data.pipeline.fetch(Request(data.split.validation[:32].tolist())).inputs
    with torch.inference_mode():
        ours, theirs = network.module.eval()(images), plain.eval()(images)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(ours.abs().max().item(), 1))


def test_a_linear_head_keeps_the_stock_names():
    network = make_network(small_recipe("bundled/resnet"))
    assert set(folded_state(network.module)) == set(find_backbone("bundled/resnet").build(10).state_dict())


def test_an_appended_head_leaves_the_old_layer_as_it_was_pretrained():
    from finetune.models.weight_files import read_weights

    pretrained = read_weights(bundled_weights("bundled/vgg"))
    network = make_network(small_recipe(head="append"))
    state = network.module.state_dict()
    assert torch.equal(state["classifier.1.0.weight"], pretrained["classifier.1.weight"])
    assert network.freeze_map(Trainable()).rules[0].pattern == "classifier.1.1"


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
        make_network(recipe)


def test_weights_of_another_architecture_are_refused_with_what_differs():
    from finetune import Model

    other = str(bundled_weights("bundled/resnet"))
    with pytest.raises(
        UsageError, match=r"(?s)does not fit the architecture.*- features\.0\.weight.*\+ conv1\.weight|more"
    ):
        make_network(small_recipe(model=Model("bundled/vgg", weights=other)))
