"""TensorRT as a host sees it: the graph it is handed, the engine it makes of it, and what can be read off that engine.

One class serves `tensorrt` 8.5 to 11 and `tensorrt_rtx`. How a network is built and run stands in `_board.py`, which
boards run too; how those functions fail is translated here into the pipeline's own errors.
"""

from __future__ import annotations

import collections
import importlib
import importlib.metadata
import importlib.util
import logging
import struct
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.families import Runtime
from calibration.recipe import FloatType, Precision
from calibration.scheme import SHARED, Scheme
from models.errors import BadRequest, CannotRunHere, CheckFailed
from targets import _board
from targets.base import Export, Session

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

GRAPH, ENGINE = "model.onnx", "model.engine"

# The newest opset of TensorRT 8.6's importer. From 18 on, ReduceMean takes its axes as an input, which that importer
# overlooks: it would average over every axis. Source: onnx/onnx-tensorrt, tag release/8.6-GA, docs/operators.md and
# builtin_op_importers.cpp.
_WEAK_OPSET, _WEAK_IR = 17, 8
_WEAK = "weak"  # the metadata entry that marks such a graph

_LEVELS = {"INFO": logging.DEBUG, "WARNING": logging.WARNING, "ERROR": logging.ERROR, "INTERNAL_ERROR": logging.ERROR}
_ERRORS = {_board.Damaged: BadRequest, _board.Unable: CannotRunHere, _board.Rejected: CheckFailed}

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRtTarget:
    """What TensorRT targets share; each adds `missing`."""

    name: str
    summary: str
    package: str  # tensorrt or tensorrt_rtx: the module
    runtime: str  # as NVIDIA writes it
    # Compute capabilities that its engines run on; empty where that is the GPU they were built on.
    capabilities: tuple[tuple[int, int], ...] = ()
    scheme: Scheme = SHARED
    processor: Runtime = "accelerator"

    def not_executed(self) -> str | None:
        if importlib.util.find_spec(self.package) is None:
            return f"the {self.package} package is not importable here"
        try:
            gpu = find_gpu()
        except CannotRunHere as e:
            return str(e)
        if not self.capabilities or gpu.capability in self.capabilities:
            return None
        return (
            f"{gpu.name} has compute capability {_dotted(gpu.capability)}, engines of {self.runtime} run "
            f"on {', '.join(map(_dotted, self.capabilities))}; TARGET=nvidia builds for this GPU"
        )

    def toolchain(self) -> dict[str, str]:
        version = installed_version(self.package)
        return {} if version is None else {self.package: version}

    def float_type(self, precision: Precision) -> FloatType:
        return "f32" if precision == "fp32" else "f16"

    def build(self, export: Export, out: Path) -> None:
        trt = importlib.import_module(self.package)
        graph = typed_onnx(export) if _board.strongly_typed(trt) else weak_onnx(export)
        onnx_bytes = graph.SerializeToString()
        plan = build_plan(trt, onnx_bytes, precision=export.precision, batch=export.batch)
        (out / GRAPH).write_bytes(onnx_bytes)
        (out / ENGINE).write_bytes(plan)

    def inspect(self, export: Export, engine: Path) -> dict[str, object]:
        header = read_plan_header(engine / ENGINE)
        _check_made_by(header, self.runtime, installed_version(self.package))
        found = check_graph(export, engine / GRAPH)
        plan = (engine / ENGINE).read_bytes()
        # Kernel names stand in the plan in clear. `gemm_mha` is what TensorRT-RTX 1.7 calls fused attention.
        fused = b"gemm_mha" in plan if header.runtime == "TensorRT-RTX" else None
        return {"plan_version": header.version, "plan_bytes": len(plan), "fused_attention": fused, **found}

    def graph(self, engine: Path) -> Path | None:
        return engine / GRAPH

    @contextmanager
    def open(self, engine: Path) -> Iterator[Session]:
        why_not = self.not_executed()
        if why_not is not None:
            raise CannotRunHere(why_not)
        trt = importlib.import_module(self.package)
        plan = (engine / ENGINE).read_bytes()
        with explained(), closing(_board.Execution(trt, plan, _board.find_cuda(), _say)) as execution:
            yield execution


