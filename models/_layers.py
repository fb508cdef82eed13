"""Building blocks shared by several families, with timm's attribute names so that its checkpoints load key by key.

Some blocks have a counterpart for the channels form of a network: a subclass with the same parameters and results that
computes on feature maps (N, C, H, W) instead of tokens (..., length, C). `recast` converts a network from the tokens
form to the channels form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional


class ConvNormAct(nn.Module):
    """Convolution without bias -> BatchNorm -> activation (identity if `act` is None)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        act: Callable[[], nn.Module] | None = nn.SiLU,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = act() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))  # type: ignore[no-any-return]


class GlobalMean(nn.Module):
    """Global average pooling: (N, C, H, W) -> (N, C, 1, 1).

    Equal to `nn.AdaptiveAvgPool2d(1)`. After a permutation, that layer preserves the memory order of the axes, which
    torch.onnx exports as a Gather with computed indices.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class Mlp(nn.Module):
    """Linear -> activation -> linear, on the last axis."""

    def __init__(self, dim: int, hidden: int, *, act: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class QueryKeyValue(nn.Linear):
    """Query, key and value projections in one linear layer: all queries, then all keys, then all values."""


class Attention(nn.Module):
    """Multi-head self-attention on tokens (N, length, dim), with tensors of rank 4 at most."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = QueryKeyValue(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        _, length, dim = x.shape
        parts = self.qkv(x).reshape(-1, length, 3 * self.heads, dim // self.heads).transpose(1, 2)
        query, key, value = parts.split(self.heads, 1)  # each (N, heads, length, head_dim)
        attended = attend(query, key, value).transpose(1, 2)
        return self.proj(attended.reshape(-1, length, dim))  # type: ignore[no-any-return]


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of heads (N, heads, length, head_dim). `bias` (1 or N, heads, length, length) is
    added to the attention logits.

    Written as separate operators, so that every exporter emits the same MatMul - Softmax - MatMul. The queries are
    scaled before the product, which keeps it within the range of FP16.
    """
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    if bias is not None:
        logits = logits + bias
    return logits.softmax(-1) @ value  # type: ignore[no-any-return]


# --- The channels form ----------------------------------------------------------------------------------------------
#
# The layout that Apple recommends for the Neural Engine (apple/ml-ane-transformers; apple/coreai-models,
# neural_engine_rules.md): channels on axis 1, 1x1 convolutions instead of linear layers, separate convolutions for
# queries, keys and values, and attention computed head by head without a reshape. Operations on parameters only, such
# as reshaping of weights, are folded before export.

_SMALLEST_GAMMA = 2.0**-14  # the smallest normal FP16 number


def recast(network: nn.Module, twins: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Replace the class of every module of `network` by its counterpart in `twins`, in place.

    The counterpart has the same parameters, but a different forward pass.
    """
    for module in network.modules():
        if twin := twins.get(type(module)):
            module.__class__ = twin  # torch's lazy and parametrized modules change their class in the same way


class Pointwise(nn.Linear):
    """Linear layer on the channels of a feature map (N, C, H, W), as a 1x1 convolution; unchanged on inputs (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            return super().forward(x)
        return functional.conv2d(x, self.weight[:, :, None, None], self.bias)


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of a feature map (N, C, H, W), without permutations.

    coremltools 9.0 fuses exactly these operators, with the shift before the scale, to one `layer_norm` over axis 1;
    `functional.layer_norm` would need permutations that it keeps. The magnitude of gamma is bounded below, so that the
    shift is not divided by zero.
    """

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        normal = centred * torch.rsqrt((centred * centred).mean(1, keepdim=True) + self.eps)
        gamma = torch.where(self.weight.abs() < _SMALLEST_GAMMA, _SMALLEST_GAMMA, self.weight)
        return (normal + (self.bias / gamma).reshape(1, -1, 1, 1)) * gamma.reshape(1, -1, 1, 1)


class ChannelProjections(QueryKeyValue):
    """Query, key and value projections as three 1x1 convolutions: (N, C, H, W) -> three maps (N, dim, H, W)."""

    def forward(self, x: Tensor, scale: float) -> tuple[Tensor, ...]:  # type: ignore[override]
        return projections(x, self.weight, self.bias, scale)


class ChannelAttention(Attention):
    """Multi-head self-attention between the positions of each row of a feature map (N, dim, rows, length)."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x, (x.shape[1] // self.heads) ** -0.5)
        return self.proj(attend_by_head(query, key, value, self.heads))  # type: ignore[no-any-return]


def projections(x: Tensor, weight: Tensor, bias: Tensor, scale: float, runs: int = 1) -> tuple[Tensor, ...]:
    """Return queries times `scale`, keys and values of a feature map (N, C, H, W), each from a separate convolution.

    The rows of `weight` (3 * dim, C) and `bias` (3 * dim,) consist of `runs` blocks, each with queries, keys and values
    in this order.
    """
    _, channels, *_ = x.shape
    weights = weight.reshape(runs, 3, -1, channels).unbind(1)
    biases = bias.reshape(runs, 3, -1).unbind(1)
    return tuple(
        functional.conv2d(x, (rows * factor).reshape(-1, channels, 1, 1), (shift * factor).flatten())
        for rows, shift, factor in zip(weights, biases, (scale, 1.0, 1.0), strict=True)
    )


def attend_by_head(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Dot-product attention between the positions of each row of maps (N, heads * head_dim, rows, length), head by
    head. `query` must be scaled. `bias` (1 or rows, heads, length, length) is added to the attention logits.

    The keys lie along axis 1 of the logits, the axis over which the Neural Engine computes a softmax best. Each product
    is a form of `einsum` that Core ML has as a single operator; only the keys need a transposition.
    """
    head_dim = query.shape[1] // heads
    sides = ((query, 1), (key.transpose(1, 3), 3), (value, 1))
    parts = (torch.split(side, head_dim, axis) for side, axis in sides)
    biases = [None] * heads if bias is None else torch.split(bias.permute(1, 3, 0, 2), 1)  # (1, keys, rows, queries)
    attended = []
    for queries, keys, values, added in zip(*parts, biases, strict=True):
        logits = torch.einsum("nkrc,ncrq->nkrq", keys, queries)
        logits = logits if added is None else logits + added
        attended.append(torch.einsum("ncrk,nkrq->ncrq", values, logits.softmax(1)))
    return torch.cat(attended, 1)


def initialize(model: nn.Module) -> None:
    """Initialize convolutions (Kaiming normal, fan out) and linear layers (truncated normal, variance 1 / fan-in) with
    zero biases. Normalization layers keep their weights of 1.

    The usual standard deviation of 0.02 for vision transformers suits layers with hundreds of inputs. With few inputs
    it nearly suppresses the signal, and a short training would spend its first epochs on larger weights.

    The last norm of a residual branch is not initialized to 0. Quantization does not depend on it: batch normalization
    is folded before quantization-aware training, which therefore never divides by gamma (`calibration.quantize`).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
