"""Bias correction: remove the mean quantization error of each layer.

Quantization shifts the mean of each output channel of a layer, by clipping of activations and by weight errors that do
not cancel. Layer by layer, in order of execution, the bias absorbs the difference to the mean in float (Nagel et al.,
"Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.2 and appendix D:
with images instead of BatchNorm statistics). The float and the quantized network run side by side, once, so that each
layer is corrected for the error that the corrections before it have left.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from calibration.fake_quant.symmetric import FakeQuant
from calibration.graph import fx
from calibration.graph.exported_program import WEIGHTED

BEFORE: Final = "before_corrections"  # key in graph.meta: the original biases and weights, by attribute name


def correct(prepared: GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Correct the biases of `prepared`, whose ranges are fixed and frozen, on `images` (N, 3, S, S), in place. Return
    the original biases by attribute name.

    Layers in float, layers without a bias, and layers whose bias other operators also read do not change.
    """
    pair = Pair(prepared)
    with torch.no_grad():
        pair.run(images)
    prepared.meta[BEFORE] = pair.before
    return pair.before


def restore(prepared: GraphModule, before: dict[str, Tensor]) -> None:
    """Undo a correction of `prepared`, which returned `before`."""
    with torch.no_grad():
        for name, bias in before.items():
            fx.named_tensor(prepared, name).copy_(bias)
    forget(prepared)


def forget(prepared: GraphModule) -> None:
    """Discard the original biases of `prepared`: after training they no longer apply."""
    prepared.meta.pop(BEFORE, None)


def uncorrect(graph: GraphModule) -> None:
    """Make `graph` read the original biases and weights. `graph` shares the tensors of a corrected graph but quantizes
    other operators, and each correction compensates the error of all layers up to its own.
    """
    before: dict[str, Tensor] = graph.meta.pop(BEFORE, {})
    for layer in [node for node in graph.graph.nodes if node.target in WEIGHTED]:
        for argument in layer.args[1:3]:
            if isinstance(argument, Node):
                layer.replace_input_with(argument, _from_before(graph, argument, before))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _from_before(graph: GraphModule, argument: Node, before: dict[str, Tensor]) -> Node:
    """Return a node that reads the original weight (quantized or not) or bias; `argument` if it was not changed."""
    source = argument.all_input_nodes[0] if argument.op == "call_module" else argument
    if not fx.is_stored(source) or str(source.target) not in before:
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
    """Interpreter that runs a prepared graph in float and quantized: every value is a pair (float, quantized)."""

    def __init__(self, prepared: GraphModule) -> None:
        super().__init__(prepared)
        self.prepared, self.before = prepared, dict[str, Tensor]()
        # A tensor may have several names: reads are counted by memory address.
        stored = filter(fx.is_stored, prepared.graph.nodes)
        self.reads = Counter(fx.stored_tensor(prepared, node).data_ptr() for node in stored for _ in node.users)

    def run_node(self, n: Node) -> Any:
        if not n.all_input_nodes:  # images and stored tensors
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
        """Hook before both networks run `layer`; `env` holds the pairs that `layer` reads."""

    def alone(self, n: Node, pairs: dict[Node, Any], side: int) -> Any:
        """Run `n` on one side of its input pairs: 0 is float, 1 is quantized."""
        self.env = {source: pairs[source][side] for source in n.all_input_nodes}
        value = super().run_node(n)
        self.env = pairs
        return value

    def corrected(self, layer: Node, floats: Tensor, rounded: Tensor) -> Tensor | float:
        """Correct the bias of `layer`; return its change, broadcastable to the output, or 0.0 if not corrected."""
        bias = fx.argument(layer, "bias")
        if not fx.is_stored(bias) or not self.rounds(cast(Node, layer.args[1])):
            return 0.0
        stored = fx.stored_tensor(self.prepared, bias)
        if self.reads[stored.data_ptr()] > 1:
            return 0.0
        channel = fx.channel_axis(layer, floats.ndim)
        axes = [axis for axis in range(floats.ndim) if axis != channel]
        change = (floats - rounded).mean(axes)
        self.before[str(bias.target)] = stored.detach().clone()
        stored.add_(change)
        return change.reshape([-1 if axis == channel else 1 for axis in range(floats.ndim)])

    def rounds(self, node: Node) -> bool:
        """Return whether `node` is a fake-quantize module."""
        return isinstance(fx.called_module(self.prepared, node), FakeQuant)
