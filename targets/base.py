"""Protocols of targets: runtime, quantization scheme, and the toolchain that builds engines. Further protocols describe
optional abilities, such as bundles, compute units and model cards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias, runtime_checkable

from calibration.recipe import FloatType, Precision, WeightOnly

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from calibration.family_placements import Runtime
    from calibration.scheme import Scheme

    Images: TypeAlias = npt.NDArray[np.float32]  # (N, 3, H, W), preprocessed
    Logits: TypeAlias = npt.NDArray[np.float32]  # (N, classes)
    Executor: TypeAlias = Callable[[Images], Logits]  # takes any number of images

# Treatment of operators whose values exceed FP16: computed in float32 (auto), or an error (strict).
Half: TypeAlias = Literal["auto", "strict"]

INPUT_NAME = "image"
OUTPUT_NAME = "logits"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Target-specific options beyond precision and batch. They are part of the cache keys of its engines.

    A target with options derives a class from this one, with a default for each field.
    """

    def changed(self) -> dict[str, object]:
        """Return the options that differ from their defaults, by name."""
        values = {item.name: (getattr(self, item.name), item.default) for item in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}


NO_OPTIONS: Final = Options()


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """A finished export, the input of every target's compiler. All files contain the same weights and qparams.

    - `model.pt2`: torch.export program, decomposed, with explicit quantize/dequantize operators (read by Core ML)
    - `model.onnx`: the same graph, float32 around explicit Q/DQ, dynamic batch, input `image`, output `logits`
    - `scales.json`: the scale of every quantizer by module path; empty for float recipes
    - `model.json`: model, recipe, size, class names, preprocessing
    - `ranges.json`: the range of every tensor on real images, see `targets.fp16.Ranges`
    - `sample.npz`: a few preprocessed validation images with the logits of the torch program
    - `tensors.json`: names of the tensors that `model.pt2` and `model.onnx` share, in order of execution
    """

    path: Path
    precision: Precision
    batch: int  # images per query that the engine is built for
    storage: WeightOnly | None = None  # weight compression: fewer bits in the file than in the computation
    options: Options = NO_OPTIONS  # of the target that compiles the export
    half: Half = "auto"  # operators that exceed FP16: computed in float32, or refused ("strict")

    @property
    def onnx(self) -> Path:
        return self.path / "model.onnx"

    @property
    def program(self) -> Path:
        return self.path / "model.pt2"

    def size(self) -> int:
        """Return the side of the input in pixels."""
        return int(self.description()["size"])  # type: ignore[call-overload, no-any-return]

    def description(self) -> dict[str, object]:
        """Return the contents of `model.json`."""
        contents: dict[str, object] = json.loads((self.path / "model.json").read_text())
        return contents

    def tensors(self) -> list[str]:
        """Return the contents of `tensors.json`."""
        names: list[str] = json.loads((self.path / "tensors.json").read_text())
        return names

    def scales(self) -> dict[str, object]:
        """Return the contents of `scales.json`."""
        scales: dict[str, object] = json.loads((self.path / "scales.json").read_text())
        return scales


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Verified accuracy of an engine on the test part."""

    executed: bool  # False: the graph that the engine was compiled from was executed instead
    why_not: str | None  # reason why the target itself did not execute the engine
    by: str  # the program that executed it
    top1: float  # percent
    float_top1: float  # percent, of the float model on the same images
    images: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Facts of a verified engine for its model card, beyond its export."""

    key: str  # of the artifact
    version: str  # of Edgeline
    model: str
    recipe: str
    paper: str | None  # the publication of the network
    published: str | None  # published accuracy of the network, with its source
    weights: str  # source of the weights
    data: str  # name of the dataset of the verification
    toolchain: Mapping[str, str]  # versions of the packages that built the engine
    accuracy: Accuracy


class Session(Protocol):
    """An engine that is loaded on its device; each query has `batch` images."""

    @property
    def batch(self) -> int: ...

    def infer(self, images: Images) -> Logits:
        """Run one query of exactly `batch` preprocessed images (batch, 3, H, W) and return logits (batch, classes)."""
        ...

    def latencies_ns(self, images: Images, count: int) -> list[int]:
        """Run `count` queries in sequence and return the latency of each in nanoseconds."""
        ...


