"""Reference evaluator: run a Core ML package without Core ML, each operator computed by torch on the CPU of any system.

`Evaluator` executes the program of a package, operator by operator. Each operator is implemented by one function in
`layers`, `arithmetic`, `shapes`, `sampling`, `recurrent` or `compressed`, registered under the operator's name in MIL,
Core ML's intermediate language. To add an operator, add a function there. Semantics follow coremltools' operator
definitions (apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html).
"""

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
from targets.coreml.inputs import check, inputs
from targets.coreml.mil import arithmetic, compressed, layers, recurrent, sampling, shapes  # noqa: F401 - register operators
from targets.coreml.mil.operation import is_constant
from targets.coreml.mil.registry import OPERATORS, Function

# "fp16": values that the program declares as FP16 (inputs, and outputs of operators) are rounded to FP16, as Apple's
# compute units store them. Inside an operator, float32 is used: the accumulation of these units is not documented.
# "exact": float32 throughout.
Rounding: TypeAlias = Literal["fp16", "exact"]
Watch: TypeAlias = Callable[[Any, str, Tensor], None]  # coremltools operation, name of an output, its value

_MOST_ELEMENTS = 2**28  # of a value: 1 GiB in float32
_UPDATE = "coreml_update_state"  # coremltools' operator for a write_state and the read_state after it
_COMPUTED_IN = {"f": np.float32, "u2": np.int32, "u4": np.int64}  # by kind and size of a constant's type; else as is


@dataclass(frozen=True, kw_only=True, slots=True)
class _Declared:
    """The declared type of a value of the program."""

    name: str
    shape: tuple[int | None, ...] | None  # a size of None: dynamic; a shape of None: a classifier's dictionary
    dtype: torch.dtype | None  # type that it is computed in; None for strings
    half: bool  # declared as FP16

    def __str__(self) -> str:
        return f"({', '.join('any' if size is None else str(size) for size in self.shape or ())})"

    def fits(self, value: Tensor) -> bool:
        if self.shape is None:
            return True
        sizes = zip(self.shape, value.shape, strict=False)
        return value.dim() == len(self.shape) and all(size in (None, actual) for size, actual in sizes)

    def rounded(self, value: Tensor, rounding: Rounding) -> Tensor:
        return value.half().float() if self.half and rounding == "fp16" else value


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """An operator, ready to run."""

    operation: Any
    function: Function
    values: Mapping[str, str | list[str]]  # names of the values to pass, by parameter
    fixed: Mapping[str, object]  # all other arguments
    outputs: tuple[_Declared, ...]
    finished: tuple[str, ...]  # values that no later operator reads


