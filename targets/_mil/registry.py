"""Which function computes which operator of MIL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Function: TypeAlias = Callable[..., Any]  # a Tensor, or a tuple of them for an operator with several outputs

OPERATORS: dict[str, Function] = {}


def operator(*names: str) -> Callable[[Function], Function]:
    """Register a function as what the MIL operators `names` compute.

    Its parameters are called as the operator's inputs. Those before the `*` arrive as tensors (a list of them where MIL
    takes several values; None where an optional one is not given), those after it as Python values: numbers, strings,
    booleans, lists. Where the program leaves one out, MIL's own default arrives; where an older version of the operator
    has no such input, the default of the function, or None.

    Floating-point tensors arrive in float32, whatever type the program gives them, and are rounded to that type by
    the evaluator when they leave. Integers and booleans arrive in their own type, uint16 and uint32 in int32 and int64.
    """

    def register(function: Function) -> Function:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register
