"""Transformations of ONNX graphs that toolchains need: a fixed batch, FP16 types, Q/DQ patterns that runtimes fuse.

Every transformation returns a copy; the input model is unchanged.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from targets.onnx.index import Index, axis, copied, dequantized, drop_unused_constants

if TYPE_CHECKING:
    import numpy.typing as npt
    from onnx import ModelProto, NodeProto

_FLOAT32_OPERATORS = "float32_operators"  # metadata entry of an FP16 graph: operators kept in float32, with reasons


def with_batch(model: ModelProto, batch: int) -> ModelProto:
    """Return a copy of `model` with the batch of its inputs and outputs fixed; inner shapes are inferred again."""
    import onnx

    fixed = copied(model)
    del fixed.graph.value_info[:]
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True)


def with_own_quantizers(model: ModelProto) -> ModelProto:
    """Return a copy of `model` in which no two weights share an initializer for their scale or zero point."""
    separate = copied(model)
    constants = Index(model).constants
    for node in separate.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            for index in range(1, len(node.input)):
                own = separate.graph.initializer.add()
                own.CopyFrom(constants[node.input[index]])
                own.name = node.input[index] = f"{node.input[0]}_{('scale', 'zero_point')[index - 1]}"
    return separate


def with_padding_before_rounding(model: ModelProto) -> ModelProto:
    """Return a copy of `model` in which a convolution that reads a concatenation is padded before quantization:

        Concat -> Q -> DQ -> Conv(pads)      becomes      Concat -> Pad -> Q -> DQ -> Conv

    The results are identical, since quantization maps 0.0 to the zero point exactly. Needed by runtimes that convert
    such an input to uint8 and then pad it with 0 instead of the zero point.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    padded = copied(model)
    graph, index = padded.graph, Index(padded)
    for quantize in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        source = index.producer(quantize.input[0])
        convolutions = [reader for dq in index.readers[quantize.output[0]] for reader in index.readers[dq.output[0]]]
        if source is None or source.op_type != "Concat" or [node.op_type for node in convolutions] != ["Conv"]:
            continue
        pads = {attribute.name: attribute.ints for attribute in convolutions[0].attribute}.get("pads")
        if pads is None or not any(pads):
            continue
        sides = np.array([0, 0, *pads[: len(pads) // 2], 0, 0, *pads[len(pads) // 2 :]], np.int64)
        name = source.output[0]
        graph.initializer.append(numpy_helper.from_array(sides, f"{name}_pads"))
        pad = helper.make_node("Pad", [name, f"{name}_pads"], [f"{name}_padded"], name=f"{name}_padded")
        graph.node.insert(list(graph.node).index(quantize), pad)
        quantize.input[0] = pad.output[0]
        pads[:] = [0] * len(pads)
    del graph.value_info[:]  # padding has changed some shapes
    return padded


def with_unsigned_activations(model: ModelProto) -> ModelProto:
    """Return a copy of `model` in which non-negative activations are quantized to uint8 with the same scale:

        Relu -> Q (int8)      becomes      Clip(0, 127 * scale) -> Q (uint8)

    The integers are the same, from 0 to 127. CPU instructions multiply uint8 by int8; int8 activations would have to
    be shifted to uint8, which takes time. An activation with a second reader stays int8: it would need a separate
    Clip, which costs more time than uint8 saves.
    """
    import numpy as np
    from onnx import numpy_helper

    unsigned = copied(model)
    graph, index = unsigned.graph, Index(unsigned)
    constants, producers = index.values, index.producers
    reads = Counter(name for node in graph.node for name in node.input)
    reads.update(output.name for output in graph.output)
    zero, changed = "unsigned_zero_point", set[str]()
    for quantize in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        name, scale, zero_point = quantize.input[0], constants[quantize.input[1]], constants[quantize.input[2]]
        highest = _highest(producers.get(name), constants)
        if highest is None or reads[name] > 1 or zero_point.dtype != np.int8 or zero_point != 0:
            continue
        ends = {f"{name}_lowest": 0.0, f"{name}_highest": min(highest, 127 * float(scale))}
        graph.initializer.extend(numpy_helper.from_array(np.array(end, np.float32), key) for key, end in ends.items())
        producers[name].op_type = "Clip"
        producers[name].input[1:] = list(ends)
        changed.add(quantize.output[0])
    for node in graph.node:
        integers = {"QuantizeLinear": node.output, "DequantizeLinear": node.input}.get(node.op_type, [""])[0]
        if integers in changed:
            node.input[2] = zero
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.uint8), zero))
    del graph.value_info[:]  # some types have changed
    return unsigned


def _highest(node: NodeProto | None, constants: Mapping[str, npt.NDArray[Any]]) -> float | None:
    """Return the upper bound of an operator's output; None where the output may be negative."""
    if node is not None and node.op_type == "Relu":
        return math.inf
    if node is None or node.op_type != "Clip" or len(node.input) < 2 or constants.get(node.input[1], -1) < 0:
        return None
    return float(constants[node.input[2]]) if len(node.input) > 2 and node.input[2] in constants else math.inf


