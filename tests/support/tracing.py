"""A network as torch.export traces it, and its operators that depend on the image, for tests of families."""

from __future__ import annotations

import functools

import torch
from torch.export import Dim, ExportedProgram

import models


@functools.cache
def traced(name: str, size: int) -> ExportedProgram:
    """Return the model `name` with ten classes, in evaluation mode, for any batch size."""
    example = torch.zeros(2, 3, size, size)
    batch = Dim("batch", min=1, max=1024)
    return torch.export.export(models.ALL[name].build(10).eval(), (example,), dynamic_shapes=({0: batch},))


def of_the_image(program: ExportedProgram) -> list[torch.fx.Node]:
    """Return the operators with activations as inputs; all others are constants of the traced network."""
    found: dict[torch.fx.Node, None] = {}
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.name in inputs or (node.op == "call_function" and found.keys() & set(node.all_input_nodes)):
            found[node] = None
    return [node for node in found if node.op == "call_function"]


def kind(node: torch.fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]
