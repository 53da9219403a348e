"""Every classification model of torchvision: built, frozen, trained a step, exported, loaded into the stock class."""

import pytest
import torch
from conftest import make_network, small_recipe, train_run
from PIL import Image
from torchvision.models import get_model, get_model_weights

from finetune import Images, Model, Trainable, UsageError
from finetune.export.verify import FOLDED_TOLERANCE
from finetune.export.weights import export
from finetune.models.backbones import check_image_size, find_backbone, torchvision_backbone, torchvision_names
from finetune.models.heads import find_head, standardised_layers
from finetune.models.pretrained import find_pretrained
from finetune.models.standardisation import standardise
from finetune.store.restore import trained_network

# The smallest images that an architecture takes, or those it is built for; others take 64.
IMAGE_SIZES = {"inception_v3": 299, "maxvit_t": 224} | dict.fromkeys(
    [name for name in torchvision_names() if name.startswith("vit_")], 224
)
# One a kind of head or of trouble for the ordinary suite; the others are slow.
QUICK = ("mnasnet0_5", "mobilenet_v3_small", "regnet_y_400mf", "squeezenet1_1")
CLASSES = 3


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for label, colour in (("blue", (0, 0, 255)), ("green", (0, 255, 0)), ("red", (255, 0, 0))):
        (folder / label).mkdir()
        for number in range(3):
            Image.linear_gradient("L").convert("RGB").resize((70 + number, 60)).point(
                [min(value * (200 + level) // 400, 255) for level in colour for value in range(256)]
            ).save(folder / label / f"{number}.png")
    return folder


def recipe_for(name: str, pictures):
    return small_recipe(
        model=Model(name, weights="none"),
        data=Images(str(pictures), image_size=IMAGE_SIZES.get(name, 64)),
        epochs=0,
        max_steps=1,
        batch_size=6,
    )


def test_torchvision_has_the_models_that_this_file_goes_through():
    assert len(torchvision_names()) >= 80 and set(QUICK) <= set(torchvision_names())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in torchvision_names()]
)
def test_a_model_freezes_trains_a_step_and_its_export_loads_strictly_into_the_stock_class(tmp_path, pictures, name):
    recipe = recipe_for(name, pictures)
    before = make_network(recipe, CLASSES)
    run = train_run(tmp_path / "run", recipe, save_every_steps=0)
    after, state = trained_network(run, "latest")
    frozen = before.freeze_map(recipe.trainable).at(0).frozen()
    found = after.module.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in frozen.items())
    heads = [parameter for parameter in state.model if parameter.endswith("weight")]
    assert heads == [f"{path}.weight" for path in before.head_paths]
    assert not any(torch.equal(before.module.state_dict()[key], found[key]) for key in heads)
    del before, frozen

    seen = export(run, "latest", tmp_path / "model.pt").seen
    assert not seen.error and seen.alike == seen.samples and seen.difference < 1e-4
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    stock = get_model(name, num_classes=CLASSES, **options)
    stock.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    size = recipe.data.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = after.module.eval()(images), stock.eval()(images)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=FOLDED_TOLERANCE * max(ours.abs().max().item(), 1))


@pytest.mark.parametrize("name", torchvision_names())
def test_every_offered_weights_file_has_a_preparation_and_fits_the_size_it_was_trained_at(name):
    for member in get_model_weights(name):
        backbone = torchvision_backbone(name, member)
        assert backbone.preprocessing.resize_size >= backbone.preprocessing.image_size >= 224
        assert len(backbone.preprocessing.mean) == len(backbone.preprocessing.std) == 3
        if name.startswith("vit_"):  # the only ones built for one size
            size = backbone.preprocessing.image_size
            assert backbone.build(2)(torch.zeros(1, 3, size, size)).shape == (1, 2) if size == 384 else True


@pytest.mark.parametrize(
    ("name", "size", "can"),
    [
        ("vit_b_16", 96, "224"),
        ("maxvit_t", 96, "224"),
        ("inception_v3", 96, "299, 320, 384"),
        ("alexnet", 32, "64, 96, 112"),
    ],
)
def test_an_image_size_that_does_not_fit_is_one_line_with_those_that_do(name, size, can):
    with pytest.raises(UsageError) as error:
        check_image_size(find_backbone(name), size)
    assert f"--image-size {size}: {name} cannot take it; it can take {can}" in str(error.value)
    assert "\n" not in str(error.value)


def test_auxiliary_heads_are_found_train_and_have_their_say_in_train_mode_only():
    backbone = find_backbone("inception_v3")
    assert find_head(backbone.build) == ["AuxLogits.fc", "fc"]
    assert find_head(find_backbone("googlenet").build) == ["aux1.fc2", "aux2.fc2", "fc"]
    network = make_network(small_recipe(model=Model("inception_v3", weights="none")), CLASSES)
    freeze = network.freeze_map(Trainable()).at(0)
    freeze.apply()
    held = freeze.modes()
    images = torch.zeros(2, 3, 299, 299)
    logits, auxiliary = network.module(images)
    assert logits.shape == auxiliary.shape == (2, CLASSES)
    assert "AuxLogits.conv0.bn" in held and "AuxLogits.fc" not in held
    assert isinstance(network.module.eval()(images), torch.Tensor)


def test_auxiliary_heads_learn_on_standardised_features_too():
    network = make_network(small_recipe(model=Model("googlenet", weights="none")), CLASSES)
    standardise(network.module, [torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(0))])
    deviations = {path: layer.deviation for path, layer in standardised_layers(network.module)}
    assert list(deviations) == ["aux1.fc2", "aux2.fc2", "fc"]
    assert all((deviation != 1).any() for deviation in deviations.values())
    assert not network.module.training


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_that_normalise_pretrained_inputs_themselves_get_them_normalised_so(name):
    """torchvision switches that on when it loads pretrained weights, and off in the plain network of an export."""
    ours = find_backbone(name)
    torch.manual_seed(0)
    plain = ours.build(5).eval()
    stock = get_model(name, num_classes=5, transform_input=True, init_weights=False).eval()
    stock.load_state_dict(plain.state_dict())
    transform = get_model_weights(name).DEFAULT.transforms()
    pixels = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = (pixels / 255 - torch.tensor(transform.mean).view(3, 1, 1)) / torch.tensor(transform.std).view(3, 1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(plain(ours.preprocessing.normalise(pixels)), stock(theirs), rtol=0, atol=1e-4)


def test_a_head_appended_to_a_network_with_auxiliary_heads_leaves_those_alone():
    backbone = find_backbone("googlenet")
    from finetune.models.network import build_network

    pretrained = backbone.build(5).state_dict()
    network = build_network(
        backbone, pretrained, "test", head="append", class_count=CLASSES, dropout=0.0, head_width=0, seed=0
    )
    freeze = network.freeze_map(Trainable()).at(0)
    assert freeze.apply() == ["fc.1.weight", "fc.1.bias"]
    freeze.modes()
    assert network.module(torch.zeros(1, 3, 224, 224)).shape == (1, CLASSES)


def test_looking_at_an_architecture_draws_no_random_numbers():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    find_head(find_backbone("swin_t").build)
    check_image_size(find_backbone("resnet18"), 64)
    assert torch.equal(before, torch.get_rng_state())


def test_random_weights_are_prepared_as_the_default_ones_would_be():
    backbone, weights = find_pretrained(small_recipe(model=Model("vit_h_14", weights="none")))
    assert weights is None and backbone.preprocessing.image_size == 224
