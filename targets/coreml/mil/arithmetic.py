"""Elementwise arithmetic, activations, reductions, softmax and casts.

Operators follow their definitions in coremltools, in float32. Integer inputs are computed as integers where MIL allows
them; fractional results are truncated, as in coremltools' constant folding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from targets.coreml.mil.registry import Function, operator

Elementwise: TypeAlias = Callable[[Tensor], Tensor]
Reduction: TypeAlias = Callable[[Tensor, list[int], bool], Tensor]  # float tensor, axes, whether to keep them

_ELEMENTWISE: dict[str, Elementwise] = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "logical_not": torch.logical_not,
    "relu": torch.relu,
    "relu6": F.relu6,
    "round": torch.round,  # ties to even: 0.5 gives 0, 1.5 and 2.5 give 2
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": torch.floor_divide,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,  # with the sign of the divisor
    "mul": torch.mul,
    "not_equal": torch.ne,
    "pow": torch.pow,
    "sub": torch.sub,
}


def _prod(x: Tensor, axes: list[int], keep_dims: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):  # last first: the other indices stay valid
        x = x.prod(axis, keepdim=keep_dims)
    return x


_REDUCTIONS: dict[str, Reduction] = {
    "reduce_l1_norm": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "reduce_l2_norm": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "reduce_log_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "reduce_log_sum_exp": torch.logsumexp,
    "reduce_max": torch.amax,
    "reduce_mean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "reduce_min": torch.amin,
    "reduce_prod": _prod,
    "reduce_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "reduce_sum_square": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
}

# The type that values are stored in here, by MIL's type.
_CAST_TO: dict[str, torch.dtype] = {
    "fp16": torch.float32,  # the evaluator rounds to FP16
    "fp32": torch.float32,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint16": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def _elementwise(compute: Elementwise) -> Function:
    def function(x: Tensor) -> Tensor:
        return compute(x).to(x.dtype)  # torch's exp2 of integers returns floats

    return function


def _binary(compute: Callable[[Tensor, Tensor], Tensor]) -> Function:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return compute(x, y)

    return function


def _reduction(compute: Reduction) -> Function:
    def function(x: Tensor, *, axes: Sequence[int] | None, keep_dims: bool) -> Tensor:
        every = list(range(x.dim()) if axes is None else axes)
        if x.is_floating_point():
            return compute(x, every, keep_dims)
        return compute(x.double(), every, keep_dims).long().to(x.dtype)

    return function


for _name, _compute in _ELEMENTWISE.items():
    operator(_name)(_elementwise(_compute))
for _name, _of_two in _BINARY.items():
    operator(_name)(_binary(_of_two))
for _name, _over_axes in _REDUCTIONS.items():
    operator(_name)(_reduction(_over_axes))


@operator("real_div")
def real_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


@operator("identity")
def identity(x: Tensor) -> Tensor:
    return x


@operator("select")
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


@operator("clip")
def clip(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


@operator("threshold")
def threshold(x: Tensor, *, alpha: float) -> Tensor:
    return x.clamp(min=alpha)


@operator("rsqrt")
def rsqrt(x: Tensor, *, epsilon: float) -> Tensor:
    return 1 / torch.sqrt(x + epsilon)


@operator("inverse")
def inverse(x: Tensor, *, epsilon: float) -> Tensor:
    return 1 / (x + epsilon)


@operator("log")
def log(x: Tensor, *, epsilon: float) -> Tensor:
    return torch.log(x + epsilon)


@operator("cast")
def cast(x: Tensor, *, dtype: str) -> Tensor:
    """Floats are truncated to integers; casts to a narrower integer type keep the low bits.

    MIL does not define the cast of a float out of the integer's range: here it saturates, as on Apple's GPUs
    (github.com/ml-explore/mlx/issues/4038), and NaN becomes 0.
    """
    if "int" in dtype:
        sign, _, bits = dtype.partition("int")
        x = _whole(x, lowest=0 if sign == "u" else -(2 ** (int(bits) - 1)), count=2 ** int(bits))
    return x.to(_CAST_TO[dtype])


def _whole(x: Tensor, *, lowest: int, count: int) -> Tensor:
    """Convert to the integers of a type with `count` values, of which `lowest` is the smallest."""
    if not x.is_floating_point():
        return (x.long() - lowest) % count + lowest
    # In float64, which represents all 32-bit integers: float32 cannot represent 2^31 - 1.
    return x.double().nan_to_num(nan=0).clamp(lowest, lowest + count - 1).long()


@operator("gelu")
def gelu(x: Tensor, *, mode: Literal["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"]) -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


@operator("leaky_relu")
def leaky_relu(x: Tensor, *, alpha: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


@operator("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, by_channel(alpha, x) * x)


@operator("elu")
def elu(x: Tensor, *, alpha: float) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x))


@operator("clamped_relu")
def clamped_relu(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x).clamp(max=beta)


@operator("thresholded_relu")
def thresholded_relu(x: Tensor, *, alpha: float) -> Tensor:
    return torch.where(x >= alpha, x, 0)


@operator("linear_activation")
def linear_activation(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    return alpha * x + beta


@operator("sigmoid_hard")
def sigmoid_hard(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


@operator("scaled_tanh")
def scaled_tanh(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(beta * x)


@operator("softplus_parametric")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return by_channel(alpha, x) * F.softplus(by_channel(beta, x) * x)


def by_channel(values: Tensor, x: Tensor) -> Tensor:
    """Reshape values per channel so that they broadcast with `x`, whose channels are axis 1."""
    return values.reshape(-1, *[1] * (x.dim() - 2))


@operator("softmax")
def softmax(x: Tensor, *, axis: int) -> Tensor:
    return torch.softmax(x, axis)


@operator("reduce_argmax")
def reduce_argmax(x: Tensor, *, axis: int, keep_dims: bool) -> Tensor:
    return x.argmax(axis, keepdim=keep_dims).int()


@operator("reduce_argmin")
def reduce_argmin(x: Tensor, *, axis: int, keep_dims: bool) -> Tensor:
    return x.argmin(axis, keepdim=keep_dims).int()


@operator("cumsum")
def cumsum(x: Tensor, *, axis: int, exclusive: bool, reverse: bool) -> Tensor:
    if reverse:
        x = x.flip(axis)
    if exclusive:  # each sum excludes its own element: the first is 0
        x = torch.cat((torch.zeros_like(x.narrow(axis, 0, 1)), x.narrow(axis, 0, x.shape[axis] - 1)), axis)
    sums = x.cumsum(axis, dtype=x.dtype)
    return sums.flip(axis) if reverse else sums


@operator("classify")
def classify(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return the class and the probabilities, which Core ML returns as a label and a dictionary by label.

    Here they are tensors: the index of the most likely class in the operator's `classes`, int32 (), the first where
    several are equal; and the probabilities unchanged, in the order of `classes`.
    """
    return probabilities.argmax().int(), probabilities
