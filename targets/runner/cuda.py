"""NVIDIA GPU through the CUDA driver API: libcuda by ctypes, so neither torch nor cuda-python nor pycuda is needed."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import Unable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]


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
        status = getattr(self._library, name)(*arguments)
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
