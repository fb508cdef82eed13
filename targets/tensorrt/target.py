"""TensorRT on the host: prepare the ONNX graph, build the engine, and check the graph and the header of the engine.

One class serves `tensorrt` 8.5 to 11 and `tensorrt_rtx`. Building and execution are implemented in `targets.runner`,
which also runs on the device; this module translates the exceptions of `targets.runner` into the errors of the
pipeline.
"""

from __future__ import annotations

import collections
import importlib.metadata
import importlib.util
import logging
import struct
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.family_placements import Runtime
from calibration.recipe import FloatType, Precision
from calibration.scheme import SHARED, Scheme
from models.errors import CannotRunHere, CheckFailed
from targets.base import Export, Session
from targets.devices.machine import LOCAL, Machine, explained
from targets.onnx.index import LAYOUT_OPERATORS
from targets.runner import cuda, errors, tensorrt_engine
from targets.tensorrt import options
from targets.tensorrt.weak_graph import float32_layers, is_weak, weak_onnx

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

GRAPH, ENGINE = "model.onnx", "model.engine"

_LEVELS = {"INFO": logging.DEBUG, "WARNING": logging.WARNING, "ERROR": logging.ERROR, "INTERNAL_ERROR": logging.ERROR}

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRtTarget:
    """Base class of the TensorRT targets; each subclass adds `missing`."""

    name: str
    summary: str
    package: str  # name of the Python module: tensorrt or tensorrt_rtx
    runtime: str  # name of the runtime as NVIDIA spells it
    # Compute capabilities that the engines run on; empty where an engine runs only on the GPU it was built on.
    capabilities: tuple[tuple[int, int], ...] = ()
    scheme: Scheme = SHARED
    processor: Runtime = "accelerator"
    machine: Machine = LOCAL

    def not_executed(self) -> str | None:
        if not self.machine.local:
            return self._not_executed_there()
        if importlib.util.find_spec(self.package) is None:
            return f"the {self.package} package is not importable here"
        try:
            gpu = find_gpu()
        except CannotRunHere as e:
            return str(e)
        if not self.capabilities or gpu.capability in self.capabilities:
            return None
        return self._wrong_gpu(gpu.name, gpu.capability)

    def _not_executed_there(self) -> str | None:
        runtime = self.machine.runtime(self.package)
        if runtime.missing or runtime.not_executed or not self.capabilities:
            return runtime.missing or runtime.not_executed
        return None if runtime.capability in self.capabilities else self._wrong_gpu(runtime.gpu, runtime.capability)

    def _wrong_gpu(self, name: str | None, capability: tuple[int, ...]) -> str:
        return (
            f"{name} has compute capability {_dotted(capability)}, but engines of {self.runtime} run on "
            f"{', '.join(map(_dotted, self.capabilities))}; use TARGET=nvidia to build for this GPU"
        )

    def toolchain(self) -> dict[str, str]:
        if not self.machine.local:
            runtime = self.machine.runtime(self.package)
            on = {} if self.capabilities else {"capability": _dotted(runtime.capability)}
            return {self.package: runtime.version, **on}
        version = installed_version(self.package)
        return {} if version is None else {self.package: version}

    def float_type(self, precision: Precision) -> FloatType:
        return "f32" if precision == "fp32" else "f16"

    def build(self, export: Export, out: Path) -> None:
        import onnx

        graph = graph_for(self.machine.runtime(self.package).generation, export)
        onnx.save(graph, out / GRAPH)
        chosen = {"precision": export.precision, "batch": export.batch, **options.for_builder(export)}
        of_graph = {"float32_layers": float32_layers(graph), "operators": operators(graph)}
        self.machine.build(self.package, out, {**chosen, **of_graph})

    def inspect(self, export: Export, engine: Path) -> dict[str, object]:
        header = read_plan_header(engine / ENGINE)
        _check_made_by(header, self.runtime, self.toolchain().get(self.package))
        facts = check_graph(export, engine / GRAPH)
        plan = (engine / ENGINE).read_bytes()
        # The plan contains kernel names as plain text. TensorRT-RTX 1.7 names its fused attention kernels `gemm_mha`.
        fused = b"gemm_mha" in plan if header.runtime == "TensorRT-RTX" else None
        return {"plan_version": header.version, "plan_bytes": len(plan), "fused_attention": fused, **facts}

    def graph(self, engine: Path) -> Path | None:
        return engine / GRAPH

    def open(self, engine: Path) -> AbstractContextManager[Session]:
        why_not = self.not_executed()
        if why_not is not None:
            raise CannotRunHere(why_not)
        return self.machine.open(self.package, engine)


