"""Translation of coremltools' conversion errors into one sentence that names the operator and its source line."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from calibration.graph import fx
from calibration.graph.source_lines import nearest_line
from models.errors import CheckFailed, EdgelineError
from targets.coreml.conversion.workarounds import import_coremltools

if TYPE_CHECKING:
    from torch.fx import Node

_LONGEST = 200  # characters of an error message
_LOGGED = "\n\nERROR - converting"  # start of a log record about an error that coremltools also raises


@contextmanager
def explained() -> Iterator[None]:
    """Context of a conversion: turn any error of coremltools into CheckFailed, naming the operator where it stopped.

    Version 9.0 raises many types: NotImplementedError for operators without a converter, ValueError and IndexError from
    converters that do not support a shape or type. OSError and Edgeline's own errors pass unchanged.
    """
    import_coremltools()
    at: list[Node] = []
    logger = logging.getLogger("coremltools")
    logger.addFilter(_is_unexpected)
    try:
        with _followed(at):
            yield
    except (EdgelineError, OSError):
        raise
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:_LONGEST]
        where = f" `{fx.operator_name(at[0]) or at[0].name}` at {nearest_line(at[0])}" if at else " the network"
        version = importlib.metadata.version("coremltools")
        raise CheckFailed(
            f"TARGET=coreml: coremltools {version} cannot convert{where}: {type(error).__name__}: {first}; write it "
            "with different operators, or choose a different TARGET"
        ) from error
    finally:
        logger.removeFilter(_is_unexpected)


@contextmanager
def _followed(at: list[Node]) -> Iterator[None]:
    """Keep in `at` the operator that coremltools is reading or converting; `at` is empty outside of these steps."""
    from coremltools.converters.mil.frontend.torch import internal_graph, ops

    known: dict[str, Node] = {}
    holder = cast(Any, internal_graph.InternalTorchIRNode)
    read, convert = holder.__dict__["from_exir_node"], ops.convert_single_node

    def reading(cls: Any, node: Node) -> Any:
        known[node.name] = node
        at[:] = [node]
        result = read.__func__(cls, node)
        at.clear()
        return result

    def converting(context: Any, node: Any) -> None:
        at[:] = [known[node.name]] if node.name in known else []
        convert(context, node)
        at.clear()

    holder.from_exir_node, ops.convert_single_node = classmethod(reading), converting
    try:
        yield
    finally:
        holder.from_exir_node, ops.convert_single_node = read, convert


def _is_unexpected(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LOGGED)
