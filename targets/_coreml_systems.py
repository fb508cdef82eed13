"""Which systems there are to deploy a Core ML package to, and the oldest one that a recipe can run on."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from calibration.recipe import Precision, WeightOnly
from models.errors import BadRequest
from targets._coreml_options import options_of
from targets.base import Export


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One year's systems, by the name that coremltools gives to the iPhone's, and the format of a package for them."""

    name: str
    macos: int
    specification: int
    opset: str  # of the operators


# iOS 16 is the first with FP16 inputs and outputs: for earlier ones, the first and the last operator would be a cast
# from and to float32, which the Neural Engine has not.
SYSTEMS = (
    System(name="iOS16", macos=13, specification=7, opset="CoreML6"),
    System(name="iOS17", macos=14, specification=8, opset="CoreML7"),
    System(name="iOS18", macos=15, specification=9, opset="CoreML8"),
    System(name="iOS26", macos=26, specification=10, opset="CoreML9"),
)
_BY_NAME = {system.name: system for system in SYSTEMS} | {f"macOS{system.macos}": system for system in SYSTEMS}
_IOS16, _IOS17, _IOS18, _ = SYSTEMS


def system_of(export: Export) -> System:
    """The oldest system that a package of `export` is for: the one asked for, or its recipe's own."""
    if (deployment := options_of(export).deployment) is not None:
        return _BY_NAME[deployment]
    # iOS 17 is the first to decompress palettes as it goes, not before it runs; and attention converted for it stays
    # what the Neural Engine has, products and a softmax: for iOS 18 it becomes an operator of its own.
    return max(_IOS17, _oldest(export.precision, export.storage)[0], key=SYSTEMS.index)


def accept(precision: Precision, storage: WeightOnly | None, deployment: str | None) -> None:
    """Raises BadRequest where there is no such system, or none so old that can run the recipe."""
    if deployment is None:
        return
    if deployment not in _BY_NAME:
        known = {name.lower(): name for name in _BY_NAME}
        close = difflib.get_close_matches(deployment.lower(), known, n=1, cutoff=0.85)  # another spelling, not year
        hint = f"did you mean {known[close[0]]}? " if close else ""
        raise BadRequest(f"DEPLOYMENT={deployment}: no such system; {hint}Known: {', '.join(_BY_NAME)}")
    oldest, why = _oldest(precision, storage)
    if SYSTEMS.index(_BY_NAME[deployment]) < SYSTEMS.index(oldest):
        recipe = f"RECIPE={storage.name}" if storage else f"an {precision.upper()} recipe"
        raise BadRequest(
            f"DEPLOYMENT={deployment}: {recipe} needs {oldest.name} (macOS{oldest.macos}) or later: {why}; leave "
            "DEPLOYMENT out, or take RECIPE=palette6 for weights in fewer bits on older systems"
        )


def _oldest(precision: Precision, storage: WeightOnly | None) -> tuple[System, str]:
    """The first system that can run such a package, and why no earlier one can."""
    if precision == "int8" or (storage and storage.storage == "linear" and storage.block is None):
        return _IOS18, (
            "earlier systems store INT8 weights in another form (constexpr_affine_dequantize), which is reported wrong "
            "on the GPU (github.com/apple/coremltools #2114)"
        )
    if storage and storage.storage == "linear":
        return _IOS18, "earlier systems have no scales for blocks of weights"
    if storage and storage.block:
        return _IOS18, "earlier systems have one palette for a whole tensor"
    return _IOS16, "there is no earlier one"
