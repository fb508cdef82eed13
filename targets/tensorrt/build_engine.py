"""Build the TensorRT engine of the bundle that contains this file, with the TensorRT of this machine.

    python3 build_engine.py [--workspace-mib 1024]

Checks every file against bundle.json, writes model.engine, runs the images of sample.npz through it and compares the
logits with the logits of the torch program. The last line of stdout is one JSON object; all other output goes to
stderr. Exit codes: 0 done; 2 the bundle is damaged; 3 this machine cannot build or run the engine; 4 TensorRT rejected
the graph, or the engine computes NaN or infinity.

Needs Python 3.8, TensorRT 8.5 or later and, to run the sample, numpy and an NVIDIA GPU: JetPack includes all of them.
The GPU is used through the driver library (libcuda), so neither torch nor cuda-python nor pycuda is needed.

The host imports this file as targets/tensorrt/build_engine.py to build and run engines, so that calls of TensorRT's API
are in one file. Differences between TensorRT 8.5 and 11 are detected with `hasattr`, never by version number.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import hashlib
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Say = Callable[[str, str], None]  # log callback: severity ("WARNING", "ERROR", ...), message

# An upper limit, not a reservation. A mobile model needs a few MB; on a Jetson, GPU and CPU share the memory.
WORKSPACE_BYTES = 1 << 30

_IDENTICAL_DB = 200.0  # reported for identical logits, as in the host's reports, since JSON has no infinity


class Refused(Exception):
    """Base class of failures that one sentence explains; the command exits with `exit_code`."""

    exit_code = 1


class Damaged(Refused):
    """A file of the bundle is missing or changed."""

    exit_code = 2


class Unable(Refused):
    """This machine cannot build or run the engine."""

    exit_code = 3


class Rejected(Refused):
    """TensorRT rejected the graph, or the engine failed a check."""

    exit_code = 4


# --- Building -------------------------------------------------------------------------------------------------------


class Built(NamedTuple):
    plan: bytes
    timing_cache: bytes | None  # None unless `build` was called with a timing cache


def build(
    trt: Any,
    onnx: bytes,
    *,
    precision: str,
    batch: int,
    say: Say,
    workspace_bytes: int = WORKSPACE_BYTES,
    timing_cache: bytes | None = None,
    detailed: bool = False,
) -> Built:
    """Compile a serialized ONNX graph with the TensorRT module `trt` (`tensorrt` 8.5 to 11, or `tensorrt_rtx`).

    With strong typing (10 and later), `onnx` states the type of every tensor and `precision` has no effect. With weak
    typing (8.x), `onnx` is float32 with Q/DQ and `precision` sets the builder flags FP16 and INT8. TF32 stays enabled,
    TensorRT's default. A dynamic batch gets an optimization profile of 1 to `batch` images. An empty `timing_cache`
    starts a new cache; a cache of a different GPU or TensorRT version is replaced. `detailed` keeps layer details in
    the engine for the engine inspector.

    Raises Rejected, quoting TensorRT's message, where the importer or the builder rejects the graph, and Unable where
    TensorRT does not start.
    """
    logger = make_logger(trt, say)
    builder = _builder(trt, logger)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)  # must exist until the plan is built: it owns the network's weights
    if not parser.parse(onnx):
        raise Rejected(_refusal(parser))
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    if detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _allow_small_types(trt, config, precision)
    _add_profile(builder, network, config, batch)
    if timing_cache is not None:
        _set_timing_cache(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    logger.summarize()
    if plan is None:
        raise Rejected(f"TensorRT {trt.__version__} parsed the graph but built no engine: {_last_error(logger)}")
    timings = None if timing_cache is None else config.get_timing_cache()
    return Built(bytes(plan), None if timings is None else bytes(timings.serialize()))


def _builder(trt: Any, logger: Any) -> Any:
    try:
        return trt.Builder(logger)
    except (TypeError, RuntimeError) as e:  # pybind11 raises these where a constructor returns null
        reason = _last_error(logger, otherwise=str(e))
        raise Unable(f"TensorRT {trt.__version__} does not start on this machine: {reason}") from e


def strongly_typed(trt: Any) -> bool:
    """Return whether networks are strongly typed: optional in TensorRT 10, always in 11 and RTX, never in 8.x."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


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
    dropped; the attribute `errors` keeps every error.
    """

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.counts: collections.Counter[str] = collections.Counter()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name in ("INFO", "VERBOSE"):
                return
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(message)
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


def _allow_small_types(trt: Any, config: Any, precision: str) -> None:
    if strongly_typed(trt) or not hasattr(trt.BuilderFlag, "FP16") or not hasattr(trt.BuilderFlag, "INT8"):
        return
    if precision in ("fp16", "int8"):
        config.set_flag(trt.BuilderFlag.FP16)
    if precision == "int8":
        config.set_flag(trt.BuilderFlag.INT8)


def _add_profile(builder: Any, network: Any, config: Any, batch: int) -> None:
    profile = builder.create_optimization_profile()
    dynamic = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape:
            dynamic = True
            largest = tuple(batch if side == -1 else side for side in shape)
            smallest = tuple(1 if side == -1 else side for side in shape)
            profile.set_shape(tensor.name, smallest, largest, largest)
    if dynamic:
        config.add_optimization_profile(profile)


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


# --- The GPU --------------------------------------------------------------------------------------------------------


class Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]  # (8, 7) is Orin


class Cuda:
    """The calls of the CUDA driver API that running an engine needs, on the first GPU.

    `library` is libcuda, or a substitute in tests. All calls use the primary context of the device, as TensorRT (and
    torch, where it is loaded) do. A call that fails raises Unable.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._call("cuInit", ctypes.c_uint(0))
        count, self._device = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if count.value == 0:
            raise Unable("no NVIDIA GPU: the driver is there and found none")
        self._call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(0))

    def gpu(self) -> Gpu:
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, ctypes.c_int(256), self._device)
        return Gpu(name.value.decode(), (self._attribute(75), self._attribute(76)))  # COMPUTE_CAPABILITY_MAJOR, _MINOR

    def attach(self) -> None:
        """Make the primary context current in this thread.

        The context is never released, since other libraries in the process use it.
        """
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes of GPU memory and return the address."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, array: Floats, address: int, stream: int) -> None:
        source = ctypes.c_void_p(array.ctypes.data)
        self._call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(address),
            source,
            ctypes.c_size_t(array.nbytes),
            ctypes.c_void_p(stream),
        )

    def download(self, address: int, array: Floats, stream: int) -> None:
        sink = ctypes.c_void_p(array.ctypes.data)
        self._call(
            "cuMemcpyDtoHAsync_v2",
            sink,
            ctypes.c_uint64(address),
            ctypes.c_size_t(array.nbytes),
            ctypes.c_void_p(stream),
        )

    def stream(self) -> int:
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(1))  # CU_STREAM_NON_BLOCKING
        return stream.value or 0

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def event(self) -> int:
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0))  # CU_EVENT_DEFAULT: timing is enabled
        return event.value or 0

    def record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def elapsed_ns(self, start: int, end: int) -> int:
        """Return the time between two recorded events, in nanoseconds. The resolution is about 0.5 microseconds."""
        self._call("cuEventSynchronize", ctypes.c_void_p(end))
        elapsed_ms = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(elapsed_ms), ctypes.c_void_p(start), ctypes.c_void_p(end))
        return round(elapsed_ms.value * 1e6)

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy_v2", ctypes.c_void_p(event))

    def _attribute(self, code: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(code), self._device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status == 100:  # CUDA_ERROR_NO_DEVICE
            raise Unable("no NVIDIA GPU: the driver is there and found none")
        if status != 0:
            raise Unable(f"the NVIDIA driver refused {name} with CUDA error {status}")


def find_cuda() -> Cuda:
    """Load the CUDA driver and open the first GPU. Raises Unable where the driver or the GPU is missing."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError as e:
        nodes = [node for node in ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu") if Path(node).exists()]
        if nodes:
            raise Unable(f"there is an NVIDIA GPU ({nodes[0]}), but its driver {name} cannot be loaded: {e}") from e
        raise Unable(f"no NVIDIA GPU (its driver {name} is not on this machine)") from e
    return Cuda(library)


# --- Running --------------------------------------------------------------------------------------------------------


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

    def latencies_ns(self, images: Floats, count: int) -> list[int]:
        """Run `count` queries one after the other and return the GPU time of each, in nanoseconds.

        The time is taken between two CUDA events around `execute_async_v3`: it includes the kernels and the gaps in
        which the GPU waits for the CPU to launch the next kernel. It excludes copies of images and logits (the images
        are copied once, before the first query) and the CPU time before the first kernel. Each query starts on an idle
        GPU. No CUDA graph is used: compare with `trtexec --noCudaGraph` (11) or without `--useCudaGraph` (10 and
        earlier).
        """
        self._upload(images)
        self._cuda.synchronize(self._stream)
        start, end = self._cuda.event(), self._cuda.event()
        try:
            return [self._timed_ns(start, end) for _ in range(count)]
        finally:
            self._cuda.destroy_event(start)
            self._cuda.destroy_event(end)

    def layers(self, trt: Any) -> str:
        """Return the engine inspector's description of every layer, as JSON."""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def close(self) -> None:
        self._cuda.synchronize(self._stream)
        del self._context, self._engine, self._runtime  # in this order, before the memory that they refer to
        for address in self._buffers.values():
            self._cuda.free(address)
        self._cuda.destroy_stream(self._stream)

    def _timed_ns(self, start: int, end: int) -> int:
        self._cuda.record(start, self._stream)
        self._enqueue()
        self._cuda.record(end, self._stream)
        return self._cuda.elapsed_ns(start, end)

    def _upload(self, images: Floats) -> None:
        import numpy as np

        if images.shape != self._shapes[self._input]:
            raise Rejected(f"the images have shape {images.shape}; the engine expects {self._shapes[self._input]}")
        self._query = np.ascontiguousarray(images, np.float32)  # kept alive: the copy is asynchronous
        self._cuda.upload(self._query, self._buffers[self._input], self._stream)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise Unable(f"TensorRT did not run the engine: {_last_error(self._logger)}")


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


# --- The command ----------------------------------------------------------------------------------------------------


def verified_bundle(folder: Path) -> dict[str, Any]:
    """Check the files of a bundle against their sha256 and return the contents of bundle.json.

    Raises Damaged where a file is missing or changed.
    """
    try:
        bundle: dict[str, Any] = json.loads((folder / "bundle.json").read_text())
    except (OSError, ValueError) as e:
        raise Damaged(f"{folder / 'bundle.json'} cannot be read ({e}): copy the whole bundle again") from e
    for name, expected in sorted(bundle["sha256"].items()):
        file = folder / name
        if not file.is_file():
            raise Damaged(f"{name} of the bundle {folder} is missing: copy the whole bundle again")
        actual = hashlib.sha256(file.read_bytes()).hexdigest()
        if actual != expected:
            raise Damaged(
                f"{name} of the bundle {folder} was changed or damaged (sha256 {actual[:12]}..., expected "
                f"{expected[:12]}...): copy the whole bundle again"
            )
    return bundle


def build_bundle(folder: Path, workspace_bytes: int, say: Say) -> dict[str, object]:
    """Build the engine of the bundle in `folder` and run its sample; return the JSON object that the command prints.

    Raises Damaged, Unable or Rejected.
    """
    bundle = verified_bundle(folder)
    trt = _tensorrt()
    graph = _graph(bundle, strongly_typed(trt))
    cache = folder / "timing.cache"
    say("INFO", f"TensorRT {trt.__version__} compiles {graph} ({bundle['precision']}); this takes minutes on a Jetson")
    started = time.monotonic()
    built = build(
        trt,
        (folder / graph).read_bytes(),
        precision=bundle["precision"],
        batch=bundle["batch"],
        say=say,
        workspace_bytes=workspace_bytes,
        timing_cache=cache.read_bytes() if cache.exists() else b"",
        detailed=True,
    )
    seconds = time.monotonic() - started
    _write(folder / "model.engine", built.plan)
    _write(cache, built.timing_cache or b"")
    return {
        "engine": str(folder / "model.engine"),
        "bytes": len(built.plan),
        "sha256": hashlib.sha256(built.plan).hexdigest(),
        "tensorrt": trt.__version__,
        "graph": graph,
        "precision": bundle["precision"],
        "batch": bundle["batch"],
        "seconds": round(seconds, 1),
        **try_engine(trt, built.plan, folder, say),
    }


def try_engine(trt: Any, plan: bytes, folder: Path, say: Say) -> dict[str, object]:
    """Run the sample images through the engine and compare its logits with the logits of the torch program.

    Returns `executed`, and either the comparison (see `compare`) or, as `why_not`, why the engine was not executed.
    Raises Rejected where a logit is NaN or infinite.
    """
    try:
        import numpy
    except ImportError:
        return {"executed": False, "why_not": "not executed: numpy is not importable"}
    try:
        cuda = find_cuda()
        gpu = cuda.gpu()
    except Unable as e:
        return {"executed": False, "why_not": f"not executed: {e}"}
    with numpy.load(folder / "sample.npz") as sample:
        images, expected = sample["images"], sample["logits"]
    execution = Execution(trt, plan, cuda, say)
    try:
        logits = run_all(execution, images)
        _write(folder / "layers.json", execution.layers(trt).encode())
    finally:
        execution.close()
    if not numpy.isfinite(logits).all():
        raise Rejected(
            f"the engine computes NaN or infinity on {gpu.name} with TensorRT {trt.__version__}: build the bundle "
            "again with RECIPE=fp32 to see whether FP16 overflows"
        )
    return {
        "executed": True,
        "why_not": None,
        "gpu": gpu.name,
        "compute_capability": "{}.{}".format(*gpu.capability),
    } | {**compare(expected, logits)}


def run_all(execution: Execution, images: Floats) -> Floats:
    """Return the logits of any number of images; the last query is padded by repeating the last image."""
    import numpy as np

    batch = execution.batch
    missing = -len(images) % batch
    filled = np.concatenate((images, images[-1:].repeat(missing, 0)))
    queries = [execution.infer(filled[start : start + batch]) for start in range(0, len(filled), batch)]
    return np.concatenate(queries)[: len(images)]


def compare(expected: Floats, actual: Floats) -> dict[str, object]:
    """Compare logits (images, classes) with the expected logits.

    Returns `snr_db`, the signal-to-noise ratio in decibels, and `agreement`, the percentage of images whose top-1
    class is the same.
    """
    import numpy as np

    signal = float(np.square(expected, dtype=np.float64).sum())
    noise = float(np.square(np.subtract(expected, actual, dtype=np.float64)).sum())
    snr_db = _IDENTICAL_DB if noise == 0 else float(10 * np.log10(max(signal, 1e-300) / noise))
    agreement = float((expected.argmax(1) == actual.argmax(1)).mean() * 100)
    return {"images": len(actual), "snr_db": round(snr_db, 1), "agreement": round(agreement, 1)}


def _tensorrt() -> Any:
    try:
        import tensorrt
    except ImportError as e:
        raise Unable(
            f"the tensorrt package is not importable here ({e}): install it, on a Jetson with `sudo apt install "
            "python3-libnvinfer`, elsewhere with `python3 -m pip install tensorrt`"
        ) from e
    return tensorrt


def _graph(bundle: dict[str, Any], strong: bool) -> str:
    graph = bundle["graphs"]["strong" if strong else "weak"]
    if graph is None:
        raise Unable(f"this TensorRT needs a weakly typed graph, which the bundle lacks: {bundle['why_no_weak_graph']}")
    return str(graph)


def _write(file: Path, contents: bytes) -> None:
    part = file.with_name(file.name + ".part")
    part.write_bytes(contents)
    part.replace(file)  # atomic: a file of this name is always complete


def _to_stderr(severity: str, message: str) -> None:
    print(f"{severity.lower()}: {message}", file=sys.stderr)


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    options.add_argument("--workspace-mib", type=int, default=WORKSPACE_BYTES >> 20, help="GPU memory for building")
    arguments = options.parse_args()
    try:
        result = build_bundle(Path(__file__).resolve().parent, arguments.workspace_mib << 20, _to_stderr)
    except Refused as e:
        print(e, file=sys.stderr)
        return e.exit_code
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
