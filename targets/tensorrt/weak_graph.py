"""Graphs for weakly typed TensorRT 8.x: float32 in opset 17 with Q/DQ; builder flags enable FP16 and INT8."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from models.errors import CheckFailed
from targets.base import Export
from targets.onnx.index import Index, axis, dequantized, drop_unused_constants

if TYPE_CHECKING:
    import numpy.typing as npt
    from onnx import ModelProto, NodeProto

# The newest opset that TensorRT 8.6's importer reads. From opset 18 on, ReduceMean takes its axes as an input, which
# this importer ignores: it would average over every axis. Source: onnx/onnx-tensorrt, tag release/8.6-GA,
# docs/operators.md and builtin_op_importers.cpp.
_OPSET, _IR = 17, 8
_TYPING, _WEAK = "typing", "weak"  # metadata entry of a weakly typed graph
_FLOAT32_LAYERS = "float32_layers"  # metadata entry: see `float32_layers`


def weak_onnx(export: Export, *, normalization: bool = True) -> ModelProto:
    """Return the graph for TensorRT 8.6; without `normalization`, the graph for 8.5.

        ReduceMean(x, axes)                  ->  ReduceMean(x), axes an attribute
        Split(x), num_outputs                ->  Split(x)
        Resize(x), attributes of opset 18    ->  Resize(x)
        Gelu(x), opset 20                    ->  x * 0.5 * (1 + Erf(x / sqrt 2)), or the formula with Tanh
        int8 weight -> DQ                    ->  float32 weight -> Q -> DQ     the integers are the same
        LayerNormalization(x), for 8.5       ->  ReduceMean, Sub, Pow, ReduceMean, Add, Sqrt, Div, Mul, Add

    The importers of 8.5 and 8.6 read Q/DQ scales as float32 whatever their type is, so they cannot read the FP16 graph.
    8.5 has no LayerNormalization (source: onnx-tensorrt release/8.5-GA and 8.6-GA); 8.6 computes it in float32.
    Raises CheckFailed where the model has an operator that opset 17 cannot express; in fp16 and int8, an operator that
    FP16 cannot hold, since the builder flags apply to every operator; for 8.5, an INT8 operator that it cannot build.
    """
    import onnx

    from targets.onnx.graph import with_batch

    model = with_batch(onnx.load(export.onnx), export.batch)
    if export.precision != "fp32":
        model = _safe_in_half(model, export)
    constants = Index(model).values
    _quantize_in_graph(model, constants)
    pinned = _rewrite(model, constants, _REWRITES if normalization else {**_REWRITES, **_PRIMITIVES})
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", _OPSET))
    model.ir_version = _IR
    onnx.helper.set_model_props(model, {_TYPING: _WEAK, _FLOAT32_LAYERS: json.dumps(pinned)})
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise CheckFailed(
            f"{export.onnx} cannot be converted to opset {_OPSET}, the newest that TensorRT 8.x reads: "
            f"{' '.join(str(e).split())}"
        ) from e
    if not normalization:
        _refuse_depthwise_silu(model)
    return model


def is_weak(model: ModelProto) -> bool:
    """Return whether `model` was made by `weak_onnx`."""
    return any(entry.key == _TYPING and entry.value == _WEAK for entry in model.metadata_props)


def float32_layers(model: ModelProto) -> list[str]:
    """Return the operators of a weakly typed graph that must be computed in float32 whatever the builder flags are.

    They are the squares, means and standard deviations of LayerNormalization in graphs for 8.5.
    """
    entries = {entry.key: entry.value for entry in model.metadata_props}
    names: list[str] = json.loads(entries.get(_FLOAT32_LAYERS, "[]"))
    return names


def _safe_in_half(model: ModelProto, export: Export) -> ModelProto:
    """Return `model` with mask constants limited to the range of FP16.

    Raises CheckFailed where the limited graph still has operators that FP16 cannot hold.
    """
    from targets.fp16 import sentence, unsafe
    from targets.onnx.fp16_ranges import limited, operators, ranges_of

    ranges = ranges_of(export)
    model = limited(model, ranges.sentinels)
    if overflowing := unsafe(operators(model), ranges):
        raise CheckFailed(
            f"FP16 cannot hold {len(overflowing)} operators, and TensorRT 8.x cannot keep single operators in float32: "
            f"{sentence(overflowing)}; use RECIPE=fp32 with TensorRT 8.x, or use TensorRT 10 or later"
        )
    return model


def _quantize_in_graph(model: ModelProto, constants: dict[str, Any]) -> None:
    """Replace each int8 constant that a DequantizeLinear reads by its float32 values and a QuantizeLinear."""
    from onnx import helper, numpy_helper

    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            name = f"{node.output[0]}_float"
            values = dequantized(constants[node.input[0]], constants[node.input[1]], axis(node))
            model.graph.initializer.append(numpy_helper.from_array(values, name))
            quantized = helper.make_node(
                "QuantizeLinear", [name, *node.input[1:]], [f"{name}_q"], name=f"{node.name}_q", axis=axis(node)
            )
            node.input[0] = quantized.output[0]
            model.graph.node.append(quantized)
        model.graph.node.append(node)
    drop_unused_constants(model)


# --- Operators --------------------------------------------------------------------------------------------------------


class _Replacement:
    """Operators that replace `node`, in order, with their constants and the names of those that stay in float32."""

    def __init__(self, node: NodeProto, constants: dict[str, npt.NDArray[Any]]) -> None:
        from onnx import helper

        self.node, self.values = node, constants
        self.attributes: dict[str, Any] = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, npt.NDArray[Any]] = {}
        self.float32: list[str] = []
        self._name = node.name or node.output[0]

    def constant(self, suffix: str, value: float) -> str:
        import numpy as np

        name = f"{self._name}_{suffix}"
        self.constants[name] = np.array(value, np.float32)
        return name

    def add(self, operator: str, inputs: list[str], suffix: str, *, float32: bool = False, **attributes: Any) -> str:
        """Add an operator and return its output, which is that of the replaced node if `suffix` is empty."""
        from onnx import helper

        name = f"{self._name}_{suffix}" if suffix else self._name
        output = name if suffix else self.node.output[0]
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))
        if float32:
            self.float32.append(name)
        return output

    def keep(self, inputs: list[str], dropped: tuple[str, ...] = (), **attributes: Any) -> None:
        """Add the replaced node with other inputs and attributes."""
        kept = {name: value for name, value in self.attributes.items() if name not in dropped}
        self.add(self.node.op_type, inputs, "", **{**kept, **attributes})


_Rewrite = Callable[[_Replacement], None]


def _rewrite(model: ModelProto, constants: dict[str, npt.NDArray[Any]], rewrites: dict[str, _Rewrite]) -> list[str]:
    """Replace the operators of `rewrites`; return the names of the operators that must be computed in float32."""
    from onnx import numpy_helper

    nodes, pinned = list(model.graph.node), list[str]()
    del model.graph.node[:], model.graph.value_info[:]
    for node in nodes:
        if node.op_type not in rewrites:
            model.graph.node.append(node)
            continue
        replacement = _Replacement(node, constants)
        rewrites[node.op_type](replacement)
        model.graph.node.extend(replacement.nodes)
        model.graph.initializer.extend(
            numpy_helper.from_array(value, name) for name, value in replacement.constants.items()
        )
        pinned += replacement.float32
    drop_unused_constants(model)
    return pinned


def _reduce_mean(new: _Replacement) -> None:
    axes = {"axes": new.values[new.node.input[1]].tolist()} if len(new.node.input) == 2 else {}
    new.keep([new.node.input[0]], ("noop_with_empty_axes",), **axes)


def _split(new: _Replacement) -> None:
    """Without `num_outputs`, Split makes equal parts."""
    from onnx import helper

    kept = {name: value for name, value in new.attributes.items() if name != "num_outputs"}
    new.nodes.append(helper.make_node("Split", new.node.input, new.node.output, name=new.node.name, **kept))


def _resize(new: _Replacement) -> None:
    """Drop attributes of opset 18 that are at their defaults. The policy has no effect on factors."""
    policy = new.attributes.get("keep_aspect_ratio_policy", b"stretch")
    dropped = {
        "antialias": not new.attributes.get("antialias", 0),
        "keep_aspect_ratio_policy": policy == b"stretch" or len(new.node.input) < 4,
    }
    new.keep(list(new.node.input), tuple(name for name, default in dropped.items() if default))


def _gelu(new: _Replacement) -> None:
    (x,) = new.node.input
    if new.attributes.get("approximate", b"none") == b"tanh":
        cube = new.add("Mul", [new.add("Mul", [x, x], "square"), x], "cube")
        bent = new.add("Mul", [cube, new.constant("bend", 0.044715)], "bent")
        factor = new.constant("factor", math.sqrt(2 / math.pi))
        step = new.add("Tanh", [new.add("Mul", [new.add("Add", [x, bent], "sum"), factor], "scaled")], "tanh")
    else:
        step = new.add("Erf", [new.add("Div", [x, new.constant("root", math.sqrt(2))], "scaled")], "erf")
    shifted = new.add("Add", [step, new.constant("one", 1.0)], "shifted")
    new.add("Mul", [x, new.add("Mul", [shifted, new.constant("half", 0.5)], "gate")], "")


def _layer_normalization(new: _Replacement) -> None:
    """Write the formula, from the squares to the standard deviation in float32: FP16 holds neither the square of 256
    nor an epsilon of 1e-6.
    """
    x, scale, *bias = new.node.input
    first, rank = new.attributes.get("axis", -1), new.values[scale].ndim
    if first != -rank:
        raise CheckFailed(
            f"{new.node.name}: a LayerNormalization from axis {first} on with a scale of {rank} dimensions is not "
            f"supported for TensorRT 8.5, expected axis {-rank}; use TensorRT 8.6 or later"
        )
    axes = list(range(-rank, 0))
    mean = new.add("ReduceMean", [x], "mean", float32=True, axes=axes, keepdims=1)
    centred = new.add("Sub", [x, mean], "centred")
    squared = new.add("Pow", [centred, new.constant("two", 2.0)], "squared", float32=True)
    variance = new.add("ReduceMean", [squared], "variance", float32=True, axes=axes, keepdims=1)
    epsilon = new.constant("epsilon", new.attributes.get("epsilon", 1e-5))
    shifted = new.add("Add", [variance, epsilon], "shifted", float32=True)
    deviation = new.add("Sqrt", [shifted], "deviation", float32=True)
    normal = new.add("Div", [centred, deviation], "normal")
    scaled = new.add("Mul", [normal, scale], "scaled" if bias else "")
    if bias:
        new.add("Add", [scaled, bias[0]], "")


_REWRITES: dict[str, _Rewrite] = {"ReduceMean": _reduce_mean, "Split": _split, "Resize": _resize, "Gelu": _gelu}
_PRIMITIVES: dict[str, _Rewrite] = {"LayerNormalization": _layer_normalization}


def _refuse_depthwise_silu(model: ModelProto) -> None:
    """Raise CheckFailed for a depthwise convolution in INT8 with SiLU and an INT8 output, which 8.5.2 cannot build.

    Source: NVIDIA/TensorRT, issue 3385: no kernel for a depthwise convolution with an activation other than ReLU.
    """
    refused = list(_depthwise_silu(model))
    if refused:
        raise CheckFailed(
            f"TensorRT 8.5 cannot build {refused[0]}{f' and {len(refused) - 1} others' if refused[1:] else ''}, a "
            "depthwise convolution in INT8 followed by SiLU and a QuantizeLinear (NVIDIA/TensorRT issue 3385): leave "
            "depthwise convolutions in FP16, as the default PLACEMENT does, or use TensorRT 8.6 or later"
        )


def _depthwise_silu(model: ModelProto) -> Iterator[str]:
    index = Index(model)
    for node in model.graph.node:
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        if node.op_type != "Conv" or groups == 1 or not all(map(index.dequantizer, node.input[:2])):
            continue
        readers = index.readers.get(node.output[0], [])
        gates = {output for reader in readers if reader.op_type == "Sigmoid" for output in reader.output}
        for reader in readers:
            if reader.op_type == "Mul" and gates & set(reader.input):
                quantizers = index.readers.get(reader.output[0], [])
                if any(quantizer.op_type == "QuantizeLinear" for quantizer in quantizers):
                    yield node.name or node.output[0]
