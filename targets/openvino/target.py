"""OpenVINO on this machine's CPU: float32, the CPU's native half precision, or INT8 from the exported Q/DQ graph."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.family_placements import Runtime
from calibration.recipe import FloatType, Precision
from calibration.scheme import SHARED, Scheme
from models.errors import CheckFailed
from targets import forced_evaluation
from targets.base import INPUT_NAME, Export
from targets.host import HostSession, threads
from targets.macs import of_convolution, of_product

if TYPE_CHECKING:
    import numpy.typing as npt

    from targets.base import Images, Logits

_OPTIONS = "engine.json"
_CPUINFO = Path("/proc/cpuinfo")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CpuTarget:
    name: str = "cpu"
    summary: str = "OpenVINO on this machine's CPU"
    scheme: Scheme = SHARED
    processor: Runtime = "cpu"

    def missing(self) -> str | None:
        return None if importlib.util.find_spec("openvino") else "the openvino package is missing: run `make setup`"

    def not_executed(self) -> str | None:
        return self.missing()

    def toolchain(self) -> dict[str, str]:
        return {"openvino": importlib.metadata.version("openvino"), "half": half_precision()}

    def float_type(self, precision: Precision) -> FloatType:
        return "f32" if precision == "fp32" else half_precision()

    def build(self, export: Export, out: Path) -> None:
        import onnx
        import openvino

        from targets.onnx.fp16_ranges import kept_in_float32, limited, ranges_of
        from targets.onnx.graph import with_own_quantizers, with_padding_before_rounding, with_unsigned_activations

        # Workarounds for two bugs of OpenVINO 2026.4: a convolution that shares a zero point with a linear layer runs
        # in float32 (half of the layers of a MobileViT); and a convolution that reads a quantized concatenation, which
        # OpenVINO converts to uint8, is padded with 0 instead of the zero point (MobileViT's fusions: 17 dB instead of
        # 40).
        source = onnx.load(export.onnx)
        hint = "f32" if export.precision == "fp32" else half_precision()  # the precision of layers that are not INT8
        if hint == "f16":  # bfloat16 has the range of float32
            source = limited(source, ranges_of(export).sentinels)
            if kept_in_float32(source, export):
                log.warning("OpenVINO has a single float type: all operators that are not INT8 run in float32")
                hint = "f32"
        graph = with_padding_before_rounding(with_own_quantizers(source))
        graph = with_unsigned_activations(graph)
        model = openvino.Core().read_model(graph.SerializeToString())
        model.reshape([export.batch, *list(model.input(0).partial_shape)[1:]])
        openvino.save_model(model, out / "model.xml", compress_to_fp16=False)
        # Always explicit: by default, OpenVINO runs float32 models in bfloat16 where the CPU supports it.
        options = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
        (out / _OPTIONS).write_text(json.dumps(options, indent=1) + "\n")

    def inspect(self, export: Export, engine: Path) -> dict[str, object]:
        compiled = _compiled(engine)
        precisions: dict[str, int] = {}
        for node in compiled.get_runtime_model().get_ops():
            info = node.get_rt_info()
            if info["layerType"].astype(str) in {"Convolution", "FullyConnected", "MatMul"}:
                precision = info["runtimePrecision"].astype(str)
                precisions[precision] = precisions.get(precision, 0) + 1
        integers = precisions.get("i8", 0) + precisions.get("u8", 0)
        if export.precision == "int8" and not integers:
            raise CheckFailed(
                f"{engine}: OpenVINO executes no layer in INT8 ({precisions}); this CPU may lack INT8 instructions, "
                "use RECIPE=fp32"
            )
        hint = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
        return {"threads": threads(), "precision_hint": hint, "weighted_layers_by_precision": precisions}

    def half(self) -> bool:
        return half_precision() != "f32"

    def macs(self, engine: Path) -> dict[str, int]:
        products = dict(_products(engine))
        by_precision: dict[str, int] = {}
        for node in _compiled(engine).get_runtime_model().get_ops():
            info = node.get_rt_info()
            if macs := _macs(node, products):
                precision = info["runtimePrecision"].astype(str)
                by_precision[precision] = by_precision.get(precision, 0) + macs
        return by_precision

    def graph(self, engine: Path) -> Path | None:
        return None

    @contextmanager
    def open(self, engine: Path) -> Iterator[HostSession]:
        compiled = _compiled(engine)
        request = compiled.create_infer_request()

        def run(images: Images) -> Logits:
            logits: Logits = request.infer({INPUT_NAME: images}, share_inputs=True)[0]
            return logits

        yield HostSession(batch=int(compiled.input(0).shape[0]), run=run)

    def forced(
        self, engine: Path, given: Mapping[str, npt.NDArray[Any]], wanted: Collection[str]
    ) -> dict[str, npt.NDArray[Any]]:
        options = json.loads((engine / _OPTIONS).read_text()) | {"INFERENCE_PRECISION_HINT": "f32"}
        return forced_evaluation.openvino_tensors(_read(engine), options, given, wanted)

    def probe(self, engine: Path, names: list[str], images: Images) -> dict[str, npt.NDArray[Any]]:
        """Run one query and return the tensors `names` that the engine still has.

        The tensors become outputs of the graph, so OpenVINO does not fuse operators across them. It has no way to read
        tensors of the fused graph.
        """
        model = _read(engine)
        known = {name for node in model.get_ops() for output in node.outputs() for name in output.get_names()}
        shown = [name for name in names if name in known]
        for name in shown:
            model.add_outputs(name)
        results = _compiled(engine, model).create_infer_request().infer({INPUT_NAME: images})
        return {name: value.copy() for output, value in results.items() for name in output.get_names() if name in shown}


def half_precision() -> FloatType:
    """Return OpenVINO's name of the fastest 16-bit float type of this CPU: `bf16` or `f16`; `f32` where it has none.

    bfloat16 needs AVX512-BF16 or AMX, FP16 needs AVX512-FP16 or Arm. The CPU flags are read from /proc/cpuinfo.
    """
    flags = set(_CPUINFO.read_text().split()) if _CPUINFO.exists() else set()
    if {"amx_fp16", "avx512_fp16", "asimdhp", "fphp"} & flags and "amx_bf16" not in flags:
        return "f16"
    return "bf16" if {"amx_bf16", "avx512_bf16"} & flags else "f32"


def _macs(node: Any, products: Mapping[str, int]) -> int:
    """Return the MACs of an executed operator; 0 where it is neither a layer nor a matrix product.

    OpenVINO fuses the two matrix products of attention with the softmax between them and lists the names of the
    original operators. `products` has the MACs of every matrix product by name.
    """
    info = node.get_rt_info()
    kind = info["layerType"].astype(str)
    if kind in {"Convolution", "FullyConnected"}:
        left, right, output = (list(port.get_shape()) for port in (node.input(0), node.input(1), node.output(0)))
        return of_convolution(right, output) if kind == "Convolution" else of_product(left, output)
    return sum(products.get(name, 0) for name in info["originalLayersNames"].astype(str).split(","))


def _products(engine: Path) -> Iterator[tuple[str, int]]:
    """Yield the name and the MACs of each matrix product in the engine's file."""
    for node in _read(engine).get_ops():
        if node.get_type_name() == "MatMul":
            left, output = list(node.input(0).get_shape()), list(node.output(0).get_shape())
            yield node.get_friendly_name(), of_product(left, output, transposed=node.get_attributes()["transpose_a"])


def _compiled(engine: Path, model: Any = None) -> Any:
    import openvino

    options = json.loads((engine / _OPTIONS).read_text())
    return openvino.Core().compile_model(
        model or _read(engine), "CPU", {**options, "INFERENCE_NUM_THREADS": str(threads())}
    )


def _read(engine: Path) -> Any:
    import openvino

    return openvino.Core().read_model(engine / "model.xml")


TARGET = CpuTarget()
