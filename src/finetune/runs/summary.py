"""`finetune summary`: what a recipe's network is made of, what trains, how large a checkpoint will be."""

import io

import torch
from torchinfo import summary

from finetune.models.freeze import apply_freeze, changeable_tensors, frozen_tensors, set_modes
from finetune.models.pretrained import new_network, pretrained
from finetune.recipe.spec import Recipe
from finetune.training.dataset import open_data
from finetune.training.optimizer import build_optimizer, optimizer_state


def checkpoint_bytes(recipe: Recipe, module: torch.nn.Module, rules) -> int:
    """Size of a checkpoint: its tensors, saved into memory, the optimizer's after one step included."""
    names = apply_freeze(module, rules, 0)
    parameters = dict(module.named_parameters())
    copies = {name: torch.nn.Parameter(parameters[name].detach().clone()) for name in names}
    spec = recipe.optimizer
    optimizer = build_optimizer(copies, spec.name, spec.lr, spec.weight_decay, spec.momentum)
    for parameter in copies.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    stream = io.BytesIO()
    torch.save(
        {
            "model": {name: value.clone() for name, value in changeable_tensors(module, rules, 0).items()},
            "frozen": list(frozen_tensors(module, rules, 0)),
            "optimizer": optimizer_state(optimizer),
            "rng": torch.get_rng_state(),
        },
        stream,
    )
    return stream.getbuffer().nbytes


def summary_text(recipe: Recipe) -> str:
    """torchinfo's table with the trainable column, then the counts and sizes that decide."""
    backbone, weights, tensors = pretrained(recipe)
    data = open_data(recipe, backbone)
    network = new_network(recipe, backbone, weights, data.output_count, tensors)
    rules = network.rules(recipe.trainable.rules)
    module = network.module
    apply_freeze(module, rules, 0)
    held = set_modes(module, rules, recipe.trainable.batchnorm, 0)
    table = summary(
        module,
        input_data=[backbone.preprocessing.example(1)],
        col_names=("output_size", "num_params", "trainable"),
        row_settings=("var_names", "depth"),
        depth=4,
        mode="eval",
        verbose=0,
    )
    counts = {True: 0, False: 0}
    for parameter in module.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    source = weights.text if weights else "random"
    return "\n".join(
        [
            str(table),
            f"backbone:    {backbone.name}, weights {source}",
            f"trainable:   {counts[True]:,} parameters",
            f"frozen:      {counts[False]:,} parameters; {len(held)} modules held in eval mode",
            f"checkpoint:  about {checkpoint_bytes(recipe, module, rules):,} bytes",
        ]
    )
