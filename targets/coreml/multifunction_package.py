"""Multifunction packages: merge Core ML packages into one package with a named function for each.

Equal weights are stored once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from calibration.recipe import WeightOnly
from models.errors import BadRequest, CheckFailed
from targets.coreml.conversion.workarounds import import_coremltools, no_leftovers, no_progress_bars
from targets.coreml.deployment import SYSTEMS
from targets.coreml.interface import features
from targets.coreml.mil.operation import is_constant
from targets.coreml.package import Package, read

_FIRST = "iOS18"  # the first system that loads packages with several functions


def deployment_of_part(storage: WeightOnly | None, deployment: str | None) -> str | None:
    """Return the deployment target that a package must be built for to become a function; None: the recipe's default.

    `deployment` is the requested target. Raises BadRequest where it is too old for packages with several functions.
    """
    names = [system.name for system in SYSTEMS], [f"macOS{system.macos}" for system in SYSTEMS]
    first = names[0].index(_FIRST)
    if deployment in (*names[0][:first], *names[1][:first]):
        raise BadRequest(
            f"DEPLOYMENT={deployment}: a package with several functions needs {_FIRST} ({names[1][first]}) or later; "
            "leave DEPLOYMENT out, or build one engine for each function"
        )
    # coremltools merges packages as iOS 18 packages. Operators of older opsets remain valid, and attention is better
    # converted for the recipe's default (see `deployment.system_of`); but palettes are stored differently.
    return _FIRST if storage and deployment is None else deployment


def merge(packages: Mapping[str, Path], out: Path) -> None:
    """Write the packages as functions of these names to `out`; the first is the default function.

    Raises CheckFailed where a function, read back from `out`, differs from its package.
    """
    coremltools = import_coremltools()
    descriptor = coremltools.utils.MultiFunctionDescriptor()
    for name, path in packages.items():
        descriptor.add_function(str(path), src_function_name="main", target_function_name=name)
    descriptor.default_function_name = next(iter(packages))
    with no_progress_bars(), no_leftovers():
        coremltools.utils.save_multifunction(descriptor, str(out))
    for name, path in packages.items():
        check(name, read(out, name), read(path))


def check(name: str, found: Package, expected: Package) -> None:
    """Raise CheckFailed where the function `name` differs from the package that it was made from.

    Compared are the inputs and outputs, and the type, name, shapes and inputs of every operator.
    """
    for noun, one, other in (
        ("inputs", features(found.inputs), features(expected.inputs)),
        ("outputs", found.outputs, expected.outputs),
        ("described outputs", features(_described(found, name).output), features(expected.spec.description.output)),
    ):
        if one != other:
            raise CheckFailed(f"{noun} of function {name}: {one}, expected {other}")
    for place, (ours, theirs) in enumerate(zip_longest(_computed(found), _computed(expected))):
        if difference := _difference(ours, theirs):
            raise CheckFailed(
                f"operator {place + 1} of function {name} differs from the package that it was made from: {difference}"
            )


def _described(package: Package, name: str) -> Any:
    (function,) = (described for described in package.spec.description.functions if described.name == name)
    return function


def _computed(package: Package) -> Iterator[Any]:
    """Return the operators without constants, which are compared where they are read: merging deduplicates them."""
    return (operation for operation in package.operations if operation.op_type != "const")


def _difference(ours: Any | None, theirs: Any | None) -> str | None:
    if ours is None or theirs is None:
        return f"{_titled(ours)}, expected {_titled(theirs)}"
    if (one := _signature(ours)) != (other := _signature(theirs)):
        return f"{_titled(ours)} is {one}, expected {other}"
    for parameter in ours.inputs.keys() | theirs.inputs.keys():
        if not _same(ours.inputs.get(parameter), theirs.inputs.get(parameter)):
            return f"{_titled(ours)} has a different {parameter}"
    return None


def _titled(operation: Any | None) -> str:
    return f"{operation.name} ({operation.op_type})" if operation is not None else "nothing"


def _signature(operation: Any) -> tuple[str, list[tuple[str, str]]]:
    return operation.op_type, [(value.name, str(value.sym_type)) for value in operation.outputs]


def _same(ours: Any, theirs: Any) -> bool:
    """Return whether two inputs are equal: both missing, equal constants, values of one name, or lists of equals."""
    if ours is None or theirs is None:
        return ours is theirs
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(_same(*pair) for pair in zip(ours, theirs, strict=True))
    if is_constant(ours) and is_constant(theirs):
        return _equal(ours.val, theirs.val)
    return bool(ours.name == theirs.name)


def _equal(ours: Any, theirs: Any) -> bool:
    import numpy as np

    one, other = np.asarray(ours), np.asarray(theirs)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
