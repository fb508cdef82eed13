"""Properties of the values and operations of a MIL program, as coremltools reads them."""

from __future__ import annotations

from typing import Any


def is_constant(value: Any) -> bool:
    """Return whether a value is stored in the package, and neither computed by an operator nor an input."""
    return value.val is not None and (value.op is None or value.op.op_type == "const")