class Evaluator:
    """A function of a package, prepared once and run any number of times.

    `operations` are the operators as returned by `targets.coreml.package.read`, `outputs` the names of the values that
    `run` returns. Inputs must fit the shapes and ranges in the package's description, and optional inputs may be left
    out. Raises CheckFailed naming the operators that are not implemented, or an operator with an output of more than
    2^28 elements.
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
                f"the reference evaluator does not support the operators {', '.join(unknown)}: run this package on a "
                "Mac, or implement the operators in targets/coreml/mil"
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
        self._constants = {  # at first, constants that are outputs of the function
            value.name: _tensor(value.val)
            for operation in operations
            for value in operation.outputs
            if value.name in self.outputs and operation.op_type == "const"
        }
        self._steps = tuple(self._prepared(operations))
        read = {name for step in self._steps for names in step.values.values() for name in _listed(names)}
        self._constants = {name: self._constants[name] for name in self._constants.keys() & (read | {*outputs})}

    def run(
        self,
        inputs: Mapping[str, Tensor],
        *,
        given: Mapping[str, Tensor] | None = None,
        watch: Watch | None = None,
    ) -> dict[str, Tensor]:
        """Return the outputs for `inputs` by name; floating-point outputs are float32 tensors.

        States, which Core ML keeps between predictions, are zeros at the start of each run. `watch` is called with
        every value that depends on the inputs, as computed. For values named in `given`, later operators read the given
        value instead of the computed one (teacher forcing), without rounding.

        Raises BadRequest where an input is missing or has a wrong shape, CheckFailed naming an operator that fails.
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
        """Return the inputs, defaults included, in their declared types. Inputs without a reader are not checked."""
        left_out = [value for name, value in self._described.items() if name not in given and value.default is not None]
        tensors = {value.name: value.filled() for value in left_out} | dict(given)
        if self._inputs.keys() - tensors.keys():
            names = ", ".join(sorted(given)) or "none"
            raise BadRequest(f"the package has the inputs {', '.join(sorted(self._inputs))}; got {names}")
        for name, declared in self._inputs.items():
            if not declared.fits(tensors[name]):
                shape = tuple(tensors[name].shape)
                raise BadRequest(f"input {name} has shape {shape}; the package accepts {declared}")
            tensors[name] = declared.rounded(tensors[name].to(declared.dtype), self.rounding)
        check(self._described, tensors)
        return tensors

    def _prepared(self, operations: Sequence[Any]) -> Iterator[_Step]:
        """Yield the steps that depend on the inputs; compute all others, mostly weight decompression, once here."""
        last = {value.name: operation for operation in operations for value in _inputs(operation)}
        for operation in operations:
            if operation.op_type == "const":
                continue
            step = self._step(operation, last)
            if {name for names in step.values.values() for name in _listed(names)} <= self._constants.keys():
                outputs = (output.name for output in step.outputs)
                with torch.no_grad():
                    self._constants |= dict(zip(outputs, self._computed(step, self._constants), strict=True))
            else:
                yield step

    def _step(self, operation: Any, last: Mapping[str, Any]) -> _Step:
        """Prepare an operator. `last` maps every value to the last operator that reads it."""
        function = OPERATORS[operation.op_type]
        tensors, attributes = _parameters(function)
        arguments = {name: getattr(operation, name, None) for name in tensors}
        for value in _flat(arguments.values()):
            if is_constant(value):
                self._constants[value.name] = _tensor(value.val)
        unread = [output.name for output in operation.outputs if output.name not in last]
        finished = {value.name for value in _inputs(operation) if last[value.name] is operation} | {*unread}
        return _Step(
            operation=operation,
            function=function,
            values={name: _names(value) for name, value in arguments.items() if value is not None},
            fixed=dict.fromkeys(name for name, value in arguments.items() if value is None)
            | dict(_fixed(operation, attributes)),
            outputs=tuple(_bounded(operation, _declared(output)) for output in operation.outputs),
            finished=tuple(finished - {*self.outputs} - self._constants.keys() - _constant_names(operation)),
        )

    def _computed(self, step: _Step, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the outputs of an operator.

        Raises CheckFailed naming the operator where its function fails, or an output does not have the declared shape.
        """
        operation = step.operation
        tensors = {
            name: values[source] if isinstance(source, str) else [values[each] for each in source]
            for name, source in step.values.items()
        }
        try:
            result = step.function(**tensors, **step.fixed)
        except Exception as error:  # errors of any type, since a package may have any arguments
            raise CheckFailed(
                f"the reference evaluator cannot compute {operation.name} ({operation.op_type}): {error}"
            ) from error
        outputs = []
        for value, output in zip(result if isinstance(result, tuple) else (result,), step.outputs, strict=True):
            if not output.fits(value):
                raise CheckFailed(
                    f"{operation.name} ({operation.op_type}) was computed with shape {tuple(value.shape)}, but the "
                    f"package declares {output}: a fault of targets/coreml/mil, or of the package"
                )
            outputs.append(output.rounded(value, self.rounding))
        return outputs


@cache
def _parameters(function: Function) -> tuple[tuple[str, ...], Mapping[str, object]]:
    """Return the names of a function's tensor parameters, and its attributes with their default values."""
    tensors, attributes = [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            attributes[name] = None if parameter.default is parameter.empty else parameter.default
        else:
            tensors.append(name)
    return tuple(tensors), attributes


def _fixed(operation: Any, attributes: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield the attributes of an operator as Python values. Raises CheckFailed where an attribute is not constant."""
    for name, default in attributes.items():
        value = getattr(operation, name, None)
        if value is not None and value.val is None:
            raise CheckFailed(
                f"{operation.name} ({operation.op_type}) has a computed {name}; the reference evaluator needs a "
                "constant: export the model with fixed sizes"
            )
        attribute = default if value is None else value.val
        yield name, attribute.tolist() if isinstance(attribute, np.ndarray | np.generic) else attribute


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


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _is_fed(value: Any) -> bool:
    """Return whether a value is an input of the program."""
    return value.op is None and value.val is None and not _is_state(value)


def _is_state(value: Any) -> bool:
    from coremltools.converters.mil.mil import types

    return value.op is None and bool(types.is_state(value.sym_type))


def _initial(state: Any) -> Tensor:
    """Return the initial value of a state: zeros, as in Core ML."""
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
    """Return `declared`. Raises CheckFailed where an operator's output has more elements than `_MOST_ELEMENTS`."""
    elements = math.prod(size or 1 for size in declared.shape or ())
    if elements > _MOST_ELEMENTS:
        raise CheckFailed(
            f"{operation.name} ({operation.op_type}) has an output of shape {declared}, {elements} elements; the "
            f"reference evaluator supports at most {_MOST_ELEMENTS}"
        )
    return declared


def _tensor(constant: Any) -> Tensor:
    """Return a constant in the type that it is computed in. Types of fewer than 8 bits are stored in 8 bits."""
    array = np.asarray(constant)
    kind = "f" if array.dtype.kind == "f" else array.dtype.str[1:]
    stored = _COMPUTED_IN.get(kind, np.dtype(array.dtype.str))
    return torch.from_numpy(np.array(array, dtype=stored))


def _as_computed(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
