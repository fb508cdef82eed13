"""Workarounds for bugs and missing converters of coremltools 9.0, one function each.

Each workaround has a test in tests/targets/coreml/conversion/test_workarounds.py (for weights:
test_weight_compression.py) that fails once coremltools has fixed the bug, so that the workaround can be removed.
`mended` applies the workarounds that rewrite a program: operators that 9.0 converts wrongly, or not at all, are
replaced by operators that compute the same values. To add a rewrite, write a function with the parameters of the
operator, and add it to `_REWRITTEN`.
"""

from __future__ import annotations

import logging
import math
import string
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from calibration.graph import fx
from models.errors import CheckFailed

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node

# Warnings on every import of 9.0 that are suppressed:
# - torch above 2.7 is untested: every package is read back and compared with the torch program
# - scikit-learn is too new for coremltools' scikit-learn converters: they are never called
# - off macOS, Core ML cannot be loaded: `Target.not_executed` reports it
_EXPECTED = ("Torch version", "scikit-learn version") + (() if sys.platform == "darwin" else ("Failed to load _ML",))

_PIPELINES = ("frontend_pytorch", "default", "backend_mlprogram")

_APART = "told_apart_"  # name prefix of temporary identity operators

_LARGEST_HALF, _SENTINEL = 65504.0, 40000.0  # the largest FP16 value; replaces constants that represent infinity
# Operators that add or select a constant rather than multiply by it: a constant beyond the range of FP16 in one of
# them represents infinity.
_ADD_OR_SELECT = frozenset(
    {"add", "sub", "masked_fill", "where", "maximum", "minimum", "scaled_dot_product_attention"}
    | {"full", "full_like", "pad", "constant_pad_nd", "expand", "repeat", "clone"}
)
# Operators that are rewritten for some numbers, where a stored scalar is replaced by the number: the argument's index.
_NUMBER_ARGUMENTS = {
    "aten.div.Tensor_mode": 1,
    "aten.floor_divide.default": 1,
    "aten.pow.Tensor_Tensor": 0,
    "aten.remainder.Tensor": 1,
}
# Operators whose default arguments must be written explicitly, and whose scalar arguments must be floats.
_SPELLED_OUT = frozenset({"hardtanh", "leaky_relu", "elu", "threshold", "clamp_min", "clamp_max", "cosine_similarity"})


def import_coremltools() -> Any:
    """Import coremltools without the warnings of `_EXPECTED`; all other warnings are shown."""
    logging.getLogger("coremltools").addFilter(_is_unexpected)
    import coremltools

    return coremltools


