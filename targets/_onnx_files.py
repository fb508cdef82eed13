"""ONNX files that may be damaged or of others: read and checked before anything follows their edges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import CheckFailed

if TYPE_CHECKING:
    from onnx import ModelProto


def read(path: Path) -> ModelProto:
    """The model in a file, as far as the ONNX checker can tell a valid one: operators with their attributes, tensors
    as long as their shapes, every value made before it is read. Raises CheckFailed where it is none.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    # The checker raises RuntimeError and UnicodeDecodeError, too, and TypeError where a required message is missing.
    except (DecodeError, onnx.checker.ValidationError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise CheckFailed(f"{path} is no valid ONNX model ({first_line(error)}); build the engine again") from error
    return model


def first_line(error: BaseException) -> str:
    """What an error of a library says first."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
