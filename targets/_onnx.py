"""ONNX files as the toolchains want them: a fixed batch, FP16 typed into the graph, nothing shared between weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt
    from onnx import ModelProto, NodeProto

_FLOAT32_OPERATORS = "float32_operators"  # the entry of the metadata of an FP16 graph


def with_batch(model: ModelProto, batch: int) -> ModelProto:
    """A copy of `model` with the dynamic batch of its input and output fixed; shapes in between are inferred anew."""
    import onnx

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True)


def with_own_quantizers(model: ModelProto) -> ModelProto:
    """A copy of `model` in which every weight has a scale and a zero point of its own; equal ones are shared before."""
    import onnx

    separate = onnx.ModelProto()
    separate.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in separate.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            for index in range(1, len(node.input)):
                own = separate.graph.initializer.add()
                own.CopyFrom(constants[node.input[index]])
                own.name = node.input[index] = f"{node.input[0]}_{('scale', 'zero_point')[index - 1]}"
    return separate


def with_padding_before_rounding(model: ModelProto) -> ModelProto:
    """A copy of `model` in which a convolution over a concatenation pads in float, before its input is quantized:

        Concat -> Q -> DQ -> Conv(pads)      becomes      Concat -> Pad -> Q -> DQ -> Conv

    The same numbers, since zero is an integer; for runtimes that shift such an input to uint8 and pad it with 0.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    padded = type(model)()
    padded.CopyFrom(model)
    graph = padded.graph
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for quantize in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        source = producers.get(quantize.input[0])
        convolutions = [reader for dq in readers[quantize.output[0]] for reader in readers[dq.output[0]]]
        if source is None or source.op_type != "Concat" or [node.op_type for node in convolutions] != ["Conv"]:
            continue
        pads = {found.name: found.ints for found in convolutions[0].attribute}.get("pads")
        if pads is None or not any(pads):
            continue
        sides = np.array([0, 0, *pads[: len(pads) // 2], 0, 0, *pads[len(pads) // 2 :]], np.int64)
        name = source.output[0]
        graph.initializer.append(numpy_helper.from_array(sides, f"{name}_pads"))
        pad = helper.make_node("Pad", [name, f"{name}_pads"], [f"{name}_padded"], name=f"{name}_padded")
        graph.node.insert(list(graph.node).index(quantize), pad)
        quantize.input[0] = pad.output[0]
        pads[:] = [0] * len(pads)
    del graph.value_info[:]  # some shapes have grown
    return padded


def with_unsigned_activations(model: ModelProto) -> ModelProto:
    """A copy of `model` in which what is never negative is quantized to uint8 in place of int8, by the same scale:

        Relu -> Q (int8)      becomes      Clip(0, 127 * scale) -> Q (uint8)

    The same integers, from 0 to 127. CPUs multiply uint8 by int8; int8 must be shifted, which takes them time. What
    something else reads as well stays as it is: a clip of its own costs more than is gained.
    """
    import numpy as np
    from onnx import numpy_helper

    unsigned = type(model)()
    unsigned.CopyFrom(model)
    graph = unsigned.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
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
    """The largest value that an operator leaves; None where it may leave negative ones."""
    if node is not None and node.op_type == "Relu":
        return math.inf
    if node is None or node.op_type != "Clip" or len(node.input) < 2 or constants.get(node.input[1], -1) < 0:
        return None
    return float(constants[node.input[2]]) if len(node.input) > 2 and node.input[2] in constants else math.inf


def with_biases_apart(model: ModelProto) -> ModelProto:
    """A copy of `model` in which the biases of integer products of rank 3 or more have rank 3:

        DQ, DQ [-> Transpose] -> MatMul -> Add((n,))      becomes      ... -> MatMul -> Add((1, 1, n))

    The same numbers. ONNX Runtime makes a Gemm of a product and a bias of rank 1, before it looks for integers: in
    float, on weights that are dequantized for every query.
    """
    from onnx import numpy_helper, shape_inference

    apart = type(model)()
    apart.CopyFrom(model)
    graph = apart.graph
    inferred = shape_inference.infer_shapes(model).graph.value_info
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in inferred}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        for place, product in ((0, 1), (1, 0)) if node.op_type == "Add" else ():
            bias, source = constants.get(node.input[place]), producers.get(node.input[product])
            if bias is None or bias.ndim != 1 or source is None or source.op_type != "MatMul":
                continue
            weight = producers.get(source.input[1])
            if weight is not None and weight.op_type == "Transpose":
                weight = producers.get(weight.input[0])
            if weight is not None and weight.op_type == "DequantizeLinear" and ranks.get(source.output[0], 0) >= 3:
                name = f"{node.name}_bias"
                graph.initializer.append(numpy_helper.from_array(bias.reshape(1, 1, -1), name))
                node.input[place] = name
    return apart


def macs(model: ModelProto) -> dict[str, int]:
    """Multiply-accumulates of each layer and product of `model`, all of whose shapes are known, by its name."""
    from targets._macs import of_convolution, of_product

    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        shapes[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    found = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        left, right, output = (shapes[name] for name in (node.input[0], node.input[1], node.output[0]))
        transposed = any(given.name == "transA" and given.i for given in node.attribute)
        product = of_product(left, output, transposed=transposed)
        found[node.name] = of_convolution(right, output) if node.op_type == "Conv" else product
    return found


def activation_scales(model: ModelProto) -> dict[str, float]:
    """The scale of every tensor that `model` rounds, by its name."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        node.input[0]: float(numpy_helper.to_array(constants[node.input[1]]))
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }


def without_quantizers(model: ModelProto) -> ModelProto:
    """A copy of `model` in float: activations are not rounded, and weights are the values that their integers stand
    for. What TensorRT's implicit INT8 takes beside a calibration cache; it ignores the cache of a graph with Q/DQ.
    """
    import onnx
    from onnx import numpy_helper

    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    graph = plain.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    source = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    renamed: dict[str, str] = {}
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        if node.input[0] in source:
            renamed[node.output[0]] = source[node.input[0]]
            continue
        integers, scale = constants[node.input[0]].astype("float32"), constants[node.input[1]]
        axis = next((found.i for found in node.attribute if found.name == "axis"), 1)
        shape = [-1 if place == axis % integers.ndim else 1 for place in range(integers.ndim)]
        values = integers * (scale.reshape(shape) if scale.ndim else scale)
        graph.initializer.append(numpy_helper.from_array(values.astype("float32"), node.output[0]))
    kept = [node for node in graph.node if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    for node in kept:
        node.input[:] = [_origin(name, renamed) for name in node.input]
    kept += [
        onnx.helper.make_node("Identity", [_origin(given.name, renamed)], [given.name], name=f"{given.name}_float")
        for given in graph.output
        if given.name in renamed
    ]
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    needed = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(needed)
    return plain


def _origin(name: str, renamed: Mapping[str, str]) -> str:
    """The tensor that `name` is a rounding of, however often it was rounded."""
    while name in renamed:
        name = renamed[name]
    return name


def to_fp16(model: ModelProto, float32: Mapping[str, str] = MappingProxyType({})) -> ModelProto:
    """A copy of `model` with every float tensor typed FP16, input and output excepted: strongly typed TensorRT (10 on
    request, 11 and RTX always) computes in the types that the graph states.

        image (float32) -> Cast -> [everything, and the scales of Q/DQ, in FP16] -> Cast -> logits (float32)

    FP16 scales need opset 19 or later; they are FP16 values already (`Scheme.fp16_scales`), so nothing is rounded.

    Operators whose names are keys of `float32` keep that type, between casts; the values, the reasons, are kept in the
    metadata of the graph.
    Raises CheckFailed where the graph has control flow.
    """
    from onnx import shape_inference

    from targets._half_typing import Typing

    typed = type(model)()
    typed.CopyFrom(model)
    typing = Typing(model, frozenset(float32))
    nodes, constants = typing.nodes(), typing.constants()
    del typed.graph.node[:], typed.graph.initializer[:], typed.graph.value_info[:]
    typed.graph.node.extend(nodes)
    typed.graph.initializer.extend(constants)
    if float32:
        typed.metadata_props.add(key=_FLOAT32_OPERATORS, value=json.dumps(dict(sorted(float32.items()))))
    return shape_inference.infer_shapes(typed, data_prop=True)


def float32_operators(model: ModelProto) -> dict[str, str]:
    """The operators that `to_fp16` left in float32 on request, by name, with the reasons."""
    entries = {entry.key: entry.value for entry in model.metadata_props}
    found: dict[str, str] = json.loads(entries.get(_FLOAT32_OPERATORS, "{}"))
    return found
