"""The model cut where training begins: a frozen prefix, whose outputs never change, and the suffix that trains.

Models of torchvision and timm are traced with torch.fx. What trains is *live*, and so is everything computed from it;
what is computed from the images and not live is the prefix. The tensors that live operations take from it are the whole
state, and lie side by side in one row a sample. Of a model whose forward cannot be traced, as those of transformers,
the head is cut off: the row is what enters it.

The suffix runs the very modules of the model, so parameters, optimizer and checkpoint know nothing of the cut.
"""

import io
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import NodePathTracer

from finetune.errors import is_out_of_memory, one_line
from finetune.models.freeze import in_eval
from finetune.models.fusion import Fusion
from finetune.models.heads import Standardised

# The two parts do the same operations; but a kernel may choose its algorithm by the memory layout of what it gets.
ALLOWED_DIFFERENCE = 1e-5


class CannotSplit(Exception):
    """Why a model has no frozen prefix that could be computed once."""


@dataclass(frozen=True)
class Split:
    """A model in two: `suffix(prefix(samples))` are its outputs.

    Attributes:
        prefix: images (batch, 3, height, width) or tokens (batch, length) -> rows (batch, width). Wants inference mode.
        suffix: rows -> what the model returns. It trains, or does not, as the model's modules are set.
        places: the operations whose outputs lie in a row, by their paths in the model.
        shapes: of those outputs, a sample each.
        graph: of the prefix, from images to those outputs; None of what cannot be traced.
    """

    prefix: Callable[[Tensor], Tensor]
    suffix: Callable[[Tensor], Any]
    places: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    graph: fx.GraphModule | None = None

    def fused(self, fusion: Fusion) -> Callable[[Tensor], Tensor]:
        """The prefix with what can be computed at once; made when it is first called."""
        return lambda batch: _to_rows(fusion.network(batch))

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return sum(map(_numel, self.shapes))


def split(model: nn.Module, samples: Tensor) -> Split:
    """Cut a model whose `requires_grad` and modes are those of its training, and try the cut on `samples`.

    Args:
        samples: (batch, 3, height, width) images or (batch, length) tokens, on the model's device, in the memory format
            of training; two or more.

    Raises:
        CannotSplit: nothing is frozen before what trains, or the parts do not compute what the whole does.
    """
    if not any(map(_is_live, model.modules())):
        raise CannotSplit("nothing trains")
    ways: list[Callable[[nn.Module, Tensor], tuple[Split, Tensor]]] = [_split_traced]
    if hasattr(model, "base_model_prefix"):  # of transformers
        ways = [_split_behind_encoder]
    elif hasattr(model, "pretrained_cfg"):  # of timm, which branches by shapes and switches, not by what images hold
        ways = [_split_traced, _split_off_last]
    with torch.inference_mode():
        found, rows = _first_that_can(ways, model, samples)
        with in_eval(model):
            _hold_against(model(samples), found.suffix(rows))
    return found


def _first_that_can(
    ways: Sequence[Callable[[nn.Module, Tensor], tuple[Split, Tensor]]], model: nn.Module, samples: Tensor
) -> tuple[Split, Tensor]:
    """Raises: CannotSplit: none can; says why the first could not."""
    reasons = list[CannotSplit]()
    for way in ways:
        try:
            return way(model, samples)
        except CannotSplit as reason:
            reasons.append(reason)
    raise reasons[0]


def _hold_against(whole: Tensor, parts: Tensor) -> None:
    """Raises: CannotSplit: the parts do not give what the whole model gives."""
    if whole.shape != parts.shape:
        raise CannotSplit("what trains is not at the end of the model")
    difference = ((whole - parts).abs().max() / whole.abs().max().clamp(min=1e-12)).item()
    if not difference <= ALLOWED_DIFFERENCE:
        raise CannotSplit(f"its two parts differ from the whole by {difference:.1e} of the largest output")


def _is_live(module: nn.Module) -> bool:
    """Whether any of a module trains, behaves as in training, or is measured on the data."""
    return any(parameter.requires_grad for parameter in module.parameters()) or any(
        part.training or isinstance(part, Standardised) for part in module.modules()
    )


def _is_mixed(module: nn.Module) -> bool:
    """Whether some of a module's parameters train and others do not; of one with a forward of its own, not of a chain
    of layers, also whether a layer without parameters, as a pool, does not behave as in training."""
    if not _is_live(module):
        return False
    is_whole = all(parameter.requires_grad for parameter in module.parameters())
    return not is_whole or (not isinstance(module, nn.Sequential) and not all(map(_is_live, module.children())))


# ---- Rows ---------------------------------------------------------------------------------------------------------


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _to_rows(values: Sequence[Tensor]) -> Tensor:
    """(batch, ...) tensors side by side: (batch, width)."""
    flat = [value.flatten(1) for value in values]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)


