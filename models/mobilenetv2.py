"""MobileNetV2: inverted residuals with linear bottlenecks.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, arXiv 1801.04381, Table 2; channels
are rounded as in the authors' TensorFlow code. Modules have timm's names, so that its checkpoints load key by key. The
keys of torchvision and of tonylins/pytorch-mobilenet-v2, which number all blocks consecutively, are renamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from models._layers import initialize
from models.checkpoint import Format

# (expansion, channels, blocks, stride of the first block): the rows of Table 2
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _renames(first: Sequence[str], later: Sequence[str], classifier: str) -> tuple[tuple[str, str], ...]:
    """Return the renames of `features.0` to `features.18`.

    `first`: names of the convolutions and norms in the block without expansion, alternating; `later`: the same for all
    other blocks.
    """
    blocks = [(stage, block) for stage, (_, _, count, _) in enumerate(_STAGES) for block in range(count)]
    return (
        (r"^features\.0\.0\.", "conv_stem."),
        (r"^features\.0\.1\.", "bn1."),
        (rf"^features\.{len(blocks) + 1}\.0\.", "conv_head."),
        (rf"^features\.{len(blocks) + 1}\.1\.", "bn2."),
        (rf"^{classifier}\.(weight|bias)$", r"classifier.\1"),
        *(
            (rf"^features\.{row}\.conv\.", f"blocks.{stage}.{block}.")
            for row, (stage, block) in enumerate(blocks, start=1)
        ),
        *zip((rf"^(blocks\.0\.0)\.{name}\." for name in first), _inner("conv_dw", "conv_pw"), strict=True),
        *zip(
            (rf"^(blocks\.\d\.\d)\.{name}\." for name in later), _inner("conv_pw", "conv_dw", "conv_pwl"), strict=True
        ),
    )


def _inner(*convolutions: str) -> Iterator[str]:
    for index, name in enumerate(convolutions, start=1):
        yield rf"\1.{name}."
        yield rf"\1.bn{index}."


FORMATS = (
    # Its other widths round all channels up and do not scale the first two layers: these networks differ from the
    # variants here, and their shapes are rejected.
    Format(
        name="tonylins/pytorch-mobilenet-v2",
        signature=r"features\.1\.conv\.0\.weight",
        renames=_renames(("0", "1", "3", "4"), ("0", "1", "3", "4", "6", "7"), r"classifier"),
    ),
    Format(
        name="pytorch/vision",
        signature=r"features\.1\.conv\.0\.0\.weight",
        renames=_renames(
            (r"0\.0", r"0\.1", "1", "2"), (r"0\.0", r"0\.1", r"1\.0", r"1\.1", "2", "3"), r"classifier\.1"
        ),
    ),
)


def mobilenetv2_035(classes: int) -> nn.Module:
    return MobileNetV2(classes, width=0.35)


def mobilenetv2_050(classes: int) -> nn.Module:
    return MobileNetV2(classes, width=0.5)


def mobilenetv2_075(classes: int) -> nn.Module:
    return MobileNetV2(classes, width=0.75)


def mobilenetv2_100(classes: int) -> nn.Module:
    return MobileNetV2(classes, width=1.0)


def mobilenetv2_130(classes: int) -> nn.Module:
    return MobileNetV2(classes, width=1.3)


def mobilenetv2_140(classes: int) -> nn.Module:
    return MobileNetV2(classes, width=1.4)


class MobileNetV2(nn.Module):
    """Images (N, 3, S, S) -> logits (N, classes); `width` multiplies every channel count."""

    def __init__(self, classes: int, *, width: float) -> None:
        super().__init__()
        stem = divisible(32 * width)
        self.conv_stem = nn.Conv2d(3, stem, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.act1 = nn.ReLU6()
        stages: list[nn.Module] = []
        inputs = stem
        for expansion, channels, blocks, first_stride in _STAGES:
            outputs = divisible(channels * width)
            stage = nn.Sequential()
            for index in range(blocks):
                stride = first_stride if index == 0 else 1
                stage.append(
                    DepthwiseSeparable(inputs, outputs)
                    if expansion == 1
                    else InvertedResidual(inputs, outputs, expansion, stride)
                )
                inputs = outputs
            stages.append(stage)
        self.blocks = nn.Sequential(*stages)
        head = divisible(1280 * max(1.0, width))  # the last layer is never narrower than 1280
        self.conv_head = nn.Conv2d(inputs, head, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(head)
        self.act2 = nn.ReLU6()
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.2)
        self.classifier = nn.Linear(head, classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act1(self.bn1(self.conv_stem(x))))
        x = self.global_pool(self.act2(self.bn2(self.conv_head(x)))).flatten(1)
        return self.classifier(self.drop(x))  # type: ignore[no-any-return]


class DepthwiseSeparable(nn.Module):
    """First block, with expansion 1: 3x3 depthwise -> 1x1 linear projection, without a skip."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(inputs, inputs, 3, 1, 1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.act1 = nn.ReLU6()
        self.conv_pw = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv_pw(self.act1(self.bn1(self.conv_dw(x)))))  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """1x1 expand -> 3x3 depthwise -> 1x1 linear projection, ReLU6; identity skip if the shape is kept."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.conv_pw = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act1 = nn.ReLU6()
        self.conv_dw = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.act2 = nn.ReLU6()
        self.conv_pwl = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv_pw(x)))
        y = self.act2(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.skip else y  # type: ignore[no-any-return]


def divisible(channels: float, by: int = 8) -> int:
    """Round to the nearest multiple of `by`, but never down by more than 10 percent (`_make_divisible`)."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded
