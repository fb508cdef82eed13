"""`make models`: list the models."""

from __future__ import annotations

import models
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