def find_gpu() -> _board.Gpu:
    """The first NVIDIA GPU, found through its driver alone. Raises CannotRunHere where there is none."""
    with explained():
        return _board.find_cuda().gpu()


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def installed_version(package: str) -> str | None:
    """The version of `tensorrt` or `tensorrt_rtx`, read without importing it; None where it is not importable.

    NVIDIA names the distributions after the CUDA they are for as well: `tensorrt_rtx_cu13` brings `tensorrt_rtx`.
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
    workspace_bytes: int = _board.WORKSPACE_BYTES,
) -> bytes:
    """Compile a serialized graph (`typed_onnx` or `weak_onnx`) with the module `trt`; see `_board.build`.

    Raises CheckFailed where the importer or the builder refuses it, in their words.
    """
    with explained():
        built = _board.build(trt, onnx, precision=precision, batch=batch, say=_say, workspace_bytes=workspace_bytes)
    return built.plan


@contextmanager
def explained() -> Iterator[None]:
    """Failures of `_board`, which knows nothing of Edgeline, as the errors that the pipeline explains."""
    try:
        yield
    except _board.Refused as e:
        raise _ERRORS[type(e)](str(e)) from e


def _say(severity: str, message: str) -> None:
    log.log(_LEVELS[severity], "TensorRT: %s", message)


# --- Graphs ---------------------------------------------------------------------------------------------------------


def typed_onnx(export: Export) -> ModelProto:
    """The graph for strongly typed TensorRT: every tensor has the type it is computed in, the batch is fixed.

    fp32: as exported. fp16 and int8: FP16, the scales of Q/DQ included, between casts from and to float32; operators
    that FP16 cannot hold stay in float32. Raises CheckFailed where HALF=strict and there are some.
    """
    import onnx

    from targets._half_onnx import typed
    from targets._onnx import with_batch

    fixed = with_batch(onnx.load(export.onnx), export.batch)
    return fixed if export.precision == "fp32" else typed(fixed, export)


def weak_onnx(export: Export) -> ModelProto:
    """The graph for weakly typed TensorRT (8.5 and 8.6): float32 in opset 17; the builder's flags allow FP16 and INT8.

        ReduceMean(x, axes)           ->  ReduceMean(x), axes an attribute
        Split(x), num_outputs         ->  Split(x)
        int8 weight -> DQ             ->  float32 weight -> Q -> DQ     the same integers

    These importers read the scales of Q/DQ as float32 whatever their type is, so the FP16 graph is not for them.
    8.5 has no LayerNormalization: models with attention need 8.6 (source: onnx-tensorrt release/8.5-GA and 8.6-GA).
    Raises CheckFailed where the model has an operator that opset 17 cannot say, or that FP16 cannot hold: the builder's
    flags apply to all operators alike.
    """
    import onnx

    from targets._onnx import with_batch

    model = with_batch(onnx.load(export.onnx), export.batch)
    if export.precision != "fp32":
        model = _safe_in_half(model, export)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "ReduceMean":
            _axes_to_attribute(node, constants)
        elif node.op_type == "Split":
            _drop_attributes(node, "num_outputs")  # equal parts are the default
    _quantize_in_graph(model, constants)
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", _WEAK_OPSET))
    model.ir_version = _WEAK_IR
    onnx.helper.set_model_props(model, {"typing": _WEAK})
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise CheckFailed(
            f"{export.onnx} cannot be written in opset {_WEAK_OPSET}, the newest that TensorRT 8.x reads: "
            f"{' '.join(str(e).split())}"
        ) from e
    return model


def _safe_in_half(model: ModelProto, export: Export) -> ModelProto:
    """`model` with the constants of its masks within FP16. Raises CheckFailed where FP16 cannot hold it even so."""
    from targets._half import sentence, unsafe
    from targets._half_onnx import limited, operators, ranges_of

    ranges = ranges_of(export)
    model = limited(model, ranges.sentinels)
    if found := unsafe(operators(model), ranges):
        raise CheckFailed(
            f"FP16 cannot hold {len(found)} operators, and TensorRT 8.x takes no type for a single one: "
            f"{sentence(found)}; use RECIPE=fp32 there, or TensorRT 10 or later"
        )
    return model


def _axes_to_attribute(node: NodeProto, constants: dict[str, Any]) -> None:
    from onnx import helper, numpy_helper

    _drop_attributes(node, "noop_with_empty_axes")
    if len(node.input) == 2:
        node.attribute.append(helper.make_attribute("axes", numpy_helper.to_array(constants[node.input[1]]).tolist()))
        del node.input[1]


def _drop_attributes(node: NodeProto, name: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _quantize_in_graph(model: ModelProto, constants: dict[str, Any]) -> None:
    """Replace each int8 constant that is dequantized by its float32 values and a QuantizeLinear."""
    from onnx import helper, numpy_helper

    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            stored, scale = constants[node.input[0]], numpy_helper.to_array(constants[node.input[1]])
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            integers = numpy_helper.to_array(stored)
            shape = [1] * integers.ndim
            if scale.ndim:
                shape[axis] = -1
            name = f"{node.output[0]}_float"
            model.graph.initializer.append(numpy_helper.from_array(integers * scale.reshape(shape), name))
            quantized = helper.make_node(
                "QuantizeLinear", [name, *node.input[1:]], [f"{name}_q"], name=f"{node.name}_q", axis=axis
            )
            node.input[0] = quantized.output[0]
            model.graph.node.append(quantized)
        model.graph.node.append(node)
    _drop_unused_constants(model)


_LAYOUT = frozenset({"Transpose", "Reshape", "Cast"})  # what may stand between a weight and its layer


def _drop_unused_constants(model: ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def check_graph(export: Export, file: Path) -> dict[str, object]:
    """Hold the graph handed to NVIDIA to the recipe: types, batch, a quantized weight for each layer of scales.json.

    Raises CheckFailed; returns the count of quantized layers, operators, and constants by type.
    """
    import onnx
    from onnx import TensorProto

    from targets._half import described
    from targets._onnx import float32_operators

    model = onnx.load(file)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    if batch != export.batch:
        raise CheckFailed(f"{file} takes {batch or 'any number of'} images a query; expected {export.batch}")
    layers, scales = quantized_layers(model), len(export.scales())
    if layers != scales:
        raise CheckFailed(f"{file} has {layers} quantized layers, scales.json has {scales}: build again")
    weak = any(entry.key == "typing" and entry.value == _WEAK for entry in model.metadata_props)
    half = export.precision != "fp32" and not weak
    unwanted = TensorProto.FLOAT if half else TensorProto.FLOAT16
    kept = float32_operators(model)
    allowed = {name for node in model.graph.node if _is_float32(node, kept) for name in (*node.input, *node.output)}
    found = (tensor for tensor in _constants(model) if tensor.data_type == unwanted)
    strays = [tensor.name for tensor in found if tensor.name not in allowed]
    if strays:
        raise CheckFailed(
            f"{file} has {len(strays)} constants of type {TensorProto.DataType.Name(unwanted)} ({strays[0]}, ...); "
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
    """Whether an operator of an FP16 graph was left in float32: one of `kept`, or what dequantizes for it."""
    return (node.name or node.output[0]) in kept or node.name.removesuffix("_float32") != node.name


def quantized_layers(model: ModelProto) -> int:
    """How many operators read a dequantized weight: an int8 constant, or a float one through a QuantizeLinear. Layers
    whose weights are equal may share one.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    weights: set[str] = set()
    layers = 0
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in constants:
            constants.add(node.output[0])
        elif (node.op_type == "DequantizeLinear" and node.input[0] in constants) or (
            node.op_type in _LAYOUT and node.input[0] in weights
        ):
            weights.add(node.output[0])
        else:
            layers += any(name in weights for name in node.input)
    return layers


