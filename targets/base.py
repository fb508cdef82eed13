"""What a target is: a runtime, the arithmetic it executes, and the toolchain that makes its engines."""

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

# What happens to operators that FP16 cannot hold: they stay in float32, or the recipe is refused.
Half: TypeAlias = Literal["auto", "strict"]

INPUT_NAME = "image"
OUTPUT_NAME = "logits"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of one target alone, beyond precision and batch: part of the keys of its engines. A target with options
    derives a class from this one, with a default for each field.
    """

    def changed(self) -> dict[str, object]:
        """The options that differ from their defaults, by name."""
        values = {item.name: (getattr(self, item.name), item.default) for item in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}


NO_OPTIONS: Final = Options()


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """A finished export: what every target compiles. All files describe the same numbers.

    - `model.pt2`: torch.export program, decomposed, quantize/dequantize operators explicit (Core ML reads this)
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
    storage: WeightOnly | None = None  # weights in fewer bits than they are computed in
    options: Options = NO_OPTIONS  # of the target that compiles it
    half: Half = "auto"  # operators that FP16 cannot hold: computed in float32, or refused ("strict")

    @property
    def onnx(self) -> Path:
        return self.path / "model.onnx"

    @property
    def program(self) -> Path:
        return self.path / "model.pt2"

    def size(self) -> int:
        """Side of the input in pixels."""
        return int(self.description()["size"])  # type: ignore[call-overload, no-any-return]

    def description(self) -> dict[str, object]:
        """The contents of `model.json`."""
        found: dict[str, object] = json.loads((self.path / "model.json").read_text())
        return found

    def tensors(self) -> list[str]:
        """The contents of `tensors.json`."""
        found: list[str] = json.loads((self.path / "tensors.json").read_text())
        return found

    def scales(self) -> dict[str, object]:
        """The contents of `scales.json`."""
        found: dict[str, object] = json.loads((self.path / "scales.json").read_text())
        return found


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
    """What is known of an engine once it is verified, beyond its export."""

    key: str  # of the artifact
    version: str  # of Edgeline
    model: str
    recipe: str
    paper: str | None  # that describes the network
    published: str | None  # accuracy of the network, and who says so
    weights: str  # where they come from
    data: str  # name of the dataset that it was verified on
    toolchain: Mapping[str, str]  # versions of what built it
    accuracy: Accuracy


class Session(Protocol):
    """An engine, loaded on its device and ready for `batch` images a query."""

    @property
    def batch(self) -> int: ...

    def infer(self, images: Images) -> Logits:
        """Run one query of exactly `batch` preprocessed images (batch, 3, H, W) and return logits (batch, classes)."""
        ...

    def latencies_ns(self, images: Images, count: int) -> list[int]:
        """Run `count` queries one after the other and return how long each took, in nanoseconds."""
        ...


