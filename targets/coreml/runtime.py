"""Core ML's runtime on a Mac: load a package for a choice of compute units, predict, measure time, read compute plans.

Written against coremltools 9.0, whose signatures the tests check; never executed on a Mac. Off macOS,
`ThisMac.not_executed` returns the reason.

All calls go through the protocol `Machine`, whose arguments and results are only paths, arrays, names and numbers, so
that a remote Mac or a connected iPhone can be substituted for this Mac.
"""

from __future__ import annotations

import platform
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, cast

from models.errors import CannotRunHere, EdgelineError
from targets.base import INPUT_NAME, OUTPUT_NAME, Placement
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.interface import pixels
from targets.coreml.package import read_facts

if TYPE_CHECKING:
    from targets.base import Images, Logits

# Names of coremltools.ComputeUnit. The first is the default of apps. Where the Neural Engine cannot compile an
# operator, Core ML silently runs it on a different unit, and ALL may be slower than CPU_AND_NE: so all four exist here.
UNITS: Final = ("ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE")

_MACOS: Final = 15  # the first version with the operators of iOS 18; MLComputePlan needs 14.4
_DEVICES: Final = {  # classes of coremltools.models.compute_device
    "MLCPUComputeDevice": "CPU",
    "MLGPUComputeDevice": "GPU",
    "MLNeuralEngineComputeDevice": "Neural Engine",
}

_NEEDS: Final = {"ALL": "Neural Engine", "CPU_AND_GPU": "GPU", "CPU_AND_NE": "Neural Engine"}  # device, by unit

# Core ML releases the arrays of a prediction about a second later, without holding Python's global interpreter lock
# (apple/coremltools pull requests 2827 and 2829), so its reference must not be the last. Inputs are therefore kept
# alive here for some seconds.
_HELD_SECONDS: Final = 10.0
_HELD: deque[tuple[float, Features]] = deque()

# Inputs and outputs by name: arrays, or PIL images; a classifier also returns a string and a dictionary.
Features: TypeAlias = Mapping[str, Any]


class Loaded(Protocol):
    """A package that a machine has compiled and loaded for one of `UNITS`."""

    @property
    def load_ns(self) -> int | None:
        """Loading time measured by Core ML, in nanoseconds, without compilation of the package; None if unknown.

        It includes the specialization of the program for the Neural Engine, which the system may have cached.
        """
        ...

    def predict(self, inputs: Features) -> Features: ...

    def latencies_ns(self, inputs: Features, count: int) -> list[int]:
        """Run `count` predictions in a row on the machine; return the time of each, measured by Core ML, in ns."""
        ...

    def plan(self) -> list[Placement]: ...


class Machine(Protocol):
    """A machine that runs Core ML: `ThisMac`, or a substitute."""

    def not_executed(self) -> str | None:
        """Return why packages cannot be executed on the machine; None where they can."""
        ...

    def doubt(self, unit: str) -> str | None:
        """Return why times for `unit` (of `UNITS`) may not be times of the devices in its name; None without doubt."""
        ...

    def load(self, package: Path, unit: str, function: str | None = None) -> Loaded:
        """Load a function of an .mlpackage, by default the package's default function, for `unit` (of `UNITS`).

        Raises CannotRunHere with the reason of `not_executed`, or with Core ML's reason where it rejects the package.
        """
        ...


@dataclass(frozen=True, slots=True)
class ThisMac:
    """The Mac that this process runs on, used through coremltools."""

    def not_executed(self) -> str | None:
        if sys.platform != "darwin":
            return "needs macOS: Core ML runs on Apple devices only; on a Mac, the package runs as it is"
        release = platform.mac_ver()[0]
        if int(release.partition(".")[0]) < _MACOS:
            return f"needs macOS {_MACOS} or later: this Mac has {release}"
        return None

    def doubt(self, unit: str) -> str | None:
        """As `Machine.doubt`: Intel Macs and virtual machines may lack a device in the name of the unit."""
        needed = _NEEDS.get(unit)
        if needed is None or needed in self.devices():
            return None
        return f"this Mac has no {needed}: Core ML silently runs {unit} on other devices"

    def devices(self) -> set[str]:
        """Return the names, as in a plan, of the devices of this Mac that Core ML can use."""
        with _explained("does not list its devices"):
            devices = import_coremltools().models.compute_device.MLComputeDevice.get_all_compute_devices()
        return {_device(device) for device in devices}

    def load(self, package: Path, unit: str, function: str | None = None) -> LoadedHere:
        """As `Machine.load`, with optimization hints for fixed shapes and fast predictions rather than fast loading.

        Apps set the same hints with MLModelConfiguration.optimizationHints.
        """
        if reason := self.not_executed():
            raise CannotRunHere(reason)
        coremltools = import_coremltools()
        with warnings.catch_warnings(), _explained(f"cannot load {package} for {unit}"):
            # Where Core ML rejects a package, MLModel only warns, and a later prediction fails.
            warnings.simplefilter("error", RuntimeWarning)
            try:
                model = coremltools.models.MLModel(
                    str(package),
                    compute_units=coremltools.ComputeUnit[unit],
                    function_name=function,
                    optimization_hints={
                        "reshapeFrequency": coremltools.ReshapeFrequency.Infrequent,
                        "specializationStrategy": coremltools.SpecializationStrategy.FastPrediction,
                    },
                )
            except RuntimeWarning as refusal:
                raise CannotRunHere(f"Core ML on this Mac cannot load {package} for {unit}: {refusal}") from refusal
        return LoadedHere(model=model, compiled=_compiled(model, package))


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedHere:
    model: Any  # coremltools.models.MLModel; it deletes `compiled` when it is garbage collected
    compiled: str  # the .mlmodelc folder

    @property
    def load_ns(self) -> int | None:
        duration: int | None = self.model.load_duration_in_nano_seconds
        return duration

    def predict(self, inputs: Features) -> Features:
        with _explained("cannot predict"):
            copied = dict(inputs)  # a new dictionary each time: predict converts its values in place
            _hold(copied)
            return cast("Features", self.model.predict(copied))

    def latencies_ns(self, inputs: Features, count: int) -> list[int]:
        """Return the time of each prediction, in nanoseconds, without the copies between Python and Core ML.

        Apps need no such copies. Source: coremlpython's CoreMLPython.mm, which reads the clock only around
        `predictionFromFeatures`.
        """
        latencies = []
        for _ in range(count):
            self.predict(inputs)
            duration: int | None = self.model.last_predict_duration_in_nano_seconds
            if duration is None:
                raise CannotRunHere("Core ML does not report the duration of predictions: update coremltools")
            latencies.append(duration)
        return latencies

    def plan(self) -> list[Placement]:
        """Return the compute plan. Raises CannotRunHere unless the default function is loaded: Core ML has no other."""
        default = self.model.get_spec().description.defaultFunctionName or "main"
        function = self.model.function_name or default
        if function != default:
            raise CannotRunHere(
                f"Core ML has a compute plan only for a package's default function, {default}; build {function} as a "
                "separate engine to see where it runs"
            )
        with _explained("has no plan"):
            plan = import_coremltools().models.compute_plan.MLComputePlan.load_from_path(
                self.compiled, compute_units=self.model.compute_unit
            )
            operations = _operations(plan.model_structure.program.functions[function].block)
            return [_placement(plan, operation) for operation in operations if _is_computed(operation)]


