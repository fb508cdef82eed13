"""Machines that execute engines: this one, in this process, or a device, through the runner there.

Both have the same interface, and both execute engines with `targets.runner.runtimes`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from calibration.recipe import FloatType
from models.errors import BadRequest, CannotRunHere, CheckFailed, EdgelineError
from targets.devices.connection import Connection, Dropped
from targets.runner import cpu, errors, runtimes
from targets.runner.files import digest_of
from targets.runner.tensorrt_engine import STRONG

if TYPE_CHECKING:
    from targets.base import Images, Logits, Session

T = TypeVar("T")
_CHUNK: Final = 1 << 20  # bytes of a file in one message
_ATTEMPTS: Final = 3  # to repeat a request over a new connection
_ERRORS: Final[Mapping[type[errors.Refused], type[EdgelineError]]] = {
    errors.Damaged: BadRequest,
    errors.Unable: CannotRunHere,
    errors.Rejected: CheckFailed,
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeFacts:
    """A runtime on a machine: its version, and the GPU that it uses."""

    version: str = "missing"
    missing: str | None = None  # why engines cannot be built
    not_executed: str | None = None  # why engines cannot be executed
    generation: str = STRONG  # of TensorRT
    gpu: str | None = None
    capability: tuple[int, ...] = ()  # compute capability of the GPU

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> RuntimeFacts:
        """Return the facts in a description by `targets.runner.runtimes.described`."""
        values = {item.name: described[item.name] for item in fields(cls) if item.name in described}
        return cls(**values | {"capability": tuple(values.get("capability", ()))})


class Machine(Protocol):
    """A machine that builds and executes engines. `runtime` is a name of `targets.runner.runtimes.RUNTIMES`."""

    @property
    def local(self) -> bool: ...

    def runtime(self, runtime: str) -> RuntimeFacts:
        """Return the version of a runtime and the device that it uses."""
        ...

    def threads(self) -> int:
        """Return the number of threads for inference on the CPU."""
        ...

    def half(self) -> FloatType:
        """Return the fastest 16-bit float type of the CPU; f32 if it has none."""
        ...

    def processor(self) -> dict[str, str]:
        """Return the processor for keys of engines that run on a CPU; empty for this machine, whose store it is."""
        ...

    def build(self, runtime: str, folder: Path, options: Mapping[str, object]) -> None:
        """Compile the graph in `folder` and add the compiled files to it. Raises CheckFailed if it is rejected."""
        ...

    def inspect(self, runtime: str, engine: Path) -> dict[str, Any]:
        """Return the runtime's description of an engine."""
        ...

    def open(self, runtime: str, engine: Path) -> contextlib.AbstractContextManager[Session]:
        """Load an engine."""
        ...

    def telemetry(self) -> dict[str, Any]:
        """Return clocks, temperatures and load at this moment."""
        ...


class ThisMachine:
    """The machine that this process runs on."""

    local = True

    def runtime(self, runtime: str) -> RuntimeFacts:
        if importlib.util.find_spec(runtime) is None:
            return RuntimeFacts(missing=f"the {runtime} package is missing: run `make setup`")
        return RuntimeFacts.of(runtimes.described(runtime))

    def threads(self) -> int:
        return cpu.threads()

    def processor(self) -> dict[str, str]:
        return {}

    def half(self) -> FloatType:
        half: FloatType = cpu.half_precision()  # type: ignore[assignment]
        return half

    def build(self, runtime: str, folder: Path, options: Mapping[str, object]) -> None:
        with explained():
            runtimes.runtime(runtime).build(folder, options, _say)

    def inspect(self, runtime: str, engine: Path) -> dict[str, Any]:
        with explained():
            inspected: dict[str, Any] = runtimes.runtime(runtime).inspect(engine, self.threads())
        return inspected

    @contextmanager
    def open(self, runtime: str, engine: Path) -> Iterator[Session]:
        with explained():
            session = runtimes.runtime(runtime).open_engine(engine, self.threads(), _say)
            with contextlib.closing(session):
                yield session

    def telemetry(self) -> dict[str, Any]:
        from targets.runner.telemetry import snapshot

        return dict(snapshot())


LOCAL: Final = ThisMachine()


def machine_of(target: object) -> Machine:
    """Return the machine that builds and executes the engines of a target."""
    machine: Machine = target.machine if runs_on_devices(target) else LOCAL  # type: ignore[attr-defined]
    return machine


