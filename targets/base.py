"""What a target is: a runtime, the arithmetic it executes, and the toolchain that makes its engines."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from calibration.recipe import Precision, WeightOnly
from calibration.scheme import Scheme

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Images: TypeAlias = npt.NDArray[np.float32]  # (N, 3, H, W), preprocessed
    Logits: TypeAlias = npt.NDArray[np.float32]  # (N, classes)

# What an app hands to the engine and gets back, where the target has a choice: the preprocessed tensor for logits, as
# everywhere; the image itself for logits; or the image for the name of its class, with probabilities.
Interface: TypeAlias = Literal["tensor", "image", "classifier"]

INPUT_NAME = "image"
OUTPUT_NAME = "logits"


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """A finished export: what every target compiles. All files describe the same numbers.

    - `model.pt2`: torch.export program, decomposed, quantize/dequantize operators explicit (Core ML reads this)
    - `model.onnx`: the same graph, float32 around explicit Q/DQ, dynamic batch, input `image`, output `logits`
    - `scales.json`: the scale of every quantizer by module path; empty for float recipes
    - `model.json`: model, recipe, size, class names, preprocessing
    - `sample.npz`: a few preprocessed validation images with the logits of the torch program
    """

    path: Path
    precision: Precision
    batch: int  # images per query that the engine is built for
    # What Core ML alone offers; every other target gets the defaults.
    storage: WeightOnly | None = None  # weights in fewer bits than they are computed in
    interface: Interface = "tensor"
    deployment: str | None = None  # the oldest system that must run the engine, such as "iOS17"; None: the recipe's

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

    def scales(self) -> dict[str, object]:
        """The contents of `scales.json`."""
        found: dict[str, object] = json.loads((self.path / "scales.json").read_text())
        return found


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

    def missing(self) -> str | None:
        """Why this machine cannot build for the target, and what would help; None when it can."""
        ...

    def not_executed(self) -> str | None:
        """Why an engine built here cannot be executed here; None when it can."""
        ...

    def toolchain(self) -> dict[str, str]:
        """Versions that change what `build` produces: they become part of the engine's key."""
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
    """A target that takes more than the defaults of an `Export`: weights in fewer bits, other interfaces, an older
    system to run on.
    """

    def accept(
        self,
        *,
        precision: Precision,
        storage: WeightOnly | None,
        interface: Interface,
        deployment: str | None,
        batch: int,
    ) -> None:
        """Raises BadRequest, in the words of the command line, where these do not go together."""
        ...


@runtime_checkable
class Probes(Protocol):
    """A target that can show the tensors inside an engine, to find where it goes wrong."""

    def probe(self, engine: Path, names: list[str], images: Images) -> dict[str, npt.NDArray[Any]]:
        """Run one query and return those of the tensors `names` (of the export's ONNX file) that still exist."""
        ...
