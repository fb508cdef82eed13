"""What a Core ML package carries: scales and integers, read from its protobuf message and the bytes of its weight file
by nobody's code but this, so that whatever wrote the package has no say in the proof.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibration.carried import Activation, Carried, Weight, first_nonzero
from models.errors import CheckFailed
from targets._coreml import SPECIFICATION, check_files

_QUANTIZE, _DEQUANTIZE, _INT8_WEIGHT = "quantize", "dequantize", "constexpr_blockwise_shift_scale"
_LAYOUT = frozenset({"transpose", "reshape", "expand_dims", "squeeze", "cast"})

# A blob begins with its description, little-endian: sentinel (4 bytes), type (4), its length in bytes (8), its place in
# the file (8), and 40 bytes that do not matter here.
# Source: coremltools, mlmodel/src/MILBlob/Blob/StorageFormat.hpp and BlobDataType.hpp.
_BLOB = struct.Struct("<IIQQ")
_SENTINEL = 0xDEADBEEF
_BLOB_TYPES = {1: np.float16, 2: np.float32, 3: np.uint8, 4: np.int8}


def carried(package: Path) -> list[Carried]:
    """The operators of a package's main function that read rounded tensors, in order of execution."""
    from coremltools.proto import Model_pb2

    check_files(package)
    spec = Model_pb2.Model()
    spec.ParseFromString((package / SPECIFICATION).read_bytes())
    function = spec.mlProgram.functions["main"]
    return list(_Program(package, function.block_specializations[function.opset].operations).carried())


def value(package: Path, stored: Any) -> Any:
    """The array in a `Value` message, from the message itself or from the file of weights that it points into."""
    from coremltools.proto import MIL_pb2

    tensor = stored.type.tensorType
    shape = tuple(dimension.constant.size for dimension in tensor.dimensions)
    kind = MIL_pb2.DataType.Name(tensor.dataType)
    if stored.WhichOneof("value") == "blobFileValue":
        return _blob(package, stored.blobFileValue, kind, shape)
    found = stored.immediateValue.tensor
    form = found.WhichOneof("value")
    values = getattr(found, form).values
    array = np.frombuffer(values, kind.lower()) if form == "bytes" else np.array(values)
    return array.reshape(shape)


def _blob(package: Path, place: Any, kind: str, shape: tuple[int, ...]) -> Any:
    name = Path(place.fileName.removeprefix("@model_path/"))
    if name.is_absolute() or ".." in name.parts:
        raise CheckFailed(f"{package} names a file of weights outside of itself, {place.fileName!r}: it is not read")
    file = (package / SPECIFICATION).parent / name
    with file.open("rb") as weights:
        weights.seek(place.offset)
        sentinel, number, size, offset = _BLOB.unpack(weights.read(_BLOB.size).ljust(_BLOB.size, b"\0"))
        dtype = np.dtype(_BLOB_TYPES.get(number, np.void))
        weights.seek(offset)
        content = weights.read(math.prod(shape) * dtype.itemsize)
    lengths = {size, math.prod(shape) * dtype.itemsize, len(content)}
    if sentinel != _SENTINEL or dtype.name != kind.lower() or len(lengths) > 1:
        raise CheckFailed(
            f"{file} has no {kind.lower()} tensor of shape {shape} at byte {place.offset}, where the package says that "
            f"one is (found type {number}, {size} bytes): build the package again"
        )
    return np.frombuffer(content, dtype).reshape(shape)


class _Program:
    def __init__(self, package: Path, operations: Any) -> None:
        self.package = package
        self.operations = operations
        self.makers = {output.name: operation for operation in operations for output in operation.outputs}

    def carried(self) -> Iterator[Carried]:
        for operation in self.operations:
            if operation.type in _LAYOUT | {_QUANTIZE, _DEQUANTIZE}:
                continue
            sources = [source for source in map(self._dequantizer, _names(operation.inputs)) if source is not None]
            weights = [self._weight(source) for source in sources if source.type == _INT8_WEIGHT]
            activations = [self._activation(source) for source in sources if source.type == _DEQUANTIZE]
            if sources:
                yield Carried(
                    name=operation.outputs[0].name,
                    aliases=(),
                    activations=tuple(activations),
                    weight=weights[0] if weights else None,
                )

    def _dequantizer(self, name: str) -> Any:
        operation = self.makers.get(name)
        while operation is not None and operation.type in _LAYOUT:
            operation = self.makers.get(_names({"x": operation.inputs["x"]})[0])
        return operation if operation is not None and operation.type in (_DEQUANTIZE, _INT8_WEIGHT) else None

    def _activation(self, source: Any) -> Activation:
        quantize = self.makers[_names({"input": source.inputs["input"]})[0]]
        pair = (quantize, source)
        return Activation(
            scales=np.array([self._input(operation, "scale") for operation in pair], np.float64),
            zero_point=first_nonzero(*(self._input(operation, "zero_point") for operation in pair)),
            place=quantize.outputs[0].name,
        )

    def _weight(self, source: Any) -> Weight:
        integers = self._input(source, "data")
        return Weight(
            integers=integers,
            scales=np.ravel(self._input(source, "scale")).astype(np.float64),
            zero_point=first_nonzero(self._input(source, "offset")),
            place=source.outputs[0].name,
        )

    def _input(self, operation: Any, name: str) -> Any:
        """A constant input, given in place or by name; 0 where a zero point is left out."""
        if name not in operation.inputs:
            return np.zeros(())
        (argument,) = operation.inputs[name].arguments
        if argument.WhichOneof("binding") == "value":
            return value(self.package, argument.value)
        return value(self.package, self.makers[argument.name].attributes["val"])


def _names(inputs: Mapping[str, Any]) -> list[str]:
    """Of the values that an operator reads, by name of the input: x before y. (A message keeps them in no order.)"""
    arguments = [argument for _, binding in sorted(inputs.items()) for argument in binding.arguments]
    return [argument.name for argument in arguments if argument.WhichOneof("binding") == "name"]
