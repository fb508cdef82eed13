"""Core ML itself: load a package for some of a Mac's compute units, predict with it, time it, and ask for its plan.

Everything passes through `Machine`, which trades in packages, arrays, names and numbers alone, so that a Mac or an
iPhone at the end of a cable can take the place of this Mac.
"""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, cast

from models.errors import CannotRunHere
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

    def load(self, package: Path, unit: str, function: str | None = None) -> LoadedHere:
        if reason := self.not_executed():
            raise CannotRunHere(reason)
        coremltools = import_coremltools()
        with warnings.catch_warnings():
            # Where Core ML refuses a package, MLModel only warns and later cannot predict.
            warnings.simplefilter("error", RuntimeWarning)
            try:
                model = coremltools.models.MLModel(
                    str(package), compute_units=coremltools.ComputeUnit[unit], function_name=function
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
            # A fresh dictionary each time: predict converts its values in place.
            return cast("Features", self.model.predict(dict(inputs)))

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
        with _explained("has no plan"):
            plan = import_coremltools().models.compute_plan.MLComputePlan.load_from_path(
                self.compiled, compute_units=self.model.compute_unit
            )
        function = plan.model_structure.program.functions[self.model.function_name or "main"]
        return [_placement(plan, operation) for operation in _operations(function.block) if _is_computed(operation)]


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as refusal:  # what the compiled part of coremltools makes of Core ML's errors
        raise CannotRunHere(f"Core ML on this Mac {what}: {refusal}") from refusal


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
    return _DEVICES.get(name, name)


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreMLSession:
    """A loaded package behind the interface that every target has: preprocessed images in, logits out."""

    batch: int
    loaded: Loaded
    features: Callable[[Images], Features]  # what the package takes

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
    loaded = machine.load(package, unit)
    description = import_coremltools().utils.load_spec(str(package)).description
    (image,) = description.input
    if image.type.WhichOneof("Type") == "imageType":
        preprocess = read_facts(description.metadata)["preprocess"]
        yield CoreMLSession(batch=1, loaded=loaded, features=partial(_picture, preprocess))
    else:
        yield CoreMLSession(batch=image.type.multiArrayType.shape[0], loaded=loaded, features=_tensor)


def _tensor(images: Images) -> Features:
    return {INPUT_NAME: images}


def _picture(preprocess: Mapping[str, Any], images: Images) -> Features:
    from PIL import Image

    return {INPUT_NAME: Image.fromarray(pixels(images, preprocess)[0].transpose(1, 2, 0))}
