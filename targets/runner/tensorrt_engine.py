"""TensorRT engines: building from ONNX, and execution on the first GPU.

One code path serves `tensorrt` 8.5 to 11 and `tensorrt_rtx`. Differences between versions are detected with `hasattr`,
never by version number.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import re
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from .cuda import find_cuda
from .errors import Rejected, Unable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import numpy as np
    import numpy.typing as npt

    from .cuda import Cuda

    Floats = npt.NDArray[np.float32]
    Say = Callable[[str, str], None]  # log callback: severity ("WARNING", "ERROR", ...), message

# Generations of TensorRT, each of which compiles a graph of its own.
STRONG = "TensorRT 10 and later"  # strongly typed: the graph states the type of every tensor
WEAK = "TensorRT 8.6"  # weakly typed: builder flags enable FP16 and INT8
PRIMITIVE = "TensorRT 8.5"  # weakly typed, without LayerNormalization

# An upper limit, not a reservation. A mobile model needs a few MB; on a Jetson, GPU and CPU share the memory.
WORKSPACE_BYTES = 1 << 30

_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|could not be allocated", re.IGNORECASE)
_IN_FLIGHT = 2  # queries on the stream while timing, as trtexec has
CUDA_EVENTS = "CUDA events"  # `timer` of an execution's method


# Libraries without which an installed TensorRT does not import, with the remedies.
_CUDA = "install the CUDA and cuDNN that this TensorRT needs, on a Jetson with `sudo apt install nvidia-jetpack`"
_TENSORRT = "install TensorRT's libraries, on a Jetson with `sudo apt install nvidia-jetpack`"
_LIBRARIES = {
    "libnvdla_compiler": "`sudo apt install nvidia-l4t-dla-compiler`; start a container with --runtime nvidia",
    "libcuda.so": "install the NVIDIA driver; start a container with --runtime nvidia",
    "libcublas": _CUDA,
    "libcudart": _CUDA,
    "libcudnn": _CUDA,
    "libnvinfer": _TENSORRT,
    "libnvonnxparser": _TENSORRT,
}


def load(package: str) -> Any:
    """Import `tensorrt` or `tensorrt_rtx`.

    Raises Unable, with a remedy, where the package is missing or is there and does not import.
    """
    try:
        return importlib.import_module(package)
    except (ImportError, OSError) as e:
        if isinstance(e, ModuleNotFoundError) and e.name == package:
            raise Unable(
                f"the {package} package is not importable by {sys.executable}: install it, on a Jetson with `sudo apt "
                "install python3-libnvinfer` for the system's python3, elsewhere with `python3 -m pip install "
                f"{package}`"
            ) from e
        reason = _one_line(str(e))
        remedies = [remedy for library, remedy in _LIBRARIES.items() if library in reason]
        remedy = remedies[0] if remedies else "install it again, for this Python"
        raise Unable(f"the {package} package is there, but does not import ({reason}): {remedy}") from e


class Built(NamedTuple):
    plan: bytes
    settings: dict[str, object]  # that the engine was built with
    timing_cache: bytes | None  # None unless `build` was called with a timing cache


def build(
    trt: Any,
    onnx: bytes,
    *,
    precision: str,
    batch: int,
    say: Say,
    workspace_bytes: int | None = None,
    timing_cache: bytes | None = None,
    detailed: bool = False,
    float32_layers: Collection[str] = (),
    batches: Sequence[int] | None = None,
    optimization_level: int | None = None,
    dla_core: int | None = None,
) -> Built:
    """Compile a serialized ONNX graph with the TensorRT module `trt` (`tensorrt` 8.5 to 11, or `tensorrt_rtx`).

    With strong typing (10 and later), `onnx` states the type of every tensor and `precision` has no effect. With weak
    typing (8.x), `onnx` is float32 with Q/DQ and `precision` sets the builder flags FP16 and INT8. TF32 stays enabled,
    TensorRT's default. `workspace_bytes`: see `default_workspace`; a build that runs out of memory is repeated with a
    quarter of it. An empty `timing_cache` starts a new cache; a cache of a different GPU or TensorRT version is
    replaced. `detailed` keeps layer details in the engine for the engine inspector. `float32_layers` names layers that
    stay in float32 with weak typing. A dynamic batch gets an optimization profile for `batches`, the least, the
    likeliest and the greatest number of images; without it, from 1 to `batch`. `optimization_level` is TensorRT's, 0
    to 5. `dla_core` runs on the DLA, with other layers on the GPU.

    Raises Rejected, quoting TensorRT's message, where the importer or the builder rejects the graph, and Unable where
    TensorRT does not start or lacks an option.
    """
    logger = make_logger(trt, say)
    builder = _builder(trt, logger)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)  # must exist until the plan is built: it owns the network's weights
    if not parser.parse(onnx):
        raise Rejected(_refusal(parser))
    config = builder.create_builder_config()
    if detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    flags = _allow_small_types(trt, config, precision)
    if flags and float32_layers:
        flags += _keep_in_float32(trt, network, config, float32_layers)
    settings: dict[str, object] = {"typing": "strong" if strongly_typed(trt) else "weak", "flags": flags}
    settings.update(_add_profile(builder, network, config, batch, batches))
    if optimization_level is not None:
        settings.update(_set_level(trt, config, optimization_level))
    if dla_core is not None:
        settings.update(_use_dla(trt, builder, network, config, dla_core))
    if timing_cache is not None:
        _set_timing_cache(config, timing_cache)
    workspace_bytes = default_workspace() if workspace_bytes is None else workspace_bytes
    plan, settings["workspace_bytes"] = _plan(trt, builder, network, config, logger, workspace_bytes)
    timings = None if timing_cache is None else config.get_timing_cache()
    return Built(plan, settings, None if timings is None else bytes(timings.serialize()))


def default_workspace() -> int:
    """Return half of the GPU's free memory, but at most WORKSPACE_BYTES; WORKSPACE_BYTES without a GPU."""
    try:
        cuda = find_cuda()
        cuda.attach()
        return min(WORKSPACE_BYTES, cuda.free_bytes() // 2)
    except Unable:
        return WORKSPACE_BYTES


def _plan(trt: Any, builder: Any, network: Any, config: Any, logger: Any, workspace_bytes: int) -> tuple[bytes, int]:
    """Return the plan and the workspace that it was built with: a quarter of `workspace_bytes` if memory ran out."""
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    plan = builder.build_serialized_network(network, config)
    if plan is None and any(map(_OUT_OF_MEMORY.search, logger.errors)):
        limit, workspace_bytes = workspace_bytes, workspace_bytes // 4
        smaller = f"building again with {workspace_bytes >> 20} MiB"
        logger.say("WARNING", f"out of memory with a workspace of {limit >> 20} MiB: {smaller}")
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
        plan = builder.build_serialized_network(network, config)
    logger.summarize()
    if plan is None:
        raise Rejected(f"TensorRT {trt.__version__} parsed the graph but built no engine: {_last_error(logger)}")
    return bytes(plan), workspace_bytes


def _builder(trt: Any, logger: Any) -> Any:
    try:
        return trt.Builder(logger)
    except (TypeError, RuntimeError) as e:  # pybind11 raises these where a constructor returns null
        reason = _last_error(logger, otherwise=_one_line((logger.warnings or [str(e)])[-1]))
        raise Unable(f"TensorRT {trt.__version__} does not start on this machine: {reason}{_why_no_gpu()}") from e


def _why_no_gpu() -> str:
    try:
        find_cuda()
    except Unable as e:
        return f"; {e}"
    return ""


def strongly_typed(trt: Any) -> bool:
    """Return whether networks are strongly typed: optional in TensorRT 10, always in 11 and RTX, never in 8.x."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def generation(trt: Any) -> str:
    """Return the generation of the TensorRT module `trt`: STRONG, WEAK or PRIMITIVE.

    Raises Unable for versions before 8.5.
    """
    if strongly_typed(trt):
        return STRONG
    if not hasattr(trt.ICudaEngine, "num_io_tensors"):
        raise Unable(f"TensorRT {trt.__version__} is too old: 8.5 or later is needed, on a Jetson JetPack 5.1 or later")
    return WEAK if hasattr(trt.INetworkDefinition, "add_normalization") else PRIMITIVE


def network_flags(trt: Any) -> int:
    """Return the flags of `create_network`: explicit batch and strong typing, where this TensorRT has them."""
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH"):  # required by 8.x, ignored by 10, removed in 11
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return flags


def make_logger(trt: Any, say: Say) -> Any:
    """Return a TensorRT logger that passes each distinct warning and error to `say` once.

    Messages that differ only in numbers count as the same message. `summarize()` reports how many repetitions were
    dropped; the attributes `errors` and `warnings` keep every message.
    """

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.say = say
            self.counts: collections.Counter[str] = collections.Counter()
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name in ("INFO", "VERBOSE"):
                return
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(message)
            else:
                self.warnings.append(message)
            kind = re.sub(r"\d+", "#", message.strip())
            self.counts[kind] += 1
            if self.counts[kind] == 1:
                say(severity.name, _one_line(message))

        def summarize(self) -> None:
            for kind, count in self.counts.items():
                if count > 1:
                    say("INFO", f"{count - 1} more like: {_one_line(kind)}")
            self.counts.clear()

    return Logger()


def _allow_small_types(trt: Any, config: Any, precision: str) -> list[str]:
    """Set the builder flags of `precision` for weak typing, and return their names."""
    if strongly_typed(trt) or not hasattr(trt.BuilderFlag, "FP16") or not hasattr(trt.BuilderFlag, "INT8"):
        return []
    if precision == "fp32":
        return []
    config.set_flag(trt.BuilderFlag.FP16)
    if precision == "fp16":
        return ["FP16"]
    config.set_flag(trt.BuilderFlag.INT8)
    return ["FP16", "INT8"]


def _keep_in_float32(trt: Any, network: Any, config: Any, names: Collection[str]) -> list[str]:
    """Constrain the layers called `names` to float32, with their outputs; return the builder flags that this set."""
    if not hasattr(trt.BuilderFlag, "OBEY_PRECISION_CONSTRAINTS"):  # removed in TensorRT 11
        return []
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.name in names and hasattr(layer, "precision") and hasattr(layer, "set_output_type"):
            layer.precision = trt.DataType.FLOAT
            for output in range(layer.num_outputs):
                layer.set_output_type(output, trt.DataType.FLOAT)
    return ["OBEY_PRECISION_CONSTRAINTS"]


def _add_profile(
    builder: Any, network: Any, config: Any, batch: int, batches: Sequence[int] | None
) -> dict[str, object]:
    """Add an optimization profile for the dynamic inputs of `network`, and return it as a setting."""
    profile = builder.create_optimization_profile()
    sizes = list(batches or (1, batch, batch))
    dynamic = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape:
            dynamic = True
            profile.set_shape(tensor.name, *(tuple(size if side == -1 else side for side in shape) for size in sizes))
    if dynamic:
        config.add_optimization_profile(profile)
        return {"batches": sizes}
    if batches is not None:
        raise Rejected("the graph has a fixed batch: a range of batches needs a graph with a dynamic batch")
    return {}


def _set_level(trt: Any, config: Any, level: int) -> dict[str, object]:
    if not hasattr(config, "builder_optimization_level"):
        raise Unable(f"TensorRT {trt.__version__} has no optimization levels, 8.6 and later have: leave the level out")
    config.builder_optimization_level = level
    return {"optimization_level": level}


def _use_dla(trt: Any, builder: Any, network: Any, config: Any, core: int) -> dict[str, object]:
    """Run on a DLA core what it supports; return the core and the names of the layers that stay on the GPU."""
    cores = builder.num_DLA_cores if hasattr(builder, "num_DLA_cores") else 0
    if core >= cores:
        raise Unable(f"there is no DLA core {core}: TensorRT {trt.__version__} finds {cores} here; build for the GPU")
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return {"dla_core": core, "layers_on_gpu": [layer.name for layer in layers if not config.can_run_on_DLA(layer)]}


def _set_timing_cache(config: Any, contents: bytes) -> None:
    timings = config.create_timing_cache(contents)
    if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
        # Written on a different GPU or by a different TensorRT version, or damaged: start with an empty cache.
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, ignore_mismatch=False)


def _refusal(parser: Any) -> str:
    """Describe the first error of the ONNX importer: node, operator, and the importer's message."""
    error = parser.get_error(0)
    node = f"node {error.node()}" if error.node() >= 0 else "the file"
    if hasattr(error, "node_name") and error.node_name():
        node = f"node {error.node_name()!r}"
    operator = f" ({error.node_operator()})" if hasattr(error, "node_operator") and error.node_operator() else ""
    message = re.sub(r"^Assertion failed: ", "", _one_line(error.desc()))
    if message in ("", "false"):  # an assertion without a message; `func` is the function that contains it
        message = f"{error.func()} does not support it"
    others = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    return f"NVIDIA's ONNX importer refuses {node}{operator}: {message}{others}"


def _last_error(logger: Any, otherwise: str = "it gave no reason") -> str:
    return _one_line(logger.errors[-1] if logger.errors else otherwise)


def _one_line(message: str) -> str:
    return " ".join(message.split())


# --- Running ----------------------------------------------------------------------------------------------------------


class Execution:
    """An engine on the GPU with its buffers: one float32 input, one float32 output, `batch` images per query."""

    def __init__(self, trt: Any, plan: bytes, cuda: Cuda, say: Say) -> None:
        self._cuda = cuda
        cuda.attach()
        self._logger = make_logger(trt, say)
        self._runtime = trt.Runtime(self._logger)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise Unable(
                f"TensorRT {trt.__version__} does not load the engine on {cuda.gpu().name}: an engine runs only with "
                "the TensorRT version and GPU it was built with; build it again here"
            )
        self._engine = engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        if len(names) != 2 or len(inputs) != 1:
            raise Rejected(f"the engine has the inputs and outputs {', '.join(names)}; expected one input, one output")
        for name in names:
            if engine.get_tensor_dtype(name) != trt.DataType.FLOAT:
                raise Rejected(f"{name} of the engine is {engine.get_tensor_dtype(name)}; expected float32")
        self._input = inputs[0]
        self._output = next(name for name in names if name != self._input)
        self._context = context = engine.create_execution_context()
        if context is None:
            raise Unable(f"{cuda.gpu().name} has not enough memory to run the engine: {_last_error(self._logger)}")
        shape = tuple(engine.get_tensor_shape(self._input))
        if -1 in shape:
            shape = tuple(engine.get_tensor_profile_shape(self._input, 0)[2])  # the maximum of the profile
            context.set_input_shape(self._input, shape)
        self._shapes = {self._input: shape, self._output: tuple(context.get_tensor_shape(self._output))}
        self._stream = cuda.stream()
        self._buffers = {name: cuda.allocate(4 * _product(shape)) for name, shape in self._shapes.items()}
        for name, address in self._buffers.items():
            context.set_tensor_address(name, address)
        self._graph: int | None = None
        self._why_no_graph: str | None = None

    @property
    def batch(self) -> int:
        return int(self._shapes[self._input][0])

    def infer(self, images: Floats) -> Floats:
        """Run one query of exactly `batch` preprocessed images (batch, 3, H, W) and return logits (batch, classes)."""
        import numpy as np

        logits = np.empty(self._shapes[self._output], np.float32)
        self._upload(images)
        self._enqueue()
        self._cuda.download(self._buffers[self._output], logits, self._stream)
        self._cuda.synchronize(self._stream)
        return logits

    def warm_up(self, seconds: float = 0.2) -> int:
        """Run queries for at least `seconds`, trtexec's default, so that clocks rise; return their number."""
        launch = self._launcher()
        queries, end = 0, time.perf_counter() + seconds
        while queries == 0 or time.perf_counter() < end:
            launch()
            self._cuda.synchronize(self._stream)
            queries += 1
        return queries

    def latencies_ns(self, images: Floats, count: int) -> list[int]:
        """Run `count` queries and return the GPU time of each, in nanoseconds, by trtexec's method (see `method`).

        The time is taken between two CUDA events around the computation. It excludes copies: the images are copied
        once, before the first query. The next query is enqueued while a query runs, so that the time excludes the
        launch from the CPU, unless launching takes longer than computing.
        """
        launch = self._launcher()
        self._upload(images)
        self._cuda.synchronize(self._stream)
        latencies: list[int] = []
        with contextlib.ExitStack() as release:
            slots = [(self._event(release), self._event(release)) for _ in range(_IN_FLIGHT)]
            for query in range(count + _IN_FLIGHT):
                start, end = slots[query % _IN_FLIGHT]
                if query >= _IN_FLIGHT:
                    latencies.append(self._cuda.elapsed_ns(start, end))
                if query < count:
                    self._cuda.record(start, self._stream)
                    launch()
                    self._cuda.record(end, self._stream)
        return latencies

    def end_to_end_ns(self, images: Floats, count: int) -> list[int]:
        """Run `count` queries one after the other and return the time of each, in nanoseconds, with the copies.

        The time is taken by the clock of the CPU, from images in page-locked memory to logits in page-locked memory.
        """
        launch = self._launcher()
        self._check_shape(images)
        latencies = []
        with contextlib.ExitStack() as release:
            source, sink = self._pinned(self._input, release), self._pinned(self._output, release)
            source[:] = images
            for _ in range(count):
                started = time.perf_counter_ns()
                self._cuda.upload(source, self._buffers[self._input], self._stream)
                launch()
                self._cuda.download(self._buffers[self._output], sink, self._stream)
                self._cuda.synchronize(self._stream)
                latencies.append(time.perf_counter_ns() - started)
        return latencies

    @property
    def method(self) -> dict[str, object]:
        """How queries are timed: `timer` and `end_to_end_timer`, `in_flight` queries, `cuda_graph` and
        `why_no_cuda_graph`, `spin` and `transfers`. The CUDA graph is captured at the first use.
        """
        self._launcher()
        return {
            "timer": CUDA_EVENTS,
            "end_to_end_timer": "clock of the CPU",
            "in_flight": _IN_FLIGHT,
            "cuda_graph": self._graph is not None,
            "why_no_cuda_graph": self._why_no_graph,
            "spin": self._cuda.spins(),
            "transfers": "excluded; end to end, included, from and to page-locked memory",
        }

    def layers(self, trt: Any) -> str:
        """Return the engine inspector's description of every layer, as JSON."""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def close(self) -> None:
        self._cuda.synchronize(self._stream)
        if self._graph is not None:
            self._cuda.destroy_graph(self._graph)
        del self._context, self._engine, self._runtime  # in this order, before the memory that they refer to
        for address in self._buffers.values():
            self._cuda.free(address)
        self._cuda.destroy_stream(self._stream)

    def _launcher(self) -> Callable[[], None]:
        """Return a function that puts a query on the stream: as a CUDA graph, or where it cannot be captured, plainly.

        One query runs before the capture, since TensorRT initializes in its first query.
        """
        if self._graph is None and self._why_no_graph is None:
            self._enqueue()
            self._cuda.synchronize(self._stream)
            try:
                self._graph = self._cuda.capture(self._stream, self._enqueue)
            except Unable as e:
                self._why_no_graph = str(e)
        graph = self._graph
        return self._enqueue if graph is None else lambda: self._cuda.launch(graph, self._stream)

    def _event(self, release: contextlib.ExitStack) -> int:
        event = self._cuda.event()
        release.callback(self._cuda.destroy_event, event)
        return event

    def _pinned(self, name: str, release: contextlib.ExitStack) -> Floats:
        array = self._cuda.pinned(self._shapes[name])
        release.callback(self._cuda.unpin, array)
        return array

    def _upload(self, images: Floats) -> None:
        import numpy as np

        self._check_shape(images)
        self._query = np.ascontiguousarray(images, np.float32)  # kept alive: the copy is asynchronous
        self._cuda.upload(self._query, self._buffers[self._input], self._stream)

    def _check_shape(self, images: Floats) -> None:
        if images.shape != self._shapes[self._input]:
            raise Rejected(f"the images have shape {images.shape}; the engine expects {self._shapes[self._input]}")

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise Unable(f"TensorRT did not run the engine: {_last_error(self._logger)}")


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product
