"""ConvMixer: a patch embedding, then depthwise and pointwise convolutions at one resolution.

Trockman & Kolter, "Patches Are All You Need?", TMLR 2023, arXiv 2201.09792. BatchNorm follows the activation, so it
cannot be folded into the preceding convolution. Modules have timm's names, so that its checkpoints load key by key; the
consecutive numbers in the authors' checkpoints are renamed.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from models._layers import initialize
from models.checkpoint import Format

_DEEPEST = 32  # largest number of blocks
FORMATS = (
    Format(
        name="locuslab/convmixer",
        signature=r"3\.0\.fn\.0\.weight",
        renames=(
            (r"^([02])\.", r"stem.\1."),
            (r"^\d+\.(weight|bias)$", r"head.\1"),
            *((rf"^{3 + block}\.(\d)\.", rf"blocks.{block}.\1.") for block in range(_DEEPEST)),
        ),
    ),
)


def convmixer_768_32(classes: int) -> nn.Module:
    """The only released variant with ReLU (authors' README)."""
    return ConvMixer(classes, dim=768, depth=32, kernel=7, patch=7, act=nn.ReLU)


def convmixer_1024_20(classes: int) -> nn.Module:
    return ConvMixer(classes, dim=1024, depth=20, kernel=9, patch=14, act=nn.GELU)


def convmixer_1536_20(classes: int) -> nn.Module:
    return ConvMixer(classes, dim=1536, depth=20, kernel=9, patch=7, act=nn.GELU)


def convmixer_mini(classes: int) -> nn.Module:
    """Small variant for images of 64 pixels, not from the paper."""
    return ConvMixer(classes, dim=128, depth=6, kernel=5, patch=4, act=nn.ReLU)


class ConvMixer(nn.Module):
    """Images (N, 3, S, S), S a multiple of `patch` -> logits (N, classes)."""

    def __init__(
        self, classes: int, *, dim: int, depth: int, kernel: int, patch: int, act: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dim, patch, patch), act(), nn.BatchNorm2d(dim))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    Residual(
                        nn.Sequential(
                            nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim), act(), nn.BatchNorm2d(dim)
                        )
                    ),
                    nn.Conv2d(dim, dim, 1),
                    act(),
                    nn.BatchNorm2d(dim),
                )
                for _ in range(depth)
            )
        )
        self.pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(dim, classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pooling(self.blocks(self.stem(x))))  # type: ignore[no-any-return]


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x  # type: ignore[no-any-return]
