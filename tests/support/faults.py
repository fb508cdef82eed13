"""Conversion faults of every kind, planted in ONNX graphs and torch programs: verification must find and name them.

Each plant changes a graph in place and returns the tensor whose operator is then wrong; None where the graph has no
place for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    import numpy.typing as npt
    from onnx import GraphProto, ModelProto, NodeProto
    from torch.export import ExportedProgram

    Array = npt.NDArray[Any]

Plant = Callable[["ModelProto"], "str | None"]


def scale_off(model: ModelProto) -> str | None:
    """The scale of an activation's quantizer is off by 1 %; of a convolution's weights in a float graph."""
    graph = model.graph
    quantizers = _middle(node for node in graph.node if node.op_type == "QuantizeLinear")
    for node in quantizers:
        _own(graph, node, 1, lambda scale: scale * scale.dtype.type(1.01))
        return str(node.output[0])
    for node in _middle(_weighted(graph)):
        _own(graph, node, 1, lambda weight: weight * weight.dtype.type(1.01))
        return str(node.output[0])
    return None


def channel_scales_swapped(model: ModelProto) -> str | None:
    """The scales of two channels of a quantized weight are exchanged."""
    graph, constants = model.graph, _constants(model.graph)
    for node in _middle(_weight_quantizers(graph)):
        scales = constants[node.input[1]]
        if scales.ndim and scales.min() < scales.max():
            _own(graph, node, 1, _swapped)
            return str(node.output[0])
    return None


def axis_wrong(model: ModelProto) -> str | None:
    """The scales of a square weight are applied along the wrong axis; in a float graph, the weight is transposed."""
    graph, constants = model.graph, _constants(model.graph)
    for node in _middle(_weight_quantizers(graph)):
        shape = constants[node.input[0]].shape
        axes = [found for found in node.attribute if found.name == "axis"]
        if len(shape) > 1 and shape[0] == shape[1] and axes:
            axes[0].i = 1 - axes[0].i
            return str(node.output[0])
    for node in _middle(_weighted(graph)):
        shape = constants[node.input[1]].shape if node.input[1] in constants else ()
        if len(shape) > 1 and shape[0] == shape[1]:
            _own(graph, node, 1, lambda weight: np.ascontiguousarray(weight.swapaxes(0, 1)))
            return str(node.output[0])
    return None


def bias_missing(model: ModelProto) -> str | None:
    """A layer has lost its bias."""
    graph, constants = model.graph, _constants(model.graph)
    for node in _middle(node for node in graph.node if node.op_type in ("Conv", "Gemm")):
        if len(node.input) > 2 and constants.get(node.input[2], np.zeros(1)).any():
            _own(graph, node, 2, np.zeros_like)
            return str(node.output[0])
    return None


def pad_wrong(model: ModelProto) -> str | None:
    """A convolution pads with half of its input's largest value instead of 0."""
    graph = model.graph
    for node in _middle(node for node in graph.node if node.op_type == "Conv"):
        pads = next((found.ints for found in node.attribute if found.name == "pads"), None)
        if pads is None or not any(pads):
            continue
        half = len(pads) // 2
        sides = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
        element = _constants(graph).get(node.input[1], np.zeros(1, np.float32)).dtype
        value = np.array(0.5, element if element.kind == "f" else np.float32)
        graph.initializer.extend([numpy_helper.from_array(sides, "pad_sides"), numpy_helper.from_array(value, "pad")])
        padded = helper.make_node("Pad", [node.input[0], "pad_sides", "pad"], ["padded"], name="padded")
        graph.node.insert(list(graph.node).index(node), padded)
        node.input[0] = "padded"
        pads[:] = [0] * len(pads)
        return str(node.output[0])
    return None


