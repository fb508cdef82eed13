"""Core ML itself: load a package for some of a Mac's compute units, predict with it, time it, and ask for its plan.

Written against coremltools 9.0, whose signatures the tests check; none of it has been executed on a Mac, and off macOS
`ThisMac.not_executed` says so.

Everything passes through `Machine`, which trades in packages, arrays, names and numbers alone, so that a Mac or an
iPhone at the end of a cable can take the place of this Mac.
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
from targets._coreml import read_facts
from targets._coreml_fixes import import_coremltools
from targets._coreml_interface import pixels
from targets.base import INPUT_NAME, OUTPUT_NAME, Placement

if TYPE_CHECKING:
    from targets.base import Images, Logits

# coremltools.ComputeUnit by name. The first is what an app gets that asks for nothing. Where the Neural Engine cannot
# compile an operator, Core ML runs it elsewhere and says nothing: ALL may be slower than CPU_AND_NE, hence all four.
UNITS: Final = ("ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE")

_MACOS: Final = 15  # the first with the operators of iOS 18; MLComputePlan needs 14.4
_DEVICES: Final = {  # classes of coremltools.models.compute_device
    "MLCPUComputeDevice": "CPU",
    "MLGPUComputeDevice": "GPU",
    "MLNeuralEngineComputeDevice": "Neural Engine",
}

_NEEDS: Final = {"ALL": "Neural Engine", "CPU_AND_GPU": "GPU", "CPU_AND_NE": "Neural Engine"}  # device, by unit

# Core ML frees the arrays of a prediction about a second later, and without holding Python's lock (apple/coremltools
# pull requests 2827 and 2829): the last reference must not be its own. So inputs are held here for some seconds.
_HELD_SECONDS: Final = 10.0
_HELD: deque[tuple[float, Features]] = deque()

# By name: arrays, or PIL images; a classifier answers with a string and a dictionary, too.
Features: TypeAlias = Mapping[str, Any]


class Loaded(Protocol):
    """A package that a machine has compiled and loaded for one of `UNITS`."""

    @property
    def load_ns(self) -> int | None:
        """Core ML's own time for loading, in nanoseconds, without the compilation of the package; None: not known.

        It includes the Neural Engine's specialization of the program, which the system may have kept from before.
        """
        ...

    def predict(self, inputs: Features) -> Features: ...

    def latencies_ns(self, inputs: Features, count: int) -> list[int]:
        """Core ML's own time for each of `count` predictions in a row, looped where the package is loaded."""
        ...

    def plan(self) -> list[Placement]: ...


class Machine(Protocol):
    """Where Core ML runs: `ThisMac`, or whatever takes its place."""

    def not_executed(self) -> str | None:
        """Why packages cannot be executed there; None where they can."""
        ...

    def doubt(self, unit: str) -> str | None:
        """Why times on one of `UNITS` are not what its name promises; None where nothing is known against them."""
        ...

    def load(self, package: Path, unit: str, function: str | None = None) -> Loaded:
        """Load one function of an .mlpackage, by default its default one, for one of `UNITS`.

        Raises CannotRunHere with the reason of `not_executed`, or Core ML's own where it refuses the package.
        """
        ...


