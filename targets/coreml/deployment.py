"""Deployment targets of Core ML packages (iOS and macOS versions), and the oldest version that runs a recipe."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from calibration.recipe import Precision, WeightOnly
from models.errors import BadRequest
from targets.base import Export
from targets.coreml.options import options_of


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """The operating systems of one year, and the package format for them."""

    name: str  # of the iOS version, as coremltools spells it
    macos: int  # macOS version of the same year
    specification: int  # version of the package's specification
    opset: str  # MIL opset


# iOS 16 is the first version with FP16 inputs and outputs: for earlier versions, the first and the last operator would
# be casts from and to float32, which the Neural Engine does not support.
SYSTEMS = (
    System(name="iOS16", macos=13, specification=7, opset="CoreML6"),
    System(name="iOS17", macos=14, specification=8, opset="CoreML7"),
    System(name="iOS18", macos=15, specification=9, opset="CoreML8"),
    System(name="iOS26", macos=26, specification=10, opset="CoreML9"),
)
_BY_NAME = {system.name: system for system in SYSTEMS} | {f"macOS{system.macos}": system for system in SYSTEMS}
_IOS16, _IOS17, _IOS18, _ = SYSTEMS


def system_of(export: Export) -> System:
    """Return the deployment target of `export`: the requested one, or the recipe's default."""
    if (deployment := options_of(export).deployment) is not None:
        return _BY_NAME[deployment]
    # iOS 17 is the first version that decompresses palettes during execution rather than when loading. Attention
    # converted for iOS 17 consists of matrix products and a softmax, which the Neural Engine runs; for iOS 18 it
    # becomes a single `scaled_dot_product_attention`.
    return max(_IOS17, _oldest(export.precision, export.storage)[0], key=SYSTEMS.index)


def accept(precision: Precision, storage: WeightOnly | None, deployment: str | None) -> None:
    """Raise BadRequest where `deployment` is not a known system, or is too old to run the recipe."""
    if deployment is None:
        return
    if deployment not in _BY_NAME:
        known = {name.lower(): name for name in _BY_NAME}
        close = difflib.get_close_matches(deployment.lower(), known, n=1, cutoff=0.85)  # corrects spelling, not year
        hint = f"did you mean {known[close[0]]}? " if close else ""
        raise BadRequest(f"DEPLOYMENT={deployment}: no such system; {hint}Known: {', '.join(_BY_NAME)}")
    oldest, why = _oldest(precision, storage)
    if SYSTEMS.index(_BY_NAME[deployment]) < SYSTEMS.index(oldest):
        recipe = f"RECIPE={storage.name}" if storage else f"an {precision.upper()} recipe"
        raise BadRequest(
            f"DEPLOYMENT={deployment}: {recipe} needs {oldest.name} (macOS{oldest.macos}) or later: {why}; leave "
            "DEPLOYMENT out, or use RECIPE=palette6 for weights in fewer bits on older systems"
        )


def _oldest(precision: Precision, storage: WeightOnly | None) -> tuple[System, str]:
    """Return the first system that runs a package of this precision and weight storage, and why earlier ones cannot."""
    if precision == "int8" or (storage and storage.storage == "linear" and storage.block is None):
        return _IOS18, (
            "earlier systems store INT8 weights as constexpr_affine_dequantize, whose results on the GPU are reported "
            "wrong (github.com/apple/coremltools #2114)"
        )
    if storage and storage.storage == "linear":
        return _IOS18, "earlier systems have no per-block scales of weights"
    if storage and storage.block:
        return _IOS18, "earlier systems have only one palette per tensor"
    return _IOS16, "no earlier system is supported"
