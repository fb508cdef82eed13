"""The reference executor of ONNX graphs: ONNX Runtime on the CPU, with every operator computed as it is defined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from targets.base import INPUT_NAME
from targets.host import in_queries
from targets.runner.cpu import threads

if TYPE_CHECKING:
    from targets.base import Images, Logits


_REFERENCE_BATCH = 32


def reference(model: Path | bytes) -> Callable[[Images], Logits]:
    """Return the reference executor of an ONNX graph, given as a file or as its bytes.

    It computes operators as ONNX defines them: every Q/DQ pair rounds, all other operators compute in float. Input: any
    number of images (N, 3, S, S), whether the graph has a dynamic or a fixed batch. Output: logits (N, classes).
    """
    session = plain_session(model)
    fixed = session.get_inputs()[0].shape[0]
    batch = fixed if isinstance(fixed, int) else _REFERENCE_BATCH
    return lambda images: in_queries(lambda query: session.run(None, {INPUT_NAME: query})[0], batch, images)


def reference_logits(model: Path | bytes, images: Images) -> Logits:
    """Return the logits (N, classes) of the reference executor for images (N, 3, S, S)."""
    return reference(model)(images)


def plain_session(model: Path | bytes) -> Any:
    """Return an onnxruntime.InferenceSession that computes operators as `reference` does."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # reference sessions are never timed
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