@dataclass(frozen=True, slots=True)
class ThisMac:
    """The Mac that this process runs on, through coremltools."""

    def not_executed(self) -> str | None:
        if sys.platform != "darwin":
            return "needs macOS: Core ML runs on Apple devices only; on a Mac, the package runs as it is"
        release = platform.mac_ver()[0]
        if int(release.partition(".")[0]) < _MACOS:
            return f"needs macOS {_MACOS} or later: this Mac has {release}"
        return None

    def doubt(self, unit: str) -> str | None:
        """A device that the unit is named after and that this Mac, an Intel one or a virtual machine, does not have."""
        needed = _NEEDS.get(unit)
        if needed is None or needed in self.devices():
            return None
        return f"this Mac has no {needed}: Core ML runs {unit} elsewhere without a word"

    def devices(self) -> set[str]:
        """The names, as in a plan, of what Core ML can compute on here."""
        with _explained("does not list its devices"):
            found = import_coremltools().models.compute_device.MLComputeDevice.get_all_compute_devices()
        return {_device(device) for device in found}

    def load(self, package: Path, unit: str, function: str | None = None) -> LoadedHere:
        """As `Machine.load`. Shapes are fixed and predictions matter more than loading, which Core ML is told: an app
        does the same with MLModelConfiguration.optimizationHints.
        """
        if reason := self.not_executed():
            raise CannotRunHere(reason)
        coremltools = import_coremltools()
        with warnings.catch_warnings(), _explained(f"cannot load {package} for {unit}"):
            # Where Core ML refuses a package, MLModel only warns and later cannot predict.
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
    model: Any  # coremltools.models.MLModel; it deletes `compiled` when it goes
    compiled: str  # the .mlmodelc folder

    @property
    def load_ns(self) -> int | None:
        found: int | None = self.model.load_duration_in_nano_seconds
        return found

    def predict(self, inputs: Features) -> Features:
        with _explained("cannot predict"):
            given = dict(inputs)  # a fresh one each time: predict converts its values in place
            _hold(given)
            return cast("Features", self.model.predict(given))

    def latencies_ns(self, inputs: Features, count: int) -> list[int]:
        """Without the copies between Python and Core ML: an app hands over the array itself. Source: coremlpython's
        CoreMLPython.mm, which reads the clock around `predictionFromFeatures` alone.
        """
        latencies = []
        for _ in range(count):
            self.predict(inputs)
            taken: int | None = self.model.last_predict_duration_in_nano_seconds
            if taken is None:
                raise CannotRunHere("Core ML does not say how long a prediction took: update coremltools")
            latencies.append(taken)
        return latencies

    def plan(self) -> list[Placement]:
        """Of the default function. Raises CannotRunHere for any other: Core ML's plans name no function."""
        default = self.model.get_spec().description.defaultFunctionName or "main"
        function = self.model.function_name or default
        if function != default:
            raise CannotRunHere(
                f"Core ML has a plan of a package's default function, {default}, alone; build {function} as an engine "
                "of its own to see where it runs"
            )
        with _explained("has no plan"):
            plan = import_coremltools().models.compute_plan.MLComputePlan.load_from_path(
                self.compiled, compute_units=self.model.compute_unit
            )
            operations = _operations(plan.model_structure.program.functions[function].block)
            return [_placement(plan, operation) for operation in operations if _is_computed(operation)]


def _hold(inputs: Features) -> None:
    """Keep what Core ML was given, with what coremltools converted it to, until Core ML has let go of it."""
    now = time.monotonic()
    while _HELD and _HELD[0][0] < now - _HELD_SECONDS:
        _HELD.popleft()
    _HELD.append((now, inputs))


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever coremltools and its compiled part raise inside, as CannotRunHere: they name no types of errors."""
    try:
        yield
    except EdgelineError:
        raise
    except Exception as refusal:
        cause = str(refusal) or type(refusal).__name__
        raise CannotRunHere(f"Core ML on this Mac {what}: {cause}") from refusal


def _compiled(model: Any, package: Path) -> str:
    """The folder of the compiled package. Raises CannotRunHere where coremltools did not hand it to Core ML."""
    try:
        return cast("str", model.get_compiled_model_path())
    except Exception as nothing:  # coremltools raises nothing more specific
        version = model.get_spec().specificationVersion
        raise CannotRunHere(
            f"Core ML on this Mac did not load {package}, which has specification version {version}: update macOS, or "
            "build it for an older system with DEPLOYMENT="
        ) from nothing


def _operations(block: Any) -> Iterator[Any]:
    """The operations of a block and of the blocks inside them (of conditionals and loops), each after its owner."""
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


def _is_computed(operation: Any) -> bool:
    return _kind(operation) != "const"


def _kind(operation: Any) -> str:
    """The operator's type as a package has it: a compiled one may have `ios18.conv` for `conv`."""
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
    """A loaded package behind the interface that every target has: preprocessed images in, logits out."""

    batch: int
    loaded: Loaded
    features: Callable[[Images], Features]  # what the package takes
    doubt: str | None = None  # why times are not what the name of the units promises

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
    """A session of a package of this project's, whatever its interface: logits are among the outputs of each.

    Raises as `Machine.load` does.
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
