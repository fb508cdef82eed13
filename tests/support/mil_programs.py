"""Small MIL programs for tests, most of them with one operator, built and run by the reference evaluator.

    run = in_memory(lambda mb, x: mb.softmax(x=x, axis=-1), {"x": (2, 3)})
    (y,) = run(torch.rand(2, 3))

`saved` builds the same program, writes it as a package and reads it back, so that the stored program runs: for one test
of each operator. `in_memory` takes milliseconds: for tests over many shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from targets.coreml import package as coreml_package
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.mil.evaluator import Evaluator, Rounding

# The body of a program: coremltools' builder, then one variable an input; gives the output, or a tuple of them.
Body: TypeAlias = Callable[..., Any]
Run: TypeAlias = Callable[..., tuple[Tensor, ...]]  # a tensor for each input in their order; gives the outputs
Opset: TypeAlias = Literal["iOS15", "iOS16", "iOS17", "iOS18"]
Type: TypeAlias = Literal["fp32", "fp16", "int32", "int16", "uint16", "int8", "uint8", "bool"]
Inputs: TypeAlias = Mapping[str, Sequence[int]]  # shape of each input, by name
Array: TypeAlias = npt.NDArray[Any]

_TYPES: dict[str, Type] = {
    "float32": "fp32",
    "float16": "fp16",
    "int32": "int32",
    "int16": "int16",
    "uint16": "uint16",
    "int8": "int8",
    "uint8": "uint8",
    "bool": "bool",
}


def in_memory(
    body: Body,
    inputs: Inputs,
    *,
    opset: Opset = "iOS18",
    dtype: Type | Mapping[str, Type] = "fp32",
    rounding: Rounding = "fp16",
) -> Run:
    """Return a function that runs the program of `body` without saving it.

    `dtype`: of the inputs, one for all or by name. Constants in `body` are numpy arrays of that type, or plain numbers.
    """
    main = program(body, inputs, opset=opset, dtype=dtype).functions["main"]
    return _runner(main.operations, list(inputs), [output.name for output in main.outputs], rounding)


def saved(
    folder: Path,
    body: Body,
    inputs: Inputs,
    *,
    opset: Opset = "iOS18",
    dtype: Type | Mapping[str, Type] = "fp32",
    rounding: Rounding = "fp16",
) -> Run:
    """Return the same as `in_memory`, for a package that is written to `folder` and read back."""
    path = save(folder / "model.mlpackage", program(body, inputs, opset=opset, dtype=dtype), opset)
    package = coreml_package.read(path)
    return _runner(package.operations, list(inputs), package.outputs, rounding)


def program(body: Body, inputs: Inputs, *, opset: Opset = "iOS18", dtype: Type | Mapping[str, Type] = "fp32") -> Any:
    """Return coremltools' program with the single function `main`."""
    coremltools = import_coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types

    chosen = dict.fromkeys(inputs, dtype) if isinstance(dtype, str) else dtype
    placeholders = {
        name: mb.placeholder(shape=tuple(shape), dtype=types.string_to_builtin(chosen[name]), allow_rank0_input=True)
        for name, shape in inputs.items()
    }
    made = Program()
    with Function(placeholders, opset_version=getattr(coremltools.target, opset)) as function:
        found = body(mb, *function.inputs.values())
        function.set_outputs(list(found) if isinstance(found, list | tuple) else [found])
    made.add_function("main", function)
    return made


def save(path: Path, made: Any, opset: Opset = "iOS18") -> Path:
    """Write a program as a package as it is, without the passes that would rewrite its operators."""
    coremltools = import_coremltools()
    coremltools.convert(
        made,
        source="milinternal",
        convert_to="mlprogram",
        minimum_deployment_target=getattr(coremltools.target, opset),
        pass_pipeline=coremltools.PassPipeline.EMPTY,
        skip_model_load=True,
    ).save(str(path))
    return path


def _runner(operations: Sequence[Any], names: Sequence[str], outputs: Sequence[str], rounding: Rounding) -> Run:
    evaluator = Evaluator(operations, outputs, rounding=rounding)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(evaluator.run(dict(zip(names, tensors, strict=True))).values())

    return run


def computed(body: Body, *arrays: Array, opset: Opset = "iOS18", rounding: Rounding = "exact") -> list[Array]:
    """Return the outputs of `body`, evaluated in memory on `arrays`, one input each."""
    names = [f"x{index}" for index in range(len(arrays))]
    run = in_memory(
        body,
        {name: array.shape for name, array in zip(names, arrays, strict=True)},
        opset=opset,
        dtype={name: _TYPES[array.dtype.name] for name, array in zip(names, arrays, strict=True)},
        rounding=rounding,
    )
    return [output.numpy() for output in run(*(torch.from_numpy(np.array(array)) for array in arrays))]


def folded(body: Callable[[Any], Any], *, opset: Opset = "iOS18") -> list[Any]:
    """Return the outputs of `body` as coremltools computes them for constant inputs, by its own operator definitions.

    None for an output without such a definition.
    """
    made = program(lambda mb, _: body(mb), {"unread": (1,)}, opset=opset)
    return [output.val for output in made.functions["main"].outputs]
