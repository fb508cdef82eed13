"""Follow the program of a Core ML package, operator by operator."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from models.errors import CheckFailed
from targets._mil import arithmetic, compressed, layers, shapes  # noqa: F401 - each registers its operators
from targets._mil.registry import OPERATORS, Function

# "fp16": what the program declares as FP16 is rounded to it after every operator, as Apple's units store it (inside an
# operator, float32 is used: how they accumulate is not documented). "exact": float32 throughout.
Rounding: TypeAlias = Literal["fp16", "exact"]
Watch: TypeAlias = Callable[[Any, str, Tensor], None]  # coremltools' operation, name of one of its outputs, the value

_COMPUTED_IN = {"f": np.float32, "u2": np.int32, "u4": np.int64}  # by kind and size of a constant's type; others stay


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """One operator, ready to run."""

    operation: Any
    function: Function
    values: Mapping[str, str | list[str]]  # by parameter: the names of the values that are computed before
    fixed: Mapping[str, object]  # the other parameters
    halves: tuple[bool, ...]  # of each output, whether the program says that it is FP16
    finished: tuple[str, ...]  # values that nothing reads afterwards


class Evaluator:
    """One function of a package, prepared once and run as often as wanted.

    `operations`: as `targets._coreml.read` gives them; `outputs`: the names that `run` returns. Raises CheckFailed
    naming the operators that are not implemented.
    """

    def __init__(self, operations: Sequence[Any], outputs: Sequence[str], *, rounding: Rounding = "fp16") -> None:
        if unknown := sorted({operation.op_type for operation in operations} - OPERATORS.keys() - {"const"}):
            raise CheckFailed(
                f"the reference evaluator does not know the operators {', '.join(unknown)}: this package can only be "
                "run on a Mac, or write them in targets/_mil"
            )
        self.rounding = rounding
        self.outputs = tuple(outputs)
        self._constants: dict[str, Tensor] = {}
        self._steps = tuple(self._prepared(operations))

    def run(
        self,
        inputs: Mapping[str, Tensor],
        *,
        given: Mapping[str, Tensor] | None = None,
        watch: Watch | None = None,
    ) -> dict[str, Tensor]:
        """The outputs for `inputs`; floats are float32 tensors.

        `watch` sees every value as it was computed. Where `given` has the name of a value, that one goes to the
        operators that follow in its place (teacher forcing). Raises CheckFailed naming the operator that fails.
        """
        forced = {name: _as_computed(value) for name, value in (given or {}).items()}
        values = self._constants | {name: _as_computed(value) for name, value in inputs.items()}
        values |= {name: forced[name] for name in inputs if name in forced}
        with torch.no_grad():
            for step in self._steps:
                for output, value in zip(step.operation.outputs, self._computed(step, values), strict=True):
                    if watch:
                        watch(step.operation, output.name, value)
                    values[output.name] = forced.get(output.name, value)
                for name in step.finished:
                    del values[name]
        return {name: values[name] for name in self.outputs}

    def _prepared(self, operations: Sequence[Any]) -> Iterator[_Step]:
        """The steps that depend on the inputs. The others, decompressed weights above all, are computed here, once."""
        last = {value.name: operation for operation in operations for value in _inputs(operation)}
        for operation in operations:
            if operation.op_type == "const":
                continue
            function = OPERATORS[operation.op_type]
            tensors, attributes = _parameters(function)
            given = {name: getattr(operation, name) for name in tensors}
            for value in _flat(given.values()):
                if _is_constant(value):
                    self._constants[value.name] = _tensor(value.val)
            read = {value.name for value in _flat(given.values())}
            step = _Step(
                operation=operation,
                function=function,
                values={name: _names(value) for name, value in given.items() if value is not None},
                fixed=dict.fromkeys(name for name, value in given.items() if value is None)
                | {name: _python(getattr(operation, name)) for name in attributes},
                halves=tuple(_is_half(output) for output in operation.outputs),
                finished=tuple(
                    name
                    for name in read
                    if last.get(name) is operation and name not in self.outputs and name not in self._constants
                ),
            )
            if read <= self._constants.keys():
                outputs = (output.name for output in operation.outputs)
                self._constants |= dict(zip(outputs, self._computed(step, self._constants), strict=True))
            else:
                yield step

    def _computed(self, step: _Step, values: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs of one operator. Raises CheckFailed naming it where torch refuses, or another shape comes out."""
        operation = step.operation
        tensors = {
            name: values[found] if isinstance(found, str) else [values[each] for each in found]
            for name, found in step.values.items()
        }
        try:
            made = step.function(**tensors, **step.fixed)
        except (RuntimeError, ValueError, IndexError, NotImplementedError) as error:
            raise CheckFailed(
                f"the reference evaluator cannot compute {operation.name} ({operation.op_type}): {error}"
            ) from error
        found = []
        for value, half, output in zip(
            made if isinstance(made, tuple) else (made,), step.halves, operation.outputs, strict=True
        ):
            if tuple(value.shape) != tuple(output.shape or ()):
                raise CheckFailed(
                    f"{operation.name} ({operation.op_type}) came out as {tuple(value.shape)}, and the package says "
                    f"{tuple(output.shape)}: a fault of targets/_mil, or of the package"
                )
            found.append(value.half().float() if half and self.rounding == "fp16" else value)
        return found


@cache
def _parameters(function: Function) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a function's tensors, and those of its attributes."""
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for name, parameter in inspect.signature(function).parameters.items():
        kinds[parameter.kind is parameter.KEYWORD_ONLY].append(name)
    return tuple(kinds[False]), tuple(kinds[True])


def _inputs(operation: Any) -> Iterator[Any]:
    return _flat(operation.inputs.values())


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        elif value is not None:
            yield value


def _names(value: Any) -> str | list[str]:
    return [each.name for each in value] if isinstance(value, list | tuple) else value.name


def _is_constant(value: Any) -> bool:
    return value.op is None or value.op.op_type == "const" if value.val is not None else False


def _is_half(output: Any) -> bool:
    from coremltools.converters.mil.mil import types

    return bool(output.dtype == types.fp16)


def _python(value: Any) -> Any:
    """An attribute as plain Python: what MIL keeps in numpy's types."""
    found = getattr(value, "val", value)
    return found.tolist() if isinstance(found, np.ndarray | np.generic) else found


def _tensor(constant: Any) -> Tensor:
    """A constant of the program in the type that it is computed in. (Types below 8 bits are kept in one of 8.)"""
    array = np.asarray(constant)
    kind = "f" if array.dtype.kind == "f" else array.dtype.str[1:]
    stored = _COMPUTED_IN.get(kind, np.dtype(array.dtype.str))
    return torch.from_numpy(np.array(array, dtype=stored))


def _as_computed(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