@runtime_checkable
class GpuSession(Session, Protocol):
    """A session that is timed on its GPU: `latencies_ns` excludes the copies from and to the memory of the host."""

    @property
    def method(self) -> Mapping[str, object]:
        """How queries are timed: see `targets.runner.tensorrt_engine.Execution.method`."""
        ...

    def warm_up(self, seconds: float) -> int:
        """Run queries for at least `seconds`, so that clocks rise, and return their number."""
        ...

    def end_to_end_ns(self, images: Images, count: int) -> list[int]:
        """Run `count` queries in sequence and return the latency of each in nanoseconds, including the copies."""
        ...


class Target(Protocol):
    """A runtime with the toolchain that builds its engines."""

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str:
        """Runtime and devices in one line, for `make targets`."""
        ...

    @property
    def scheme(self) -> Scheme: ...

    @property
    def processor(self) -> Runtime:
        """Kind of processor, which determines the default placement of INT8 operators."""
        ...

    def missing(self) -> str | None:
        """Return why this machine cannot build engines, with a remedy; None if it can."""
        ...

    def not_executed(self) -> str | None:
        """Return why this machine cannot execute the engines that it builds; None if it can."""
        ...

    def toolchain(self) -> dict[str, str]:
        """Return the versions that `build` depends on, by package. They are part of the engine's cache key."""
        ...

    def float_type(self, precision: Precision) -> FloatType:
        """Return the floating-point type of all operators that do not run in INT8, in engines of `precision`."""
        ...

    def build(self, export: Export, out: Path) -> None:
        """Compile an export into the empty folder `out`.

        `out` must be self-contained, since it may be moved before `open` is called.
        """
        ...

    def inspect(self, export: Export, engine: Path) -> dict[str, object]:
        """Read an engine from disk, check it without executing it, and return its description for the report.

        Raises CheckFailed if the engine does not match the export.
        """
        ...

    def graph(self, engine: Path) -> Path | None:
        """Return the ONNX file that `engine` was compiled from; None if it is `model.onnx` of the export."""
        ...

    def open(self, engine: Path) -> AbstractContextManager[Session]:
        """Load an engine made by `build`. Raises CannotRunHere if `not_executed` returns a reason."""
        ...


@runtime_checkable
class Checks(Protocol):
    """A target whose converter may reject operators that ONNX supports. It is therefore tried before the training."""

    def check(self, export: Export) -> None:
        """Run `Target.build` and `inspect` on the float export of an untrained network. The export has no `model.onnx`
        and no `sample.npz`.

        Raises CheckFailed with the operator that cannot be converted and its line in the source code.
        """
        ...


@runtime_checkable
class Bundles(Protocol):
    """A target whose engines are built on the device. The host prepares a bundle that the user copies to the device."""

    def bundle(self, export: Export, out: Path) -> None:
        """Do all host work for an export, and write the files that the device needs to the empty folder `out`."""
        ...

    def next_command(self, bundle: Path) -> str:
        """Return the command that builds an engine from the bundle on the device."""
        ...


@runtime_checkable
class Customizes(Protocol):
    """A target with options of its own, and possibly weight compression."""

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of its options on the command line."""
        ...

    @property
    def compresses(self) -> bool:
        """Whether its engines can have weight compression."""
        ...

    def options(
        self, variables: Mapping[str, str], *, precision: Precision, storage: WeightOnly | None, batch: int
    ) -> Options:
        """Parse its options in `variables` of the command line; an empty text stands for the default.

        Raises BadRequest if an option is invalid or excludes another option.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The runtime's plan for one operator of an engine. None: not reported by the runtime."""

    name: str
    kind: str  # type of the operator
    preferred: str | None  # unit that the operator is assigned to
    supported: tuple[str, ...]  # units that support the operator
    cost: float | None  # estimated share of the latency of a query, from 0 to 1


