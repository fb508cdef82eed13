"""Give layers back the mean that rounding takes from them.

Rounding moves the mean of what a layer computes, per channel: clipped activations, and weights whose errors add up.
Layer by layer, in order of execution, the bias takes up the difference to the mean in float (Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.2 and appendix D: with images
instead of BatchNorm statistics). Both networks run side by side, once, so that a layer is corrected for what the
corrections before it have left.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from calibration.fake_quant import FakeQuant
from calibration.program import WEIGHTED, stored_tensor

_ATEN: Final = torch.ops.aten


def correct(prepared: GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Correct the biases of `prepared`, whose ranges are fixed and frozen, on `images` (N, 3, S, S), in place. Returns
    the biases as they were, by name of their attribute; `restore` undoes it.

    Layers without a bias, and those that share theirs, stay as they are.
    """
    pair = _Pair(prepared)
    with torch.no_grad():
        pair.run(images)
    return pair.before


def restore(prepared: GraphModule, before: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, bias in before.items():
            prepared.get_parameter(name).copy_(bias)


class _Pair(Interpreter):
    """Runs a prepared graph on two sets of values, in float and rounded: every value is a pair."""

    def __init__(self, prepared: GraphModule) -> None:
        super().__init__(prepared)
        self.prepared, self.before = prepared, dict[str, Tensor]()
        self.reads = [str(node.target) for node in prepared.graph.nodes if node.op == "get_attr" for _ in node.users]

    def run_node(self, n: Node) -> Any:
        if not n.all_input_nodes:  # the images, and what is stored
            return (super().run_node(n),) * 2
        rounding = n.op == "call_module" and isinstance(self.prepared.get_submodule(str(n.target)), FakeQuant)
        pairs = self.env
        if n.op == "output":
            return self.alone(n, pairs, 1)
        floats = pairs[n.all_input_nodes[0]][0] if rounding else self.alone(n, pairs, 0)
        rounded = self.alone(n, pairs, 1)
        if n.target in WEIGHTED:
            rounded = rounded + self.corrected(n, floats, rounded)
        return floats, rounded

    def alone(self, n: Node, pairs: dict[Node, Any], side: int) -> Any:
        self.env = {source: pairs[source][side] for source in n.all_input_nodes}
        found = super().run_node(n)
        self.env = pairs
        return found

    def corrected(self, layer: Node, floats: Tensor, rounded: Tensor) -> Tensor | float:
        """What was added to the bias of `layer`, as it is added to its output."""
        bias = layer.args[2] if len(layer.args) > 2 else None
        if not isinstance(bias, Node) or bias.op != "get_attr" or self.reads.count(str(bias.target)) > 1:
            return 0.0
        channel = floats.ndim - 1 if layer.target is _ATEN.linear.default else 1
        axes = [axis for axis in range(floats.ndim) if axis != channel]
        change = (floats - rounded).mean(axes)
        stored = stored_tensor(self.prepared, bias)
        self.before[str(bias.target)] = stored.detach().clone()
        stored.add_(change)
        return change.reshape([-1 if axis == channel else 1 for axis in range(floats.ndim)])
