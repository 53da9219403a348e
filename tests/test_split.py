"""The model cut where training begins: the parts compute what the whole does, forwards and backwards."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from finetune import Trainable
from finetune.models.backbones import find_backbone, torchvision_names
from finetune.models.freeze import FreezeMap, Rule
from finetune.models.network import build_network
from finetune.models.split import CannotSplit, split

# One of each family; the other models of torchvision are slow.
TAKES_SECONDS = ("inception_v3", "maxvit_t", "swin_v2_t", "swin_t", "vgg11", "resnext50_32x4d")
FAMILIES = [
    "alexnet", "bundled/resnet", "bundled/vgg", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet",
    "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_32",
]  # fmt: skip
# The last block, as a person would name it; and what the state is then, where it is one tensor.
LAST_BLOCKS = {
    "resnet18": "layer4.1", "vgg11": "features.18", "mobilenet_v2": "features.17", "mobilenet_v3_small": "features.12",
    "efficientnet_b0": "features.7", "densenet121": "features.denseblock4", "convnext_tiny": "features.7.2",
    "vit_b_32": "encoder.layers.encoder_layer_11", "swin_t": "features.7.1", "swin_v2_t": "features.7.1",
    "regnet_y_400mf": "trunk_output.block4", "shufflenet_v2_x0_5": "conv5", "squeezenet1_1": "features.12",
    "mnasnet0_5": "layers.13", "maxvit_t": "blocks.3.layers.1", "googlenet": "inception5b", "bundled/vgg": "features.8",
    "bundled/resnet": "layer3",
}  # fmt: skip


def network(name: str, *rules: Rule, image_size: int = 0, head: str = "linear"):
    """A network with random weights, and noise for it; its freeze map set."""
    backbone = find_backbone(name)
    built = build_network(
        backbone, None, "", head=head, class_count=5, dropout=0.0, head_width=16, seed=0, old_class_count=7
    )
    model = built.module.to(memory_format=torch.channels_last)
    freeze = FreezeMap(model, (*rules, *built.freeze_map(Trainable()).rules)).at(0)
    freeze.apply()
    freeze.modes()
    size = image_size or backbone.preprocessing.image_size
    noise = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    return model, noise.contiguous(memory_format=torch.channels_last)


def gradients(model: nn.Module, forward, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of some loss; auxiliary outputs count as well. What is dropped at random is the same each time."""
    torch.manual_seed(0)
    outputs = forward(inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else [one for one in outputs if one is not None]
    model.zero_grad()
    sum(one.square().sum() for one in outputs).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_equal_parts(model: nn.Module, images: torch.Tensor):
    """In eval and in train mode; returns the split."""
    modes = {module: module.training for module in model.modules()}
    found = split(model, images)
    assert {module: module.training for module in model.modules()} == modes
    with torch.inference_mode():
        rows = found.prefix(images)
    assert rows.shape == (len(images), found.width) and rows.dtype == torch.float32
    rows = rows.clone()
    ours, theirs = gradients(model, found.suffix, rows), gradients(model, model, images)
    assert set(ours) == set(theirs) == {name for name, value in model.named_parameters() if value.requires_grad}
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4 * theirs[name].abs().max().item())
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(found.suffix(rows), model(images), rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in FAMILIES if name not in TAKES_SECONDS),
        *(pytest.param(name, marks=pytest.mark.slow) for name in TAKES_SECONDS),
        *(pytest.param(name, marks=pytest.mark.slow) for name in torchvision_names() if name not in FAMILIES),
    ],
)
def test_every_model_is_cut_at_its_head(name):
    model, images = network(name)
    found = assert_equal_parts(model, images)
    auxiliary = {"googlenet": 2, "inception_v3": 1}.get(name, 0)
    assert len(found.places) == 1 + auxiliary
    heads = [module for module in model.modules() if any(p.requires_grad for p in module.parameters(recurse=False))]
    if name != "squeezenet1_1" and name != "squeezenet1_0":
        assert sorted(shape[-1] for shape in found.shapes) == sorted(head.in_features for head in heads)


