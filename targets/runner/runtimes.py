"""Runtimes that execute engines on this machine: one class for each, with the same methods on a host and on a device.

An engine is a folder. `open_engine` returns an execution with `batch`, `infer`, `latencies_ns` and `close`; `build`
compiles a graph into an engine where the runtime compiles on the device.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from .cpu import HostSession
from .errors import Refused, Unable
from .files import cache_folder
from .system.packages import module_version

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Say = Callable[[str, str], None]  # log callback: severity ("WARNING", "ERROR", ...), message

INPUT = "image"

# ONNX Runtime and OpenVINO send telemetry and write an identifier to the user's home, OpenVINO as soon as it is
# imported. Telemetry is disabled here, before either is imported: `targets` imports this module. OpenVINO uses a stub
# where its telemetry package cannot be imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


class OnnxRuntime:
    """ONNX Runtime on the CPU. An engine is the folder of `model.onnx`."""

    package = "onnxruntime"

    def described(self) -> dict[str, Any]:
        return {"version": version_of(self.package), "not_executed": None}

    def open_engine(self, engine: Path, threads: int, say: Say) -> HostSession:
        session = self.session(str(engine / "model.onnx"), threads)
        shape = session.get_inputs()[0].shape
        return HostSession(batch=shape[0], run=lambda images: session.run(None, {INPUT: images})[0])

    def session(self, model: str | bytes, threads: int, **options: str) -> Any:
        """Return an InferenceSession. `options`: `optimized` is a file to write the executed graph to."""
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        if "optimized" in options:
            settings.optimized_model_filepath = options["optimized"]
        settings.intra_op_num_threads = threads
        settings.log_severity_level = 3  # errors
        return onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


class OpenVino:
    """OpenVINO on the CPU. An engine is the folder of `model.xml`, `model.bin` and the properties in `engine.json`."""

    package = "openvino"

    def described(self) -> dict[str, Any]:
        return {"version": version_of(self.package), "not_executed": None}

    def open_engine(self, engine: Path, threads: int, say: Say) -> HostSession:
        compiled = self.compiled(engine, threads)
        request = compiled.create_infer_request()
        batch = int(compiled.input(0).shape[0])
        return HostSession(batch=batch, run=lambda images: request.infer({INPUT: images}, share_inputs=True)[0])

    def compiled(self, engine: Path, threads: int, model: Any = None) -> Any:
        """Return the compiled model of an engine, or of `model` with the engine's properties."""
        import openvino

        core = openvino.Core()
        properties = dict(json.loads((engine / "engine.json").read_text()), INFERENCE_NUM_THREADS=str(threads))
        return core.compile_model(model or core.read_model(engine / "model.xml"), "CPU", properties)

    def inspect(self, engine: Path, threads: int) -> dict[str, Any]:
        """Return the precision hint of the compiled model, and the number of layers with weights by precision."""
        compiled = self.compiled(engine, threads)
        precisions: dict[str, int] = {}
        for node in compiled.get_runtime_model().get_ops():
            info = node.get_rt_info()
            if info["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul"):
                precision = info["runtimePrecision"].astype(str)
                precisions[precision] = precisions.get(precision, 0) + 1
        hint = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
        return {"precision_hint": hint, "weighted_layers_by_precision": precisions}


