"""The blocks that a backbone is thawed in, and the depth of each: what `last:2`, `--thaw-last` and `--lr-decay` count.

Blocks are the modules at the first depth where there are four or more, or a list of layers: until then the largest is
looked into, as the `features` of a VGG or the `encoder` of a BERT. They are ordered by when the network enters them, on
an example. What only scales (a normalisation layer) belongs to the block that was entered before it, and so does what
comes behind a list of layers, as a pooler. What is never entered is in no block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.errors import UsageError
from finetune.models.freeze import in_eval
from finetune.models.heads import has_auxiliary_heads

LEAST_BLOCKS = 4


@dataclass(frozen=True)
class Block:
    """A part of a backbone that is thawed at once.

    Attributes:
        name: path of its first module.
        paths: of all its modules, in the order in which they are entered.
    """

    name: str
    paths: tuple[str, ...]

    def holds(self, name: str) -> bool:
        """Whether a parameter of that name is in it."""
        return any(is_within(name, path) for path in self.paths)


def blocks_of(module: nn.Module, head_paths: Sequence[str], example: Tensor) -> tuple[Block, ...]:
    """The blocks of a backbone, the last one first: in the order in which it is thawed.

    Args:
        module: the network.
        head_paths: of what is new, and trains from the beginning: part of no block.
        example: (samples, ...) to try it on, on its device.
    """
    layers = _entered(module, head_paths, example)
    paths = _first_depth(module, layers, head_paths)
    found = list[list[str]]()
    is_behind_list = False
    for path in sorted(paths, key=lambda path: min(layers.index(one) for one in layers if is_within(one, path))):
        is_in_list = isinstance(module.get_submodule(path.rpartition(".")[0]), nn.ModuleList)
        is_behind_list |= is_in_list
        if found and not is_in_list and (is_behind_list or _only_scales(module.get_submodule(path))):
            found[-1].append(path)
        else:
            found.append([path])
    return tuple(Block(one[0], tuple(one)) for one in reversed(found))


def _entered(module: nn.Module, head_paths: Sequence[str], example: Tensor) -> list[str]:
    """Paths of the modules with parameters of their own and nothing below them, as they are first entered."""
    found, paths = dict[str, None](), {one: path for path, one in module.named_modules()}
    leaves = [
        one for one, path in paths.items()
        if path and any(True for _ in one.parameters()) and not any(True for _ in one.children())
        and not any(is_within(path, head) for head in head_paths)
    ]  # fmt: skip
    handles = [
        one.register_forward_pre_hook(lambda entered, _inputs: found.setdefault(paths[entered])) for one in leaves
    ]
    try:
        with in_eval(module), torch.inference_mode():
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    return list(found)


def _first_depth(module: nn.Module, layers: Sequence[str], head_paths: Sequence[str]) -> list[str]:
    """The first depth with enough blocks, none of which holds a part of the head."""
    found = _children_of(module, "", layers)
    while mixed := [path for path in found if any(is_within(head, path) for head in head_paths)]:
        found = [path for path in found if path not in mixed]
        found += [one for path in mixed for one in _children_of(module.get_submodule(path), f"{path}.", layers)]
    while sum(not _only_scales(module.get_submodule(path)) for path in found) < LEAST_BLOCKS:
        sizes = {path: sum(is_within(layer, path) for layer in layers) for path in found}
        largest = max(sizes, key=sizes.__getitem__)
        is_in_list = any(isinstance(module.get_submodule(path.rpartition(".")[0]), nn.ModuleList) for path in found)
        if sizes[largest] < 2 or is_in_list:
            break
        found.remove(largest)
        found += _children_of(module.get_submodule(largest), f"{largest}.", layers)
    return found


def _children_of(module: nn.Module, prefix: str, layers: Sequence[str]) -> list[str]:
    paths = [f"{prefix}{name}" for name, _ in module.named_children()]
    return [path for path in paths if any(is_within(layer, path) for layer in layers)]


def is_within(path: str, outer: str) -> bool:
    """Whether a path is another one, or below it."""
    return path == outer or path.startswith(f"{outer}.")


def _only_scales(module: nn.Module) -> bool:
    """Whether it has no matrix: a normalisation layer."""
    return all(parameter.ndim < 2 for parameter in module.parameters())


def last_blocks(blocks: Sequence[Block], count: int) -> list[str]:
    """Module paths of the last `count` blocks.

    Raises:
        UsageError: there are not so many.
    """
    if count > len(blocks):
        names = ", ".join(block.name for block in blocks)
        raise UsageError(f"last:{count}: the backbone has {len(blocks)} blocks ({names}); give fewer, or all")
    return [path for block in blocks[:count] for path in block.paths]


def unread_paths(module: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Paths of the modules that have parameters of their own, of which no output depends on any."""
    required = {value: value.requires_grad for value in module.parameters()}
    try:
        with in_eval(module), torch.inference_mode(False), torch.enable_grad():
            module.requires_grad_(True)
            module.training = has_auxiliary_heads(module)  # torchvision computes them while its root trains only
            outputs = module(example)
            outputs = [outputs] if isinstance(outputs, Tensor) else [one for one in outputs if one is not None]
            total = torch.stack([one.sum() for one in outputs]).sum()
            read = torch.autograd.grad(total, list(required), allow_unused=True)
    finally:
        for value, requires in required.items():
            value.requires_grad_(requires)
    unused = {value for value, gradient in zip(required, read, strict=True) if gradient is None}
    found = list[str]()
    for path, one in module.named_modules():
        own = list(one.parameters(recurse=False))
        if own and all(value in unused for value in own):
            found.append(path)
    return tuple(found)
