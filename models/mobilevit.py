"""MobileViT v1: inverted residuals, with transformers over 2x2-pixel patches in the three deepest stages.

Mehta & Rastegari, "MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer", ICLR 2022,
arXiv 2110.02178, Table 4; details as in the authors' code (apple/ml-cvnets, tag cvnets-v0.1). Modules have timm's
names, so that its checkpoints load key by key; the keys of the authors' checkpoints are renamed.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from models._layers import (
    Attention,
    ChannelAttention,
    ChannelNorm,
    ChannelProjections,
    ConvNormAct,
    Pointwise,
    QueryKeyValue,
    initialize,
)
from models.checkpoint import Format

_PATCH = 2  # side of a patch in pixels of the feature map, in every stage
_HEADS = 4
_DEPTHS = (2, 4, 3)  # transformer layers in stages 3, 4 and 5


def _rgb(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the stem's weights from BGR to RGB images."""
    name = "stem.conv.weight"
    return tensors | {name: tensors[name].flip(1)}


FORMATS = (
    Format(
        # The authors' MobileViT weights are those of v0.1, trained on BGR images from OpenCV. timm's weights are the
        # same with the stem converted to RGB, so the key names imply the channel order. This does not hold for models
        # trained with v0.2 or later, which use RGB images and the same names: rename the keys of such a file first.
        name="apple/ml-cvnets",
        signature=r"conv_1\.block\.conv\.weight",
        renames=(
            (r"^conv_1\.block\.norm\.", "stem.bn."),
            (r"^conv_1\.block\.", "stem."),
            (r"^conv_1x1_exp\.block\.norm\.", "final_conv.bn."),
            (r"^conv_1x1_exp\.block\.", "final_conv."),
            (r"^classifier\.fc\.", "head.fc."),
            *((rf"^layer_{stage}\.", f"stages.{stage - 1}.") for stage in range(1, 6)),
            (r"\.block\.exp_1x1\.block\.", ".conv1_1x1."),
            (r"\.block\.conv_3x3\.block\.", ".conv2_kxk."),
            (r"\.block\.red_1x1\.block\.", ".conv3_1x1."),
            (r"\.local_rep\.conv_3x3\.block\.", ".conv_kxk."),
            (r"\.local_rep\.conv_1x1\.block\.conv\.", ".conv_1x1."),
            (r"\.conv_proj\.block\.", ".conv_proj."),
            (r"\.fusion\.block\.", ".conv_fusion."),
            (r"^(stages\..*\.(?:conv\d_\w+|conv_kxk|conv_proj|conv_fusion))\.norm\.", r"\1.bn."),
            (r"\.global_rep\.\d+\.(weight|bias)$", r".norm.\1"),
            (r"\.global_rep\.", ".transformer."),
            (r"\.pre_norm_mha\.0\.", ".norm1."),
            (r"\.pre_norm_mha\.1\.qkv_proj\.", ".attn.qkv."),
            (r"\.pre_norm_mha\.1\.out_proj\.", ".attn.proj."),
            (r"\.pre_norm_ffn\.0\.", ".norm2."),
            (r"\.pre_norm_ffn\.1\.", ".mlp.fc1."),
            (r"\.pre_norm_ffn\.4\.", ".mlp.fc2."),
        ),
        adapt=_rgb,
    ),
)


def mobilevit_xxs(classes: int) -> nn.Module:
    return MobileViT(classes, (16, 24, 48, 64, 80), dims=(64, 80, 96), expansion=2, head=320)


def mobilevit_xs(classes: int) -> nn.Module:
    return MobileViT(classes, (32, 48, 64, 80, 96), dims=(96, 120, 144), expansion=4, head=384)


def mobilevit_s(classes: int) -> nn.Module:
    return MobileViT(classes, (32, 64, 96, 128, 160), dims=(144, 192, 240), expansion=4, head=640)