def find_gpu() -> cuda.Gpu:
    """Return the first NVIDIA GPU, as its driver reports it. Raises CannotRunHere without a driver or a GPU."""
    with explained():
        return cuda.find_cuda().gpu()


def why_not_importable(package: str) -> str | None:
    """Import `tensorrt` or `tensorrt_rtx`; return why it does not import, with a remedy, or None if it does."""
    try:
        tensorrt_engine.load(package)
    except errors.Unable as e:
        return str(e)
    return None


def _dotted(capability: tuple[int, ...]) -> str:
    return ".".join(map(str, capability))


def installed_version(package: str) -> str | None:
    """Return the version of `tensorrt` or `tensorrt_rtx` without importing it; None where it is not importable.

    The name of a distribution may end in its CUDA version: `tensorrt_rtx_cu13` installs the module `tensorrt_rtx`.
    """
    if importlib.util.find_spec(package) is None:
        return None
    for distribution in (package, f"{package}_cu13", f"{package}_cu12", f"{package}_bindings"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def build_plan(
    trt: Any,
    onnx: bytes,
    *,
    precision: Precision,
    batch: int,
    workspace_bytes: int | None = None,
) -> bytes:
    """Compile a serialized graph (`typed_onnx`) into a plan with the module `trt`; see `tensorrt_engine.build`.

    Raises CheckFailed, quoting NVIDIA's message, where the importer or the builder rejects the graph.
    """
    with explained():
        built = tensorrt_engine.build(
            trt,
            onnx,
            precision=precision,
            batch=batch,
            say=_say,
            workspace_bytes=workspace_bytes,
        )
    return built.plan


def _say(severity: str, message: str) -> None:
    log.log(_LEVELS[severity], "TensorRT: %s", message)


# --- Graphs ---------------------------------------------------------------------------------------------------------


def typed_onnx(export: Export) -> ModelProto:
    """Return the graph for strongly typed TensorRT: the graph states the type of every tensor, and the batch is fixed.

    Precision fp32: as exported. Precisions fp16 and int8: FP16, the Q/DQ scales included, between a cast from float32
    and a cast to float32; operators that FP16 cannot hold stay in float32. Raises CheckFailed where HALF=strict and
    there is such an operator.
    """
    import onnx

    from targets.onnx.fp16_ranges import typed
    from targets.onnx.graph import with_batch

    fixed = with_batch(onnx.load(export.onnx), export.batch)
    return fixed if export.precision == "fp32" else typed(fixed, export)


def graph_for(generation: str, export: Export) -> ModelProto:
    """Return the graph for a generation of TensorRT, see `tensorrt_engine.generation`."""
    if generation == tensorrt_engine.STRONG:
        return typed_onnx(export)
    return weak_onnx(export, normalization=generation == tensorrt_engine.WEAK)


def operators(graph: ModelProto) -> dict[str, object]:
    """Return the operators by which the runner describes an engine, see `targets.runner.engine_facts.usage`: `macs` by
    name, and the names of `softmaxes`.
    """
    from onnx.shape_inference import infer_shapes

    from targets.onnx.graph import macs

    softmaxes = [node.name for node in graph.graph.node if node.op_type == "Softmax"]
    return {"macs": macs(infer_shapes(graph, data_prop=True)), "softmaxes": softmaxes}


def check_graph(export: Export, file: Path) -> dict[str, object]:
    """Check the graph given to TensorRT: batch, types, and one quantized layer for each entry of scales.json.

    Returns the number of quantized layers, of operators, of operators kept in float32, and of constants by type.
    Raises CheckFailed where the graph does not match the export.
    """
    import onnx
    from onnx import TensorProto

    from targets.fp16 import described
    from targets.onnx.graph import float32_operators

    model = onnx.load(file)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    if batch != export.batch:
        raise CheckFailed(f"{file} takes {batch or 'any number of'} images per query; expected {export.batch}")
    layers, scales = quantized_layers(model), len(export.scales())
    if layers != scales:
        raise CheckFailed(f"{file} has {layers} quantized layers, scales.json has {scales}: build again")
    half = export.precision != "fp32" and not is_weak(model)
    unwanted = TensorProto.FLOAT if half else TensorProto.FLOAT16
    kept = float32_operators(model)
    allowed = {name for node in model.graph.node if _is_float32(node, kept) for name in (*node.input, *node.output)}
    candidates = (tensor for tensor in _constants(model) if tensor.data_type == unwanted)
    mistyped = [tensor.name for tensor in candidates if tensor.name not in allowed]
    if mistyped:
        raise CheckFailed(
            f"{file} has {len(mistyped)} constants of type {TensorProto.DataType.Name(unwanted)} ({mistyped[0]}, ...); "
            f"recipe precision {export.precision} expects {'FLOAT16' if half else 'FLOAT'}"
        )
    types = collections.Counter(TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer)
    return {
        "quantized_layers": layers,
        "operators": len(model.graph.node),
        **described(kept),
        "constants": dict(sorted(types.items())),
    }


def _is_float32(node: NodeProto, kept: Mapping[str, str]) -> bool:
    """Return whether `node` of an FP16 graph is in float32: an operator of `kept`, or a dequantizer copied for it."""
    return (node.name or node.output[0]) in kept or node.name.removesuffix("_float32") != node.name


def quantized_layers(model: ModelProto) -> int:
    """Count the operators that read a dequantized weight: an int8 constant, or a float constant through a Q/DQ pair.

    Layers with equal weights may share a constant.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    weights: set[str] = set()
    layers = 0
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in constants:
            constants.add(node.output[0])
        elif (node.op_type == "DequantizeLinear" and node.input[0] in constants) or (
            node.op_type in LAYOUT_OPERATORS and node.input[0] in weights
        ):
            weights.add(node.output[0])
        else:
            layers += any(name in weights for name in node.input)
    return layers


def _constants(model: ModelProto) -> Iterator[Any]:
    """Yield the constants whose type follows the precision: all but the region and factors of Resize (float32)."""
    fixed = {name for node in model.graph.node if node.op_type == "Resize" for name in node.input[1:3]}
    yield from (tensor for tensor in model.graph.initializer if tensor.name not in fixed)
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] not in fixed:
            yield from (attribute.t for attribute in node.attribute if attribute.name == "value")


# --- Plans ----------------------------------------------------------------------------------------------------------

# Header of a plan, little-endian: magic (4 bytes), 12 bytes that are not read, length of the plan in bytes (8), major,
# minor, patch, build (1 each). Magic and version: NVIDIA/TensorRT samples/common/sampleEngines.cpp, printPlanVersion.
# The position of the length was measured on TensorRT-RTX 1.7.1.116; it is checked for TensorRT-RTX only.
_HEADER = struct.Struct("<4s12xQ4B")
_HEADER_BYTES = 64
_RUNTIMES = {b"ftrt": "TensorRT", b"vtrt": "TensorRT-RTX"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanHeader:
    runtime: str  # TensorRT or TensorRT-RTX
    version: str  # major.minor.patch.build of the runtime that built the plan; the build number modulo 256


def read_plan_header(file: Path) -> PlanHeader:
    """Read the header of an engine file without TensorRT.

    Raises CheckFailed where the file is not a TensorRT plan, or is truncated.
    """
    with file.open("rb") as plan:
        start = plan.read(_HEADER_BYTES)
    size = file.stat().st_size
    if start[:4] not in _RUNTIMES:
        raise CheckFailed(f"{file} is not a TensorRT engine: it starts with {start[:4]!r}, expected b'ftrt' or b'vtrt'")
    if len(start) < _HEADER_BYTES:
        raise CheckFailed(f"{file} is truncated within its header ({size} bytes): build the engine again")
    magic, length, *version = _HEADER.unpack_from(start)
    if magic == b"vtrt" and length != size:
        raise CheckFailed(f"{file} has {size} bytes, its header states {length}: build the engine again")
    return PlanHeader(runtime=_RUNTIMES[magic], version=".".join(map(str, version)))


def _check_made_by(header: PlanHeader, runtime: str, installed: str | None) -> None:
    if header.runtime != runtime:
        raise CheckFailed(f"the engine was built by {header.runtime}, expected {runtime}")
    if installed in (None, "unknown"):
        return
    # Some pip versions lack the build number; the header stores the low byte of each number.
    expected = [int(part) % 256 for part in str(installed).split(".")[:4] if part.isdigit()]
    actual = [int(part) for part in header.version.split(".")]
    if actual[: len(expected)] != expected:
        raise CheckFailed(
            f"the engine was built by {runtime} {header.version}, but {installed} is installed here: build it again"
        )