def _constants(model: ModelProto) -> Iterator[Any]:
    """Every constant whose type follows the precision: Resize takes its region and factors in float32 always."""
    fixed = {name for node in model.graph.node if node.op_type == "Resize" for name in node.input[1:3]}
    yield from (tensor for tensor in model.graph.initializer if tensor.name not in fixed)
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] not in fixed:
            yield from (attribute.t for attribute in node.attribute if attribute.name == "value")


# --- Plans ----------------------------------------------------------------------------------------------------------

# A plan begins, little-endian: magic (4 bytes), 12 bytes, its length in bytes (8), major, minor, patch, build (1 each).
# Magic and version: NVIDIA/TensorRT samples/common/sampleEngines.cpp, printPlanVersion. The length is as measured on
# TensorRT-RTX 1.7.1.116, and is relied on for RTX alone.
_HEADER = struct.Struct("<4s12xQ4B")
_HEADER_BYTES = 64
_RUNTIMES = {b"ftrt": "TensorRT", b"vtrt": "TensorRT-RTX"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanHeader:
    runtime: str  # TensorRT or TensorRT-RTX
    version: str  # major.minor.patch.build of what made the plan; the build number modulo 256


def read_plan_header(file: Path) -> PlanHeader:
    """Who made an engine, read without TensorRT. Raises CheckFailed where the file is no plan, or not a whole one."""
    with file.open("rb") as plan:
        start = plan.read(_HEADER_BYTES)
    size = file.stat().st_size
    if start[:4] not in _RUNTIMES:
        raise CheckFailed(f"{file} is no TensorRT engine: it begins with {start[:4]!r}, expected b'ftrt' or b'vtrt'")
    if len(start) < _HEADER_BYTES:
        raise CheckFailed(f"{file} ends within its header ({size} bytes): build the engine again")
    magic, length, *version = _HEADER.unpack_from(start)
    if magic == b"vtrt" and length != size:
        raise CheckFailed(f"{file} is {size} bytes long, its header says {length}: build the engine again")
    return PlanHeader(runtime=_RUNTIMES[magic], version=".".join(map(str, version)))


def _check_made_by(header: PlanHeader, runtime: str, installed: str | None) -> None:
    if header.runtime != runtime:
        raise CheckFailed(f"the engine was made by {header.runtime}, expected {runtime}")
    if installed in (None, "unknown"):
        return
    # pip names some releases without their build number, and the header keeps one byte of each number.
    expected = [int(part) % 256 for part in str(installed).split(".")[:4] if part.isdigit()]
    found = [int(part) for part in header.version.split(".")]
    if found[: len(expected)] != expected:
        raise CheckFailed(
            f"the engine was made by {runtime} {header.version}, and {installed} is installed here: build it again"
        )
