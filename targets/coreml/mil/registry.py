"""Registry of the functions that implement MIL operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Function: TypeAlias = Callable[..., Any]  # returns a Tensor, or a tuple of Tensors for several outputs

OPERATORS: dict[str, Function] = {}


def operator(*names: str) -> Callable[[Function], Function]:
    """Register a function as the implementation of the MIL operators `names`.

    The function's parameters have the names of the operator's inputs. Parameters before the `*` are tensors (lists of
    tensors for inputs with several values; None for missing optional inputs); parameters after the `*` are Python
    values: numbers, strings, booleans, lists. For an input that the program leaves out, the function gets MIL's
    default; for an input that an older version of the operator does not have, the function's default, or None.

    Floating-point tensors are float32, whatever their type in the program; the evaluator rounds the results to that
    type. Integers and booleans have their own type, except uint16 and uint32, which are int32 and int64.
    """

    def register(function: Function) -> Function:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register
