"""PT2E quantizer: annotates the edges of a graph that a scheme and a placement quantize."""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import QuantizationSpecBase

from calibration.fake_quant.affine import STEPS, PerTensorAffineFakeQuant
from calibration.fake_quant.calibrators import LEVELS
from calibration.fake_quant.symmetric import FakeQuant, PerChannelFakeQuant, PerTensorFakeQuant
from calibration.graph import fx
from calibration.graph.exported_program import WEIGHTED
from calibration.qdq_placement import LAYERS, SMALL, Kind, Placement
from calibration.quantizer import integer_regions
from calibration.scheme import Scheme

_ATEN = torch.ops.aten
_PRODUCTS = frozenset({_ATEN.matmul.default, _ATEN.bmm.default})
ADDITIONS = frozenset({_ATEN.add.Tensor, _ATEN.add_.Tensor})


class SchemeQuantizer(Quantizer):  # type: ignore[misc]
    """Quantizes the inputs of the operators in the placement, and no others:

        x -> conv -> silu        becomes        x -> Q -> DQ -> conv -> silu
                                                    w -> Q -> DQ -^

    Outputs stay in float up to the next such operator: norms, softmax and gates run in the float type of the graph. If
    the scheme has integer regions, see `calibration.quantizer.integer_regions`, the outputs inside them are quantized
    as well. Constants of rank 0 are never inputs of such operators, so none is ever quantized (coremltools 9.0 folds
    quantized scalars with int8 wrap-around, without a warning).
    """

    def __init__(self, scheme: Scheme, placement: Placement = LAYERS) -> None:
        super().__init__()
        self.placement, self.regions = placement, scheme.regions
        if (scheme.activation_bits, scheme.per_channel_weights) != (8, True) or not 2 <= scheme.weight_bits <= 8:
            raise NotImplementedError(
                f"{scheme}: only activations of 8 bits and per-channel weights of 2 to 8 bits are implemented"
            )
        # Activations saturate at -128, as in the quantize operator of every runtime; weights are stored integers and
        # stay symmetric.
        self.activation = (
            _spec(PerTensorFakeQuant, torch.per_tensor_symmetric, lowest=-LEVELS - 1)
            if scheme.activations == "symmetric"
            else _spec(PerTensorAffineFakeQuant, torch.per_tensor_affine, torch.uint8, lowest=0, highest=STEPS)
        )
        levels = 2 ** (scheme.weight_bits - 1) - 1
        self.weight = _spec(PerChannelFakeQuant, torch.per_channel_symmetric, lowest=-levels, highest=levels, axis=0)

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        if self.regions:
            integer_regions.spell_out(model)
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        rounded = set(integer_regions.rounded_outputs(model, self._may_round)) if self.regions else set()
        for node in model.graph.nodes:
            inputs: dict[Node, QuantizationSpecBase] = {}
            if is_rounded(node, self.placement):
                value, other = node.args[0], node.args[1]
                assert isinstance(value, Node) and isinstance(other, Node)
                inputs = {value: self._read(value, rounded)}
                inputs[other] = self.weight if node.target in WEIGHTED else self._read(other, rounded)
            elif node in rounded and integer_regions.is_elementwise(node):
                inputs = {value: self._read(value, rounded) for value in node.all_input_nodes}
            if inputs or node in rounded:
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map=inputs,
                    output_qspec=self.activation if node in rounded else None,
                    _annotated=True,
                )
        return model

    def _may_round(self, node: Node) -> bool:
        kept = self.placement.keeps_float(fx.module_path(node))
        return not kept and (node.target not in WEIGHTED or kind_of(node) in self.placement.kinds)

    def _read(self, value: Node, rounded: set[Node]) -> QuantizationSpecBase:
        """Return the spec of an input. It is shared with the origin of `value` if that is quantized, to round once."""
        source = integer_regions.origin(value)
        return SharedQuantizationSpec(source) if source in rounded and source is not value else self.activation

    def validate(self, model: GraphModule) -> None:
        """No checks: `annotate` marks each edge with the one spec of its kind."""


def is_rounded(node: Node, placement: Placement) -> bool:
    """Return whether `placement` quantizes the inputs of an operator of a traced graph."""
    return kind_of(node) in placement.kinds and not placement.keeps_float(fx.module_path(node))


def kind_of(node: Node) -> Kind | None:
    """Return the kind of `node` in a placement; None if no placement quantizes it."""
    if node.target is _ATEN.linear.default:
        return "linear"
    if node.target in WEIGHTED:
        groups = fx.groups(node)
        outputs, inputs = fx.shape(cast(Node, node.args[1]))[:2]  # inputs of one group
        if groups != 1 and inputs == 1:
            return "depthwise"
        return "conv" if min(inputs, outputs // groups) >= SMALL else "small"
    if node.target in _PRODUCTS | ADDITIONS:
        first, second = node.args[:2]
        if not (_is_activation(first) and _is_activation(second)):
            return None
        if node.target in _PRODUCTS:
            return "attention"
        return "elementwise" if fx.shape(cast(Node, first)) == fx.shape(cast(Node, second)) else None
    return None


def _is_activation(argument: object) -> bool:
    return isinstance(argument, Node) and not fx.is_stored(argument) and argument.meta["val"].is_floating_point()


def _spec(
    kind: type[FakeQuant],
    qscheme: torch.qscheme,
    dtype: torch.dtype = torch.int8,
    *,
    lowest: int,
    highest: int = LEVELS,
    axis: int | None = None,
) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=dtype,
        observer_or_fake_quant_ctr=kind,
        quant_min=lowest,
        quant_max=highest,
        qscheme=qscheme,
        ch_axis=axis,
    )
