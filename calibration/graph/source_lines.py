"""Line of an operator of a traced program in the source code of the network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.fx import Node

_ROOT = Path(__file__).parents[2]
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in')
_TORCH = "/site-packages/torch/"
UNKNOWN = "(no line)"


def line(node: Node) -> str:
    """Return the innermost line in the network's own source code at which `node` was traced."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return UNKNOWN
    file, number = next((frame for frame in reversed(frames) if _TORCH not in frame[0]), frames[-1])
    path = Path(file)
    if path.is_relative_to(_ROOT) and "/site-packages/" not in file:
        return f"{path.relative_to(_ROOT)}:{number}"
    return f"{file.rpartition('/site-packages/')[2]}:{number}"


def nearest_line(node: Node) -> str:
    """Return the source line of `node`, or of the nearest node before or after it: an operator that was rewritten has
    no line of its own.
    """
    seen = {node}
    pending = [node]
    while pending:
        here = pending.pop(0)
        if (location := line(here)) != UNKNOWN:
            return location
        around: Iterable[Node] = [*here.all_input_nodes, *here.users]
        new = [other for other in around if other not in seen and other.op == "call_function"]
        seen |= set(new)
        pending += new
    return UNKNOWN
