"""A model as a torch.export program: how it is made, kept on disk, and asked for its scales."""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import torch

# Registers the quantized_decomposed operators, without which a quantized program can be neither run nor loaded.
import torchao.quantization.pt2e  # noqa: F401
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from calibration.batches import Batch

_LARGEST_BATCH = 1024  # images a query; only the batch is dynamic: windows, patches and biases fix height and width
# Operators with a weight as their second argument, whose output channels are the weight's first axis.
WEIGHTED = frozenset({torch.ops.aten.conv2d.default, torch.ops.aten.linear.default})

_IDENTITY = ".data/serialization_id"  # of an archive: torch computes it from the content, and writes it at the end
_GRAPH_ID = re.compile(rb'(\\*"graph_id\\*": )(\d+)')  # in JSON, and in JSON within a string of JSON


class LayerScales(TypedDict):
    """The scales that one layer computes with."""

    activation: float  # of its input
    weight: list[float]  # one an output channel


def export(model: nn.Module, size: int) -> ExportedProgram:
    """Trace `model` as it is (training or evaluation mode) for images (batch, 3, size, size)."""
    example = torch.zeros(2, 3, size, size)  # two images: one would be specialised into the graph
    return torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch", min=1, max=_LARGEST_BATCH)},))


def save(program: ExportedProgram, path: Path) -> None:
    """Write `program` as a `.pt2` archive: the same bytes for the same program, in every process.

    Raises OSError where the file cannot be written. (Written by torch itself, a full disk would end the process: its
    archive writer throws from a destructor. So the archive is made in memory first.)
    """
    content = io.BytesIO()
    torch.export.save(program, content)
    path.write_bytes(_reproducible(content.getbuffer()))


def _reproducible(archive: memoryview) -> memoryview:
    """The `archive` with the graphs that its nodes come from numbered from 0, in the order that they are named in.

    torch identifies them by `id(graph)`, an address, in the provenance of each node (`torch.fx.traceback.NodeSource`).
    Nothing else differs between two archives of one program: their entries have fixed times and a fixed order.
    """
    made = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(made)
    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        for entry in source.namelist():
            name = entry.partition("/")[2]  # behind the name of the archive, which the writer puts there again
            if name == _IDENTITY:
                continue
            content = source.read(entry)
            if name.startswith("models/"):
                content = _numbered(content)
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return made.getbuffer()


def _numbered(graph: bytes) -> bytes:
    numbers: dict[bytes, int] = {}

    def number(found: re.Match[bytes]) -> bytes:
        return b"%s%d" % (found[1], numbers.setdefault(found[2], len(numbers)))

    return _GRAPH_ID.sub(number, graph)


def load(path: Path) -> ExportedProgram:
    """Read back a program of ours. (The format is a zip of JSON and tensors that is read without unpickling code.)"""
    return torch.export.load(path)


def logits(model: nn.Module, batches: Iterable[Batch]) -> npt.NDArray[np.float32]:
    """Run every batch through `model`, as it is and where it is, and return all logits (N, classes)."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        found = torch.cat([model(images.to(device)).cpu() for images, _ in batches])
    return cast("npt.NDArray[np.float32]", found.numpy())


def scales(graph: GraphModule) -> dict[str, LayerScales]:
    """The scales of a converted graph by name of the layer that computes with them."""
    found: dict[str, LayerScales] = {}
    for name, node in named_layers(graph):
        activation, weight = cast(Node, node.args[0]), cast(Node, node.args[1])
        per_channel = stored_tensor(graph, cast(Node, weight.args[1]))
        found[name] = {
            "activation": float(cast(float, activation.args[1])),
            "weight": per_channel.tolist(),
        }
    return found


def named_layers(graph: GraphModule) -> Iterator[tuple[str, Node]]:
    """The quantized layers by path of their module. Where it computes a second one, or is called again, that is
    `path#2`.
    """
    times: Counter[str] = Counter()
    for node in quantized_layers(graph):
        path = module_path(node)
        times[path] += 1
        yield path if times[path] == 1 else f"{path}#{times[path]}", node


def quantized_layers(graph: GraphModule) -> Iterator[Node]:
    """The convolutions and linear layers whose inputs are both dequantized integers, in order of execution."""
    dequantize = torch.ops.quantized_decomposed
    for node in graph.graph.nodes:
        if node.target in WEIGHTED:
            inputs = {cast(Node, argument).target for argument in node.args[:2]}
            if inputs == {dequantize.dequantize_per_tensor.default, dequantize.dequantize_per_channel.default}:
                yield node


def module_path(node: Node) -> str:
    """The path of the innermost module that `node` was traced in, such as `stages.2.1.conv_kxk.conv`."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    return str(list(stack.values())[-1][0])


def stored_tensor(graph: GraphModule, node: Node) -> Tensor:
    """The parameter or buffer that a node of the graph reads."""
    assert node.op == "get_attr", f"{node} is computed, not stored"
    owner, _, name = str(node.target).rpartition(".")
    return cast(Tensor, getattr(graph.get_submodule(owner), name))