def saturation_off(model: ModelProto) -> str | None:
    """A quantizer saturates one integer below its end."""
    graph, constants = model.graph, _constants(model.graph)
    for node in _middle(node for node in graph.node if node.op_type == "QuantizeLinear"):
        scale, zero = constants[node.input[1]], constants[node.input[2]]
        ends = np.iinfo(zero.dtype)
        bounds = np.array([ends.min - int(zero), ends.max - 1 - int(zero)], np.float64) * float(scale)
        names = [f"{node.name}_lowest", f"{node.name}_highest"]
        graph.initializer.extend(
            numpy_helper.from_array(np.array(bound, scale.dtype), name)
            for name, bound in zip(names, bounds, strict=True)
        )
        clip = helper.make_node("Clip", [node.input[0], *names], ["saturated"], name="saturated")
        graph.node.insert(list(graph.node).index(node), clip)
        node.input[0] = "saturated"
        return str(node.output[0])
    return None


def constant_rounded(model: ModelProto) -> str | None:
    """A bias (or else a weight) was rounded to 8 bits of mantissa fewer than the graph's type has."""
    graph, constants = model.graph, _constants(model.graph)
    for place, kinds in ((2, ("Conv", "Gemm", "BatchNormalization", "LayerNormalization")), (1, ("Conv", "Gemm"))):
        for node in _middle(node for node in graph.node if node.op_type in kinds):
            value = constants.get(node.input[place]) if len(node.input) > place else None
            if value is not None and value.dtype.kind == "f" and not (value == _coarse(value)).all():
                _own(graph, node, place, _coarse)
                return str(node.output[0])
    return None


ALL: dict[str, Plant] = {
    "scale off by 1 %": scale_off,
    "two channels' scales swapped": channel_scales_swapped,
    "axis wrong": axis_wrong,
    "bias missing": bias_missing,
    "pad value wrong": pad_wrong,
    "saturation off by one": saturation_off,
    "constant rounded": constant_rounded,
}


def _coarse(value: Array) -> Array:
    """Return `value` with the mantissa of FP16 if it is float32, and of 4 bits if it is FP16."""
    if value.dtype == np.float32:
        return value.astype(np.float16).astype(np.float32)
    mantissa, exponent = np.frexp(value.astype(np.float32))
    return np.asarray(np.ldexp(np.round(mantissa * 16) / 16, exponent).astype(value.dtype))


def _swapped(scales: Array) -> Array:
    swapped = scales.copy()
    low, high = int(scales.argmin()), int(scales.argmax())
    swapped[low], swapped[high] = scales[high], scales[low]
    return swapped


def _middle(nodes: Iterator[NodeProto]) -> list[NodeProto]:
    """Return the nodes from the middle node on, then the nodes before it."""
    found = list(nodes)
    half = len(found) // 2
    return found[half:] + found[:half]


