"""Quantization parameters of a Core ML package: scales, zero points and integer weights.

They are read from the protobuf message and the bytes of the weight file without the code that wrote the package, so
that an error of the writer cannot hide in the reader.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibration.graph.qparams import Activation, Carried, Weight, first_nonzero
from models.errors import CheckFailed
from targets.coreml.package import SPECIFICATION, check_files

_QUANTIZE, _DEQUANTIZE, _INT8_WEIGHT = "quantize", "dequantize", "constexpr_blockwise_shift_scale"
_LAYOUT = frozenset({"transpose", "reshape", "expand_dims", "squeeze", "cast"})

# Header of a blob, little-endian: sentinel (4 bytes), data type (4), length of the data in bytes (8), offset of the
# data in the file (8), and 40 bytes that are not read.
# Source: coremltools, mlmodel/src/MILBlob/Blob/StorageFormat.hpp and BlobDataType.hpp.
_BLOB = struct.Struct("<IIQQ")
_SENTINEL = 0xDEADBEEF
_BLOB_TYPES = {1: np.float16, 2: np.float32, 3: np.uint8, 4: np.int8}


def carried(package: Path) -> list[Carried]:
    """Return the quantized operators of a package's main function with their qparams, in order of execution.

    Raises CheckFailed where the package is damaged.
    """
    from coremltools.proto import Model_pb2

    check_files(package)
    spec = Model_pb2.Model()
    spec.ParseFromString((package / SPECIFICATION).read_bytes())
    function = spec.mlProgram.functions["main"]
    return list(_Program(package, function.block_specializations[function.opset].operations).carried())


def value(package: Path, stored: Any) -> Any:
    """Return the array of a `Value` message, from the message itself or from the weight file that it refers to.

    Raises CheckFailed where the reference leaves the package, or the weight file has no such tensor at that offset.
    """
    from coremltools.proto import MIL_pb2

    tensor = stored.type.tensorType
    shape = tuple(dimension.constant.size for dimension in tensor.dimensions)
    kind = MIL_pb2.DataType.Name(tensor.dataType)
    if stored.WhichOneof("value") == "blobFileValue":
        return _blob(package, stored.blobFileValue, kind, shape)
    immediate = stored.immediateValue.tensor
    form = immediate.WhichOneof("value")
    values = getattr(immediate, form).values
    array = np.frombuffer(values, kind.lower()) if form == "bytes" else np.array(values)
    return array.reshape(shape)


def _blob(package: Path, place: Any, kind: str, shape: tuple[int, ...]) -> Any:
    name = Path(place.fileName.removeprefix("@model_path/"))
    if name.is_absolute() or ".." in name.parts:
        raise CheckFailed(f"{package} refers to a weight file outside of the package, {place.fileName!r}: not read")
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
            f"{file} has no {kind.lower()} tensor of shape {shape} at byte {place.offset}, to which the package refers "
            f"(type {number}, {size} bytes are there): build the package again"
        )
    return np.frombuffer(content, dtype).reshape(shape)


class _Program:
    def __init__(self, package: Path, operations: Any) -> None:
        self.package = package
        self.operations = operations
        self.producers = {output.name: operation for operation in operations for output in operation.outputs}

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
        """Return the dequantizing operation whose result `name` is, directly or through layout operations, or None."""
        operation = self.producers.get(name)
        while operation is not None and operation.type in _LAYOUT:
            operation = self.producers.get(_names({"x": operation.inputs["x"]})[0])
        return operation if operation is not None and operation.type in (_DEQUANTIZE, _INT8_WEIGHT) else None

    def _activation(self, source: Any) -> Activation:
        quantize = self.producers[_names({"input": source.inputs["input"]})[0]]
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
        """Return a constant input, stored inline or in a `const` operation; 0 for a zero point that is left out."""
        if name not in operation.inputs:
            return np.zeros(())
        (argument,) = operation.inputs[name].arguments
        if argument.WhichOneof("binding") == "value":
            return value(self.package, argument.value)
        return value(self.package, self.producers[argument.name].attributes["val"])


def _names(inputs: Mapping[str, Any]) -> list[str]:
    """Return the names of the values that an operator reads, sorted by parameter, since a message has no order."""
    arguments = [argument for _, binding in sorted(inputs.items()) for argument in binding.arguments]
    return [argument.name for argument in arguments if argument.WhichOneof("binding") == "name"]