class UnitSession(Session, Protocol):
    """An engine that is loaded on one set of compute units, with its load time and compute plan."""

    @property
    def doubt(self) -> str | None:
        """Reason why latencies are not representative of these units, such as a machine without one of them; else
        None.
        """
        ...

    @property
    def load_ns(self) -> int | None:
        """Load time of the engine in nanoseconds; None if the runtime does not report it."""
        ...

    def plan(self) -> list[Placement]:
        """Return the plan of every operator except constants, in order of execution."""
        ...


@runtime_checkable
class HasUnits(Protocol):
    """A target whose engines can be restricted to a set of the device's compute units. Latency depends on the set, and
    the logits may differ between sets.
    """

    @property
    def units(self) -> tuple[str, ...]:
        """Names of the sets of units; `Target.open` uses the first."""
        ...

    def open_on(self, engine: Path, unit: str) -> AbstractContextManager[UnitSession]:
        """Load an engine as `Target.open` does, on the set of units called `unit`."""
        ...


@runtime_checkable
class Accounts(Protocol):
    """A target that reports the precision in which its engines compute, which may be less INT8 than requested."""

    def half(self) -> bool:
        """Return whether 16-bit floats are faster than 32-bit floats on this machine."""
        ...

    def macs(self, engine: Path) -> dict[str, int]:
        """Return the multiply-accumulates of a query by their precision at run time, in OpenVINO's names: `i8`, `u8`,
        `f32`, `f16`, `bf16`.
        """
        ...


@runtime_checkable
class Publishes(Protocol):
    """A target whose engines contain their own model card, for users who receive only the engine."""

    def publish(self, export: Export, engine: Path, facts: Facts) -> None:
        """Add `facts` to the verified files in `engine`.

        Files may be hard links to the source artifact: replace a changed file, never write into an existing one.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A verified engine that becomes one function of a multifunction file."""

    engine: Path  # folder of the engine, with model.json of the export
    precision: Precision
    facts: Facts


@runtime_checkable
class Merges(Protocol):
    """A target that can merge several engines into one file with a named function for each."""

    def options_of_part(self, storage: WeightOnly | None, options: Options) -> Options:
        """Return `options` with the changes that an engine needs to become part of a multifunction file.

        Raises BadRequest if `options` exclude such a file.
        """
        ...

    def toolchain(self) -> dict[str, str]:
        """Return the same as `Target.toolchain`."""
        ...

    def merge(self, parts: Mapping[str, Part], out: Path) -> None:
        """Write one file with the functions `parts` by name to the empty folder `out`; the first is the default.

        Raises CheckFailed if a written function differs from its source engine.
        """
        ...


@runtime_checkable
class Evaluates(Protocol):
    """A target whose engines can be evaluated without its runtime: slowly, but on every system."""

    @property
    def evaluator(self) -> str:
        """Name of the evaluator in reports."""
        ...

    def evaluate(self, export: Export, engine: Path) -> Executor:
        """Return a function from images to the logits of the engine that was built from `export`.

        Raises CheckFailed if the engine cannot be evaluated.
        """
        ...

    def replay(self, export: Export, engine: Path, images: Images) -> dict[str, object]:
        """Evaluate each operator of an engine on the inputs that the torch program computed (teacher forcing), for one
        query, and return a summary of the comparison.

        Raises CheckFailed with the first operator whose output differs.
        """
        ...


@runtime_checkable
class Forces(Protocol):
    """A target whose compiled graph is not an ONNX file, and can be evaluated with chosen tensors replaced."""

    def forced(
        self, engine: Path, given: Mapping[str, npt.NDArray[Any]], wanted: Collection[str]
    ) -> dict[str, npt.NDArray[Any]]:
        """Evaluate the graph in float32 for one query, with each tensor in `given` replaced by its value for its
        readers.

        Returns the tensors in `wanted` whose names the graph still has.
        """
        ...


@runtime_checkable
class Probes(Protocol):
    """A target that can return intermediate tensors of an engine, to locate an error."""

    def probe(self, engine: Path, names: list[str], images: Images) -> dict[str, npt.NDArray[Any]]:
        """Run one query and return the tensors in `names` (of the export's `model.onnx`) that the engine still has."""
        ...
