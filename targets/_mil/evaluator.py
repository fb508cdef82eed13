"""Follow the program of a Core ML package, operator by operator."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from models.errors import BadRequest, CheckFailed
from targets._coreml import is_constant
from targets._coreml_inputs import check, inputs
from targets._mil import arithmetic, compressed, layers, recurrent, sampling, shapes  # noqa: F401 - register operators
from targets._mil.registry import OPERATORS, Function

# "fp16": what the program declares as FP16 is rounded to it, inputs and the outputs of every operator, as Apple's units
# store it (inside an operator, float32 is used: how they accumulate is not documented). "exact": float32 throughout.
Rounding: TypeAlias = Literal["fp16", "exact"]
Watch: TypeAlias = Callable[[Any, str, Tensor], None]  # coremltools' operation, name of one of its outputs, the value

_MOST_ELEMENTS = 2**28  # of one value: 1 GiB in float32
_UPDATE = "coreml_update_state"  # what coremltools reads a write_state and the read_state after it as
_COMPUTED_IN = {"f": np.float32, "u2": np.int32, "u4": np.int64}  # by kind and size of a constant's type; others stay


@dataclass(frozen=True, kw_only=True, slots=True)
class _Declared:
    """What the program says of a value."""

    name: str
    shape: tuple[int | None, ...] | None  # None for any size; for what is no tensor: a classifier's dictionary
    dtype: torch.dtype | None  # that it is computed in; None for what is no number
    half: bool  # FP16

    def __str__(self) -> str:
        return f"({', '.join('any' if size is None else str(size) for size in self.shape or ())})"

    def fits(self, value: Tensor) -> bool:
        if self.shape is None:
            return True
        sizes = zip(self.shape, value.shape, strict=False)
        return value.dim() == len(self.shape) and all(size in (None, came) for size, came in sizes)

    def rounded(self, value: Tensor, rounding: Rounding) -> Tensor:
        return value.half().float() if self.half and rounding == "fp16" else value


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """One operator, ready to run."""

    operation: Any
    function: Function
    values: Mapping[str, str | list[str]]  # by parameter: the names of the values that are computed before
    fixed: Mapping[str, object]  # the other parameters
    outputs: tuple[_Declared, ...]
    finished: tuple[str, ...]  # values that nothing reads afterwards


class Evaluator:
    """One function of a package, prepared once and run as often as wanted.

    `operations`: as `targets._coreml.read` gives them; `outputs`: the names that `run` returns. Inputs that the package
    describes are held to its enumerated shapes and ranges, and optional ones may be left out. Raises CheckFailed naming
    the operators that are not implemented, or one that puts out more than memory is made for.
    """

    def __init__(
        self,
        operations: Sequence[Any],
        outputs: Sequence[str],
        *,
        rounding: Rounding = "fp16",
    ) -> None:
        if unknown := sorted({operation.op_type for operation in operations} - OPERATORS.keys() - {"const"}):
            raise CheckFailed(
                f"the reference evaluator does not know the operators {', '.join(unknown)}: this package can only be "
                "run on a Mac, or write them in targets/_mil"
            )
        self.rounding = rounding
        self.outputs = tuple(outputs)
        self._inputs = {
            value.name: _declared(value) for operation in operations for value in _inputs(operation) if _is_fed(value)
        }
        described = getattr(operations, "described", ())
        self._described = {value.name: value for value in inputs(described) if value.name in self._inputs}
        self._states = {
            value.name: _initial(value) for operation in operations for value in _inputs(operation) if _is_state(value)
        }
        self._constants = {  # that are outputs themselves
            value.name: _tensor(value.val)
            for operation in operations
            for value in operation.outputs
            if value.name in self.outputs and operation.op_type == "const"
        }
        self._steps = tuple(self._prepared(operations))
        read = {name for step in self._steps for found in step.values.values() for name in _listed(found)}
        self._constants = {name: self._constants[name] for name in self._constants.keys() & (read | {*outputs})}

    def run(
        self,
        inputs: Mapping[str, Tensor],
        *,
        given: Mapping[str, Tensor] | None = None,
        watch: Watch | None = None,
    ) -> dict[str, Tensor]:
        """The outputs for `inputs`; floats are float32 tensors.

        States, which Core ML keeps from one prediction to the next, are zeros at the beginning of each run.
        `watch` sees every value that depends on the inputs, as it was computed. Where `given` has the name of one, that
        goes to the operators that follow in its place (teacher forcing), as it is: it is not rounded.
        Raises BadRequest where an input is missing or of another shape, CheckFailed naming an operator that fails.
        """
        forced = {name: _as_computed(value) for name, value in (given or {}).items()}
        values = (
            self._constants
            | self._states
            | self._fed(inputs)
            | {name: forced[name] for name in inputs if name in forced}
        )
        with torch.no_grad():
            for step in self._steps:
                for output, value in zip(step.outputs, self._computed(step, values), strict=True):
                    if watch:
                        watch(step.operation, output.name, value)
                    values[output.name] = forced.get(output.name, value)
                if step.operation.op_type == _UPDATE:
                    values[step.operation.state.name] = values[step.outputs[0].name]
                for name in step.finished:
                    del values[name]
        return {name: values[name] for name in self.outputs}

    def _fed(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs in the types that the program declares. (One that no operator reads is not known here.)"""
        left_out = [value for name, value in self._described.items() if name not in given and value.default is not None]
        found = {value.name: value.filled() for value in left_out} | dict(given)
        if self._inputs.keys() - found.keys():
            came = ", ".join(sorted(given)) or "none"
            raise BadRequest(f"the package takes the inputs {', '.join(sorted(self._inputs))}; got {came}")
        for name, declared in self._inputs.items():
            if not declared.fits(found[name]):
                shape = tuple(found[name].shape)
                raise BadRequest(f"input {name} has the shape {shape}; the package takes {declared}")
            found[name] = declared.rounded(found[name].to(declared.dtype), self.rounding)
        check(self._described, found)
        return found

    def _prepared(self, operations: Sequence[Any]) -> Iterator[_Step]:
        """The steps that depend on the inputs. The others, decompressed weights above all, are computed here, once."""
        last = {value.name: operation for operation in operations for value in _inputs(operation)}
        for operation in operations:
            if operation.op_type == "const":
                continue
            step = self._step(operation, last)
            if {name for found in step.values.values() for name in _listed(found)} <= self._constants.keys():
                names = (output.name for output in step.outputs)
                with torch.no_grad():
                    self._constants |= dict(zip(names, self._computed(step, self._constants), strict=True))
            else:
                yield step

    def _step(self, operation: Any, last: Mapping[str, Any]) -> _Step:
        """`last`: of every value, the operator that reads it last."""
        function = OPERATORS[operation.op_type]
        tensors, attributes = _parameters(function)
        given = {name: getattr(operation, name, None) for name in tensors}
        for value in _flat(given.values()):
            if is_constant(value):
                self._constants[value.name] = _tensor(value.val)
        unread = [output.name for output in operation.outputs if output.name not in last]
        finished = {value.name for value in _inputs(operation) if last[value.name] is operation} | {*unread}
        return _Step(
            operation=operation,
            function=function,
            values={name: _names(value) for name, value in given.items() if value is not None},
            fixed=dict.fromkeys(name for name, value in given.items() if value is None)
            | dict(_fixed(operation, attributes)),
            outputs=tuple(_bounded(operation, _declared(output)) for output in operation.outputs),
            finished=tuple(finished - {*self.outputs} - self._constants.keys() - _constant_names(operation)),
        )

    def _computed(self, step: _Step, values: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs of one operator. Raises CheckFailed naming it where torch refuses, or another shape comes out."""
        operation = step.operation
        tensors = {
            name: values[found] if isinstance(found, str) else [values[each] for each in found]
            for name, found in step.values.items()
        }
        try:
            made = step.function(**tensors, **step.fixed)
        except Exception as error:  # torch's, numpy's, and those of operators that a package has made up
            raise CheckFailed(
                f"the reference evaluator cannot compute {operation.name} ({operation.op_type}): {error}"
            ) from error
        found = []
        for value, output in zip(made if isinstance(made, tuple) else (made,), step.outputs, strict=True):
            if not output.fits(value):
                raise CheckFailed(
                    f"{operation.name} ({operation.op_type}) came out as {tuple(value.shape)}, and the package says "
                    f"{output}: a fault of targets/_mil, or of the package"
                )
            found.append(output.rounded(value, self.rounding))
        return found


@cache
def _parameters(function: Function) -> tuple[tuple[str, ...], Mapping[str, object]]:
    """The names of a function's tensors, and its attributes with the value of each where the program has none."""
    tensors, attributes = [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            attributes[name] = None if parameter.default is parameter.empty else parameter.default
        else:
            tensors.append(name)
    return tuple(tensors), attributes


def _fixed(operation: Any, attributes: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """The attributes as plain Python: of what MIL keeps in numpy's types."""
    for name, default in attributes.items():
        value = getattr(operation, name, None)
        if value is not None and value.val is None:
            raise CheckFailed(
                f"{operation.name} ({operation.op_type}) computes its {name} while it runs; the reference evaluator "
                "takes it from a constant: export the model with fixed sizes"
            )
        found = default if value is None else value.val
        yield name, found.tolist() if isinstance(found, np.ndarray | np.generic) else found


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


def _listed(found: str | list[str]) -> list[str]:
    return [found] if isinstance(found, str) else found


def _is_fed(value: Any) -> bool:
    """Whether it is an input of the program."""
    return value.op is None and value.val is None and not _is_state(value)


def _is_state(value: Any) -> bool:
    from coremltools.converters.mil.mil import types

    return value.op is None and bool(types.is_state(value.sym_type))


def _initial(state: Any) -> Tensor:
    """What Core ML gives to a state that is new."""
    from coremltools.converters.mil.mil import types

    tensor = state.sym_type.wrapped_type()
    return _tensor(np.zeros(tensor.get_shape(), types.nptype_from_builtin(tensor.get_primitive())))


def _constant_names(operation: Any) -> set[str]:
    return {value.name for value in _inputs(operation) if is_constant(value)}


def _declared(value: Any) -> _Declared:
    from coremltools.converters.mil.mil import types

    sizes = None if types.is_dict(value.sym_type) else value.shape
    is_number = types.is_float(value.dtype) or types.is_int(value.dtype) or types.is_bool(value.dtype)
    return _Declared(
        name=value.name,
        shape=None if sizes is None else tuple(None if types.symbolic.is_symbolic(n) else int(n) for n in sizes),
        dtype=_tensor(np.zeros((), types.nptype_from_builtin(value.dtype))).dtype if is_number else None,
        half=value.dtype == types.fp16,
    )


def _bounded(operation: Any, declared: _Declared) -> _Declared:
    """Raises CheckFailed where an operator puts out so much that it is no network for a picture."""
    elements = math.prod(size or 1 for size in declared.shape or ())
    if elements > _MOST_ELEMENTS:
        raise CheckFailed(
            f"{operation.name} ({operation.op_type}) puts out {declared}, {elements} numbers; the reference evaluator "
            f"computes up to {_MOST_ELEMENTS} at a time"
        )
    return declared


def _tensor(constant: Any) -> Tensor:
    """A constant of the program in the type that it is computed in. (Types below 8 bits are kept in one of 8.)"""
    array = np.asarray(constant)
    kind = "f" if array.dtype.kind == "f" else array.dtype.str[1:]
    stored = _COMPUTED_IN.get(kind, np.dtype(array.dtype.str))
    return torch.from_numpy(np.array(array, dtype=stored))


def _as_computed(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