def runs_on_devices(target: object) -> bool:
    """Return whether the engines of a target can be built and executed on a device."""
    return isinstance(getattr(target, "machine", None), ThisMachine | RemoteMachine)


@contextmanager
def explained() -> Iterator[None]:
    """Translate exceptions of `targets.runner`, which imports nothing of Edgeline, into the errors of the pipeline."""
    try:
        yield
    except errors.Refused as error:
        raise _ERRORS.get(type(error), CannotRunHere)(str(error)) from error


def _say(severity: str, message: str) -> None:
    levels = {"INFO": logging.DEBUG, "WARNING": logging.WARNING}
    log.log(levels.get(severity, logging.ERROR), "TensorRT: %s", message)


class RemoteMachine:
    """A device. `connect` opens a connection to its runner; a lost connection is opened again.

    `power_mode` and `lock_clocks` are settings of a Jetson while engines are timed.

    Files are sent once: the runner keeps them by their SHA-256, and an interrupted upload continues where it ended. A
    build continues on the device while the connection is lost, and its result is collected later.
    """

    local = False

    def __init__(self, connect: Callable[[], Connection], *, power_mode: str = "", lock_clocks: bool = False) -> None:
        self._connect = connect
        self.power: Mapping[str, object] = {"power_mode": power_mode, "lock_clocks": lock_clocks}
        self._connection: Connection | None = None
        self._runtimes: dict[str, RuntimeFacts] = {}

    def request(self, fields: Mapping[str, object], attachments: Mapping[str, Any] | None = None) -> Any:
        """Return the reply to a request, and its attachments. A request whose connection is lost is repeated."""
        return self._repeated(lambda connection: connection.request(fields, attachments))

    def facts(self) -> dict[str, Any]:
        """Return the facts of the device: see `targets.runner.facts`."""
        return dict(self._machine["facts"])

    @functools.cached_property
    def _machine(self) -> Mapping[str, Any]:
        reply, _ = self.request({"op": "facts"})
        return dict(reply)

    def runtime(self, runtime: str) -> RuntimeFacts:
        if runtime not in self._runtimes:
            reply, _ = self.request({"op": "runtime", "runtime": runtime})
            self._runtimes[runtime] = RuntimeFacts.of(reply)
        return self._runtimes[runtime]

    def threads(self) -> int:
        return int(self._machine["threads"])

    def processor(self) -> dict[str, str]:
        facts = self.facts()
        return {"processor": f"{facts.get('architecture')} {facts.get('cpu')}"}

    def half(self) -> FloatType:
        half: FloatType = self._machine["half"]
        return half

    def telemetry(self) -> dict[str, Any]:
        reply, _ = self.request({"op": "telemetry"})
        return dict(reply["telemetry"])

    def build(self, runtime: str, folder: Path, options: Mapping[str, object]) -> None:
        fields = {"op": "build", "runtime": runtime, "options": dict(options)}

        def built(connection: Connection) -> Mapping[str, str]:
            reply, _ = connection.request({**fields, "files": _sent(connection, folder)})
            for name, digest in reply["files"].items():
                _receive(connection, digest, folder / Path(name).name)
            return dict(reply["files"])

        self._repeated(built)

    def inspect(self, runtime: str, engine: Path) -> dict[str, Any]:
        def inspected(connection: Connection) -> dict[str, Any]:
            reply, _ = connection.request({"op": "inspect", "runtime": runtime, "files": _sent(connection, engine)})
            return dict(reply["inspected"])

        return self._repeated(inspected)

    @contextmanager
    def open(self, runtime: str, engine: Path) -> Iterator[RemoteSession]:
        connection, opened = self._repeated(lambda connection: (connection, _opened(connection, runtime, engine)))
        kind = RemoteGpuSession if "method" in opened else RemoteSession
        session = kind(self, runtime, engine, connection, opened)
        try:
            yield session
        finally:
            session.close()

    def connection(self) -> Connection:
        """Return the open connection, opening it if needed."""
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def close(self) -> None:
        """Close the connection. The next request opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _repeated(self, action: Callable[[Connection], T]) -> T:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return action(self.connection())
            except Dropped as error:
                self._connection = None
                if attempt == _ATTEMPTS:
                    raise
                log.warning("%s; connecting again", error)
        raise AssertionError("unreachable")


class RemoteSession:
    """An engine that is loaded on a device. It is loaded again after a lost connection."""

    def __init__(
        self, machine: RemoteMachine, runtime: str, engine: Path, connection: Connection, opened: Mapping[str, Any]
    ) -> None:
        self._machine, self._runtime, self._engine = machine, runtime, engine
        self._on = connection  # in which the engine is loaded
        self._opened = opened  # the reply to `open`

    @property
    def batch(self) -> int:
        return int(self._opened["batch"])

    def infer(self, images: Images) -> Logits:
        def inferred(connection: Connection) -> Logits:
            _, values = connection.request({"op": "infer", "session": self._load(connection)}, {"images": images})
            logits: Logits = values["logits"]
            return logits

        return self._machine._repeated(inferred)

    def latencies_ns(self, images: Images, count: int) -> list[int]:
        """Run `count` queries on the device and return the latency of each, measured there: without the connection."""
        return self._timed(images, count, end_to_end=False)

    def conditions(self) -> dict[str, Any] | None:
        """Return clocks, temperatures, power and load of the device since the first timed query: see
        `targets.runner.telemetry.Series`.
        """
        reply, _ = self._machine.request({"op": "conditions"})
        conditions: dict[str, Any] | None = reply["conditions"]
        return conditions

    def close(self) -> None:
        if self._on is self._machine._connection:
            with contextlib.suppress(EdgelineError):
                self._on.request({"op": "close", "session": self._opened["session"]})

    def _timed(self, images: Images, count: int, *, end_to_end: bool) -> list[int]:
        fields = {"op": "time", "count": count, "end_to_end": end_to_end, **self._machine.power}

        def timed(connection: Connection) -> list[int]:
            reply, _ = connection.request({**fields, "session": self._load(connection)}, {"images": images})
            return [int(latency) for latency in reply["latencies"]]

        return self._machine._repeated(timed)

    def _load(self, connection: Connection) -> int:
        """Return the number of the session in `connection`, loading the engine if it is not loaded there."""
        if self._on is not connection:
            self._on, self._opened = connection, _opened(connection, self._runtime, self._engine)
        return int(self._opened["session"])


class RemoteGpuSession(RemoteSession):
    """An engine that is loaded on the GPU of a device: see `targets.base.GpuSession`."""

    @property
    def method(self) -> Mapping[str, object]:
        method: Mapping[str, object] = self._opened["method"]
        return method

    def warm_up(self, seconds: float) -> int:
        fields = {"op": "warm_up", "seconds": seconds, **self._machine.power}

        def warmed(connection: Connection) -> int:
            reply, _ = connection.request({**fields, "session": self._load(connection)})
            return int(reply["queries"])

        return self._machine._repeated(warmed)

    def end_to_end_ns(self, images: Images, count: int) -> list[int]:
        return self._timed(images, count, end_to_end=True)


def _opened(connection: Connection, runtime: str, engine: Path) -> Mapping[str, Any]:
    """Load an engine on the device, sending it first if the device lacks it. Returns the reply to `open`."""
    reply, _ = connection.request({"op": "open", "runtime": runtime, "files": _sent(connection, engine)})
    return dict(reply)


def _sent(connection: Connection, folder: Path) -> dict[str, str]:
    """Send the files of a folder that the device lacks. Returns the digest of each by name."""
    files = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    digests = {name: digest_of(file) for name, file in files.items()}
    reply, _ = connection.request({"op": "received", "digests": list(digests.values())})
    for (name, digest), received in zip(digests.items(), reply["received"], strict=True):
        if received >= 0:
            _send(connection, files[name], digest, received)
    return digests


def _send(connection: Connection, file: Path, digest: str, received: int) -> None:
    """Send the bytes of a file from `received` on. The device replies with the bytes that it has; -1 for all."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        while received >= 0:
            stream.seek(received)
            content = stream.read(_CHUNK)
            last = received + len(content) >= size
            fields = {"op": "put", "digest": digest, "offset": received, "last": last}
            reply, _ = connection.request(fields, {"content": content})
            received = int(reply["received"])


def _receive(connection: Connection, digest: str, file: Path) -> None:
    """Write a file of the device to `file`. Raises CannotRunHere if it does not have the digest."""
    part = file.with_name(f"{file.name}.part")
    with part.open("wb") as stream:
        while True:
            fields = {"op": "get", "digest": digest, "offset": stream.tell(), "count": 1 << 22}
            reply, values = connection.request(fields)
            stream.write(values["content"])
            if stream.tell() >= reply["size"] or not values["content"]:
                break
    if digest_of(part) != digest:
        part.unlink()
        raise Dropped(f"{file.name} was damaged on its way from the device; repeat the command")
    part.replace(file)
