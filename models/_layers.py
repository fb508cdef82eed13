"""Building blocks that several families share, named as timm names them so that its checkpoints fit key by key."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


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


class Attention(nn.Module):
    """Multi-head self-attention on tokens (N, length, dim), in rank 4 throughout."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
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
