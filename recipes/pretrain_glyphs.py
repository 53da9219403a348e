"""Pretrain a small backbone on printed characters, from random weights: everything trains.

    finetune pretrain_glyphs --backbone bundled/vgg --fonts /usr/share/fonts

How the backbones that ship with the kit were made; their cards hold the exact command and what came of it.
"""

from finetune import Images, Model, Optimizer, Recipe, Schedule, Trainable


def recipe(
    fonts: str = "",
    backbone: str = "bundled/vgg",
    image_size: int = 32,
    max_steps: int = 3000,
    batch_size: int = 128,
    lr: float = 4e-3,
    weight_decay: float = 2e-2,
    seed: int = 0,
) -> Recipe:
    """All of a small network, on 62 printed characters, distorted anew each time.

    Args:
        fonts: folder that holds .ttf or .otf files, searched with all below it; "" = the fonts matplotlib ships.
        backbone: architecture: bundled/vgg or bundled/resnet.
        image_size: edge in pixels.
        max_steps: optimizer steps.
        batch_size: samples an optimizer step.
        lr: learning rate at its peak.
        weight_decay: for weight matrices; biases and normalisation layers get none.
        seed: of the split by font, the order, the first weights and the distortion.
    """
    return Recipe(
        model=Model(backbone=backbone, weights="none", head="keep"),
        data=Images(images="glyphs", fonts=fonts, image_size=image_size, augment="glyphs", validation_fraction=0.1),
        trainable=Trainable(rules=(("*", "trainable", 0),), batchnorm=True),
        optimizer=Optimizer(name="adamw", lr=lr, weight_decay=weight_decay),
        schedule=Schedule(name="cosine", warmup_fraction=0.05, final_fraction=0.0),
        epochs=0,
        max_steps=max_steps,
        batch_size=batch_size,
        seed=seed,
    )
