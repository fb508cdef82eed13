"""Remote against local timing of one engine, and the cost of the connection: an SSH server on loopback is the device.

    python -m tests.bench.devices [MODEL]

Run it with `make bench-devices`. Both sessions execute the same INT8 engine for ONNX Runtime at 64 pixels, in
interleaved rounds; weights are random. Latencies are measured where the engine runs: the ratio must not contain the
connection. The runner is a process of its own, so the ratio contains differences between two processes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import calibration.recipe
import models
import targets
from calibration.data.sample_photos import Photos
from pipeline import process_setup
from pipeline.run import Run
from pipeline.stages.compiled import compiled
from pipeline.store.store import Store
from pipeline.timing.interleaved import ComparisonPlan, Speedup, compare
from targets.devices import inventory
from targets.devices.attached import able
from targets.devices.connection import Connection, over_ssh
from targets.devices.machine import RemoteMachine
from tests.support.devices.proxy import proxy
from tests.support.devices.sshd import SERVER, Server, serving

if TYPE_CHECKING:
    from targets.base import Images

MODEL, SIZE = "mobilevit_xs", 64  # pixels; a model that does not take it gets the nearest side
MOST = 1.03  # remote latency, in local ones

# The search for ranges and the corrections take time and do not change the speed of an engine.
_PLAIN = {"calibrator": "minmax", "equalize": False, "bias_correction": False}
_TARGET = targets.ALL["onnxruntime"]
_PLAN = ComparisonPlan(min_rounds=60, max_seconds=30.0, width=0.01)


def main(name: str) -> int:
    if SERVER is None:
        print("not executed: no sshd; install openssh-server (`make system-packages`)")
        return 3
    run = _run(name)
    engine = Store(Path("build")).get(compiled(run)).path
    images, _ = next(run.images("val").batches(1))
    print(f"{name} at {run.preprocess.size} pixels, load of the machine {os.getloadavg()[0]:.1f}", flush=True)
    with TemporaryDirectory() as folder, serving(Path(folder)) as server:
        _report_bytes(server, engine)
        speedup = _compared(server, engine, images.numpy())
    low, ratio, high = 1 / speedup.high, 1 / speedup.ratio, 1 / speedup.low
    print(f"remote latency over local: {ratio:.3f} [{low:.3f}, {high:.3f}] in {speedup.rounds} rounds")
    if speedup.vague:
        print("undecided: the interval is too wide; repeat on a quiet machine")
        return 1
    print(f"missed: {low:.3f} is above {MOST}" if low > MOST else "no figure missed")
    return 1 if low > MOST else 0


def _run(name: str) -> Run:
    model = models.ALL[name]
    recipe = calibration.recipe.with_ptq(calibration.recipe.ALL["int8_ptq"], **_PLAIN)
    preprocess = replace(model.preprocess, size=model.sizes.nearest(SIZE)[0])
    return Run(model=model, recipe=recipe, target=_TARGET, data=Photos(), preprocess=preprocess, trained=False)


def _report_bytes(server: Server, engine: Path) -> None:
    """Print seconds and bytes of a connection and of loading an engine, for the first and second time."""
    size = sum(file.stat().st_size for file in engine.iterdir() if file.is_file())
    print(f"engine: {size:,} bytes")
    with proxy(server.port) as line:
        for turn in ("first", "second"):
            machine = _machine(server.through(line.port))
            before = line.up
            connecting = _seconds(machine.connection)
            connected = line.up
            loading = _seconds(lambda: _loaded(machine, engine))  # noqa: B023
            machine.close()
            print(
                f"{turn} time: connected in {connecting:.2f} s, {connected - before:,} bytes sent; "
                f"engine sent and loaded in {loading:.2f} s, {line.up - connected:,} bytes sent",
                flush=True,
            )


def _loaded(machine: RemoteMachine, engine: Path) -> None:
    with replace(_TARGET, machine=machine).open(engine):  # type: ignore[type-var]
        pass


def _compared(server: Server, engine: Path, images: Images) -> Speedup:
    """Return the speedup of the remote session over the local session."""
    machine = _machine(server)
    with ExitStack() as opened:
        opened.callback(machine.close)
        sessions = {
            "local": opened.enter_context(_TARGET.open(engine)),
            "remote": opened.enter_context(replace(_TARGET, machine=machine).open(engine)),  # type: ignore[type-var]
        }
        return compare(sessions, images, _PLAN).speedup("remote", "local")


def _machine(server: Server) -> RemoteMachine:
    file = server.key.with_name("devices.toml")
    file.write_text(server.table())
    return RemoteMachine(lambda: Connection(partial(over_ssh, inventory.find(file, "loop", able())), "DEVICE=loop"))


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    process_setup.settle()
    sys.exit(main(*sys.argv[1:] or [MODEL]))