@contextmanager
def one_progress_bar(program: ExportedProgram, title: str) -> Iterator[None]:
    """Context of a conversion of `program`: draw one progress bar on stderr.

    Version 9.0 draws four bars that stay on the screen, and no option turns them off.
    """
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil.passes import pass_pipeline

    from calibration import progress

    nodes = sum(node.op == "call_function" for node in program.graph.nodes)
    passes = sum(len(pass_pipeline.PassPipeline.get_pipeline(name).passes) for name in _PIPELINES)
    with progress.bar(total=nodes + passes, title=title, unit="step") as bar:

        def counted(steps: Iterable[Any], **_: Any) -> Iterator[Any]:
            for step in steps:
                yield step
                bar.update()

        originals = ops._tqdm, pass_pipeline.tqdm
        ops._tqdm = pass_pipeline.tqdm = counted
        try:
            yield
        finally:
            ops._tqdm, pass_pipeline.tqdm = originals


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Context without progress bars of passes: version 9.0 draws a bar of zero steps for each merged package."""
    from coremltools.converters.mil.mil.passes import pass_pipeline

    original = pass_pipeline.tqdm
    pass_pipeline.tqdm = lambda steps, **_: steps
    try:
        yield
    finally:
        pass_pipeline.tqdm = original


@contextmanager
def no_leftovers() -> Iterator[None]:
    """Context of conversions and merges that removes their temporary files when it ends.

    Version 9.0 keeps a copy of each model in the system's temporary folder until the process ends.
    """
    original = tempfile.tempdir
    with tempfile.TemporaryDirectory() as scratch:
        tempfile.tempdir = scratch
        try:
            yield
        finally:
            tempfile.tempdir = original


@contextmanager
def labels_beside_logits() -> Iterator[None]:
    """Context of a conversion: a classifier may have further outputs beside the label and its probabilities.

    Version 9.0 inserts these two before the declared outputs and then indexes the declared list of output types by the
    new positions, which raises IndexError. The types are applied before that, so the list can be removed.
    """
    from coremltools.converters.mil.backend.mil import load

    original = load._add_classify_op

    def added(program: Any, labels: Any) -> Any:
        program.functions["main"].set_output_types(None)
        return original(program, labels)

    load._add_classify_op = added
    try:
        yield
    finally:
        load._add_classify_op = original


@contextmanager
def one_bar_for_weights(title: str, count: int) -> Iterator[None]:
    """Context of the compression of `count` weights: draw one progress bar on stderr. Version 9.0 draws four."""
    from coremltools.converters.mil.mil.passes import pass_pipeline
    from coremltools.optimize.coreml import _quantization_passes

    from calibration import progress

    with progress.bar(total=count, title=title, unit="weight") as bar:

        def counted(steps: Iterable[Any], **_: Any) -> Iterator[Any]:
            for step in steps:
                yield step
                bar.update(min(1, count - bar.n))  # the steps include weights that are not compressed

        originals = _quantization_passes.tqdm, pass_pipeline.tqdm
        _quantization_passes.tqdm, pass_pipeline.tqdm = counted, lambda steps, **_: steps
        try:
            yield
        finally:
            _quantization_passes.tqdm, pass_pipeline.tqdm = originals


@contextmanager
def scales_above_zero() -> Iterator[None]:
    """Context of weight quantization: symmetric quantization to signed integers with an error of at most half a step.

    Version 9.0 gives a block of zeros, such as a dead channel, the scale 0 and divides by it
    (github.com/apple/coremltools #2853). It also divides in FP16 and rounds scales down, both of which make errors of
    more than half a step.
    """
    import numpy as np
    from coremltools.optimize import _utils

    original = _utils.quantize_weight_by_dtype

    def quantized(weight: Any, axes: Any, dtype: Any, mode: str) -> tuple[Any, Any, None]:
        low, high = _utils.get_quant_range_by_dtype(dtype, mode)
        exact = weight.astype(np.float64)
        largest = np.abs(exact).max(axis=axes, keepdims=True)
        scale = np.maximum((largest / high).astype(weight.dtype), np.finfo(weight.dtype).smallest_subnormal)
        too_small = scale.astype(np.float64) * (high + 0.5) < largest
        scale = np.where(too_small, np.nextafter(scale, scale.dtype.type(np.inf)), scale)
        return np.clip(np.round(exact / scale), low, high), scale, None

    _utils.quantize_weight_by_dtype = quantized
    try:
        yield
    finally:
        _utils.quantize_weight_by_dtype = original


@contextmanager
def names_kept() -> Iterator[None]:
    """Context of a conversion: operators have the names of their torch nodes; operators that coremltools adds do not.

    Version 9.0 numbers added operators as torch numbers nodes: `sub_2` of a package may be a part of torch's second
    variance, and torch's own `sub_2` is then renamed.
    """
    from coremltools.converters.mil import Builder

    original = Builder.__dict__["_get_free_name"]

    def free(cls: Any, name: str) -> str:
        return str(original.__func__(cls, f"added_{name}"))

    Builder._get_free_name = classmethod(free)
    try:
        yield
    finally:
        Builder._get_free_name = original


@contextmanager
def transposes_told_apart() -> Iterator[None]:
    """Context of a conversion: an operator may read a tensor and its transpose, as `x @ x.mT` does.

    Where two transposes cancel, version 9.0 inserts a transpose before such an operator for every input that comes from
    the same tensor, rather than only for the input that needs it: wrong values where the axes are equally long, a shape
    error elsewhere. A temporary identity after the transpose makes the inputs distinct tensors.
    """
    from coremltools.converters.mil.mil.passes.defs.optimize_repeat_ops import reduce_transposes

    original = reduce_transposes.apply

    def apply(self: Any, program: Any) -> None:
        for block in program.functions.values():
            _tell_transposes_apart(block)
        original(self, program)
        for block in program.functions.values():
            _drop(block, [operation for operation in block.operations if operation.name.startswith(_APART)])

    reduce_transposes.apply = apply
    try:
        yield
    finally:
        reduce_transposes.apply = original


def _tell_transposes_apart(block: Any) -> None:
    from coremltools.converters.mil import Builder as mb

    with block:
        for operation in list(block.operations):
            read = _flat(operation.inputs.values())
            for value in read:
                if (
                    value.op is not None
                    and value.op.op_type == "transpose"
                    and any(value.op.x is each for each in read)
                ):
                    same = mb.identity(x=value, before_op=operation, name=f"{_APART}{value.name}_{operation.name}")
                    block.replace_uses_of_var_after_op(anchor_op=same.op, end_op=operation, old_var=value, new_var=same)


def _drop(block: Any, identities: list[Any]) -> None:
    with block:
        for operation in identities:
            (value,) = operation.outputs
            block.replace_uses_of_var_after_op(anchor_op=operation, old_var=value, new_var=operation.x)
        block.remove_ops(identities)


def mended(program: ExportedProgram, *, half: bool) -> GraphModule:
    """Return `program` as a module to export again, rewritten into operators that coremltools converts correctly.

    `program` itself is unchanged. Call `decomposed` on the new export. `half`: Core ML will compute in FP16.
    """
    graph = program.module()
    fold_quantized_scalars(graph)
    if half:
        limit_sentinels(graph)
    rewrite(graph)
    return graph


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """Return a freshly exported program in inference operators that coremltools has converters for.

    Operators without a converter are decomposed by torch, where torch has a decomposition. A fresh export uses training
    IR, which version 9.0 cannot read. It has converters for 447 names, but for none of channel_shuffle, celu, addcmul
    and other rare operators.
    """
    import torch

    import_coremltools()
    from coremltools.converters.mil.frontend.torch.torch_op_registry import is_torch_fx_node_supported

    program = program.run_decompositions({})
    tried: set[Any] = set()
    while unknown := {
        node.target
        for node in program.graph.nodes
        if node.op == "call_function"
        and node.target not in tried
        and not fx.operator_name(node).endswith("_")  # `__xor__`: its name looks like that of an in-place operator
        and not is_torch_fx_node_supported(node)
    }:
        tried |= unknown
        known = torch.export.default_decompositions()
        program = program.run_decompositions({target: known[target] for target in unknown if target in known})
    spell_out(program.graph_module)
    return program


def fold_quantized_scalars(graph: GraphModule) -> None:
    """Fold the dequantization of stored scalars (rank 0), in place.

    Version 9.0 subtracts the zero point in int8, where 100 - -100 overflows to -56.
    """
    for node in list(graph.graph.nodes):
        if str(node.target) != "quantized_decomposed.dequantize_per_tensor.default":
            continue
        if fx.is_stored(node.args[0]) and (integer := fx.stored_tensor(graph, node.args[0])).dim() == 0:
            node.replace_all_uses_with(_store(graph, node, node.target(integer, *node.args[1:], **node.kwargs)))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def limit_sentinels(graph: GraphModule) -> None:
    """Limit constants beyond the range of FP16 that represent infinity, as in attention masks, to +-40000, in place.

    Factors are unchanged, since a factor of 1e6 does not represent infinity. Version 9.0 converts constants above 1e38
    to infinity, and computes with smaller ones in float32, off the Neural Engine. Apple masks with -40000
    (apple/coreai-models, neural_engine_rules.md): the lowest FP16 value is -65504, but its sum with an attention score
    of -16 is -infinity again.
    """
    from torch.fx.node import map_aggregate

    for node in list(graph.graph.nodes):
        if fx.operator_name(node) not in _ADD_OR_SELECT:
            continue

        def limited(argument: Any, node: Node = node) -> Any:
            if isinstance(argument, float) and abs(argument) > _LARGEST_HALF:
                return math.copysign(_SENTINEL, argument)
            if not fx.is_stored(argument):
                return argument
            stored = fx.stored_tensor(graph, argument)
            if not stored.is_floating_point() or not (beyond := stored.abs() > _LARGEST_HALF).any():
                return argument
            return _store(graph, node, stored.detach().where(~beyond, stored.sign() * _SENTINEL))

        node.args, node.kwargs = (cast(Any, map_aggregate(part, limited)) for part in (node.args, node.kwargs))
    graph.recompile()


def rewrite(graph: GraphModule) -> None:
    """Replace each operator of `_REWRITTEN` by its function, in place; the next export traces into the function.

    Stored scalars in arguments of `_NUMBER_ARGUMENTS` are passed as Python numbers.
    """
    from targets.coreml.weighted_layers import Constants

    constants = Constants(graph)
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target)
        node.target = _REWRITTEN.get(name, node.target)
        place = _NUMBER_ARGUMENTS.get(name)
        if place is None or node.args[place] not in constants.nodes:
            continue
        value = constants.value(node.args[place])
        if value.dim() == 0:
            node.update_arg(place, value.item())
        if name == "aten.pow.Tensor_Tensor" and (value.dim() == 0 or (value > 0).all()):
            node.target = power_of_number if value.dim() == 0 else power_of_stored
    graph.recompile()


def spell_out(graph: GraphModule) -> None:
    """Add default arguments to operators of `_SPELLED_OUT`, and convert their scalars to floats, in place.

    Version 9.0 relies on the number of arguments, and passes integers, as in `F.hardtanh(x, 0, 6)`, to MIL operators
    that accept only floats.
    """
    for node in graph.graph.nodes:
        if fx.operator_name(node) in _SPELLED_OUT and node.meta["val"].is_floating_point():
            arguments = fx.schema(node).arguments
            given = (*node.args, *(argument.default_value for argument in arguments[len(node.args) :]))
            scalars = [argument.type.kind() == "NumberType" for argument in arguments]
            node.args = tuple(float(value) if scalar else value for value, scalar in zip(given, scalars, strict=True))
    graph.recompile()


def add(x: Tensor, other: Tensor | float, *, alpha: float = 1) -> Tensor:
    """Sum with `alpha`, a factor of `other`, which version 9.0 ignores."""
    return x + other if alpha == 1 else x + other * alpha


def subtract(x: Tensor, other: Tensor | float, *, alpha: float = 1) -> Tensor:
    """Difference with `alpha`; see `add`."""
    return x - other if alpha == 1 else x - other * alpha


def alias(x: Tensor) -> Tensor:
    """Return `x` unchanged, as `x[...]` and some functions of other libraries do: version 9.0 has no converter."""
    return x


def both(x: Tensor, other: Tensor) -> Tensor:
    """`x & other` of booleans, for which version 9.0 has a converter only as `logical_and`. Integers: unchanged."""
    import torch

    return torch.logical_and(x, other) if x.dtype == torch.bool else torch.bitwise_and(x, other)


def either(x: Tensor, other: Tensor) -> Tensor:
    """`x | other`; see `both`."""
    import torch

    return torch.logical_or(x, other) if x.dtype == torch.bool else torch.bitwise_or(x, other)


def clamp(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    """Clamp with one limit, as a maximum or a minimum. (Parameters have torch's names.)

    Version 9.0 sets the missing limit to the largest float32 value, which is infinity in FP16.
    """
    import torch

    low, high = (None if limit is None or math.isinf(limit) else limit for limit in (min, max))
    if (low is None) == (high is None) or not x.is_floating_point():
        return torch.clamp(x, min, max)
    return torch.clamp_max(x, float(high)) if low is None else torch.clamp_min(x, float(low))  # type: ignore[arg-type]


def argmax(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Index of the largest of all elements where `dim` is None: version 9.0 then uses the last axis."""
    import torch

    if dim is not None:
        return torch.argmax(x, dim, keepdim)
    return torch.argmax(x.reshape(-1), 0).reshape([1] * x.dim() if keepdim else [])


def argmin(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Index of the smallest of all elements; see `argmax`."""
    import torch

    if dim is not None:
        return torch.argmin(x, dim, keepdim)
    return torch.argmin(x.reshape(-1), 0).reshape([1] * x.dim() if keepdim else [])


def atan2(y: Tensor, x: Tensor) -> Tensor:
    """Angle of a point, by its quadrant; signed zeros are not distinguished.

    Version 9.0 computes 0 instead of pi for points on the negative x axis (github.com/apple/coremltools #2769).
    """
    import torch

    half = torch.where(y > 0, math.pi / 2, torch.where(y < 0, -math.pi / 2, 0.0))
    turn = torch.where(x < 0, torch.where(y < 0, -math.pi, math.pi), 0.0)
    return torch.where(x == 0, half, (y / torch.where(x == 0, 1.0, x)).atan() + turn)


def bilinear(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Bilinear layer, as a linear layer and a sum: version 9.0 has no converter for it.

    Shapes: `x` (..., I), `other` (..., J), `weight` (O, I, J), result (..., O).
    """
    from torch.nn import functional

    outputs, _, columns = weight.shape
    mixed = functional.linear(x, weight.transpose(1, 2).flatten(0, 1))
    result = (mixed.reshape(*mixed.shape[:-1], outputs, columns) * other.unsqueeze(-2)).sum(-1)
    return result if bias is None else result + bias


def diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """Diagonal, as a strided slice. Version 9.0 supports only the main diagonal of the first two axes."""
    matrix = x.movedim((dim1, dim2), (-2, -1))
    rows, columns = matrix.shape[-2:]
    count = max(0, min(rows + min(offset, 0), columns - max(offset, 0)))
    first = offset if offset >= 0 else -offset * columns
    return matrix.flatten(-2)[..., first : first + (count - 1) * (columns + 1) + 1 : columns + 1]


def einsum(equation: str, operands: Sequence[Tensor], path: Any = None) -> Tensor:
    """Einsum with `...` replaced by letters: version 9.0 parses the dots as axes."""
    import torch

    if "..." not in equation:
        return torch.einsum(equation, *operands)
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    terms = inputs.split(",")
    ranks = [tensor.dim() - len(term.replace("...", "")) for term, tensor in zip(terms, operands, strict=True)]
    dots = "".join(free[: max(ranks)])
    terms = [term.replace("...", dots[len(dots) - rank :]) for term, rank in zip(terms, ranks, strict=True)]
    if not arrow:  # implicit output: the axes of the dots, then the letters that occur once, in alphabetical order
        once = sorted({letter for letter in inputs if letter.isalpha() and inputs.count(letter) == 1})
        output = "..." + "".join(once)
    return torch.einsum(f"{','.join(terms)}->{output.replace('...', dots)}", *operands)


def floor_divide(x: Tensor, other: Tensor | float) -> Tensor:
    """Floor division by 1, as floor: version 9.0 removes the division (github.com/apple/coremltools #2762)."""
    import torch

    return x.floor() if isinstance(other, float | int) and other == 1 else torch.floor_divide(x, other)


def divide(x: Tensor, other: Tensor | float, *, rounding_mode: str | None = None) -> Tensor:
    """Quotient with `rounding_mode="floor"`; see `floor_divide`."""
    import torch

    if rounding_mode == "floor" and isinstance(other, float | int) and other == 1:
        return x.floor()
    return torch.div(x, other, rounding_mode=rounding_mode)


def remainder(x: Tensor, other: Tensor | float) -> Tensor:
    """Remainder of a division by 1, which version 9.0 computes by a floor division; see `floor_divide`."""
    import torch

    return x - x.floor() if isinstance(other, float | int) and other == 1 else torch.remainder(x, other)


def fmod(x: Tensor, other: Tensor | float) -> Tensor:
    """Remainder of a truncated division, with the sign of `x`. Version 9.0 has no converter for it."""
    return x - trunc(x / other) * other


def instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Instance normalization by running statistics, as the equivalent batch normalization.

    Version 9.0 normalizes by the statistics of the input (github.com/apple/coremltools #2666).
    """
    import torch
    from torch.nn import functional

    if use_input_stats or running_mean is None:
        return torch.instance_norm(
            x, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled
        )
    return functional.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)


def matmul(x: Tensor, other: Tensor) -> Tensor:
    """Product with a vector, as a product with a matrix of one column or row: version 9.0 fails for matrix @ vector."""
    if x.dim() > 1 and other.dim() == 1:
        return (x @ other.unsqueeze(-1)).squeeze(-1)
    if x.dim() == 1 and other.dim() > 1:
        return (x.unsqueeze(0) @ other).squeeze(-2)
    return x @ other


def power_of_number(base: float, exponent: Tensor) -> Tensor:
    """base ** exponent, by an exponential. Raises CheckFailed for a negative base.

    With MIL's `pow`, Core ML's runtime is reported to compute exponent ** base (github.com/apple/coremltools #2628,
    #2742).
    """
    import torch

    if base < 0:
        raise CheckFailed(
            f"the network computes {base:g} ** x with a negative base, for which Core ML's runtime is reported to swap "
            "base and exponent; write it with torch.where and torch.exp"
        )
    if base == 0:
        return torch.where(exponent > 0, 0.0, torch.where(exponent == 0, 1.0, math.inf))
    return (exponent * math.log(base)).exp()


def power_of_stored(base: Tensor, exponent: Tensor) -> Tensor:
    """base ** exponent for a stored tensor `base` of positive values; see `power_of_number`."""
    return (exponent * base.log()).exp()


def product(x: Tensor, dim: int | None = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    """Product along an axis, by repeated halving. Version 9.0 has no converter for it."""
    import torch

    if dtype is not None:
        x = x.to(dtype)
    if dim is None:
        x, dim = x.reshape(-1), 0
    while (size := x.shape[dim]) > 1:
        half = size // 2
        pairs = x.narrow(dim, 0, half) * x.narrow(dim, half, half)
        rest = x.narrow(dim, 2 * half, size - 2 * half)
        x = torch.cat([pairs, rest], dim) if size % 2 else pairs
    return x if keepdim else x.squeeze(dim)


def round_decimals(x: Tensor, *, decimals: int) -> Tensor:
    """Rounding to a number of decimals, which version 9.0 does not support."""
    return (x * 10.0**decimals).round() / 10.0**decimals


def softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """log(1 + exp(beta x)) / beta, or x where beta x exceeds the threshold: version 9.0 ignores the threshold."""
    import torch
    from torch.nn import functional

    if (beta, threshold) == (1, 20):
        return functional.softplus(x)
    scaled = x * beta
    return torch.where(scaled > threshold, x, functional.softplus(scaled) / beta)


def trunc(x: Tensor) -> Tensor:
    """Rounding towards zero, for which version 9.0 has no converter."""
    return x.sign() * x.abs().floor()


def unfold(x: Tensor, dimension: int, size: int, step: int) -> Tensor:
    """Sliding windows along an axis, as strided slices, one per position in the window: 9.0 has no converter for it."""
    import torch

    count = (x.shape[dimension] - size) // step + 1
    parts = []
    for place in range(size):
        picked: list[slice] = [slice(None)] * x.dim()
        picked[dimension] = slice(place, place + (count - 1) * step + 1, step)
        parts.append(x[tuple(picked)])
    return torch.stack(parts, -1)


def upsample_bilinear2d(
    x: Tensor, output_size: Sequence[int] | None, align_corners: bool, scale_factors: Sequence[float] | None = None
) -> Tensor:
    """Bilinear interpolation where size times factor is not an integer, as a matrix product per axis.

    Version 9.0 rejects it. Sampling positions follow torch: they depend on the factor, not on the sizes.
    """
    import torch
    from torch.nn import functional

    if scale_factors is None:
        return functional.interpolate(x, list(output_size or ()), mode="bilinear", align_corners=align_corners)
    sizes = [size * factor for size, factor in zip(x.shape[-2:], scale_factors, strict=True)]
    if align_corners or all(float(size).is_integer() for size in sizes):
        factors = [float(factor) for factor in scale_factors]
        return functional.interpolate(x, scale_factor=factors, mode="bilinear", align_corners=align_corners)
    rows, columns = (
        torch.tensor(_bilinear_weights(size, factor)) for size, factor in zip(x.shape[-2:], scale_factors, strict=True)
    )
    return rows @ (x @ columns.mT)


def where(condition: Tensor, x: Tensor | float, other: Tensor | float) -> Tensor:
    """Selection between floats and an integer, which version 9.0 rejects; torch decomposes hardshrink into it."""
    import torch

    floats = any(isinstance(each, torch.Tensor) and each.is_floating_point() for each in (x, other))
    one, two = (float(each) if floats and isinstance(each, int) else each for each in (x, other))
    return torch.where(condition, one, two)


def _bilinear_weights(size: int, factor: float) -> list[list[float]]:
    """Return the interpolation matrix of an axis: a row per interpolated element, a column per input element."""
    rows = []
    for place in range(int(size * factor)):
        position = min(size - 1.0, max(0.0, (place + 0.5) / factor - 0.5))
        rows.append([max(0.0, 1 - abs(position - element)) for element in range(size)])
    return rows


def upsample_nearest2d(
    x: Tensor, output_size: Sequence[int] | None, scale_factors: Sequence[float] | None = None
) -> Tensor:
    """Nearest-neighbour interpolation by a factor that is not an integer, as slices at torch's sampling positions.

    Version 9.0 uses an operator whose sampling positions depend on the sizes, not on the factor.
    """
    import torch
    from torch.nn import functional

    if scale_factors is None or all(float(factor).is_integer() for factor in scale_factors):
        if scale_factors is None:
            return functional.interpolate(x, size=list(output_size or ()))
        return functional.interpolate(x, scale_factor=[float(factor) for factor in scale_factors])
    for axis, factor in zip((-2, -1), scale_factors, strict=True):
        size = x.shape[axis]
        places = [min(size - 1, int(place / factor)) for place in range(int(size * factor))]
        x = torch.cat([x.narrow(axis, place, 1) for place in places], axis)
    return x


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """GELU with tanh approximation, written out; coremltools fuses it into MIL's gelu. Version 9.0 ignores
    `approximate`.
    """
    from torch.nn import functional

    if approximate == "none":
        return functional.gelu(x)
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Group normalization of (N, C, H, W) in rank 4, with means over space before means over channels.

    Inputs of other ranks are unchanged. Version 9.0 uses rank 5, which the Neural Engine does not run, and one mean
    over all values of a group (200,704 values in the first maps of a HAT-Net), whose sum overflows FP16.
    """
    from torch.nn import functional

    if x.dim() != 4:
        return functional.group_norm(x, groups, weight, bias, eps)
    count, channels, height, width = x.shape
    grouped = x.reshape(count, groups, channels // groups, height * width)
    centred = grouped - grouped.mean(3, keepdim=True).mean(2, keepdim=True)
    variance = (centred * centred).mean(3, keepdim=True).mean(2, keepdim=True)
    normal = (centred / (variance + eps).sqrt()).reshape(count, channels, height, width)
    if weight is not None:
        normal = normal * weight.reshape(1, channels, 1, 1)
    return normal if bias is None else normal + bias.reshape(1, channels, 1, 1)


def log_sigmoid(x: Tensor) -> Tensor:
    """Logarithm of a sigmoid, as -softplus(-x): version 9.0 has no converter for log_sigmoid."""
    from torch.nn import functional

    return -functional.softplus(-x)


def log_softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """Log-softmax, by differences to the largest logit.

    Version 9.0 computes log(softmax(x)), where the softmax is 0 in FP16 for probabilities below 3e-8.
    """
    shifted = x - x.amax(dim, keepdim=True)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def max_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Tensor:
    """Max pooling with an explicit stride, by default the kernel size: version 9.0 needs the argument."""
    from torch.nn import functional

    return functional.max_pool2d(x, [*kernel_size], [*(stride or kernel_size)], [*padding], [*dilation], ceil_mode)


def pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """Circular padding, as slices from the opposite side, last axis first. Version 9.0 supports only other modes."""
    import torch

    if mode != "circular" or min(pad) < 0:
        return torch.nn.functional.pad(x, list(pad), mode, value)
    for axis, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), start=1):
        size = x.shape[-axis]
        parts = x.narrow(-axis, size - before, before), x, x.narrow(-axis, 0, after)
        x = torch.cat([part for part in parts if part.shape[-axis]], -axis)
    return x


def reciprocal(x: Tensor) -> Tensor:
    """1 / x, as a quotient. Version 9.0 converts it to MIL's inverse, 1 / (x + 0.0001)."""
    import torch

    return torch.ones(1) / x


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """RMS normalization by a vector norm, whose squares do not overflow FP16.

    Version 9.0 requires `eps`, and adds it after dividing by the largest value: inputs of zeros become 0 / 0.
    """
    import torch

    axes = tuple(range(-len(normalized_shape), 0))
    root: Tensor = torch.linalg.vector_norm(x, 2, axes, keepdim=True) / math.prod(normalized_shape) ** 0.5
    normal = x / (root * root + (torch.finfo(torch.float32).eps if eps is None else eps)).sqrt()
    return normal if weight is None else normal * weight


def roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    """Cyclic shift, as two slices per axis.

    Version 9.0 uses gather, which no Neural Engine runs; slices and concatenations run on it.
    """
    import torch

    if not dims:
        return torch.roll(x, tuple(shifts))
    for shift, axis in zip(shifts, dims, strict=True):
        if start := -shift % x.shape[axis]:
            x = torch.cat([x.narrow(axis, start, x.shape[axis] - start), x.narrow(axis, 0, start)], axis)
    return x


def var_mean(
    x: Tensor, dim: Sequence[int] | None = None, unbiased: bool = True, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Variance and mean, as two operators: version 9.0 has a converter for each, but none for var_mean."""
    return var_mean_correction(x, dim, correction=int(unbiased), keepdim=keepdim)


def var_mean_correction(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    axes = tuple(range(x.dim())) if dim is None else tuple(dim)
    return x.var(axes, correction=1 if correction is None else correction, keepdim=keepdim), x.mean(axes, keepdim)


def _is_unexpected(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_EXPECTED)


def _flat(values: Iterable[Any]) -> list[Any]:
    """Return the values that a MIL operator reads, with lists flattened."""
    lists = (value if isinstance(value, list | tuple) else (value,) for value in values)
    return [value for each in lists for value in each if value is not None]


def _store(graph: GraphModule, node: Node, value: Tensor) -> Node:
    """Register `value` as a buffer of `graph` and return a node, before `node`, that reads it."""
    name = f"mended_{len(dict(graph.named_buffers()))}"
    graph.register_buffer(name, value)
    with graph.graph.inserting_before(node):
        return graph.graph.get_attr(name)


_REWRITTEN: dict[str, Callable[..., Any]] = {
    "aten.__and__.Tensor": both,
    "aten.__or__.Tensor": either,
    "aten.add.Tensor": add,
    "aten.alias.default": alias,
    "aten.argmax.default": argmax,
    "aten.argmin.default": argmin,
    "aten.atan2.default": atan2,
    "aten.bilinear.default": bilinear,
    "aten.clamp.default": clamp,
    "aten.clip.default": clamp,
    "aten.diagonal.default": diagonal,
    "aten.div.Scalar_mode": divide,
    "aten.div.Tensor_mode": divide,
    "aten.einsum.default": einsum,
    "aten.floor_divide.default": floor_divide,
    "aten.floor_divide.Scalar": floor_divide,
    "aten.fmod.Scalar": fmod,
    "aten.fmod.Tensor": fmod,
    "aten.gelu.default": gelu,
    "aten.group_norm.default": group_norm,
    "aten.instance_norm.default": instance_norm,
    "aten.log_sigmoid.default": log_sigmoid,
    "aten.log_softmax.int": log_softmax,
    "aten.matmul.default": matmul,
    "aten.max_pool2d.default": max_pool2d,
    "aten.pad.default": pad,
    "aten.pow.Scalar": power_of_number,
    "aten.prod.default": product,
    "aten.prod.dim_int": product,
    "aten.reciprocal.default": reciprocal,
    "aten.remainder.Scalar": remainder,
    "aten.remainder.Tensor": remainder,
    "aten.rms_norm.default": rms_norm,
    "aten.roll.default": roll,
    "aten.round.decimals": round_decimals,
    "aten.softplus.default": softplus,
    "aten.sub.Tensor": subtract,
    "aten.trunc.default": trunc,
    "aten.unfold.default": unfold,
    "aten.upsample_bilinear2d.vec": upsample_bilinear2d,
    "aten.upsample_nearest2d.vec": upsample_nearest2d,
    "aten.var_mean.correction": var_mean_correction,
    "aten.var_mean.dim": var_mean,
    "aten.where.ScalarOther": where,
    "aten.where.ScalarSelf": where,
}
