"""BatchNorm as part of the convolution before it: of what is frozen both are one linear map, computed at once.

What comes out differs in its last bits, so whether it is done is a named value of a run.
"""

import copy
import functools
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Fusion:
    """The pairs of a frozen network in eval mode that can be computed at once.

    Attributes:
        pairs: nodes of the graph, a convolution and the BatchNorm behind it.
    """

    def __init__(self, network: nn.Module):
        """Look for them; a network that cannot be traced to its layers has none."""
        try:
            self._traced = fx.symbolic_trace(network)
        except Exception:  # a forward that cannot be traced raises whatever it stumbles over
            self._traced = fx.GraphModule(nn.Module(), fx.Graph())
        nodes = list(self._traced.graph.nodes)
        called = [node.target for node in nodes if node.op == "call_module"]
        self.pairs = [
            (before, node)
            for node in nodes
            if self._is_layer(node, BATCHNORMS) and self._has_statistics(self._layer(node))
            for before in node.args[:1]
            if self._is_layer(before, CONVOLUTIONS) and len(before.users) == 1
            if called.count(node.target) == 1 and called.count(before.target) == 1
        ]

    def _layer(self, node: fx.Node) -> nn.Module:
        return self._traced.get_submodule(str(node.target))

    def _is_layer(self, node: object, kinds: tuple[type[nn.Module], ...]) -> bool:
        """Whether a plain layer is called; the weight of one that is put together in its forward is no parameter."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or type(self._layer(node)) not in kinds:
            return False
        return kinds is BATCHNORMS or "weight" in dict(self._layer(node).named_parameters(recurse=False))

    @staticmethod
    def _has_statistics(batchnorm: nn.Module) -> bool:
        return not batchnorm.training and getattr(batchnorm, "running_var", None) is not None

    @functools.cached_property
    def network(self) -> nn.Module:
        """The same network with its pairs at once; the layers of others are shared."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        graph.output(graph.graph_copy(self._traced.graph, copies))
        fused = fx.GraphModule(_shared(self._traced), graph)
        with torch.no_grad():
            for convolution, batchnorm in self.pairs:
                at_once = fuse_conv_bn_eval(*(cast(Any, self._layer(node)) for node in (convolution, batchnorm)))
                fused.set_submodule(str(convolution.target), at_once)
                copies[batchnorm].replace_all_uses_with(copies[convolution])
                graph.erase_node(copies[batchnorm])
        fused.recompile()
        return fused.eval()


def _shared(module: nn.Module) -> nn.Module:
    """A copy of a tree of modules whose tensors are those of the original."""
    tensors = {id(value): value for value in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, dict(tensors))
