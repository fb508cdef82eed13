"""HAT-Net: a convolutional pyramid with hierarchical self-attention in every block, with GroupNorm of one group.

Liu et al., "Vision Transformers with Hierarchical Attention", Machine Intelligence Research 21, 2024, arXiv 2106.03180;
the networks follow the authors' code (yun-liu/HAT-Net, tag v2.0). The successor of TransCNN, with the same attention
and other norms. Their statistics depend on the image, so they cannot be folded into convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from models import _pyramid
from models._pyramid import Pyramid, Stage


def hatnet_tiny(classes: int) -> nn.Module:
    return _published(classes, (48, 96, 240, 384), (2, 2, 6, 3), head_dim=48)


def hatnet_small(classes: int) -> nn.Module:
    return _published(classes, (64, 128, 320, 512), (2, 3, 8, 3))


def hatnet_medium(classes: int) -> nn.Module:
    """The only variant with kernels of 5."""
    return _published(classes, (64, 128, 320, 512), (3, 6, 18, 3), kernels=(5, 3, 5, 3))


def hatnet_large(classes: int) -> nn.Module:
    return _published(classes, (64, 128, 320, 640), (3, 8, 27, 3))


def hatnet_mini(classes: int) -> nn.Module:
    """Small variant for images of 64 pixels, not from the paper."""
    return HATNet(
        classes,
        (32, 64, 96, 128),
        (1, 1, 2, 1),
        head_dim=32,
        expansions=(4, 4, 2, 2),
        kernels=(5, 3, 5, 3),
        grids=(4, 4, 2, 1),
        pools=(2, 2, 2, 1),
    )


def _published(
    classes: int,
    dims: Sequence[int],
    depths: Sequence[int],
    *,
    head_dim: int = 64,
    kernels: Sequence[int] = (3, 3, 3, 3),
) -> nn.Module:
    return HATNet(
        classes,
        dims,
        depths,
        head_dim=head_dim,
        expansions=(8, 8, 4, 4),
        kernels=kernels,
        grids=(8, 7, 7, 1),
        pools=(8, 4, 2, 1),
    )


class HATNet(Pyramid):
    """Images (N, 3, S, S) -> logits (N, classes). `grids`: window sides of the attentions in the four stages; `pools`:
    their pooling factors. Both must divide the sides S/4, S/8, S/16 and S/32 of the feature maps.
    """

    def __init__(
        self,
        classes: int,
        dims: Sequence[int],
        depths: Sequence[int],
        *,
        head_dim: int,
        expansions: Sequence[int],
        kernels: Sequence[int],
        grids: Sequence[int],
        pools: Sequence[int],
    ) -> None:
        columns = zip(dims, depths, expansions, kernels, grids, pools, strict=True)
        stages = [
            Stage(
                dim=dim,
                depth=depth,
                attention=partial(Attention, head_dim=head_dim, grid=grid, pool=pool),
                expansion=expansion,
                kernel=kernel,
            )
            for dim, depth, expansion, kernel, grid, pool in columns
        ]
        super().__init__(classes, stages, norm=Norm, residual=InvertedResidual, downsample=Downsample)


class Norm(nn.GroupNorm):
    """GroupNorm with one group: normalize each image (C, H, W), then scale and shift each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels, eps=1e-6)


class Attention(_pyramid.Attention):
    """Attention of the pyramid, with an additional norm that published checkpoints contain but the network does not
    use: it counts in the number of parameters, is not trained, and is not exported.
    """

    def __init__(self, dim: int, *, head_dim: int, grid: int, pool: int) -> None:
        super().__init__(dim, head_dim=head_dim, grid=grid, pool=pool, norm=Norm)
        self.proj_norm = Norm(dim).requires_grad_(False)


class InvertedResidual(nn.Module):
    """x + (norm -> 1x1 expand -> depthwise -> 1x1 linear projection -> norm)(x); SiLU."""

    def __init__(self, dim: int, expansion: int, kernel: int) -> None:
        super().__init__()
        hidden = expansion * dim
        self.conv1 = nn.Sequential(Norm(dim), nn.Conv2d(dim, hidden, 1, bias=False), nn.SiLU())
        self.conv2 = nn.Sequential(
            nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False), nn.SiLU()
        )
        self.conv3 = nn.Sequential(nn.Conv2d(hidden, dim, 1, bias=False), Norm(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv3(self.conv2(self.conv1(x)))  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """A strided 3x3 convolution and a norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, 2, 1)
        self.norm = Norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]
