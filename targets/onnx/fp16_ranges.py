"""FP16 for ONNX graphs: measure the range of every tensor on images, and find the operators that FP16 cannot hold."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from targets.base import INPUT_NAME
from targets.fp16 import LARGEST, SENTINEL, Operator, Ranges, Unsafe, refuse_if_strict, sentence, unsafe
from targets.onnx.index import Index, copied, drop_unused_constants

if TYPE_CHECKING:
    import numpy.typing as npt
    from onnx import ModelProto, NodeProto

    from targets.base import Export, Images

# Operators that add or select a constant rather than multiply by it: a constant beyond the range of FP16 in one of
# them may represent infinity, as in an attention mask.
_ADD_OR_SELECT = frozenset({"Add", "Sub", "Where", "Max", "Min", "Clip", "Pad", "Expand", "Concat"})
_LEAST_DB = 60.0  # lowest signal-to-noise ratio of the graph with limited sentinels against the original, in dB
_CHECKED = 16  # images for this comparison

# How to measure the largest intermediate sum of a reduction: an elementwise operator before it (or None), and the
# reduction that shows the sum. ReduceL1 adds magnitudes, the upper bound of any partial sum.
_SUMS = {
    "ReduceMean": (None, "ReduceL1"),
    "ReduceSum": (None, "ReduceL1"),
    "ReduceL2": (None, "ReduceSumSquare"),
    "ReduceSumSquare": (None, "ReduceSumSquare"),
    "ReduceLogSumExp": ("Exp", "ReduceSum"),
    "GlobalAveragePool": (None, "ReduceL1"),
    "Softplus": ("Exp", "Identity"),
}

log = logging.getLogger(__name__)


def ranges_of(export: Export) -> Ranges:
    """Return the tensor ranges that were measured at export, from `ranges.json`.

    Without that file, the ranges are measured now on the sample images of the export. Without sample images they are
    empty, and operators are judged by their constants only.
    """
    file, sample = export.path / "ranges.json", export.path / "sample.npz"
    if file.exists():
        return Ranges(**json.loads(file.read_text()))
    if not sample.exists() or not export.onnx.exists():
        return Ranges()
    import onnx

    with np.load(sample) as arrays:
        return measured(onnx.load(export.onnx), [arrays["images"]])


def kept_in_float32(model: ModelProto, export: Export) -> dict[str, Unsafe]:
    """Return the operators of `model` that FP16 cannot hold, by name.

    `model` is the graph of the export or a graph with the same tensor names. Raises CheckFailed where HALF=strict and
    there is such an operator.
    """
    kept = unsafe(operators(model), ranges_of(export))
    refuse_if_strict(export, kept)
    if kept:
        log.warning("%d operators exceed the range of FP16 and run in float32: %s", len(kept), sentence(kept))
    return kept


def typed(model: ModelProto, export: Export) -> ModelProto:
    """Return `model` in FP16, except the operators that FP16 cannot hold, which stay in float32.

    `model` is the graph of the export or a graph with the same tensor names. Raises CheckFailed where HALF=strict and
    there is such an operator.
    """
    from targets.onnx.graph import to_fp16

    model = limited(model, ranges_of(export).sentinels)
    return to_fp16(model, {name: str(operator) for name, operator in kept_in_float32(model, export).items()})


def operators(model: ModelProto) -> list[Operator]:
    """Return the operators of an ONNX graph as `targets.fp16.Operator`, without Constant nodes."""
    from onnx import TensorProto, numpy_helper

    floats = (TensorProto.FLOAT, TensorProto.DOUBLE)
    constants = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.data_type in floats
    }
    stored = {tensor.name for tensor in model.graph.initializer}
    result = []
    for node in model.graph.node:
        if node.op_type == "Constant":
            stored.update(node.output)
            for attribute in node.attribute:
                if attribute.name == "value" and attribute.t.data_type in floats:
                    constants[node.output[0]] = numpy_helper.to_array(attribute.t)
            continue
        quantizer = node.op_type in ("QuantizeLinear", "DequantizeLinear")  # scales are FP16 values by construction
        result.append(
            Operator(
                name=node.name or node.output[0],
                kind=node.op_type,
                inputs=tuple("" if name in stored else name for name in node.input),
                outputs=tuple(node.output),
                constants={
                    place: constants[name]
                    for place, name in enumerate(node.input)
                    if name in constants and not quantizer and not _is_always_float(node, place)
                },
            )
        )
    return result


def _is_always_float(node: NodeProto, place: int) -> bool:
    """Return whether an input is float32 in graphs of every precision: the region and the factors of Resize."""
    return node.op_type == "Resize" and place in (1, 2)


# --- Measuring ------------------------------------------------------------------------------------------------------


def measured(model: ModelProto, batches: Iterable[Images], lines: Mapping[str, str] | None = None) -> Ranges:
    """Measure the range of every float tensor of `model` over `batches` of images (N, 3, S, S).

    The graph is computed in float32, with its sentinels (see `sentinels`) limited. `lines` maps tensors to the source
    lines of the network.
    """
    batches = iter(batches)
    first = next(batches)
    chosen = sentinels(model, first[:_CHECKED])
    probes = _Probes(limited(model, chosen))
    ranges = Ranges(lines=dict(lines or {}), sentinels=chosen)
    for images in chain([first], batches):
        for query in probes.queries(images):
            probes.take(query, ranges)
        ranges.images += len(images)
    return ranges


class _Probes:
    """A graph that outputs the minimum and maximum of each tensor: the tensors themselves would fill the memory."""

    def __init__(self, model: ModelProto) -> None:
        import onnx

        from targets.onnx.reference import plain_session

        self._graph = copied(model)
        self._outputs: list[tuple[str, str, str]] = []  # measure, measured tensor, name of the session's output
        self._rank = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in onnx.shape_inference.infer_shapes(model).graph.value_info
        }
        types = float_tensors(model)
        for name in sorted(types):  # the order of a set differs between processes, and would be that of the file
            self._add_extreme("highest", name, "ReduceMax", name)
            self._add_extreme("lowest", name, "ReduceMin", name)
        for node in list(model.graph.node):
            if node.op_type in _SUMS and node.output[0] in types:
                self._add_largest_sum(node)
        for name in sorted({name for operator in operators(model) for name in operator.delicate()} & types):
            self._add_least_nonzero(name)
        del self._graph.graph.output[:]
        names = [name for _, _, name in self._outputs]
        self._graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
        self._session = plain_session(self._graph.SerializeToString())
        self._batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value

    def queries(self, images: Images) -> Iterator[Images]:
        from targets.host import padded

        size = self._batch or len(images)
        yield from (padded(images[start : start + size], size) for start in range(0, len(images), size))

    def take(self, images: Images, ranges: Ranges) -> None:
        """Run one query and add its measurements to `ranges`."""
        results = self._session.run(None, {INPUT_NAME: images})
        for (measure, name, _), value in zip(self._outputs, results, strict=True):
            if measure == "least":
                ranges.widen(ranges.least, name, float(value), min)
            else:
                ranges.widen(ranges.sums if measure == "sum" else ranges.peaks, name, abs(float(value)))

    def _add_extreme(self, measure: str, of: str, kind: str, value: str) -> None:
        name = f"{of}__{measure}"
        self._add(kind, [value], name, keepdims=0)
        self._outputs.append((measure, of, name))

    def _add_largest_sum(self, node: NodeProto) -> None:
        """Add an output with the largest intermediate sum of a reduction."""
        from onnx import numpy_helper

        before, reduction = _SUMS[node.op_type]
        value, axes = node.input[0], list(node.input[1:2])
        if before:
            value = self._add(before, [value], f"{node.output[0]}__inside")
        if node.op_type == "GlobalAveragePool":
            axes = [f"{node.output[0]}__axes"]
            self._graph.graph.initializer.append(numpy_helper.from_array(np.array([2, 3], np.int64), axes[0]))
        if reduction != "Identity":
            value = self._add(reduction, [value, *axes], f"{node.output[0]}__reduced", keepdims=0)
        self._add_extreme("sum", node.output[0], "ReduceMax", value)

    def _add_least_nonzero(self, name: str) -> None:
        """Add an output with the smallest non-zero magnitude of a tensor."""
        from onnx import numpy_helper

        for constant, value in (("zero", 0.0), ("infinity", np.inf)):
            self._graph.graph.initializer.append(
                numpy_helper.from_array(np.array(value, np.float32), f"{name}__{constant}")
            )
        magnitude = self._add("Abs", [name], f"{name}__magnitude")
        is_zero = self._add("Equal", [magnitude, f"{name}__zero"], f"{name}__is_zero")
        nonzero = self._add("Where", [is_zero, f"{name}__infinity", magnitude], f"{name}__nonzero")
        self._add_extreme("least", name, "ReduceMin", nonzero)

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self._graph.graph.node.append(helper.make_node(kind, inputs, [output], **attributes))
        return output


def float_tensors(model: ModelProto) -> set[str]:
    """Return the names of the FP16 and float32 tensors that a graph computes."""
    from onnx import TensorProto, shape_inference

    inferred = shape_inference.infer_shapes(model).graph
    known = (*inferred.value_info, *inferred.output)
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16)
    computed = {name for node in model.graph.node for name in node.output}
    return {value.name for value in known if value.type.tensor_type.elem_type in kinds} & computed


# --- Sentinels ------------------------------------------------------------------------------------------------------


def sentinels(model: ModelProto, images: Images) -> list[str]:
    """Return the sentinels of a graph: constants beyond the range of FP16 that represent infinity, as -1e9 in a mask.

    A constant is a sentinel where operators add or select it, and limiting it to 40000 leaves the logits for `images`
    unchanged (60 dB).
    """
    from targets.onnx.reference import reference_logits

    candidates = sorted(_beyond(model))
    if not candidates:
        return []
    expected = reference_logits(model.SerializeToString(), images)

    def same(names: Sequence[str]) -> bool:
        from calibration.metrics import snr_db

        logits = reference_logits(limited(model, names).SerializeToString(), images)
        return snr_db(expected, logits) >= _LEAST_DB

    if same(candidates):
        return candidates
    alone = [name for name in candidates if same([name])]
    return alone if same(alone) else []


def _beyond(model: ModelProto) -> set[str]:
    """Return the constants that `_ADD_OR_SELECT` operators read and that have finite values beyond FP16's range."""
    floats = {name: values for name, values in Index(model).values.items() if values.dtype == np.float32}
    read = {name for node in model.graph.node if node.op_type in _ADD_OR_SELECT for name in node.input}
    return {name for name in read & floats.keys() if _is_beyond(floats[name]).any()}


def limited(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """Return a copy of `model` in which these sentinels are limited to a magnitude of 40000 where added or selected."""
    from onnx import numpy_helper

    result, constants = copied(model), Index(model).values
    new = {name: f"{name}_limited" for name in names}
    for name, other in new.items():
        values = constants[name]
        values = np.where(_is_beyond(values), np.sign(values) * np.float32(SENTINEL), values).astype(np.float32)
        result.graph.initializer.append(numpy_helper.from_array(values, other))
    for node in result.graph.node:
        if node.op_type in _ADD_OR_SELECT:
            node.input[:] = [new.get(name, name) for name in node.input]
    drop_unused_constants(result)
    return result


def _is_beyond(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    beyond: npt.NDArray[np.bool_] = np.isfinite(values) & (np.abs(values) > LARGEST)
    return beyond