class MobileViT(nn.Module):
    """Images (N, 3, S, S) -> logits (N, classes); S is a multiple of 64.

    `channels`: output channels of stages 1 to 5. `dims`: token widths of the transformers in stages 3 to 5, whose MLPs
    have twice this width. `head`: channels before the classifier.
    """

    def __init__(
        self,
        classes: int,
        channels: tuple[int, int, int, int, int],
        *,
        dims: tuple[int, int, int],
        expansion: int,
        head: int,
    ) -> None:
        super().__init__()
        self.stem = ConvNormAct(3, 16, 3, stride=2)
        c1, c2, *deep = channels
        self.stages = nn.Sequential(
            nn.Sequential(InvertedResidual(16, c1, expansion)),
            nn.Sequential(
                InvertedResidual(c1, c2, expansion, stride=2),
                InvertedResidual(c2, c2, expansion),
                InvertedResidual(c2, c2, expansion),
            ),
        )
        inputs = c2
        for outputs, dim, depth in zip(deep, dims, _DEPTHS, strict=True):
            self.stages.append(
                nn.Sequential(
                    InvertedResidual(inputs, outputs, expansion, stride=2), MobileViTBlock(outputs, dim, depth)
                )
            )
            inputs = outputs
        self.final_conv = ConvNormAct(inputs, head)
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(1),
                drop=nn.Dropout(0.1),
                fc=nn.Linear(head, classes),
            )
        )
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.final_conv(self.stages(self.stem(x))))  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """1x1 expand -> 3x3 depthwise -> 1x1 linear projection, SiLU; identity skip if the shape is kept (MobileNetV2)."""

    def __init__(self, inputs: int, outputs: int, expansion: int, *, stride: int = 1) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.conv1_1x1 = ConvNormAct(inputs, hidden)
        self.conv2_kxk = ConvNormAct(hidden, hidden, 3, stride=stride, groups=hidden)
        self.conv3_1x1 = ConvNormAct(hidden, outputs, act=None)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv3_1x1(self.conv2_kxk(self.conv1_1x1(x)))
        return x + y if self.skip else y


class MobileViTBlock(nn.Module):
    """Local 3x3 convolution -> attention between pixels at the same position in all patches -> fusion with the input.
    (N, C, H, W) -> (N, C, H, W); H and W must be even.

    Unfolding and folding use tensors of rank 4 (the usual implementation has rank 6, which Core ML rejects).
    """

    def __init__(self, channels: int, dim: int, depth: int) -> None:
        super().__init__()
        self.conv_kxk = ConvNormAct(channels, channels, 3)
        self.conv_1x1 = nn.Conv2d(channels, dim, 1, bias=False)
        self.transformer = nn.Sequential(*(TransformerLayer(dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.conv_proj = ConvNormAct(dim, channels)
        self.conv_fusion = ConvNormAct(2 * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        local = self.conv_1x1(self.conv_kxk(x))
        _, dim, height, width = local.shape
        folded = fold(self.norm(self.transformer(unfold(local))), dim, height, width)
        return self.conv_fusion(torch.cat((x, self.conv_proj(folded)), 1))  # type: ignore[no-any-return]


def unfold(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N * 4, H/2 * W/2, C): a sequence per position in the patch, with a token per patch."""
    _, channels, height, width = x.shape
    rows, columns = height // _PATCH, width // _PATCH
    x = x.reshape(-1, _PATCH, columns, _PATCH).transpose(1, 2)  # (N * C * rows, columns, 2, 2)
    x = x.reshape(-1, channels, rows * columns, _PATCH * _PATCH).transpose(1, 3)  # (N, 4, patches, C)
    return x.reshape(-1, rows * columns, channels)


def fold(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Inverse of `unfold`: (N * 4, H/2 * W/2, C) -> (N, C, H, W)."""
    rows, columns = height // _PATCH, width // _PATCH
    x = x.reshape(-1, _PATCH * _PATCH, rows * columns, channels).transpose(1, 3)  # (N, C, patches, 4)
    x = x.reshape(-1, columns, _PATCH, _PATCH).transpose(1, 2)  # (N * C * rows, 2, columns, 2)
    return x.reshape(-1, channels, height, width)


class TransformerLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual, on tokens (sequences, length, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, _HEADS)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, 2 * dim), act=nn.SiLU(), drop=nn.Dropout(0.1), fc2=nn.Linear(2 * dim, dim))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


# --- The channels form ----------------------------------------------------------------------------------------------


class ChannelBlock(MobileViTBlock):
    """`MobileViTBlock` with transformers on feature maps (N, dim, 4, patches): a row per position in the patch."""

    def forward(self, x: Tensor) -> Tensor:
        local = self.conv_1x1(self.conv_kxk(x))
        _, dim, height, width = local.shape
        rows, columns = height // _PATCH, width // _PATCH
        unfolded = functional.pixel_unshuffle(local, _PATCH).reshape(-1, dim, _PATCH**2, rows * columns)
        attended = self.norm(self.transformer(unfolded)).reshape(-1, dim * _PATCH**2, rows, columns)
        folded = functional.pixel_shuffle(attended, _PATCH)
        return self.conv_fusion(torch.cat((x, self.conv_proj(folded)), 1))  # type: ignore[no-any-return]


CHANNELS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Pointwise,
    nn.LayerNorm: ChannelNorm,
    QueryKeyValue: ChannelProjections,
    Attention: ChannelAttention,
    MobileViTBlock: ChannelBlock,
}