class Target(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str:
        """One line for `make targets`: runtime and devices."""
        ...

    @property
    def scheme(self) -> Scheme: ...

    @property
    def processor(self) -> Runtime:
        """The kind of processor, which decides the default placement of INT8 operators."""
        ...

    def missing(self) -> str | None:
        """Why this machine cannot build for the target, and what would help; None when it can."""
        ...

    def not_executed(self) -> str | None:
        """Why an engine built here cannot be executed here; None when it can."""
        ...

    def toolchain(self) -> dict[str, str]:
        """Versions that change what `build` produces: they become part of the engine's key."""
        ...

    def float_type(self, precision: Precision) -> FloatType:
        """The floating-point type that engines of `precision` compute in where they do not compute in INT8."""
        ...

    def build(self, export: Export, out: Path) -> None:
        """Compile an export into the empty folder `out`.

        Everything `open` needs must end up in `out`: it may be moved before it is opened.
        """
        ...

    def inspect(self, export: Export, engine: Path) -> dict[str, object]:
        """Read a built engine back from disk, check what can be checked without executing it, and describe it.

        Raises CheckFailed where the engine is not what the export says.
        """
        ...

    def graph(self, engine: Path) -> Path | None:
        """The ONNX file that `engine` was compiled from where that is not the export's own; None where it is."""
        ...

    def open(self, engine: Path) -> AbstractContextManager[Session]:
        """Load an engine that `build` made. Raises CannotRunHere where `not_executed` gives a reason."""
        ...


@runtime_checkable
class Checks(Protocol):
    """A target with a converter of its own, which may refuse operators that ONNX has: it is tried before a training."""

    def check(self, export: Export) -> None:
        """Try `Target.build` and `inspect` on an export of an untrained network in float, without `model.onnx` and
        `sample.npz`. Raises CheckFailed naming an operator that cannot be converted, and its line in the sources.
        """
        ...


@runtime_checkable
class Bundles(Protocol):
    """A target whose engines are built on the device: the host leaves a bundle to carry there."""

    def bundle(self, export: Export, out: Path) -> None:
        """Do all host work for an export and leave what the device needs in the empty folder `out`."""
        ...

    def next_command(self, bundle: Path) -> str:
        """The command that a person types next, on the device, to turn the bundle into an engine."""
        ...


@runtime_checkable
class Customizes(Protocol):
    """A target that can store weights in fewer bits, and has options of its own."""

    def options(
        self, variables: Mapping[str, str], *, precision: Precision, storage: WeightOnly | None, batch: int
    ) -> Options:
        """The options in `variables` of the command line, an empty text being the default. Raises BadRequest where
        they are invalid, or do not go together.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """What the runtime plans for one operator of an engine. None where it does not say."""

    name: str
    kind: str  # type of the operator
    preferred: str | None  # unit that it will run on
    supported: tuple[str, ...]  # units that could run it
    cost: float | None  # the runtime's estimate of its share of the whole query, from 0 to 1


class UnitSession(Session, Protocol):
    """An engine on one set of units, which also says how it got there."""

    @property
    def doubt(self) -> str | None:
        """Why times are not those of the units by that name, such as a machine without one of them; else None."""
        ...

    @property
    def load_ns(self) -> int | None:
        """How long the runtime took to load the engine, in nanoseconds; None where it does not say."""
        ...

    def plan(self) -> list[Placement]:
        """Every operator, constants left out, in order of execution."""
        ...


@runtime_checkable
class HasUnits(Protocol):
    """A target whose engines can be held to some of the device's units: each choice has a speed of its own, and may
    have other numbers.
    """

    @property
    def units(self) -> tuple[str, ...]:
        """The names of the choices; `Target.open` takes the first."""
        ...

    def open_on(self, engine: Path, unit: str) -> AbstractContextManager[UnitSession]:
        """As `Target.open`, on the units of one choice."""
        ...


@runtime_checkable
class Accounts(Protocol):
    """A target that tells what its engines really compute in, which may be less than what they were asked for."""

    def half(self) -> bool:
        """Whether this machine has 16-bit floats that are faster than those of 32."""
        ...

    def macs(self, engine: Path) -> dict[str, int]:
        """Multiply-accumulates of a query by the precision that the runtime does them in, as OpenVINO calls it:
        `i8`, `u8`, `f32`, `f16`, `bf16`.
        """
        ...


@runtime_checkable
class Publishes(Protocol):
    """A target whose engines say themselves what they are, to those who get nothing else."""

    def publish(self, export: Export, engine: Path, facts: Facts) -> None:
        """Add `facts` to the verified files in `engine`. Some are shared with the artifact that they come from: what
        changes is written anew, never into a file that is there.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A verified engine that becomes one function of several in a file."""

    engine: Path  # with the export's model.json beside it
    precision: Precision
    facts: Facts


@runtime_checkable
class Merges(Protocol):
    """A target that can put several engines into one file, behind names."""

    def options_of_part(self, storage: WeightOnly | None, options: Options) -> Options:
        """The options that an engine must be built with to go into such a file, where `options` were requested. Raises
        BadRequest where they exclude such a file.
        """
        ...

    def toolchain(self) -> dict[str, str]:
        """As `Target.toolchain`."""
        ...

    def merge(self, parts: Mapping[str, Part], out: Path) -> None:
        """Write the parts by these names into the empty folder `out`; the first is what is used where none is named.

        Raises CheckFailed where what was written is not what it was made from.
        """
        ...


@runtime_checkable
class Evaluates(Protocol):
    """A target whose engines can be computed without its runtime: slowly, but on every system."""

    @property
    def evaluator(self) -> str:
        """What computes them, as reports call it."""
        ...

    def evaluate(self, export: Export, engine: Path) -> Executor:
        """What the engine that was built of `export` answers. Raises CheckFailed where it cannot be computed."""
        ...

    def replay(self, export: Export, engine: Path, images: Images) -> dict[str, object]:
        """Compute each operator of an engine from what the torch program computed before it, for one query, and
        describe what was compared. Raises CheckFailed naming the first operator that differs.
        """
        ...


@runtime_checkable
class Forces(Protocol):
    """A target whose compiled graph is no ONNX file, and can be evaluated with chosen tensors replaced."""

    def forced(
        self, engine: Path, given: Mapping[str, npt.NDArray[Any]], wanted: Collection[str]
    ) -> dict[str, npt.NDArray[Any]]:
        """Evaluate the graph in float32 for one query, every tensor of `given` replaced, for its readers, by the given
        value. Returns the tensors `wanted` that the graph still names.
        """
        ...


@runtime_checkable
class Probes(Protocol):
    """A target that can show the tensors inside an engine, to find where it goes wrong."""

    def probe(self, engine: Path, names: list[str], images: Images) -> dict[str, npt.NDArray[Any]]:
        """Run one query and return those of the tensors `names` (of the export's ONNX file) that still exist."""
        ...
