"""Where a scheme's integers go: the PT2E quantizer that marks the edges of the graph."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from calibration.fake_quant import LEVELS, FakeQuant, PerChannelFakeQuant, PerTensorFakeQuant
from calibration.program import WEIGHTED
from calibration.scheme import Scheme


class SchemeQuantizer(Quantizer):  # type: ignore[misc]
    """Quantizes the two inputs of every convolution and linear layer, and nothing else:

        x -> conv -> silu        becomes        x -> Q -> DQ -> conv -> silu
                                                    w -> Q -> DQ -^

    Outputs stay float until the next weighted operator: residual adds, norms, softmax, gates and attention products
    are computed in the graph's float type. Constants of rank 0 are never inputs of such operators, so none is ever
    quantized (coremltools 9.0 folds quantized scalars with int8 wrap-around, without a word).
    """

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        if (scheme.weight_bits, scheme.activation_bits, scheme.per_channel_weights) != (8, 8, True):
            raise NotImplementedError(f"{scheme}: only 8 bits with per-channel weights are implemented")
        # Every runtime's quantize operator saturates at -128, and so does ours; weights are stored integers and stay
        # symmetric.
        self.activation = _spec(PerTensorFakeQuant, torch.per_tensor_symmetric, lowest=-LEVELS - 1)
        self.weight = _spec(PerChannelFakeQuant, torch.per_channel_symmetric, lowest=-LEVELS, axis=0)

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.target in WEIGHTED:
                value, weight = node.args[0], node.args[1]
                assert isinstance(value, Node) and isinstance(weight, Node)
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map={value: self.activation, weight: self.weight}, _annotated=True
                )
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: `annotate` marks each edge with the one spec of its kind."""


def _spec(kind: type[FakeQuant], qscheme: torch.qscheme, *, lowest: int, axis: int | None = None) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=kind,
        quant_min=lowest,
        quant_max=LEVELS,
        qscheme=qscheme,
        ch_axis=axis,
    )