def _hold(inputs: Features) -> None:
    """Keep inputs, and the arrays that coremltools converted them to, alive until Core ML has released them."""
    now = time.monotonic()
    while _HELD and _HELD[0][0] < now - _HELD_SECONDS:
        _HELD.popleft()
    _HELD.append((now, inputs))


@contextmanager
def _explained(failure: str) -> Iterator[None]:
    """Context that turns any error of coremltools into CannotRunHere: coremltools does not document its error types."""
    try:
        yield
    except EdgelineError:
        raise
    except Exception as refusal:
        cause = str(refusal) or type(refusal).__name__
        raise CannotRunHere(f"Core ML on this Mac {failure}: {cause}") from refusal


def _compiled(model: Any, package: Path) -> str:
    """Return the folder of the compiled package. Raises CannotRunHere where coremltools did not pass it to Core ML."""
    try:
        return cast("str", model.get_compiled_model_path())
    except Exception as nothing:  # coremltools raises nothing more specific
        version = model.get_spec().specificationVersion
        raise CannotRunHere(
            f"Core ML on this Mac did not load {package}, which has specification version {version}: update macOS, or "
            "build it for an older system with DEPLOYMENT="
        ) from nothing


def _operations(block: Any) -> Iterator[Any]:
    """Yield the operations of a block and of nested blocks (conditionals, loops); nested ones after their parent."""
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


def _is_computed(operation: Any) -> bool:
    return _kind(operation) != "const"


def _kind(operation: Any) -> str:
    """Return the operator's type as in a package: a compiled program may have `ios18.conv` for `conv`."""
    return cast("str", operation.operator_name).rpartition(".")[2]


def _placement(plan: Any, operation: Any) -> Placement:
    usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
    cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
    return Placement(
        name=operation.outputs[0].name if operation.outputs else "",
        kind=_kind(operation),
        preferred=_device(usage.preferred_compute_device) if usage else None,
        supported=tuple(_device(device) for device in usage.supported_compute_devices) if usage else (),
        cost=cost.weight if cost else None,
    )


def _device(device: Any) -> str:
    name = type(device).__name__
    return _DEVICES.get(name.removeprefix("_").removesuffix("Proxy"), name)


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreMLSession:
    """A loaded package as a `targets.base.UnitSession`: preprocessed images in, logits out."""

    batch: int
    loaded: Loaded
    features: Callable[[Images], Features]  # converts preprocessed images to the inputs of the package
    doubt: str | None = None  # see `Machine.doubt`

    @property
    def load_ns(self) -> int | None:
        return self.loaded.load_ns

    def plan(self) -> list[Placement]:
        return self.loaded.plan()

    def infer(self, images: Images) -> Logits:
        import numpy as np

        return cast("Logits", self.loaded.predict(self.features(images))[OUTPUT_NAME].astype(np.float32))

    def latencies_ns(self, images: Images, count: int) -> list[int]:
        return self.loaded.latencies_ns(self.features(images), count)


@contextmanager
def opened(machine: Machine, package: Path, unit: str) -> Iterator[CoreMLSession]:
    """Open a session of a package built by Edgeline, with any interface: all of them have logits among the outputs.

    Raises the errors of `Machine.load`.
    """
    loaded, doubt = machine.load(package, unit), machine.doubt(unit)
    description = import_coremltools().utils.load_spec(str(package)).description
    (image,) = description.input
    if image.type.WhichOneof("Type") == "imageType":
        preprocess = read_facts(description.metadata)["preprocess"]
        yield CoreMLSession(batch=1, loaded=loaded, features=partial(_picture, preprocess), doubt=doubt)
    else:
        batch = image.type.multiArrayType.shape[0]
        yield CoreMLSession(batch=batch, loaded=loaded, features=_tensor, doubt=doubt)


def _tensor(images: Images) -> Features:
    return {INPUT_NAME: images}


def _picture(preprocess: Mapping[str, Any], images: Images) -> Features:
    from PIL import Image

    return {INPUT_NAME: Image.fromarray(pixels(images, preprocess)[0].transpose(1, 2, 0))}