class TensorRt:
    """TensorRT, or TensorRT-RTX. An engine is the folder of `model.engine`, built from `model.onnx`."""

    def __init__(self, package: str) -> None:
        self.package = package

    def described(self) -> dict[str, Any]:
        """Return the version, the generation (see `tensorrt_engine`), and the GPU, or why engines do not run here."""
        from .cuda import find_cuda
        from .tensorrt_engine import generation

        trt = self.module()
        described = {"version": version_of(self.package), "generation": generation(trt)}
        try:
            gpu = find_cuda().gpu()
        except Unable as error:
            return dict(described, not_executed=str(error))
        return dict(described, not_executed=None, gpu=gpu.name, capability=list(gpu.capability))

    def open_engine(self, engine: Path, threads: int, say: Say) -> Any:
        from .cuda import find_cuda
        from .tensorrt_engine import Execution

        cuda = find_cuda()
        return Execution(self.module(), (engine / "model.engine").read_bytes(), cuda, say)

    def build(self, folder: Path, options: Mapping[str, Any], say: Say) -> None:
        """Compile `model.onnx` in `folder` to `model.engine`, and describe the engine in `engine.json`.

        `options`: those of `tensorrt_engine.build`, and `operators` of `engine_facts.usage`.
        """
        from .engine_facts import described
        from .tensorrt_engine import build

        trt, graph = self.module(), (folder / "model.onnx").read_bytes()
        cache = self._timing_cache(trt)
        settings = dict(options)
        operators = settings.pop("operators", None)
        built = build(trt, graph, say=say, detailed=True, timing_cache=_read(cache), **settings)
        _keep(cache, built.timing_cache, say)
        (folder / "model.engine").write_bytes(built.plan)
        facts = {
            "engine": "model.engine",
            "bytes": len(built.plan),
            "sha256": hashlib.sha256(built.plan).hexdigest(),
            self.package: trt.__version__,
            "graph_sha256": hashlib.sha256(graph).hexdigest(),
            "precision": options["precision"],
            "batch": options["batch"],
            "settings": built.settings,
            "timing_cache_sha256": built.timing_cache and hashlib.sha256(built.timing_cache).hexdigest(),
            **described(self.package, self._information(trt, built.plan, say), operators),
        }
        (folder / "engine.json").write_text(json.dumps(facts, indent=1) + "\n")

    def _timing_cache(self, trt: Any) -> Path | None:
        """Return the file of the kernels that were measured on GPUs like this one, by this version of TensorRT; None
        where none are measured: without a GPU, and by TensorRT-RTX, which chooses kernels when an engine is loaded.
        """
        from .cuda import find_cuda

        if self.package == "tensorrt_rtx":
            return None
        try:
            major, minor = find_cuda().gpu().capability
        except Unable:
            return None
        return cache_folder() / "timings" / f"{self.package}-{trt.__version__}-sm{major}{minor}"

    def _information(self, trt: Any, plan: bytes, say: Say) -> str | None:
        """Return the engine inspector's description of the layers; None where the engine cannot be loaded here."""
        from .cuda import find_cuda
        from .tensorrt_engine import Execution

        try:
            execution = Execution(trt, plan, find_cuda(), say)
        except Unable:
            return None
        try:
            return execution.layers(trt)
        finally:
            execution.close()

    def module(self) -> Any:
        from .tensorrt_engine import load

        return load(self.package)


def _read(cache: Path | None) -> bytes | None:
    """Return the contents of a timing cache, empty if there is none yet."""
    if cache is None:
        return None
    return cache.read_bytes() if cache.exists() else b""


def _keep(cache: Path | None, contents: bytes | None, say: Say) -> None:
    """Replace a timing cache. Of two builds at the same time, the later one is kept."""
    if cache is None or contents is None:
        return
    part = cache.with_name(f"{cache.name}.{os.getpid()}.part")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(contents)
        part.replace(cache)
    except OSError as error:
        say("WARNING", f"{cache} cannot be written ({error.strerror}): the next build measures all kernels again")


RUNTIMES: dict[str, Any] = {
    "onnxruntime": OnnxRuntime(),
    "openvino": OpenVino(),
    "tensorrt": TensorRt("tensorrt"),
    "tensorrt_rtx": TensorRt("tensorrt_rtx"),
}


def runtime(name: str) -> Any:
    """Return a runtime by the name of its package. Raises Unable if the package is not importable here."""
    found = RUNTIMES.get(name)
    if found is None:
        raise Unable(f"the runner has no runtime {name!r}")
    if importlib.util.find_spec(found.package) is None:
        raise Unable(f"the {name} package is not importable by {sys.executable}: install it for this python")
    return found


def described(name: str) -> dict[str, Any]:
    """Return the version of a runtime and its device, or `missing`, why it cannot build or run engines here."""
    try:
        found = runtime(name)
        return dict(found.described(), missing=None)
    except Refused as error:
        return {"missing": str(error)}


def version_of(package: str) -> str:
    """Return the version of an importable package; it is imported only where neither metadata nor its source has it."""
    return module_version(package) or str(getattr(importlib.import_module(package), "__version__", "unknown"))
