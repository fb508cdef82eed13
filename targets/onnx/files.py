"""Reading of ONNX files that may be damaged or come from elsewhere: the ONNX checker validates them first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import CheckFailed

if TYPE_CHECKING:
    from onnx import ModelProto


def read(path: Path) -> ModelProto:
    """Return the model in a file, validated by the ONNX checker.

    The checker validates the attributes of operators, the sizes of tensors, and that every value is computed before it
    is read. Raises CheckFailed where the file is not a valid ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    # The checker raises RuntimeError and UnicodeDecodeError, too, and TypeError where a required message is missing.
    except (DecodeError, onnx.checker.ValidationError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise CheckFailed(f"{path} is not a valid ONNX model ({first_line(error)}); build the engine again") from error
    return model


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 300 characters; the type of the error without a message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
