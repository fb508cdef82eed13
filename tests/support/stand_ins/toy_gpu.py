"""A GPU of the tests: a driver whose memory is that of this process, and an engine that adds up images."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np


class Toy:
    def __init__(self, *arguments: object) -> None:
        pass


class Severity(enum.Enum):
    ERROR = 1
    WARNING = 2
    VERBOSE = 4


class ToyDriver:
    """Stand-in for libcuda."""

    def __init__(self, gpus: int = 1, *, refuses: dict[str, int] | None = None) -> None:
        self.gpus = gpus
        self.refuses = refuses or {}  # errors by the names of calls
        self.flags = 0  # of the context
        self.captured: list[Callable[[], None]] | None = None  # work of the graph that is being captured
        self.graph: list[Callable[[], None]] = []
        self.memory: dict[int, Any] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("cuGraphInstantiate"):  # not in every driver
            raise AttributeError(name)
        return self._recorded(name, lambda *arguments: 0)

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        return self._recorded(name, found) if name.startswith("cu") else found

    def _recorded(self, name: str, function: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return self.refuses.get(name) or function(*arguments)

        return call

    def run(self, work: Callable[[], None]) -> None:
        """Run work of a kernel, or add it to the graph that is being captured."""
        if self.captured is None:
            work()
        else:
            self.captured.append(work)

    def cuStreamBeginCapture_v2(self, stream: Any, mode: Any) -> int:
        assert mode.value == 1
        self.captured = []
        return 0

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:
        assert self.captured is not None
        self.graph, self.captured = self.captured, None
        graph._obj.value = 11
        return 0

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:
        assert (graph.value, flags.value) == (11, 0)
        executable._obj.value = 12
        return 0

    def cuGraphLaunch(self, executable: Any, stream: Any) -> int:
        assert executable.value == 12
        for work in self.graph:
            work()
        return 0

    def cuDevicePrimaryCtxSetFlags_v2(self, device: Any, flags: Any) -> int:
        self.flags = flags.value
        return 0

    def cuCtxGetFlags(self, flags: Any) -> int:
        flags._obj.value = self.flags | 8  # CU_CTX_MAP_HOST
        return 0

    def cuMemAllocHost_v2(self, address: Any, size: Any) -> int:
        return self.cuMemAlloc_v2(address, size)

    def cuMemFreeHost(self, address: Any) -> int:
        return self.cuMemFree_v2(address)

    def cuInit(self, flags: Any) -> int:
        return 0 if self.gpus else 100

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.gpus
        return 0

    def cuDeviceGetName(self, name: Any, size: Any, device: Any) -> int:
        name.value = b"Toy"
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:
        memory._obj.value = 8 << 30
        return 0

    def cuDeviceGetAttribute(self, value: Any, code: Any, device: Any) -> int:
        value._obj.value = {75: 8, 76: 7}[code.value]
        return 0

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:
        block = (ctypes.c_char * size.value)()
        address._obj.value = ctypes.addressof(block)
        self.memory[address._obj.value] = block
        return 0

    def cuMemFree_v2(self, address: Any) -> int:
        del self.memory[address.value]
        return 0

    def cuMemcpyHtoDAsync_v2(self, sink: Any, source: Any, size: Any, stream: Any) -> int:
        ctypes.memmove(sink.value, source.value, size.value)
        return 0

    cuMemcpyDtoHAsync_v2 = cuMemcpyHtoDAsync_v2

    def cuStreamCreate(self, stream: Any, flags: Any) -> int:
        stream._obj.value = 7
        return 0

    def cuEventElapsedTime(self, elapsed_ms: Any, start: Any, end: Any) -> int:
        elapsed_ms._obj.value = 0.25
        return 0


class ToyEngine:
    """Engine for two images (2, 3, 4, 4) whose logits are the sum of each image and its negative. It is also its own
    execution context."""

    def __init__(self, output: str = "FLOAT", dynamic: bool = False, driver: ToyDriver | None = None) -> None:
        self.driver = driver or ToyDriver()
        self.types = {"image": "FLOAT", "logits": output}
        self.names = list(self.types)
        self.num_io_tensors = 2
        self.dynamic = dynamic
        self.addresses: dict[str, int] = {}
        self.runs = 0

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name == "image" else "OUTPUT"

    def get_tensor_dtype(self, name: str) -> str:
        return self.types[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1 if self.dynamic else 2, 3, 4, 4) if name == "image" else (2, 2)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1, 3, 4, 4), (2, 3, 4, 4), (2, 3, 4, 4)]

    def create_execution_context(self) -> ToyEngine:
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.dynamic = False
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        self.driver.run(self.compute)
        return True

    def compute(self) -> None:
        self.runs += 1
        images = np.ctypeslib.as_array((ctypes.c_float * 96).from_address(self.addresses["image"])).reshape(2, -1)
        logits = np.ctypeslib.as_array((ctypes.c_float * 4).from_address(self.addresses["logits"])).reshape(2, 2)
        logits[:] = np.stack((images.sum(1), -images.sum(1)), 1)


def toy_tensorrt(engine: ToyEngine | None) -> SimpleNamespace:
    return SimpleNamespace(
        __version__="0",
        ILogger=Toy,
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine),
        TensorIOMode=SimpleNamespace(INPUT="INPUT"),
        DataType=SimpleNamespace(FLOAT="FLOAT"),
    )


def ignore(severity: str, message: str) -> None:
    pass
