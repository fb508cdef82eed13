"""`make explain`: the stages that would be reused, and the changes that rebuild the others."""

from __future__ import annotations

from pathlib import Path

from pipeline.cli import table
from pipeline.commands.artifacts import Answer
from pipeline.run import Run
from pipeline.stages.engine import deliverable
from pipeline.store.store import Store


def explain(run: Run, root: Path) -> Answer:
    """Return every stage with its cache key and whether it is in the store; if not, with the changes that rebuild it.

    Builds nothing.
    """
    store = Store(root)
    rows: list[Answer] = []
    cells = []
    for step in deliverable(run).chain():
        cached, why = store.has(step), store.explain(step)
        rows.append({"stage": step.stage, "key": step.key, "cached": cached, "why": why})
        cells.append((step.stage, "hit" if cached else "build", "; ".join(why)))
    table.log((table.text("stage"), table.text("state"), table.text("changes")), cells)
    return {"stages": rows}
