"""The small backbones that ship with the kit: three made of torchvision's own classes, and a BERT in a folder."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import nn
from torchvision.models.mobilenetv2 import MobileNet_V2_Weights, MobileNetV2
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vgg import VGG, make_layers

from finetune.data.preprocess import Preprocessing, squash

# Layers of bundled/vgg: channels of each 3x3 convolution, "M" = halve the resolution.
VGG_LAYERS: list[str | int] = [32, 32, "M", 64, 64, "M", 128, 128, "M"]
# Channels of the three stages of bundled/resnet, one BasicBlock each.
RESNET_CHANNELS = (48, 96, 192)
POOLED_PIXELS = (2, 2)


def build_vgg(class_count: int) -> VGG:
    """torchvision's VGG with batch normalisation, six convolutions and one linear layer: 290,000 parameters."""
    # torchvision's classifier of 4096 x 4096 is replaced at once; on "meta" it costs neither time nor memory.
    with torch.device("meta"):
        model = VGG(nn.Sequential(), init_weights=False)
    model.features = make_layers(VGG_LAYERS, batch_norm=True)
    model.avgpool = nn.AdaptiveAvgPool2d(POOLED_PIXELS)
    model.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(128 * 4, class_count))
    _initialise_convolutions(model)
    return model


def build_resnet(class_count: int) -> ResNet:
    """torchvision's ResNet with a 3x3 stem and three BasicBlocks of 48, 96 and 192 channels: 700,000 parameters."""
    with torch.device("meta"):
        model = ResNet(BasicBlock, [1, 1, 1, 1])
    stem, *_ = RESNET_CHANNELS
    model.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(stem)
    channels = stem
    for stage, width in enumerate(RESNET_CHANNELS, start=1):
        stride = 1 if stage == 1 else 2
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        setattr(model, f"layer{stage}", nn.Sequential(BasicBlock(channels, width, stride, shortcut)))
        channels = width
    model.layer4 = nn.Identity()
    model.avgpool = nn.AdaptiveAvgPool2d(POOLED_PIXELS)
    model.fc = nn.Linear(channels * 4, class_count)
    _initialise_convolutions(model)
    return model


def build_mobilenet(class_count: int) -> MobileNetV2:
    """torchvision's MobileNetV2 as it is: 2,200,000 parameters before its last layer."""
    return MobileNetV2(num_classes=class_count)


def _initialise_convolutions(model: nn.Module) -> None:
    """He initialisation for convolutions, as torchvision does for both families."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


VGG_STOCK_LINES = f"""\
from torch import nn
from torchvision.models.vgg import VGG, make_layers
model = VGG(make_layers({VGG_LAYERS}, batch_norm=True), init_weights=False)
model.avgpool = nn.AdaptiveAvgPool2d({POOLED_PIXELS})
model.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(512, {{classes}}))"""

RESNET_STOCK_LINES = f"""\
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
def stage(i, o, stride):
    shortcut = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if stride > 1 else None
    return nn.Sequential(BasicBlock(i, o, stride, shortcut))
model = ResNet(BasicBlock, [1, 1, 1, 1])
model.conv1, model.bn1 = nn.Conv2d(3, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
model.layer1, model.layer2 = stage(48, 48, 1), stage(48, 96, 2)
model.layer3, model.layer4 = stage(96, 192, 2), nn.Identity()
model.avgpool, model.fc = nn.AdaptiveAvgPool2d({POOLED_PIXELS}), nn.Linear(768, {{classes}})"""

MOBILENET_STOCK_LINES = """\
import torchvision
model = torchvision.models.mobilenet_v2(num_classes={classes})"""

# Mean and standard deviation of the distorted glyphs that two of them were trained on, at 32 pixels.
GLYPHS = squash(32, mean=[0.38, 0.38, 0.38], std=[0.32, 0.32, 0.32])
# Of ImageNet's photographs, as torchvision prepares them for these weights.
PHOTOS = Preprocessing(224, 256, True, "bilinear", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Bundled:
    """A backbone for images that ships with the kit.

    Attributes:
        build: see `Backbone`.
        file: its weights.
        stock_lines: what builds it from torchvision alone.
        preprocessing: what they were trained with.
        sentence: what it is good for.
        accuracy: on ImageNet, of 100, of the weights and the last layer that they came with; None = they had none.
    """

    build: Callable[[int], nn.Module]
    file: str
    stock_lines: str
    preprocessing: Preprocessing
    sentence: str
    accuracy: float | None = None


BUNDLED = {
    "bundled/mobilenet": Bundled(
        build_mobilenet,
        "mobilenet.safetensors",
        MOBILENET_STOCK_LINES,
        PHOTOS,
        "MobileNetV2, for photographs",
        MobileNet_V2_Weights.IMAGENET1K_V1.meta["_metrics"]["ImageNet-1K"]["acc@1"],
    ),
    "bundled/vgg": Bundled(
        build_vgg, "vgg.safetensors", VGG_STOCK_LINES, GLYPHS, "A small VGG, for printed characters and small shapes"
    ),
    "bundled/resnet": Bundled(
        build_resnet, "resnet.safetensors", RESNET_STOCK_LINES, GLYPHS, "A small ResNet, for the same"
    ),
}


def knows_glyphs_only(name: str) -> bool:
    """Whether the weights of a backbone learnt nothing but printed characters."""
    return name in BUNDLED and BUNDLED[name].preprocessing is GLYPHS


def bundled_weights(name: str) -> Path:
    """The weights file of a bundled backbone."""
    return Path(str(resources.files("finetune"))) / "bundled" / BUNDLED[name].file


# Folders in transformers' format: parameters, as their cards state them, and what each is.
BUNDLED_TEXT = {"bundled/bert": (5_859_072, "A BERT of two layers, distilled by this kit, for short English texts")}

# Of the weights; their cards say more.
LICENCES = {
    "bundled/mobilenet": "BSD-3-Clause (torchvision's, learnt from ImageNet's photographs, whose own terms are for "
    "research; whether those reach weights is not settled)",
    "bundled/vgg": "MIT",
    "bundled/resnet": "MIT",
    "bundled/bert": "Apache-2.0",
}

# How well samples of another kind were told from held-out ones, by distance and by probability alone: AUROC, of
# benchmarks/novelty.py.
NOVELTY_FIGURES = {
    "bundled/vgg": "digits from printed letters 0.999 (0.850), from Fashion-MNIST 1.000 (0.960)",
    "bundled/resnet": "digits from printed letters 0.998 (0.916), from Fashion-MNIST 1.000 (0.976)",
    "bundled/mobilenet": "photographs of seven things from those of three others 0.993 to 0.999 (0.975 to 0.996)",
    "bundled/bert": "messages of customers from Python's documentation 0.990 (0.798); from those of an intent that was "
    "not trained on 0.683 (0.740) in the mean of eight",
}


def bundled_folder(name: str) -> Path:
    """The folder of a bundled text encoder."""
    return Path(str(resources.files("finetune"))) / name