def _constants(graph: GraphProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def _weighted(graph: GraphProto) -> Iterator[NodeProto]:
    constants = {tensor.name for tensor in graph.initializer}
    yield from (node for node in graph.node if node.op_type in ("Conv", "Gemm") and node.input[1] in constants)


def _weight_quantizers(graph: GraphProto) -> Iterator[NodeProto]:
    constants = {tensor.name for tensor in graph.initializer}
    yield from (node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants)


def _own(graph: GraphProto, node: NodeProto, place: int, change: Callable[[Array], Array]) -> None:
    """Replace one constant input of `node` by a changed copy that only `node` reads."""
    value = _constants(graph)[node.input[place]]
    name = f"{node.name}_planted"
    graph.initializer.append(numpy_helper.from_array(np.asarray(change(value)).astype(value.dtype), name))
    node.input[place] = name


# --- Torch programs, for targets that convert these -------------------------------------------------------------------

ProgramPlant = Callable[["ExportedProgram"], "str | None"]


def program_scale_off(program: ExportedProgram) -> str | None:
    for node in _middle_calls(program, "quantize_per_tensor"):
        for each in (node, *node.users):
            each.update_arg(1, each.args[1] * 1.01)
        return str(node.name)
    for node in _middle_calls(program, "conv2d", "linear"):
        _stored(program, node.args[1]).mul_(1.01)
        return str(node.name)
    return None


def program_channel_scales_swapped(program: ExportedProgram) -> str | None:
    for node in _middle_calls(program, "dequantize_per_channel"):
        scales = _stored(program, node.args[1])
        if scales.min() < scales.max():
            low, high = int(scales.argmin()), int(scales.argmax())
            scales[[low, high]] = scales[[high, low]]
            return str(node.name)
    return None


def program_axis_wrong(program: ExportedProgram) -> str | None:
    for node in _middle_calls(program, "dequantize_per_channel"):
        weight = _stored(program, node.args[0])
        if weight.ndim > 1 and weight.shape[0] == weight.shape[1]:
            weight.copy_(weight.transpose(0, 1).clone())
            return str(node.name)
    if _middle_calls(program, "quantize_per_tensor"):
        return None
    for node in _middle_calls(program, "conv2d", "linear"):
        weight = _stored(program, node.args[1])
        if weight.shape[0] == weight.shape[1]:
            weight.copy_(weight.transpose(0, 1).clone())
            return str(node.name)
    return None


def program_bias_missing(program: ExportedProgram) -> str | None:
    for node in _middle_calls(program, "conv2d", "convolution", "linear"):
        if len(node.args) > 2 and node.args[2] is not None and _stored(program, node.args[2]).any():
            _stored(program, node.args[2]).zero_()
            return str(node.name)
    return None


def program_pad_wrong(program: ExportedProgram) -> str | None:
    import torch

    for node in _middle_calls(program, "conv2d"):
        padding = list(node.args[4]) if len(node.args) > 4 else []
        if not any(padding):
            continue
        (rows, columns) = padding * 2 if len(padding) == 1 else padding
        with program.graph.inserting_before(node):
            sides = [columns, columns, rows, rows]
            padded = program.graph.call_function(torch.ops.aten.constant_pad_nd.default, (node.args[0], sides, 0.5))
        batch, channels, height, width = node.args[0].meta["val"].shape
        shape = (batch, channels, height + 2 * rows, width + 2 * columns)
        padded.meta = {**node.args[0].meta, "val": node.args[0].meta["val"].new_empty(shape)}
        node.update_arg(0, padded)
        node.update_arg(4, [0, 0])
        return str(node.name)
    return None


def program_saturation_off(program: ExportedProgram) -> str | None:
    import torch

    for node in _middle_calls(program, "quantize_per_tensor"):
        source, scale = node.args[0], node.args[1]
        with program.graph.inserting_before(node):
            clamped = program.graph.call_function(torch.ops.aten.clamp.default, (source, -128 * scale, 126 * scale))
        clamped.meta = dict(source.meta)
        node.update_arg(0, clamped)
        return str(node.name)
    return None


def program_constant_rounded(program: ExportedProgram) -> str | None:
    for node in _middle_calls(program, "conv2d", "linear"):
        if len(node.args) > 2 and node.args[2] is not None:
            bias = _stored(program, node.args[2])
            if bias.any():
                mantissa, exponent = bias.frexp()
                bias.copy_((mantissa * 16).round().div(16).ldexp(exponent))
                return str(node.name)
    return None


IN_PROGRAMS: dict[str, ProgramPlant] = {
    "scale off by 1 %": program_scale_off,
    "two channels' scales swapped": program_channel_scales_swapped,
    "axis wrong": program_axis_wrong,
    "bias missing": program_bias_missing,
    "pad value wrong": program_pad_wrong,
    "saturation off by one": program_saturation_off,
    "constant rounded": program_constant_rounded,
}


def _middle_calls(program: ExportedProgram, *kinds: str) -> list[Any]:
    nodes = [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and str(getattr(node.target, "__name__", "")).split(".")[0] in kinds
    ]
    half = len(nodes) // 2
    return nodes[half:] + nodes[:half]


def _stored(program: ExportedProgram, node: Any) -> Any:
    """Return the tensor of a parameter, buffer or constant of `program`, for changes in place."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    name = names[node.name]
    tensor = program.state_dict[name] if name in program.state_dict else program.constants[name]
    return tensor.detach()