def with_biases_apart(model: ModelProto) -> ModelProto:
    """Return a copy of `model` in which the biases of quantized matrix products of rank 3 or more have rank 3:

        DQ, DQ [-> Transpose] -> MatMul -> Add((n,))      becomes      ... -> MatMul -> Add((1, 1, n))

    The results are identical. ONNX Runtime fuses a product and a bias of rank 1 into a Gemm before it fuses Q/DQ
    pairs: the Gemm would compute in float, on weights that are dequantized for every query.
    """
    from onnx import numpy_helper, shape_inference

    apart = copied(model)
    graph, index = apart.graph, Index(apart)
    inferred = shape_inference.infer_shapes(model).graph.value_info
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in inferred}
    for node in graph.node:
        for place, product in ((0, 1), (1, 0)) if node.op_type == "Add" else ():
            bias, source = index.values.get(node.input[place]), index.producer(node.input[product])
            if bias is None or bias.ndim != 1 or source is None or source.op_type != "MatMul":
                continue
            weight = index.dequantizer(source.input[1], through=["Transpose"])
            if weight is not None and ranks.get(source.output[0], 0) >= 3:
                name = f"{node.name}_bias"
                graph.initializer.append(numpy_helper.from_array(bias.reshape(1, 1, -1), name))
                node.input[place] = name
    return apart


def macs(model: ModelProto) -> dict[str, int]:
    """Return the multiply-accumulates of every Conv, Gemm and MatMul of `model` by name. All shapes must be known."""
    from targets.macs import of_convolution, of_product

    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        shapes[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    counts = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        left, right, output = (shapes[name] for name in (node.input[0], node.input[1], node.output[0]))
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        product = of_product(left, output, transposed=transposed)
        counts[node.name] = of_convolution(right, output) if node.op_type == "Conv" else product
    return counts


def activation_scales(model: ModelProto) -> dict[str, float]:
    """Return the scale of every tensor that a QuantizeLinear of `model` reads, by the tensor's name."""
    values = Index(model).values
    return {
        node.input[0]: float(values[node.input[1]]) for node in model.graph.node if node.op_type == "QuantizeLinear"
    }


def without_quantizers(model: ModelProto) -> ModelProto:
    """Return a copy of `model` without Q/DQ: activations are float, and weights are the dequantized integers.

    TensorRT's implicit quantization needs such a graph with a calibration cache; it ignores the cache of a graph with
    Q/DQ.
    """
    import onnx
    from onnx import numpy_helper

    plain = copied(model)
    graph, constants = plain.graph, Index(model).values
    source = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    renamed: dict[str, str] = {}
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        if node.input[0] in source:
            renamed[node.output[0]] = source[node.input[0]]
            continue
        values = dequantized(constants[node.input[0]], constants[node.input[1]], axis(node))
        graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
    kept = [node for node in graph.node if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    for node in kept:
        node.input[:] = [_origin(name, renamed) for name in node.input]
    kept += [
        onnx.helper.make_node("Identity", [_origin(output.name, renamed)], [output.name], name=f"{output.name}_float")
        for output in graph.output
        if output.name in renamed
    ]
    del graph.node[:]
    graph.node.extend(kept)
    drop_unused_constants(plain)
    return plain


def _origin(name: str, renamed: Mapping[str, str]) -> str:
    """Return the float tensor that `name` is quantized from, through any number of Q/DQ pairs."""
    while name in renamed:
        name = renamed[name]
    return name


def to_fp16(model: ModelProto, float32: Mapping[str, str] = MappingProxyType({})) -> ModelProto:
    """Return a copy of `model` in which every float tensor is FP16, except the input and the output.

    Strongly typed TensorRT (optional in 10, always in 11 and RTX) computes in the types that the graph states:

        image (float32) -> Cast -> [all tensors and the Q/DQ scales in FP16] -> Cast -> logits (float32)

    FP16 scales need opset 19 or later. The scales have FP16 values already, see `calibration.scheme`, so the
    conversion does not round them.

    `float32` maps the names of operators that stay in float32, between casts, to the reasons, which are written into
    the metadata of the graph. Raises CheckFailed where the graph has control flow.
    """
    from onnx import shape_inference

    from targets.onnx.fp16_casts import Typing

    typed = copied(model)
    typing = Typing(model, frozenset(float32))
    nodes, constants = typing.nodes(), typing.constants()
    del typed.graph.node[:], typed.graph.initializer[:], typed.graph.value_info[:]
    typed.graph.node.extend(nodes)
    typed.graph.initializer.extend(constants)
    if float32:
        typed.metadata_props.add(key=_FLOAT32_OPERATORS, value=json.dumps(dict(sorted(float32.items()))))
    return shape_inference.infer_shapes(typed, data_prop=True)


def float32_operators(model: ModelProto) -> dict[str, str]:
    """Return the operators that `to_fp16` kept in float32: name to reason, from the metadata of the graph."""
    entries = {entry.key: entry.value for entry in model.metadata_props}
    reasons: dict[str, str] = json.loads(entries.get(_FLOAT32_OPERATORS, "{}"))
    return reasons
