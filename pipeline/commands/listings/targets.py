"""`make targets`: list the targets."""

from __future__ import annotations

import targets
from pipeline.cli import table
from pipeline.commands.artifacts import Answer


def list_targets() -> Answer:
    """Return the targets, each with the reason if its engines cannot be built or executed on this machine."""
    columns = (table.text("target"), table.text("state"), table.text("runtime and devices"))
    rows, cells = [], []
    for target in targets.ALL.values():
        reason = target.missing()
        rows.append({"name": target.name, "ready": reason is None, "why_not": reason})
        cells.append((target.name, "ready" if reason is None else "not ready", target.summary))
        if reason or (reason := target.not_executed()):
            cells.append(("", "", reason))
    table.log(columns, cells)
    return {"targets": rows}
