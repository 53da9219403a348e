"""Train a new head on a frozen, pretrained ResNet.

    finetune recipes/resnet_head.py
    finetune resnet_head --images my_photos --augment light --dropout 0.2

Expected on the digits that ship with the kit, with the defaults: 99.2 % in 7 s on two cores,
and in 6 s once the features are kept.
"""

from typing import Literal

from finetune import ImageTable, ImageTraining, Recipe, image_head


def recipe(
    images: str = "digits",
    backbone: str = "bundled/resnet",
    weights: str = "default",
    image_size: int = 0,
    augment: Literal["none", "light", "standard"] = "none",
    head: Literal["linear", "mlp", "append"] = "linear",
    dropout: float = 0.0,
    epochs: int = 0,
    batch_size: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    table: ImageTable = ImageTable(),
    training: ImageTraining = ImageTraining(),
) -> Recipe:
    """A new head on a frozen ResNet; `image_head` documents the options."""
    return image_head(**locals())
