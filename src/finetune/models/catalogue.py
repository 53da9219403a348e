"""Backbones that there are, and what is known of each before it is fetched. Nothing is fetched here."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from finetune.models.backbones import Backbone, default_member, find_backbone, torchvision_backbone, torchvision_names
from finetune.models.bundled import BUNDLED, BUNDLED_TEXT
from finetune.models.heads import find_head
from finetune.models.shapes import build_shapes
from finetune.models.weights import cached_file

MEGABYTE = 1 << 20  # torchvision states sizes so
BUNDLED_FAMILY = "ships with the kit: nothing is fetched"
# How the names of a family of torchvision's begin (the longest that fits holds), and what it is.
FAMILIES = {
    "alexnet": "AlexNet: of 2012, the first; quick, and beaten by all others",
    "convnext": "ConvNeXt: convolutions made as good as transformers; strong features, slow on a CPU",
    "densenet": "DenseNet: each layer sees all before it; good features for few parameters, much memory",
    "efficientnet_v2": "EfficientNetV2: like EfficientNet, quicker to train; for GPUs",
    "efficientnet": "EfficientNet: more accuracy for fewer operations, at its own image size",
    "googlenet": "GoogLeNet: Inception of 2014",
    "inception": "Inception v3: at 299 px",
    "maxvit": "MaxViT: convolutions and attention by turns; strong and slow",
    "mnasnet": "MNASNet: found by search, for phones",
    "mobilenet_v3": "MobileNetV3: for phones; the quickest that still sees well",
    "mobilenet": "MobileNetV2: for phones; quick on a CPU",
    "regnet": "RegNet: plain and regular, from small to very large",
    "resnet": "ResNet: the usual first choice; good features, quick on a GPU",
    "resnext": "ResNeXt: ResNet with grouped convolutions",
    "shufflenet": "ShuffleNetV2: for phones, very quick",
    "squeezenet": "SqueezeNet: very small, weak",
    "swin": "Swin Transformer: attention within windows; strong features",
    "vgg": "VGG: of 2014; large, slow, and still good for style and texture",
    "vit": "Vision Transformer: strong features, best on a GPU",
    "wide_resnet": "Wide ResNet: ResNet with twice the channels",
}
# Encoders of texts on the hub; parameters as their cards state them.
HUB_TEXTS = {
    "sentence-transformers/all-MiniLM-L6-v2": (22.7e6, "Sentences, in English; quick on a CPU: start here"),
    "BAAI/bge-small-en-v1.5": (33.4e6, "Sentences, in English"),
    "google-bert/bert-base-uncased": (110e6, "BERT, in English; when all of it is to train"),
    "FacebookAI/roberta-base": (125e6, "RoBERTa, in English; when all of it is to train"),
    "microsoft/deberta-v3-base": (184e6, "DeBERTa, in English; the best of these when all of it trains, and slow"),
    "FacebookAI/xlm-roberta-base": (278e6, "RoBERTa, in a hundred languages"),
}


@dataclass(frozen=True)
class Known:
    """What is known of a backbone.

    Attributes:
        name: what `--backbone` takes.
        family: one sentence.
        reads: "images" or "texts".
        parameters: with its own last layer, as published; of a bundled one without.
        size: edge in pixels that it was trained at; of texts None.
        fetch_bytes: to download; 0 = nothing; None = not known here.
        is_at_hand: its weights are on this machine.
        accuracy: on ImageNet, of 100, as torchvision states it; None = none is stated.
        licence: an address, where the weights come under terms of their own; "" = torchvision's.
    """

    name: str
    family: str
    reads: str
    parameters: int
    size: int | None
    fetch_bytes: int | None
    is_at_hand: bool
    accuracy: float | None = None
    licence: str = ""


def known_backbones(word: str = "") -> list[Known]:
    """All of them, or those whose name or family holds a word."""
    word = word.lower()
    everything = [*_bundled(), *_of_torchvision(), *_of_texts()]
    return [one for one in everything if word in one.name.lower() or word in one.family.lower() or word == one.reads]


def count_parameters(backbone: Backbone) -> int:
    """Of a network without its head; nothing is loaded."""
    heads = tuple(f"{path}." for path in find_head(backbone.build))
    shapes: nn.Module = build_shapes(backbone.build, 2)
    return sum(value.numel() for name, value in shapes.named_parameters() if not name.startswith(heads))


def _bundled() -> Iterator[Known]:
    for name, bundled in BUNDLED.items():
        parameters, size = count_parameters(find_backbone(name)), bundled.preprocessing.image_size
        yield Known(
            name, f"{bundled.sentence}; {BUNDLED_FAMILY}", "images", parameters, size, 0, True, bundled.accuracy
        )
    for name, (parameters, sentence) in BUNDLED_TEXT.items():
        yield Known(name, f"{sentence}; {BUNDLED_FAMILY}", "texts", parameters, None, 0, True)


def _of_torchvision() -> Iterator[Known]:
    for name in torchvision_names():
        member = default_member(name)
        facts = member.meta
        beginning = max((one for one in FAMILIES if name.startswith(one)), key=len, default="")
        yield Known(
            name=name,
            family=FAMILIES.get(beginning, "of torchvision"),
            reads="images",
            parameters=facts["num_params"],
            size=torchvision_backbone(name, member).preprocessing.image_size,  # type: ignore[union-attr]
            fetch_bytes=int(facts["_file_size"] * MEGABYTE),
            is_at_hand=cached_file(member).is_file(),
            accuracy=facts["_metrics"]["ImageNet-1K"]["acc@1"],
            licence=facts.get("license", ""),
        )


def _of_texts() -> Iterator[Known]:
    from huggingface_hub import try_to_load_from_cache

    for name, (parameters, sentence) in HUB_TEXTS.items():
        files = ("model.safetensors", "pytorch_model.bin")
        is_at_hand = any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
        yield Known(name, f"{sentence}; from the hub", "texts", int(parameters), None, None, is_at_hand)
