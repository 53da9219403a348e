"""Train a new head on a frozen MobileNetV2 that was pretrained on photographs, and ships with the kit.

finetune photo_head --images my_photos
finetune photo_head --images my_photos --augment standard --views 4
"""

from typing import Literal

from finetune import ImageTable, ImageTraining, Recipe, image_head


def recipe(
    images: str = "digits",
    backbone: str = "bundled/mobilenet",
    weights: str = "default",
    image_size: int = 0,
    augment: Literal["none", "light", "standard"] = "none",
    head: Literal["linear", "mlp", "append"] = "linear",
    dropout: float = 0.0,
    epochs: int = 15,
    batch_size: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    table: ImageTable = ImageTable(),
    training: ImageTraining = ImageTraining(),
) -> Recipe:
    """A new head for photos on a frozen MobileNetV2; `image_head` documents the options."""
    return image_head(**locals())
