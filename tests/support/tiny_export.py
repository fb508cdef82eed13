"""An export of a network that is so small that an engine is built in a quarter of a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.recipe import Precision
from targets.base import Export

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

SIZE, CHANNELS, CLASSES, IMAGES = 16, 32, 4, 5


def tiny_export(
    path: Path, precision: Precision, *, batch: int = 1, zero_point: int = 0, scale: float = 0.05
) -> Export:
    """Write conv - ReLU - mean - linear as an export: for int8, with Q/DQ at the inputs of both weighted layers."""
    import onnx
    from onnx import helper

    from targets.onnx.reference import reference_logits

    path.mkdir()
    draw = np.random.default_rng(0)
    nodes: list[NodeProto] = []
    constants: list[TensorProto] = []

    def constant(name: str, value: object) -> str:
        constants.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(name: str, shape: tuple[int, ...]) -> str:
        values = draw.normal(size=shape).astype(np.float32)
        if precision != "int8":
            return constant(name, values)
        scales = np.float32(np.float16(np.abs(values).reshape(shape[0], -1).max(1) / 127))
        integers = np.round(values / scales.reshape(-1, *[1] * (len(shape) - 1))).clip(-127, 127).astype(np.int8)
        pair = [constant(f"{name}_scale", scales), constant(f"{name}_zero", np.zeros(shape[0], np.int8))]
        inputs = [constant(f"{name}_int8", integers), *pair]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [name], name=f"dequantize_{name}", axis=0))
        return name

    def activation(name: str) -> str:
        if precision != "int8":
            return name
        pair = [
            constant(f"{name}_scale", np.float32(np.float16(scale))),
            constant(f"{name}_zero", np.int8(zero_point)),
        ]
        nodes.append(helper.make_node("QuantizeLinear", [name, *pair], [f"{name}_q"], name=f"quantize_{name}"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *pair], [f"{name}_dq"]))
        return f"{name}_dq"

    image = activation("image")
    kernel = weight("conv.weight", (CHANNELS, 3, 3, 3))
    bias = constant("conv.bias", draw.normal(size=CHANNELS).astype(np.float32))
    nodes.append(helper.make_node("Conv", [image, kernel, bias], ["features"], name="conv", pads=[1] * 4))
    nodes.append(helper.make_node("Relu", ["features"], ["positive"], name="relu"))
    axes = constant("axes", np.array([2, 3], np.int64))
    nodes.append(
        helper.make_node("ReduceMean", ["positive", axes], ["pooled"], name="mean", keepdims=0, noop_with_empty_axes=0)
    )
    pooled = activation("pooled")
    linear = weight("linear.weight", (CLASSES, CHANNELS))
    nodes.append(helper.make_node("Gemm", [pooled, linear], ["logits"], name="linear", transB=1))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", CLASSES])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path / "model.onnx")

    layers = ("conv", "linear") if precision == "int8" else ()
    (path / "scales.json").write_text(json.dumps({layer: {"activation": scale, "weight": []} for layer in layers}))
    (path / "model.json").write_text(json.dumps({"model": "tiny", "size": SIZE}))
    images = draw.normal(size=(IMAGES, 3, SIZE, SIZE)).astype(np.float32)
    np.savez(path / "sample.npz", images=images, logits=reference_logits(path / "model.onnx", images))
    return Export(path=path, precision=precision, batch=batch)
