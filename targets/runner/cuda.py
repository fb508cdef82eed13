"""NVIDIA GPU through the CUDA driver API: libcuda by ctypes, so neither torch nor cuda-python nor pycuda is needed."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import Unable

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

# Flags of a context, from cuda.h: how a thread waits for the GPU.
_SCHED_SPIN, _SCHED_MASK = 0x01, 0x07
_CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, as trtexec captures


class Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]  # (8, 7) is Orin
    memory_bytes: int  # on a Jetson, the memory of the board


class Cuda:
    """The calls of the CUDA driver API that running an engine needs, on the first GPU.

    `library` is libcuda, or a substitute in tests. All calls use the primary context of the device, as TensorRT (and
    torch, where it is loaded) do. A call that fails raises Unable.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._call("cuInit", ctypes.c_uint(0))
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if count.value == 0:
            raise Unable("no NVIDIA GPU: the driver is there and found none")
        self._devices = [self._open(index) for index in range(count.value)]
        self._device = self._devices[0]

    def gpu(self) -> Gpu:
        return self._describe(self._device)

    def gpus(self) -> list[Gpu]:
        """Describe all GPUs, the first included."""
        return [self._describe(device) for device in self._devices]

    def driver_version(self) -> str:
        """Return the newest version of CUDA that the driver supports, such as 12.6."""
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def attach(self) -> None:
        """Make the primary context current in this thread, waiting for the GPU by spinning where it can be chosen.

        A thread that sleeps instead wakes up late, which the clock counts. A context that is active already, as that of
        torch may be, keeps its way of waiting in older drivers. The context is never released, since other libraries in
        the process use it.
        """
        with contextlib.suppress(Unable):
            self._call("cuDevicePrimaryCtxSetFlags_v2", self._device, ctypes.c_uint(_SCHED_SPIN))
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)

    def spins(self) -> bool:
        """Return whether this thread, once attached, waits for the GPU by spinning."""
        flags = ctypes.c_uint()
        self._call("cuCtxGetFlags", ctypes.byref(flags))
        return flags.value & _SCHED_MASK == _SCHED_SPIN

    def free_bytes(self) -> int:
        """Return the free memory of the GPU; on a Jetson, of the memory that GPU and CPU share."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes of GPU memory and return the address."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def pinned(self, shape: tuple[int, ...]) -> Floats:
        """Return an array in page-locked memory, which the GPU copies without a detour. `unpin` frees it."""
        import numpy as np

        count = 1
        for side in shape:
            count *= side
        address = ctypes.c_void_p()
        self._call("cuMemAllocHost_v2", ctypes.byref(address), ctypes.c_size_t(4 * count))
        floats = (ctypes.c_float * count).from_address(address.value or 0)
        return np.ctypeslib.as_array(floats).reshape(shape)

    def unpin(self, array: Floats) -> None:
        self._call("cuMemFreeHost", ctypes.c_void_p(array.ctypes.data))

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

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """Record the work that `enqueue` puts on `stream` as a CUDA graph, without running it.

        Returns the graph, for `launch` and `destroy_graph`. Raises Unable where the driver or the work does not support
        it; the stream is usable afterwards.
        """
        graph = ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), ctypes.c_int(_CAPTURE_THREAD_LOCAL))
        try:
            enqueue()
        except Unable:
            with contextlib.suppress(Unable):
                self._call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
            raise
        self._call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        try:
            return self._instantiate(graph)
        finally:
            self._call("cuGraphDestroy", graph)

    def _instantiate(self, graph: ctypes.c_void_p) -> int:
        executable = ctypes.c_void_p()
        if hasattr(self._library, "cuGraphInstantiateWithFlags"):  # CUDA 11.4 and later
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        else:
            self._call("cuGraphInstantiate_v2", ctypes.byref(executable), graph, None, None, ctypes.c_size_t(0))
        return executable.value or 0

    def launch(self, graph: int, stream: int) -> None:
        self._call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def destroy_graph(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", ctypes.c_void_p(graph))

    def _open(self, index: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
        return device

    def _describe(self, device: ctypes.c_int) -> Gpu:
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        self._call("cuDeviceGetName", name, ctypes.c_int(256), device)
        self._call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        capability = self._attribute(75, device), self._attribute(76, device)  # COMPUTE_CAPABILITY_MAJOR, _MINOR
        return Gpu(name.value.decode(), capability, memory.value)

    def _attribute(self, code: int, device: ctypes.c_int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(code), device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name, None)
        if function is None:
            raise Unable(f"the NVIDIA driver has no {name}: install a newer one")
        status = function(*arguments)
        if status == 100:  # CUDA_ERROR_NO_DEVICE
            raise Unable("no NVIDIA GPU: the driver is there and found none")
        if status != 0:
            raise Unable(f"the NVIDIA driver refused {name} with CUDA error {status}{self._described(status)}")

    def _described(self, status: int) -> str:
        """Return the name of an error and its description, as the driver gives them."""
        texts = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            if getattr(self._library, function)(ctypes.c_int(status), ctypes.byref(text)) == 0 and text.value:
                texts.append(text.value.decode())
        return f" ({': '.join(texts)})" if texts else ""


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
