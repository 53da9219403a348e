"""Image encoders of transformers: ViT, DeiT, ConvNeXt, DINOv2 and whatever else has an image classification class; and
vision towers without one (of CLIP and SigLIP, DINOv3), whose pooled output a linear layer reads."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.preprocess import Preprocessing, squash
from finetune.errors import UsageError
from finetune.models import hub

PREPROCESSOR_FILE = "preprocessor_config.json"
# PIL's numbers, which a preprocessor's file holds.
INTERPOLATIONS = {0: "nearest", 2: "bilinear", 3: "bicubic"}
# ABOUT stands for what the JSON beside an export says.
STOCK_LINES = """\
from transformers import AutoConfig, AutoModelForImageClassification
config = AutoConfig.for_model(**ABOUT["architecture"]["options"]["config"], num_labels={classes})
model = AutoModelForImageClassification.from_config(config).float()"""
TOWER, TOWER_WIDTH = "tower", "width"
TOWER_LINES = """\
from transformers import AutoConfig, AutoModel
config = AutoConfig.for_model(**ABOUT["architecture"]["options"]["config"])
model = torch.nn.Module()
model.tower = AutoModel.from_config(config).float()
model.classifier = torch.nn.Linear(ABOUT["architecture"]["options"]["width"], {classes})"""


def describe(folder: Path) -> tuple[dict[str, Any], Preprocessing]:
    """Options (config, and of a vision tower how wide its pooled output is) and preprocessing of a model in a folder.

    Raises:
        UsageError: not a model for images, or one whose images are prepared in a way that we cannot.
    """
    from transformers import AutoModelForImageClassification

    config, plain = hub.read_config(folder)
    options: dict[str, Any] = {"config": plain}
    with hub.refusing(f"--backbone {folder}: its {PREPROCESSOR_FILE} cannot be used"):
        preprocessing = _preprocessing(folder, config)
    if type(config) not in AutoModelForImageClassification._model_mapping:
        width = _pooled_width(config, preprocessing.image_size)
        if not width:
            raise UsageError(
                f"--backbone {folder}: a {config.model_type} has no image classification class in transformers, and "
                "gives no pooled output for images; give an image encoder, such as ViT, DeiT, ConvNeXt or DINOv2"
            )
        options |= {TOWER: True, TOWER_WIDTH: width}
    return options, preprocessing


def _pooled_width(config: Any, image_size: int) -> int:
    """How many features the model of a config gives for an image; 0 = it is no vision tower."""
    from transformers import AutoModel

    if type(config) not in AutoModel._model_mapping or not hasattr(config, "num_channels"):
        return 0
    try:
        with torch.device("meta"), torch.inference_mode(), hub.silent():
            tower = AutoModel.from_config(config, trust_remote_code=False).eval()
            pooled = tower(pixel_values=torch.empty(1, 3, image_size, image_size)).pooler_output
    except Exception:  # of a model that is not for images whatever its forward stumbles over
        return 0
    return int(pooled.shape[1]) if isinstance(pooled, Tensor) and pooled.dim() == 2 else 0


class VisionTower(nn.Module):
    """A vision tower, and a linear layer on its pooled output.

    Args:
        tower: of transformers; gives `pooler_output` (batch, features).
        features: how many.
    """

    base_model_prefix = TOWER

    def __init__(self, tower: nn.Module, features: int, class_count: int):
        super().__init__()
        self.tower, self.classifier = tower, nn.Linear(features, class_count)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) to (batch, classes)."""
        logits: Tensor = self.classifier(self.tower(pixel_values=images).pooler_output)
        return logits


def _preprocessing(folder: Path, config: Any) -> Preprocessing:
    """As the model's own image processor does it; held against it on a picture.

    Raises:
        ValueError: it does something that we cannot.
    """
    if not (folder / PREPROCESSOR_FILE).is_file():
        size = getattr(config, "image_size", 224)
        return squash(size if isinstance(size, int) else size[0], [0.5] * 3, [0.5] * 3)
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    given = processor.to_dict()
    size = given.get("size") or {}
    crop = given.get("crop_size") if given.get("do_center_crop") else None
    # Numbers, if its file is as it should be: `Preprocessing` refuses all else.
    edge: Any = size.get("shortest_edge")
    keep_proportions = edge is not None
    if edge is None:
        edge = size.get("height")
    image_size: Any = (crop or {}).get("height", edge)
    if (fraction := given.get("crop_pct")) and keep_proportions:
        # ConvNeXt's rule: small pictures are cut out of a larger one, large ones squeezed.
        image_size, keep_proportions = edge, edge < 384
        edge = int(edge / fraction) if keep_proportions else edge
    normalises = given.get("do_normalize", True)
    ours = Preprocessing(
        image_size=image_size,
        resize_size=edge,
        keep_proportions=keep_proportions,
        interpolation=INTERPOLATIONS[given["resample"]],
        mean=list(given["image_mean"]) if normalises else [0.0] * 3,
        std=list(given["image_std"]) if normalises else [1.0] * 3,
    )
    try:
        ours.check_same(lambda picture: processor(picture, return_tensors="pt")["pixel_values"][0])
    except ValueError:
        raise ValueError(f"a {type(processor).__name__} prepares images in a way that this kit cannot") from None
    return ours


def build(options: dict[str, Any], class_count: int) -> nn.Module:
    """The stock classification model of a config, or its vision tower with a layer, randomly initialised; it returns
    logits."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    config = options["config"]
    with hub.refusing("the config of this backbone cannot be used"):
        if options.get(TOWER):
            full = AutoConfig.for_model(**hub.without_foreign_code(config))
            tower = AutoModel.from_config(full, dtype=torch.float32, trust_remote_code=False)
            return VisionTower(tower, options[TOWER_WIDTH], class_count)
        full = AutoConfig.for_model(**hub.without_foreign_code(config) | {"num_labels": class_count, "id2label": None})
        model = AutoModelForImageClassification.from_config(full, dtype=torch.float32, trust_remote_code=False)
    model.register_forward_hook(hub.only_logits)
    return model
