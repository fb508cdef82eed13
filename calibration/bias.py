"""Give layers back the mean that rounding takes from them.

Rounding moves the mean of what a layer computes, per channel: clipped activations, and weights whose errors add up.
Layer by layer, in order of execution, the bias takes up the difference to the mean in float (Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.2 and appendix D: with images
instead of BatchNorm statistics). Both networks run side by side, once, so that a layer is corrected for what the
corrections before it have left.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from calibration.fake_quant import FakeQuant
from calibration.program import WEIGHTED, stored_tensor

_ATEN: Final = torch.ops.aten
BEFORE: Final = "before_corrections"  # in the meta of a graph: biases and weights from before, by attribute


def correct(prepared: GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Correct the biases of `prepared`, whose ranges are fixed and frozen, on `images` (N, 3, S, S), in place. Returns
    the biases as they were, by name of their attribute.

    Layers in float, without a bias, or with one that others add as well, stay as they are.
    """
    pair = Pair(prepared)
    with torch.no_grad():
        pair.run(images)
    prepared.meta[BEFORE] = pair.before
    return pair.before


def restore(prepared: GraphModule, before: dict[str, Tensor]) -> None:
    """Undo a correction of `prepared`."""
    with torch.no_grad():
        for name, bias in before.items():
            _stored(prepared, name).copy_(bias)
    forget(prepared)


def _stored(prepared: GraphModule, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    return cast(Tensor, getattr(prepared.get_submodule(owner), last))


def forget(prepared: GraphModule) -> None:
    """Take the biases of `prepared` for its own: once they are trained, those before the correction mean nothing."""
    prepared.meta.pop(BEFORE, None)


def uncorrect(graph: GraphModule) -> None:
    """Give `graph`, on the tensors of a corrected one but with another part of it rounded, the biases and weights from
    before: each correction is for the error of all layers up to it.
    """
    before: dict[str, Tensor] = graph.meta.pop(BEFORE, {})
    for layer in [node for node in graph.graph.nodes if node.target in WEIGHTED]:
        for argument in layer.args[1:3]:
            if isinstance(argument, Node):
                layer.replace_input_with(argument, _from_before(graph, argument, before))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _from_before(graph: GraphModule, argument: Node, before: dict[str, Tensor]) -> Node:
    """The node that reads a weight, rounded or not, or a bias as it was; `argument` where that never changed."""
    source = argument.all_input_nodes[0] if argument.op == "call_module" else argument
    if source.op != "get_attr" or str(source.target) not in before:
        return argument
    name = f"{source.target}_before".replace(".", "_")
    graph.register_parameter(name, nn.Parameter(before[str(source.target)].clone()))
    with graph.graph.inserting_before(argument):
        own = graph.graph.get_attr(name)
    own.meta = dict(source.meta)
    if argument is source:
        return own
    quantizer = copy.deepcopy(graph.get_submodule(str(argument.target)))
    scale = cast(Tensor, quantizer.scale)
    scale.copy_(before.get(f"{argument.target}.scale", scale))
    graph.add_submodule(f"{argument.target}_before", quantizer)
    with graph.graph.inserting_before(argument):
        rounded = graph.graph.call_module(f"{argument.target}_before", (own,))
    rounded.meta = dict(argument.meta)
    return rounded


class Pair(Interpreter):
    """Runs a prepared graph on two sets of values, in float and rounded: every value is a pair."""

    def __init__(self, prepared: GraphModule) -> None:
        super().__init__(prepared)
        self.prepared, self.before = prepared, dict[str, Tensor]()
        # A tensor may have several names: it counts by where it lies.
        stored = (node for node in prepared.graph.nodes if node.op == "get_attr")
        self.reads = Counter(stored_tensor(prepared, node).data_ptr() for node in stored for _ in node.users)

    def run_node(self, n: Node) -> Any:
        if not n.all_input_nodes:  # the images, and what is stored
            return (super().run_node(n),) * 2
        rounding = self.rounds(n)
        pairs = self.env
        if n.op == "output":
            return self.alone(n, pairs, 1)
        if n.target in WEIGHTED:
            self.prepare_layer(n)
        floats = pairs[n.all_input_nodes[0]][0] if rounding else self.alone(n, pairs, 0)
        rounded = self.alone(n, pairs, 1)
        if n.target in WEIGHTED:
            rounded = rounded + self.corrected(n, floats, rounded)
        return floats, rounded

    def prepare_layer(self, layer: Node) -> None:
        """Called before both networks run `layer`, with the pairs that it reads in `env`."""

    def alone(self, n: Node, pairs: dict[Node, Any], side: int) -> Any:
        self.env = {source: pairs[source][side] for source in n.all_input_nodes}
        found = super().run_node(n)
        self.env = pairs
        return found

    def corrected(self, layer: Node, floats: Tensor, rounded: Tensor) -> Tensor | float:
        """What was added to the bias of `layer`, as it is added to its output."""
        bias = layer.args[2] if len(layer.args) > 2 else None
        if not isinstance(bias, Node) or bias.op != "get_attr" or not self.rounds(cast(Node, layer.args[1])):
            return 0.0
        stored = stored_tensor(self.prepared, bias)
        if self.reads[stored.data_ptr()] > 1:
            return 0.0
        channel = floats.ndim - 1 if layer.target is _ATEN.linear.default else 1
        axes = [axis for axis in range(floats.ndim) if axis != channel]
        change = (floats - rounded).mean(axes)
        self.before[str(bias.target)] = stored.detach().clone()
        stored.add_(change)
        return change.reshape([-1 if axis == channel else 1 for axis in range(floats.ndim)])

    def rounds(self, node: Node) -> bool:
        return node.op == "call_module" and isinstance(self.prepared.get_submodule(str(node.target)), FakeQuant)
