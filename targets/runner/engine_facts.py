"""Description of a TensorRT engine, `engine.json` beside the engine: layers with their types, and how to load it."""

from __future__ import annotations

import json
import re
from typing import Any

_TYPES = {"half": "fp16", "float": "fp32"}  # TensorRT 11's names of types
_TYPE = re.compile(r"\b(fp32|fp16|bf16|fp8|fp4|int8|int4|int32|int64|uint8|bool|half|float)\b", re.IGNORECASE)

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


def described(package: str, information: str | None) -> dict[str, Any]:
    """Return the layers of an engine, the number of layers by type of their first input, and code that loads it.

    `information` is the engine inspector's JSON; None where the engine cannot be loaded here.
    """
    load = {"python": _PYTHON.replace("tensorrt", package), "c++": _CPP}
    if information is None:
        return {"layers": None, "layers_by_type": None, "reformat_layers": None, "load": load}
    layers = layers_of(information)
    counts: dict[str, int] = {}
    for layer in layers:
        first = str((layer["inputs"] or layer["outputs"] or ["unknown"])[0])
        counts[first] = counts.get(first, 0) + 1
    return {
        "layers": layers,
        "layers_by_type": dict(sorted(counts.items())),
        "reformat_layers": sum(map(_is_reformat, layers)),
        "load": load,
    }


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
