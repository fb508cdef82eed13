"""What coremltools raises while it converts, as one sentence with the operator and its line in the sources."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from calibration.sources import nearest_line, operator
from models.errors import CheckFailed, EdgelineError
from targets._coreml_fixes import import_coremltools

if TYPE_CHECKING:
    from torch.fx import Node

_LONGEST = 200  # letters of an error
_LOGGED = "\n\nERROR - converting"  # as coremltools begins the story of an error that it raises as well


@contextmanager
def explained() -> Iterator[None]:
    """Converting inside raises CheckFailed, naming the operator at which coremltools stopped, for whatever it raises.

    Version 9.0 raises errors of all kinds: NotImplementedError for operators that it has no converter for, ValueError
    and IndexError out of converters that meet shapes or types which they were not written for. Errors of the file
    system pass as they are.
    """
    import_coremltools()
    at: list[Node] = []
    logger = logging.getLogger("coremltools")
    logger.addFilter(_is_news)
    try:
        with _followed(at):
            yield
    except (EdgelineError, OSError):
        raise
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:_LONGEST]
        where = f" `{operator(at[0]) or at[0].name}` at {nearest_line(at[0])}" if at else " the network"
        version = importlib.metadata.version("coremltools")
        raise CheckFailed(
            f"TARGET=coreml: coremltools {version} cannot convert{where}: {type(error).__name__}: {first}; write it "
            "with other operators, or choose another TARGET"
        ) from error
    finally:
        logger.removeFilter(_is_news)


@contextmanager
def _followed(at: list[Node]) -> Iterator[None]:
    """`at` holds the operator that coremltools is reading or converting, and nothing before and after these steps."""
    from coremltools.converters.mil.frontend.torch import internal_graph, ops

    known: dict[str, Node] = {}
    holder = cast(Any, internal_graph.InternalTorchIRNode)
    read, convert = holder.__dict__["from_exir_node"], ops.convert_single_node

    def reading(cls: Any, node: Node) -> Any:
        known[node.name] = node
        at[:] = [node]
        found = read.__func__(cls, node)
        at.clear()
        return found

    def converting(context: Any, node: Any) -> None:
        at[:] = [known[node.name]] if node.name in known else []
        convert(context, node)
        at.clear()

    holder.from_exir_node, ops.convert_single_node = classmethod(reading), converting
    try:
        yield
    finally:
        holder.from_exir_node, ops.convert_single_node = read, convert


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LOGGED)
