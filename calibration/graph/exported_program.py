"""A model as a torch.export program: export, storage, execution, and access to its layers and scales."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import torch

# Registers the quantized_decomposed operators, without which a quantized program can be neither run nor loaded.
import torchao.quantization.pt2e  # noqa: F401
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node

from calibration.graph import fx

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from calibration.data.batches import Batch

_LARGEST_BATCH = 1024  # images per call; only the batch is dynamic: windows, patches and biases fix height and width
# Operators with a weight as second argument, whose first axis is the output channels.
WEIGHTED = frozenset({torch.ops.aten.conv2d.default, torch.ops.aten.linear.default})

_IDENTITY = ".data/serialization_id"  # entry of an archive that torch computes from the content and writes last
_GRAPH_ID = re.compile(rb'(\\*"graph_id\\*": )(\d+)')  # in JSON, and in JSON within a string of JSON


class LayerScales(TypedDict):
    """Quantization scales of one layer."""

    activation: float  # of its input
    weight: list[float]  # one per output channel


def export(model: nn.Module, size: int) -> ExportedProgram:
    """Trace `model`, in its current mode (training or evaluation), for images (batch, 3, size, size)."""
    example = torch.zeros(2, 3, size, size)  # a batch of one would be specialized into the graph
    return torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch", min=1, max=_LARGEST_BATCH)},))


def save(program: ExportedProgram, path: Path) -> None:
    """Write `program` as a `.pt2` archive: the same bytes for the same program, in every process.

    Raises OSError if the file cannot be written. (The archive is made in memory first: torch's archive writer throws
    from a destructor if the disk is full, which would end the process.)
    """
    content = io.BytesIO()
    with warnings.catch_warnings():
        # Of stored tensors that are views of one memory; torch doubts weights on devices other than the CPU alone.
        warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        torch.export.save(program, content)
    path.write_bytes(_reproducible(content.getbuffer()))


def _reproducible(archive: memoryview) -> memoryview:
    """Return `archive` with the graph ids in the provenance of its nodes renumbered from 0, in order of appearance.

    torch identifies graphs by `id(graph)`, an address (`torch.fx.traceback.NodeSource`). Archives of one program do not
    differ otherwise: their entries have fixed times and a fixed order.
    """
    made = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(made)
    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        for entry in source.namelist():
            name = entry.partition("/")[2]  # after the name of the archive, which the writer adds again
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

    def number(match: re.Match[bytes]) -> bytes:
        return b"%s%d" % (match[1], numbers.setdefault(match[2], len(numbers)))

    return _GRAPH_ID.sub(number, graph)


def load(path: Path) -> ExportedProgram:
    """Load a program that `save` wrote. (The format is a zip of JSON and tensors, read without unpickling code.)"""
    return torch.export.load(path)


def logits(model: nn.Module, batches: Iterable[Batch]) -> npt.NDArray[np.float32]:
    """Run every batch through `model`, in its mode and on its device, and return all logits (N, classes)."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        outputs = torch.cat([model(images.to(device)).cpu() for images, _ in batches])
    return cast("npt.NDArray[np.float32]", outputs.numpy())


def scales(graph: GraphModule) -> dict[str, LayerScales]:
    """Return the scales of the quantized layers of a converted graph, by layer name."""
    by_layer: dict[str, LayerScales] = {}
    for name, node in named_layers(graph):
        activation, weight = cast(Node, node.args[0]), cast(Node, node.args[1])
        per_channel = fx.stored_tensor(graph, cast(Node, weight.args[1]))
        by_layer[name] = {
            "activation": float(cast(float, activation.args[1])),
            "weight": per_channel.tolist(),
        }
    return by_layer


def named_layers(graph: GraphModule) -> Iterator[tuple[str, Node]]:
    """Yield the quantized layers and the path of their module. If a module computes a second layer, or is called again,
    the name is `path#2`.
    """
    times: Counter[str] = Counter()
    for node in quantized_layers(graph):
        path = fx.module_path(node)
        times[path] += 1
        yield path if times[path] == 1 else f"{path}#{times[path]}", node


def quantized_layers(graph: GraphModule) -> Iterator[Node]:
    """Yield the convolutions and linear layers whose input and weight are dequantized, in order of execution."""
    dequantize = torch.ops.quantized_decomposed
    for node in graph.graph.nodes:
        if node.target in WEIGHTED:
            inputs = {cast(Node, argument).target for argument in node.args[:2]}
            if inputs == {dequantize.dequantize_per_tensor.default, dequantize.dequantize_per_channel.default}:
                yield node
