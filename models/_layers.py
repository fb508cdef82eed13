"""Building blocks that several families share, named as timm names them so that its checkpoints fit key by key.

Some have a twin for the channels form of a network: a subclass that computes the same from the same parameters, on maps
(N, C, H, W) instead of tokens (..., length, C). `recast` turns a network of the one into a network of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional


class ConvNormAct(nn.Module):
    """Convolution without bias -> BatchNorm -> activation (identity where `act` is None)."""

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
    """The mean of every channel: (N, C, H, W) -> (N, C, 1, 1).

    As `nn.AdaptiveAvgPool2d(1)`, which after a permutation keeps its order of axes in memory: a detail that torch.onnx
    writes into the graph, as a gather over computed indices.
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
    """The three projections of an attention in one linear layer: all queries, then all keys, then all values."""


class Attention(nn.Module):
    """Multi-head self-attention on tokens (N, length, dim), in rank 4 throughout."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = QueryKeyValue(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        _, length, dim = x.shape
        parts = self.qkv(x).reshape(-1, length, 3 * self.heads, dim // self.heads).transpose(1, 2)
        query, key, value = parts.split(self.heads, 1)  # each (N, heads, length, head_dim)
        answers = attend(query, key, value).transpose(1, 2)
        return self.proj(answers.reshape(-1, length, dim))  # type: ignore[no-any-return]


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of heads (N, heads, length, head_dim), `bias` (1 or N, heads, length, length) added
    to the logits.

    Written out rather than called as one operator: every exporter then emits the same MatMul - Softmax - MatMul, and
    the queries are scaled before the product, where FP16 has the room.
    """
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    if bias is not None:
        logits = logits + bias
    return logits.softmax(-1) @ value  # type: ignore[no-any-return]


# --- The channels form ----------------------------------------------------------------------------------------------
#
# As Apple's Neural Engine computes it best (apple/ml-ane-transformers; apple/coreai-models, neural_engine_rules.md):
# channels on axis 1, 1x1 convolutions for linear layers, three of them before attention, which is computed head by head
# without a reshape. What depends on parameters alone, such as the reshaping of weights, is folded before export.

_SMALLEST_GAMMA = 2.0**-14  # the smallest normal FP16 number


def recast(network: nn.Module, twins: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Give every module of `network` whose class is in `twins` the class it has there, in place: another way to compute
    from the same parameters.
    """
    for module in network.modules():
        if twin := twins.get(type(module)):
            module.__class__ = twin  # as torch's own lazy and parametrized modules change theirs


class Pointwise(nn.Linear):
    """A linear layer on the channels of a map (N, C, H, W), as a 1x1 convolution; on pooled images (N, C) as it was."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            return super().forward(x)
        return functional.conv2d(x, self.weight[:, :, None, None], self.bias)


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of a map (N, C, H, W), without moving them to the last axis and back.

    coremltools 9.0 makes one `layer_norm` over axis 1 of exactly these operators, in which the shift comes before the
    scale; it would keep permutations around `functional.layer_norm`. Division by a gamma of zero is avoided.
    """

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        normal = centred * torch.rsqrt((centred * centred).mean(1, keepdim=True) + self.eps)
        gamma = torch.where(self.weight.abs() < _SMALLEST_GAMMA, _SMALLEST_GAMMA, self.weight)
        return (normal + (self.bias / gamma).reshape(1, -1, 1, 1)) * gamma.reshape(1, -1, 1, 1)


class ChannelProjections(QueryKeyValue):
    """Queries, keys and values of a map as three 1x1 convolutions: (N, C, H, W) -> three of (N, dim, H, W)."""

    def forward(self, x: Tensor, scale: float) -> tuple[Tensor, ...]:  # type: ignore[override]
        return projections(x, self.weight, self.bias, scale)


class ChannelAttention(Attention):
    """Multi-head self-attention between the places of each row of a map (N, dim, rows, length)."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x, (x.shape[1] // self.heads) ** -0.5)
        return self.proj(attend_by_head(query, key, value, self.heads))  # type: ignore[no-any-return]


def projections(x: Tensor, weight: Tensor, bias: Tensor, scale: float, runs: int = 1) -> tuple[Tensor, ...]:
    """Queries times `scale`, keys and values of a map (N, C, H, W), each by a convolution of its own with its rows of
    `weight` (3 * dim, C) and `bias` (3 * dim,). Those alternate in `runs` of queries, keys and values.
    """
    _, channels, *_ = x.shape
    weights = weight.reshape(runs, 3, -1, channels).unbind(1)
    biases = bias.reshape(runs, 3, -1).unbind(1)
    return tuple(
        functional.conv2d(x, (rows * factor).reshape(-1, channels, 1, 1), (shift * factor).flatten())
        for rows, shift, factor in zip(weights, biases, (scale, 1.0, 1.0), strict=True)
    )


def attend_by_head(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Dot-product attention of maps (N, heads * head_dim, rows, length) between the places of a row, head by head;
    `bias` (1 or rows, heads, length, length) is added to the logits. `query` is scaled already.

    The keys of a query lie along axis 1, where the Neural Engine takes its softmax. Both products are such that Core ML
    has them as one operator, `einsum`; they ask for one transposition, that of the keys.
    """
    head_dim = query.shape[1] // heads
    sides = ((query, 1), (key.transpose(1, 3), 3), (value, 1))
    parts = (torch.split(side, head_dim, axis) for side, axis in sides)
    biases = [None] * heads if bias is None else torch.split(bias.permute(1, 3, 0, 2), 1)  # (1, keys, rows, queries)
    answers = []
    for queries, keys, values, added in zip(*parts, biases, strict=True):
        logits = torch.einsum("nkrc,ncrq->nkrq", keys, queries)
        logits = logits if added is None else logits + added
        answers.append(torch.einsum("ncrk,nkrq->ncrq", values, logits.softmax(1)))
    return torch.cat(answers, 1)


def initialize(model: nn.Module) -> None:
    """Kaiming-normal convolutions (fan out), truncated-normal linear layers (variance 1 / fan-in), zero biases, unit
    norms.

    The deviation of 0.02 that vision transformers usually start from suits hundreds of inputs. It lets nothing through
    from few, and a short training would spend its first epochs on making the weights larger.

    Gammas are never zero, not even on the last norm of a residual branch: conv-BN quantization-aware training
    divides by them.
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
