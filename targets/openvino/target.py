"""OpenVINO on this machine's CPU: float32, the CPU's native half precision, or INT8 from the exported Q/DQ graph."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.family_placements import Runtime
from calibration.recipe import FloatType, Precision
from calibration.scheme import SHARED, Scheme
from models.errors import CheckFailed
from targets import forced_evaluation
from targets.base import INPUT_NAME, Export, Session
from targets.devices.machine import LOCAL, Machine
from targets.macs import of_convolution, of_product
from targets.runner.cpu import threads
from targets.runner.runtimes import OpenVino

if TYPE_CHECKING:
    import numpy.typing as npt

    from targets.base import Images

_OPTIONS = "engine.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CpuTarget:
    name: str = "cpu"
    summary: str = "OpenVINO on this machine's CPU"
    scheme: Scheme = SHARED
    processor: Runtime = "cpu"
    machine: Machine = LOCAL

    def missing(self) -> str | None:
        return self.machine.runtime("openvino").missing

    def not_executed(self) -> str | None:
        return self.missing()

    def toolchain(self) -> dict[str, str]:
        version, half = self.machine.runtime("openvino").version, self.machine.half()
        return {"openvino": version, "half": half, **self.machine.processor()}

    def float_type(self, precision: Precision) -> FloatType:
        return "f32" if precision == "fp32" else self.machine.half()

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
        hint = "f32" if export.precision == "fp32" else self.machine.half()  # the precision of layers that are not INT8
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
        inspected = self.machine.inspect("openvino", engine)
        precisions = inspected["weighted_layers_by_precision"]
        integers = precisions.get("i8", 0) + precisions.get("u8", 0)
        if export.precision == "int8" and not integers:
            raise CheckFailed(
                f"{engine}: OpenVINO executes no layer in INT8 ({precisions}); this CPU may lack INT8 instructions, "
                "use RECIPE=fp32"
            )
        return {"threads": self.machine.threads(), **inspected}

    def half(self) -> bool:
        return self.machine.half() != "f32"

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

    def open(self, engine: Path) -> AbstractContextManager[Session]:
        return self.machine.open("openvino", engine)

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
    return OpenVino().compiled(engine, threads(), model)


def _read(engine: Path) -> Any:
    import openvino

    return openvino.Core().read_model(engine / "model.xml")


TARGET = CpuTarget()
