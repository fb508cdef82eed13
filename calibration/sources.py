"""Where an operator of a traced program comes from: its name, and the line of the network's sources."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.fx import Node

_ROOT = Path(__file__).parent.parent
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in')
_TORCH = "/site-packages/torch/"
UNKNOWN = "(no line)"


def operator(node: Node) -> str:
    """The name of a node's operator without library and overload, such as `conv2d`; "" where it has none."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.partition("::")[2] if schema else ""


def line(node: Node) -> str:
    """The innermost line of the network's own source that `node` was traced at."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return UNKNOWN
    file, number = next((frame for frame in reversed(frames) if _TORCH not in frame[0]), frames[-1])
    path = Path(file)
    if path.is_relative_to(_ROOT) and "/site-packages/" not in file:
        return f"{path.relative_to(_ROOT)}:{number}"
    return f"{file.rpartition('/site-packages/')[2]}:{number}"


def nearest_line(node: Node) -> str:
    """The line of `node`, otherwise that of what it reads or of what reads it: an operator that was rewritten has none
    of its own.
    """
    seen = {node}
    pending = [node]
    while pending:
        here = pending.pop(0)
        if (found := line(here)) != UNKNOWN:
            return found
        around: Iterable[Node] = [*here.all_input_nodes, *here.users]
        new = [other for other in around if other not in seen and other.op == "call_function"]
        seen |= set(new)
        pending += new
    return UNKNOWN
