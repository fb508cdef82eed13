"""Conformer: parallel residual network and vision transformer, with feature exchange in every block.

Peng et al., "Conformer: Local Features Coupling Global Representations for Visual Recognition", ICCV 2021,
arXiv 2105.03889, Table 1; details and module names as in the authors' code (pengzhiliang/Conformer). Stochastic depth,
a regularizer of training on ImageNet, is not implemented.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from models._layers import Attention, Mlp, initialize
from models.checkpoint import Format

FORMATS = (
    Format(
        name="pengzhiliang/Conformer",
        signature=r"conv_trans_2\..*",
        renames=((r"^conv_trans_(\d+)\.", r"conv_trans.\1."),),
    ),
)

_EPSILON = 1e-6  # of every norm except the first and the last
_BatchNorm = partial(nn.BatchNorm2d, eps=_EPSILON)
_LayerNorm = partial(nn.LayerNorm, eps=_EPSILON)
_TOKEN = 4  # side of a token in pixels of the stem's output: 16 pixels of the image


def conformer_tiny(classes: int) -> nn.Module:
    return Conformer(classes, channels=64, dim=384, heads=6)


def conformer_small(classes: int) -> nn.Module:
    return Conformer(classes, channels=256, dim=384, heads=6)


def conformer_base(classes: int) -> nn.Module:
    return Conformer(classes, channels=384, dim=576, heads=9)


def conformer_mini(classes: int) -> nn.Module:
    """Small variant for images of 64 pixels, not from the paper."""
    return Conformer(classes, channels=64, dim=64, heads=2, stem=32, depth=6)


class Conformer(nn.Module):
    """Images (N, 3, S, S) -> logits (N, classes), the sum of the logits of both branches; S is a multiple of 16.

    `channels`: channels of the first of three convolutional stages; each later stage doubles them. `dim`, `heads` and
    `depth`: width, heads and blocks of the transformer; each stage has a third of the blocks.
    """

    def __init__(self, classes: int, *, channels: int, dim: int, heads: int, stem: int = 64, depth: int = 12) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.conv1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.act1 = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.conv_1 = ConvBlock(stem, channels, project=True)
        self.trans_patch_conv = nn.Conv2d(stem, dim, _TOKEN, _TOKEN)
        self.trans_1 = TransformerBlock(dim, heads)
        self.conv_trans = nn.ModuleDict()  # keys from "2", as in the authors' code; block 1 is `conv_1` and `trans_1`
        inputs = channels
        for index in range(1, depth):
            stage = index // (depth // 3)
            outputs = channels * 2**stage
            self.conv_trans[str(index + 1)] = ConvTransBlock(
                inputs, outputs, dim, heads, token=_TOKEN // 2**stage, last=index == depth - 1
            )
            inputs = outputs
        self.trans_norm = nn.LayerNorm(dim)
        self.pooling = nn.AdaptiveAvgPool2d(1)
        self.trans_cls_head = nn.Linear(dim, classes)
        self.conv_cls_head = nn.Linear(inputs, classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        convolutional, transformer = self.head_logits(x)
        return convolutional + transformer

    def head_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (N, classes) of the convolutional branch and of the transformer for images (N, 3, S, S)."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        tokens = self.trans_1(self._embedded(x))
        x, _ = self.conv_1(x)
        for block in self.conv_trans.values():
            x, tokens = block(x, tokens)
        token = self.trans_norm(tokens[:, :1].flatten(1))  # a slice, as an index would become a Gather
        return self.conv_cls_head(self.pooling(x).flatten(1)), self.trans_cls_head(token)

    def _embedded(self, x: Tensor) -> Tensor:
        """(N, stem, H, W) -> class token and patch tokens (N, 1 + H/4 * W/4, dim)."""
        patches = self.trans_patch_conv(x).flatten(2).transpose(1, 2)
        # The class token is added to a row of zeros: expanding it would need the batch size at run time.
        return functional.pad(patches, (0, 0, 1, 0)) + functional.pad(self.cls_token, (0, 0, 0, patches.shape[1]))


class ConvTransBlock(nn.Module):
    """Residual block; transformer block with its inner map as additional input; residual block with the tokens as
    additional input.

    Feature maps (N, inputs, H, W) and tokens (N, 1 + length, dim) -> (N, outputs, H', W') and tokens of the same shape.
    The first residual block halves the resolution if the channels change, the second in the `last` block. `token`: side
    of a token in pixels of the inner map.
    """

    def __init__(self, inputs: int, outputs: int, dim: int, heads: int, *, token: int, last: bool) -> None:
        super().__init__()
        narrowing = inputs != outputs
        self.cnn_block = ConvBlock(inputs, outputs, stride=2 if narrowing else 1, project=narrowing)
        self.squeeze_block = FCUDown(outputs // 4, dim, token)
        self.trans_block = TransformerBlock(dim, heads)
        self.expand_block = FCUUp(dim, outputs // 4, token)
        self.fusion_block = ConvBlock(outputs, outputs, stride=2 if last else 1, project=last)
        self.token = token

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x, inner = self.cnn_block(x)
        # The class token is added to itself here and thus doubled, as in the authors' code: their weights expect it.
        tokens = self.trans_block(tokens + torch.cat((tokens[:, :1], self.squeeze_block(inner)), 1))
        height, width = inner.shape[2] // self.token, inner.shape[3] // self.token
        x, _ = self.fusion_block(x, self.expand_block(tokens[:, 1:], height, width))
        return x, tokens


class ConvBlock(nn.Module):
    """ResNet bottleneck: 1x1 to a quarter of `outputs` -> 3x3 with the stride -> 1x1. The shortcut is the identity, or
    with `project` a 1x1 convolution.

    (N, inputs, H, W) -> (N, outputs, H/stride, W/stride) and the inner map (N, outputs/4, H/stride, W/stride). The
    features of the transformer (N, outputs/4, H, W), if given, are added before the 3x3 convolution.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, project: bool = False) -> None:
        super().__init__()
        inner = outputs // 4
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = _BatchNorm(inner)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = _BatchNorm(inner)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = _BatchNorm(outputs)
        self.act3 = nn.ReLU()
        self.residual_conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if project else nn.Identity()
        self.residual_bn = _BatchNorm(outputs) if project else nn.Identity()

    def forward(self, x: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.act1(self.bn1(self.conv1(x)))
        inner = self.act2(self.bn2(self.conv2(y if features is None else y + features)))
        y = self.bn3(self.conv3(inner))
        return self.act3(y + self.residual_bn(self.residual_conv(x))), inner


class FCUDown(nn.Module):
    """Feature coupling unit, from maps (N, inputs, H, W) to tokens (N, H/token * W/token, dim)."""

    def __init__(self, inputs: int, dim: int, token: int) -> None:
        super().__init__()
        self.conv_project = nn.Conv2d(inputs, dim, 1)
        self.sample_pooling = nn.AvgPool2d(token) if token > 1 else nn.Identity()
        self.ln = _LayerNorm(dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.ln(self.sample_pooling(self.conv_project(x)).flatten(2).transpose(1, 2)))  # type: ignore[no-any-return]


class FCUUp(nn.Module):
    """Feature coupling unit, from tokens (N, height * width, dim) to maps (N, outputs, height * token, width * token).
    All pixels of a token have the same value.
    """

    def __init__(self, dim: int, outputs: int, token: int) -> None:
        super().__init__()
        self.conv_project = nn.Conv2d(dim, outputs, 1)
        self.bn = _BatchNorm(outputs)
        self.act = nn.ReLU()
        self.upsampling = nn.Upsample(scale_factor=token) if token > 1 else nn.Identity()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x.transpose(1, 2).reshape(-1, x.shape[2], height, width)
        return self.upsampling(self.act(self.bn(self.conv_project(x))))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, each with a residual, on tokens (N, length, dim)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = _LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = _LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]
