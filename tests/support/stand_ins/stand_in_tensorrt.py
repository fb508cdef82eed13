"""Stand-in for the module `tensorrt`: records calls, and its engines return given logits. Python 3.8, standard library.

Copied into a folder of PYTHONPATH as `tensorrt.py`. STAND_IN_TENSORRT names a JSON file with the settings:

    version       such as "8.5.2.2"; it determines the flags that exist
    input         shape of `image`
    output        shape of `logits`
    logits        file of float32 numbers that the queries return one after the other; zeros without it
    calls         file to which calls are appended, one JSON list [name, argument, ...] a line
    layers        names of the layers of every network
    start_error   message of an error with which the builder does not start
    build_errors  messages of the errors with which the first builds fail
    dla_cores     number of DLA cores
    dla_layers    names of the layers that the DLA supports
    information   JSON object that the engine inspector returns
    execute       whether engines compute the parsed graph, with ONNX Runtime
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
from pathlib import Path
from typing import Any

SETTINGS = json.loads(Path(os.environ["STAND_IN_TENSORRT"]).read_text())
__version__ = SETTINGS["version"]
_VERSION = tuple(int(part) for part in __version__.split(".")[:2])


def _record(*call: object) -> None:
    with Path(SETTINGS["calls"]).open("a") as calls:
        calls.write(json.dumps(call) + "\n")


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    pass


def _flags(name: str, members: list[str]) -> Any:
    return enum.IntEnum(name, members, start=0)


_WEAK = ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"] if _VERSION < (11,) else []
BuilderFlag = _flags("BuilderFlag", [*_WEAK, "GPU_FALLBACK", "TF32"])
NetworkDefinitionCreationFlag = _flags(
    "NetworkDefinitionCreationFlag",
    [*(["EXPLICIT_BATCH"] if _VERSION < (11,) else []), *(["STRONGLY_TYPED"] if _VERSION >= (10,) else [])],
)
MemoryPoolType = _flags("MemoryPoolType", ["WORKSPACE"])
ProfilingVerbosity = _flags("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "NONE", "DETAILED"])
TensorIOMode = _flags("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
DataType = _flags("DataType", ["FLOAT", "HALF", "INT8"])
DeviceType = _flags("DeviceType", ["GPU", "DLA"])
LayerInformationFormat = _flags("LayerInformationFormat", ["ONELINE", "JSON"])


class Layer:
    num_outputs = 1
    precision = None  # type: Any

    def __init__(self, name: str) -> None:
        self.name = name

    def set_output_type(self, index: int, kind: Any) -> None:
        _record("set_output_type", self.name, kind.name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "precision":
            _record("precision", self.name, value.name)
        object.__setattr__(self, name, value)


class Tensor:
    name = "image"
    shape = tuple(SETTINGS["input"])


class INetworkDefinition:
    num_inputs = 1
    graph = b""  # that was parsed

    def __init__(self) -> None:
        self.layers = [Layer(name) for name in SETTINGS.get("layers", [])]
        self.num_layers = len(self.layers)

    def get_input(self, index: int) -> Tensor:
        return Tensor()

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]


if _VERSION >= (8, 6):
    INetworkDefinition.add_normalization = None  # type: ignore[attr-defined]


class OnnxParser:
    num_errors = 0

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self.network = network

    def parse(self, graph: bytes) -> bool:
        _record("parse", len(graph))
        self.network.graph = graph
        return True


class Timings:
    def serialize(self) -> bytes:
        return b"timings"


class IBuilderConfig:
    profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
    default_device_type = DeviceType.GPU
    DLA_core = -1

    def __setattr__(self, name: str, value: Any) -> None:
        _record(name, getattr(value, "name", value))

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        _record("set_memory_pool_limit", pool.name, size)

    def set_flag(self, flag: Any) -> None:
        _record("set_flag", flag.name)

    def can_run_on_DLA(self, layer: Layer) -> bool:
        return layer.name in SETTINGS["dla_layers"]

    def add_optimization_profile(self, profile: Any) -> int:
        return 0

    def create_timing_cache(self, contents: bytes) -> Timings:
        _record("create_timing_cache", contents.decode())
        return Timings()

    def set_timing_cache(self, timings: Timings, ignore_mismatch: bool) -> bool:
        return True

    def get_timing_cache(self) -> Timings:
        return Timings()


if _VERSION >= (8, 6):
    IBuilderConfig.builder_optimization_level = 3  # type: ignore[attr-defined]


class Profile:
    def set_shape(self, name: str, *shapes: Any) -> None:
        _record("set_shape", name, *shapes)


class Builder:
    num_DLA_cores = SETTINGS.get("dla_cores", 0)

    def __init__(self, logger: Any) -> None:
        if "start_error" in SETTINGS:
            logger.log(Severity.WARNING, SETTINGS["start_error"])
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.logger = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        _record("create_network", [flag.name for flag in NetworkDefinitionCreationFlag if flags >> flag & 1])
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        _record("build_serialized_network")
        errors = SETTINGS.get("build_errors", [])
        if errors:
            self.logger.log(Severity.ERROR, errors.pop(0))
            return None
        major, minor = _VERSION
        return b"ftrt" + bytes(20) + bytes([major, minor, 0, 0]) + bytes(100) + network.graph


class IExecutionContext:
    def __init__(self) -> None:
        self.addresses = {}  # type: dict[str, int]
        self.logits = Path(SETTINGS["logits"]).read_bytes() if "logits" in SETTINGS else b""

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(SETTINGS["output" if name == "logits" else "input"])

    def set_input_shape(self, name: str, shape: Any) -> bool:
        _record("set_input_shape", name, list(shape))
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        _record("execute_async_v3")
        size = 4
        for side in SETTINGS["output"]:
            size *= side
        query, rest = self.logits[:size], self.logits[size:]
        self.logits = rest + query  # the first query follows the last
        ctypes.memmove(self.addresses["logits"], query.ljust(size, b"\0"), size)
        return True


class Executed(IExecutionContext):
    """A context that computes the graph of its plan, on memory of the host."""

    def __init__(self, graph: bytes) -> None:
        import onnxruntime

        super().__init__()
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])

    def execute_async_v3(self, stream: int) -> bool:
        import numpy as np

        shape = SETTINGS["input"]
        floats: Any = (ctypes.c_float * int(np.prod(shape))).from_address(self.addresses["image"])
        images = np.frombuffer(floats, np.float32).reshape(shape)
        logits = np.ascontiguousarray(self.session.run(None, {"image": images})[0], np.float32)
        ctypes.memmove(self.addresses["logits"], logits.ctypes.data, logits.nbytes)
        return True


class ICudaEngine:
    if _VERSION >= (8, 5):
        num_io_tensors = 2

    def __init__(self, plan: bytes) -> None:
        self.graph = plan[128:]

    def get_tensor_name(self, index: int) -> str:
        return ("image", "logits")[index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name == "image" else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType.FLOAT

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(SETTINGS["output" if name == "logits" else "input"])

    def create_execution_context(self) -> IExecutionContext:
        return Executed(self.graph) if SETTINGS.get("execute") else IExecutionContext()

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()


class EngineInspector:
    def get_engine_information(self, layout: Any) -> str:
        return json.dumps(SETTINGS.get("information", {"Layers": [], "Bindings": ["image", "logits"]}))


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        pass

    def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
        return ICudaEngine(plan) if plan[:4] == b"ftrt" else None
