"""`make models` and `make targets`: list the models and the targets."""

from __future__ import annotations

import models
import targets
from pipeline.cli import table
from pipeline.commands.artifacts import Answer


def list_models() -> Answer:
    """Return the models with parameters, multiply-accumulates, input size and published accuracy."""
    columns = (
        table.text("model"),
        table.text("family"),
        table.number("parameters", "{:.2f} M"),
        table.number("MACs", "{:,.0f} M"),
        table.number("input"),
        table.text("published top-1"),
    )
    rows, cells = [], []
    for spec in models.ALL.values():
        rows.append(
            {
                "name": spec.name,
                "family": spec.family,
                "parameters": spec.parameters,
                "macs": spec.macs,
                "input_size": spec.preprocess.size,
                "top1": spec.top1,
            }
        )
        top1 = f"{spec.top1:.2f} % ({spec.source})" if spec.top1 else f"none: {spec.source}"
        cells.append((spec.name, spec.family, spec.parameters / 1e6, spec.macs / 1e6, spec.preprocess.size, top1))
    table.log(columns, cells)
    return {"models": rows}


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