def _from_rows(rows: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """What `_to_rows` was given; pictures in the memory format that the model computes in."""
    parts = rows.split([_numel(shape) for shape in shapes], dim=1)
    values = [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
    return [value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value for value in values]


# ---- torchvision ----------------------------------------------------------------------------------------------------


class _Tracer(NodePathTracer):
    """Looks into a module only where a part of it trains and another does not: all else is one operation, which keeps
    its own mode."""

    def is_leaf_module(self, m: nn.Module, module_qualname: str) -> bool:
        is_whole = isinstance(m, Standardised) or not _is_mixed(m)
        return is_whole or fx.Tracer.is_leaf_module(self, m, module_qualname)


class _Traced:
    """The operations of a model: which are live, and which carry the state from the prefix to them.

    Attributes:
        boundary: computed from the images by what is frozen, and taken by live operations.
    """

    def __init__(self, model: nn.Module):
        tracer = _Tracer()
        try:
            graph = tracer.trace(model)
        except Exception as error:  # a forward that cannot be traced raises whatever it stumbles over
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise CannotSplit(f"its forward cannot be traced ({reason})") from None
        self.model = model
        self.nodes = _needed_for([next(node for node in graph.nodes if node.op == "output")])
        self.place = tracer.node_to_qualname
        self.of_images: set[fx.Node] = set()
        self.live: set[fx.Node] = set()
        for node in self.nodes:
            inputs = node.all_input_nodes
            if node.op == "placeholder" or not self.of_images.isdisjoint(inputs):
                self.of_images.add(node)
            if node.op == "output" or not self.live.isdisjoint(inputs) or self._is_live_itself(node):
                self.live.add(node)
        taken = {value for node in self.live for value in node.all_input_nodes}
        self.boundary = [node for node in self.nodes if node in taken & self.of_images - self.live]

    def _is_live_itself(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return _is_live(self.model.get_submodule(str(node.target)))
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            return bool(getattr(getattr(self.model.get_submodule(path), name), "requires_grad", False))
        return False

    def prefix(self) -> fx.GraphModule:
        """images -> the tensors of the boundary."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in _needed_for(self.boundary):
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output([copies[node] for node in self.boundary])
        return fx.GraphModule(self.model, graph)

    def suffix(self, places: Sequence[str]) -> fx.GraphModule:
        """The tensors at `places` -> the model's outputs."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        inputs = {place: graph.placeholder(f"value_{number}") for number, place in enumerate(places)}
        for node in self.nodes:
            if node in self.boundary:
                copies[node] = inputs[self.place[node]]
            elif node in self.live or node not in self.of_images:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        return fx.GraphModule(self.model, graph)


def _needed_for(outputs: Sequence[fx.Node]) -> list[fx.Node]:
    """What `outputs` are computed from, and they themselves, in the order of the graph. Leaves checks of shapes out."""
    needed, waiting = set[fx.Node](), list(outputs)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    return [node for node in outputs[0].graph.nodes if node in needed]


def _split_traced(model: nn.Module, images: Tensor) -> tuple[Split, Tensor]:
    training = _Traced(model)
    if not training.boundary or training.boundary[0].op == "placeholder":
        raise CannotSplit("what trains begins at the images")
    places = tuple(training.place[node] for node in training.boundary)
    take = training.prefix()
    try:
        with redirect_stderr(io.StringIO()):  # where torch.fx shows the lines that it wrote
            values = take(images)
    except Exception as error:  # of a forward that was not made to be traced
        if is_out_of_memory(error):
            raise
        raise CannotSplit(f"its forward cannot be traced ({one_line(error, 120)})") from None
    for place, value in zip(places, values, strict=True):
        if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != len(images):
            raise CannotSplit(f"{place} carries something else than a tensor a sample")
    shapes = tuple(tuple(value.shape[1:]) for value in values)
    graphs = {model.training: training.suffix(places)}
    if model.training:
        # The root's own switch: auxiliary heads are computed in training only.
        model.training = False
        try:
            graphs[False] = _Traced(model).suffix(places)
        except KeyError as error:
            raise CannotSplit(f"outside of training it also needs {error}") from None
        finally:
            model.training = True

    def suffix(rows: Tensor) -> Any:
        return graphs[model.training](*_from_rows(rows, shapes))

    return Split(lambda batch: _to_rows(take(batch)), suffix, places, shapes, take), _to_rows(values)


# ---- What cannot be traced ------------------------------------------------------------------------------------------


def _split_off_last(model: nn.Module, samples: Tensor) -> tuple[Split, Tensor]:
    """Rows are what enters the one module that trains, and is the model's last."""
    live = [path for path, module in model.named_modules() if _is_live(module) and not _is_mixed(module)]
    outermost = [path for path in live if not any(path.startswith(f"{other}.") for other in live)]
    if len(outermost) != 1 or outermost == [""]:
        raise CannotSplit("more than its last module trains")
    last = model.get_submodule(outermost[0])

    def take(batch: Tensor) -> list[Tensor]:
        taken = list[Tensor]()
        with _entering([last], lambda _module, inputs: taken.append(inputs[0])):
            model(batch)
        return taken

    values = take(samples)
    if len(values) != 1 or len(values[0]) != len(samples) or values[0].dim() < 2:
        raise CannotSplit(f"{outermost[0]} takes something else than a tensor a sample")
    shapes = (tuple(values[0].shape[1:]),)
    found = Split(
        lambda batch: _to_rows(take(batch)), lambda rows: last(*_from_rows(rows, shapes)), (outermost[0],), shapes
    )
    return found, _to_rows(values)


# ---- transformers ---------------------------------------------------------------------------------------------------


def _split_behind_encoder(model: nn.Module, samples: Tensor) -> tuple[Split, Tensor]:
    """Rows are what enters the modules that train. The suffix is the stock forward with a stub in the encoder's place:
    its outputs have the right shapes, and what matters of them is put in where it enters what trains."""
    encoder = model.get_submodule(str(model.base_model_prefix))
    # A pooler without pretrained weights trains with the head, though it is the encoder that calls it.
    pooler = getattr(encoder, "pooler", None)
    live = [path for path, part in encoder.named_children() if _is_live(part)]
    if live not in ([], ["pooler"]) or any(parameter.requires_grad for parameter in encoder.parameters(recurse=False)):
        raise CannotSplit(
            "of a model of transformers only what comes after its encoder can be cut off, and more trains"
        )
    places, output = _entered_first(model, encoder, samples)
    modules = [model.get_submodule(place) for place in places]

    def take(batch: Tensor) -> list[Tensor]:
        taken: dict[nn.Module, Tensor] = {}
        with _entering(modules, lambda module, inputs: taken.__setitem__(module, inputs[0])):
            model(batch)
        return [taken[module] for module in modules]

    values = take(samples)
    if any(len(value) != len(samples) or value.dim() < 2 for value in values):
        raise CannotSplit(f"{', '.join(places)} takes something else than a tensor a sample")
    shapes = tuple(tuple(value.shape[1:]) for value in values)
    one_sample = samples[:1]
    if not samples.is_floating_point():  # texts, of any length
        shorter = take(one_sample[:, : samples.shape[1] // 2])
        if tuple(tuple(value.shape[1:]) for value in shorter) != shapes:
            raise CannotSplit(f"what enters {', '.join(places)} is as long as the text")

    def encoded(count: int) -> object:
        stub = {
            name: value.new_zeros(()).expand(count, *value.shape[1:]) if isinstance(value, Tensor) else value
            for name, value in output.items()
        }
        if live and pooler is not None:
            stub["pooler_output"] = pooler(stub["last_hidden_state"])
        return type(output)(**stub)

    def suffix(rows: Tensor) -> Any:
        given = dict(zip(modules, _from_rows(rows, shapes), strict=True))
        entering = _entering(modules, lambda module, _inputs: (given[module],))
        with entering, _replaced(encoder, lambda: encoded(len(rows))):
            return model(one_sample.expand(len(rows), *one_sample.shape[1:]))

    return Split(lambda batch: _to_rows(take(batch)), suffix, places, shapes), _to_rows(values)


def _entered_first(
    model: nn.Module, encoder: nn.Module, samples: Tensor
) -> tuple[tuple[str, ...], "OrderedDict[str, object]"]:
    """Paths of the trained modules that are fed by frozen ones only, and what the encoder returns."""
    paths = {
        module: path
        for path, module in model.named_modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    }
    entered: list[str] = []
    outputs: list[OrderedDict[str, object]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not inputs[0].requires_grad:
            entered.append(paths[module])

    hook = encoder.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        with torch.inference_mode(False), torch.enable_grad(), _entering(list(paths), note):
            model(samples)
    finally:
        hook.remove()
    return tuple(entered), outputs[0]


@contextmanager
def _entering(modules: Sequence[nn.Module], hook: Callable[[nn.Module, tuple[Tensor, ...]], object]) -> Iterator[None]:
    """Within the block `hook` sees, or replaces, the inputs of `modules`."""
    # Before the hooks of others: what they see is what the module gets.
    handles = [module.register_forward_pre_hook(hook, prepend=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced(module: nn.Module, compute: Callable[[], object]) -> Iterator[None]:
    """Within the block the module does nothing and returns what `compute` gives."""
    module.forward = lambda *_args, **_kwargs: compute()
    try:
        yield
    finally:
        del module.forward