# A second or more each, and cut like one of the others.
LARGE = ("vgg11", "swin_t", "convnext_tiny", "vit_b_32", "maxvit_t", "swin_v2_t", "densenet121", "googlenet")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in LAST_BLOCKS]
)
def test_a_model_whose_last_block_trains_is_cut_in_the_middle(name):
    model, images = network(name, Rule(LAST_BLOCKS[name]))
    found = assert_equal_parts(model, images)
    head_only = split(*network(name))
    assert found.places != head_only.places


def test_a_part_of_a_residual_block_is_cut_where_two_tensors_carry_the_state():
    model, images = network("resnet18", Rule("layer4.1.conv2"), image_size=64)
    assert assert_equal_parts(model, images).places == ("layer4.0", "layer4.1.relu")


@pytest.mark.parametrize("head", ["mlp", "append"])
def test_other_heads_are_cut_off_too(head):
    model, images = network("bundled/vgg", head=head)
    assert assert_equal_parts(model, images).places == (("flatten",) if head == "mlp" else ("classifier.1.0",))


def test_where_all_trains_there_is_nothing_to_cut_off():
    model, images = network("resnet18", Rule("*"), image_size=64)
    with pytest.raises(CannotSplit, match="begins at the images"):
        split(model, images)


class StemAndHead(nn.Module):
    """What the models below have in common."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(12, 8), nn.Linear(8, 2)


class Switched(StemAndHead):
    """Drops out by its own switch, which a trace takes for a constant."""

    def forward(self, images):
        return self.head(functional.dropout(self.stem(images.flatten(1)), 0.5, self.training))


class Branching(StemAndHead):
    """Goes by the values that it sees."""

    def forward(self, images):
        features = self.stem(images.flatten(1))
        return self.head(features if features.sum() > 0 else -features)


class ByTheBatch(StemAndHead):
    """Takes one number for the whole batch along."""

    def forward(self, images):
        features = self.stem(images.flatten(1))
        return self.head(features) * features.mean()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Switched, "two parts differ from the whole"),
        (Branching, "forward cannot be traced"),
        (ByTheBatch, "something else than a tensor a sample"),
    ],
)
def test_what_cannot_be_cut_is_noticed(kind, reason):
    torch.manual_seed(0)
    model = kind()
    model.stem.requires_grad_(False)
    model.stem.training = False
    with pytest.raises(CannotSplit, match=reason):
        split(model, torch.randn(4, 3, 2, 2))


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32}
ENCODERS = {
    "vit": transformers.ViTConfig(**SMALL, patch_size=8),
    "dinov2": transformers.Dinov2Config(**SMALL, patch_size=8, mlp_ratio=2),
    "convnext": transformers.ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=32),
    "swin": transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "deit": transformers.DeiTConfig(**SMALL, patch_size=8, architectures=["DeiTForImageClassificationWithTeacher"]),
    "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
}


@pytest.fixture
def encoder(request, tmp_path):
    """A folder with a small, random classification model of transformers."""
    torch.manual_seed(0)
    config = ENCODERS[request.param]
    config.num_labels = 5
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("encoder", list(ENCODERS), indirect=True)
def test_an_encoder_of_transformers_is_cut_at_its_head(encoder, request):
    model, images = network(encoder, image_size=32)
    found = assert_equal_parts(model, images)
    assert found.width == {"dinov2": 48, "deit": 48, "resnet": 16}.get(request.node.callspec.params["encoder"], 24)


@pytest.mark.parametrize("encoder", ["vit"], indirect=True)
def test_an_encoder_of_transformers_is_not_cut_in_the_middle_and_says_so(encoder):
    model, images = network(encoder, Rule("vit.encoder.layer.1"), Rule("vit.layers.1"), image_size=32)
    with pytest.raises(CannotSplit, match="only what comes after its encoder"):
        split(model, images)
