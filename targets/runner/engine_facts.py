"""Description of a TensorRT engine, `engine.json` beside the engine: layers with their types, the MACs in INT8, fused
attention, and how to load it.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_TYPES = {"half": "fp16", "float": "fp32"}  # TensorRT 11's names of types
_TYPE = re.compile(r"\b(fp32|fp16|bf16|fp8|fp4|int8|int4|int32|int64|uint8|bool|half|float)\b", re.IGNORECASE)
_OPERATOR = re.compile(r"\[ONNX Layer: ([^\]]+)\]")  # in a layer's metadata, since TensorRT 8.6

_PYTHON = """import tensorrt
runtime = tensorrt.Runtime(tensorrt.Logger())
engine = runtime.deserialize_cuda_engine(open("model.engine", "rb").read())
context = engine.create_execution_context()
context.set_tensor_address("image", image)  # addresses of float32 tensors on the GPU
context.set_tensor_address("logits", logits)
context.execute_async_v3(stream)
"""
_CPP = """std::unique_ptr<nvinfer1::IRuntime> runtime{nvinfer1::createInferRuntime(logger)};
std::unique_ptr<nvinfer1::ICudaEngine> engine{runtime->deserializeCudaEngine(plan.data(), plan.size())};
std::unique_ptr<nvinfer1::IExecutionContext> context{engine->createExecutionContext()};
context->setTensorAddress("image", image);  // addresses of float32 tensors on the GPU
context->setTensorAddress("logits", logits);
context->enqueueV3(stream);
"""


def described(package: str, information: str | None, operators: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the layers of an engine, the number of layers by type of their first input, `usage`, and code that loads
    it. None stands for unknown.

    `information` is the engine inspector's JSON; None where the engine cannot be loaded here. `operators` of the graph:
    see `usage`.
    """
    load = {"python": _PYTHON.replace("tensorrt", package), "c++": _CPP}
    if information is None:
        layered: dict[str, Any] = {"layers": None, "layers_by_type": None, "reformat_layers": None}
        return {**layered, **usage([], operators), "load": load}
    layers = layers_of(information)
    counts: dict[str, int] = {}
    for layer in layers:
        first = str((layer["inputs"] or layer["outputs"] or ["unknown"])[0])
        counts[first] = counts.get(first, 0) + 1
    return {
        "layers": layers,
        "layers_by_type": dict(sorted(counts.items())),
        "reformat_layers": sum(map(_is_reformat, layers)),
        **usage(json.loads(information)["Layers"], operators),
        "load": load,
    }


def usage(layers: list[Any], operators: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the MACs of a query by type, the percentage in INT8, and whether the attention of each softmax is fused.

    `layers` are those of the inspector's JSON. `operators` of the ONNX graph: `macs` by name, and names of `softmaxes`.
    The type of an operator is that of the first input of its layer, `unknown` where no layer or layers of several types
    compute it. Attention is fused if a layer computes the softmax and two matrix products, or is one of TensorRT's
    kernels for multi-head attention (MHA).
    """
    if operators is None:
        return {"macs_by_type": None, "int8_macs_percent": None, "fused_attention": None}
    found = list(_computing(layers))
    macs: dict[str, int] = {}
    for name, count in operators["macs"].items():
        types = {kind for _, kind, names in found if name in names}
        kind = types.pop() if len(types) == 1 else "unknown"
        macs[kind] = macs.get(kind, 0) + count
    known = bool(macs) and "unknown" not in macs
    return {
        "macs_by_type": dict(sorted(macs.items())),
        "int8_macs_percent": round(100 * macs.get("int8", 0) / sum(macs.values()), 1) if known else None,
        "fused_attention": {name: _fused(name, found, set(operators["macs"])) for name in operators["softmaxes"]},
    }


def _computing(layers: list[Any]) -> Iterator[tuple[str, str, set[str]]]:
    """Yield name, type of the first input, and ONNX operators of every layer that does not only change the format."""
    for layer in layers:
        described = _layer(layer)
        if not _is_reformat(described):
            names = _OPERATOR.findall("" if isinstance(layer, str) else str(layer.get("Metadata", "")))
            name = str(described["name"])
            yield name, (described["inputs"] or ["unknown"])[0], set(names or name.split(" + "))


def _fused(softmax: str, layers: list[tuple[str, str, set[str]]], products: set[str]) -> bool | None:
    """Return whether the attention of a softmax is fused; None if no layer names the softmax."""
    own = [(name, names) for name, _, names in layers if softmax in names]
    return any("mha" in name.lower() or len(names & products) >= 2 for name, names in own) if own else None


def layers_of(information: str) -> list[dict[str, Any]]:
    """Return name, type of operation, and the types of inputs and outputs of every layer in the inspector's JSON.

    Types are lower-case, such as fp16 and int8. Layers of an engine without details have a name only.
    """
    return [_layer(layer) for layer in json.loads(information)["Layers"]]


def _layer(layer: Any) -> dict[str, Any]:
    if isinstance(layer, str):
        return {"name": layer, "type": None, "inputs": [], "outputs": []}
    sides = {key.lower(): [_type(tensor) for tensor in layer.get(key, [])] for key in ("Inputs", "Outputs")}
    return {"name": layer.get("Name"), "type": layer.get("LayerType"), **sides}


def _type(tensor: dict[str, Any]) -> str:
    """Return the type of a tensor; TensorRT 10 and earlier write it into the format, 11 apart."""
    match = _TYPE.search(str(tensor.get("DataType") or tensor.get("Format/Datatype", "")))
    name = match[0].lower() if match else "unknown"
    return _TYPES.get(name, name)


def _is_reformat(layer: dict[str, Any]) -> bool:
    return layer["type"] == "Reformat" or str(layer["name"]).startswith("Reformatting CopyNode")
