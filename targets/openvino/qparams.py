"""Quantization parameters of an OpenVINO model: scales, zero points and integer weights, read from its constants.

x -> FakeQuantize -> Convert (i8, u8) -> Convert -> [Subtract zero point] -> Multiply scale -> layer
                            int8 weight -> Convert -> [Subtract zero point] -> Multiply scale -^
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from calibration.graph.qparams import Activation, Carried, Weight, first_nonzero

_LAYOUT = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze"})
# Operators that quantizers consist of, and operators that read only shapes: they are not quantized operators.
_NO_READERS = frozenset({"Multiply", "Subtract", "Convert", "FakeQuantize", "Constant", "ShapeOf"})
_STEPS = 255  # quantization steps between the lower and the upper limit of a FakeQuantize


def carried(xml: Path) -> list[Carried]:
    """Return the quantized operators of a model.xml with their qparams, in order of execution."""
    import openvino

    model = openvino.Core().read_model(xml)  # a variable, since its operators do not keep the model alive
    return list(_carried(model))


def _carried(model: Any) -> Iterator[Carried]:
    for operator in model.get_ordered_ops():
        if operator.get_type_name() in _LAYOUT | _NO_READERS:
            continue
        sources = [source for source in map(_dequantizer, _inputs(operator)) if source is not None]
        weights = [_weight(source) for source in sources if source.start.get_type_name() == "Constant"]
        activations = [_activation(source) for source in sources if source.start.get_type_name() == "FakeQuantize"]
        if sources:
            yield Carried(
                name=operator.get_friendly_name(),
                aliases=tuple(_aliases(operator)),
                activations=tuple(activations),
                weight=weights[0] if weights else None,
            )


class _Dequantizer(NamedTuple):
    start: Any  # the Constant or FakeQuantize that it dequantizes
    scale: Any
    zero_point: Any


def _dequantizer(operator: Any) -> _Dequantizer | None:
    """Return the dequantizer whose result `operator` is, directly or through layout operators; None without one."""
    while operator.get_type_name() in _LAYOUT:
        operator = _inputs(operator)[0]
    if operator.get_type_name() != "Multiply":
        return None
    inner, scale = _inputs(operator)
    zero_point: Any = np.zeros(())
    if inner.get_type_name() == "Subtract":
        inner, shift = _inputs(inner)
        zero_point = _constant(shift)
    if inner.get_type_name() != "Convert":  # a multiplication in float
        return None
    while inner.get_type_name() == "Convert":
        (inner,) = _inputs(inner)
    if inner.get_type_name() not in ("Constant", "FakeQuantize"):
        return None
    return _Dequantizer(inner, _constant(scale), zero_point)


def _aliases(operator: Any) -> Iterator[str]:
    """Yield names of torch nodes that an operator may correspond to, as `targets.onnx.qparams` does.

    OpenVINO adds a bias by a separate Add.
    """
    readers = [item.get_node() for output in operator.outputs() for item in output.get_target_inputs()]
    for named in (operator, *(reader for reader in readers if reader.get_type_name() == "Add")):
        yield named.get_friendly_name().removeprefix("node_").removesuffix("/WithoutBiases")
        yield from sorted(named.output(0).get_names())


def _activation(source: _Dequantizer) -> Activation:
    lowest, highest = (float(_constant(limit).item()) for limit in _inputs(source.start)[1:3])
    return Activation(
        scales=np.array([(highest - lowest) / _STEPS, float(source.scale.item())], np.float64),
        zero_point=first_nonzero(source.zero_point),
        place=source.start.get_friendly_name(),
    )


def _weight(source: _Dequantizer) -> Weight:
    return Weight(
        integers=source.start.data.copy(),
        scales=np.ravel(source.scale).astype(np.float64),
        zero_point=first_nonzero(source.zero_point),
        place=source.start.get_friendly_name(),
    )


def _inputs(operator: Any) -> list[Any]:
    return [value.get_node() for value in operator.input_values()]


def _constant(operator: Any) -> Any:
    while operator.get_type_name() != "Constant":
        operator = _inputs(operator)[0]
    return operator.data.copy()
