"""`finetune summary`: what a recipe's network is made of, what trains, how large a checkpoint will be."""

import io

import torch
from torchinfo import summary

from finetune.base.device import numerics_put_back
from finetune.recipe.execution import Machine, Numerics
from finetune.recipe.spec import Recipe
from finetune.runs.start import Plan, new_setup
from finetune.store.state import FrozenFacts, LogMark, Progress, generators_put_back
from finetune.training.optimizer import build_optimizer, optimizer_state
from finetune.training.session import capture_state
from finetune.training.setup import Setup

SHA256_DIGITS = 64


def checkpoint_bytes(setup: Setup, trainable: list[str], held_in_eval: list[str]) -> int:
    """Size of a checkpoint of the run, its optimizer as it is after one step."""
    parameters, spec = dict(setup.network.module.named_parameters()), setup.recipe.optimizer
    copies = {name: torch.nn.Parameter(parameters[name].detach().clone()) for name in trainable}
    optimizer = build_optimizer(copies, spec.name, spec.lr, spec.weight_decay, spec.momentum)
    for parameter in copies.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    frozen = [name for name in parameters if name not in copies]
    facts = FrozenFacts(frozen, trainable, held_in_eval, 0, 0, "0" * SHA256_DIGITS)
    mark = LogMark(0, "0" * SHA256_DIGITS)
    state = capture_state(setup, setup.freeze.at(0), facts, Progress(), optimizer_state(optimizer), {}, mark)
    stream = io.BytesIO()
    torch.save(state.to_plain(), stream)
    return stream.getbuffer().nbytes


def _blocks(setup: Setup) -> list[str]:
    """The blocks of the backbone in the order in which it is thawed, with what they hold."""
    parameters = dict(setup.network.module.named_parameters())
    lines = [f"blocks:      {len(setup.network.blocks)}, in the order in which --thaw-last takes them"]
    for number, block in enumerate(setup.network.blocks, start=1):
        count = sum(value.numel() for name, value in parameters.items() if block.holds(name))
        others = f" (and {', '.join(block.paths[1:])})" if len(block.paths) > 1 else ""
        lines.append(f"  last:{number:<4}   {block.name}{others}, {count:,} parameters")
    return lines


@numerics_put_back()
@generators_put_back()
def summary_text(recipe: Recipe, chosen: frozenset[str] = frozenset()) -> str:
    """torchinfo's table with the trainable column, then the counts and sizes that decide.

    Args:
        chosen: see `Plan`.
    """
    setup, _ = new_setup(Plan(recipe, Numerics(), Machine(device="cpu"), chosen=chosen))
    module, backbone, freeze = setup.network.module, setup.backbone, setup.freeze.at(0)
    trainable, held = freeze.apply(), freeze.modes()
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
    return "\n".join(
        [
            str(table),
            f"backbone:    {backbone.name}, weights {setup.weights_text}",
            f"trainable:   {counts[True]:,} parameters",
            *_blocks(setup),
            f"frozen:      {counts[False]:,} parameters; {len(held)} modules held in eval mode",
            f"checkpoint:  about {checkpoint_bytes(setup, trainable, held):,} bytes",
        ]
    )
