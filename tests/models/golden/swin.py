"""References of Swin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.models.golden.rule import Reference, imported, of_timm

if TYPE_CHECKING:
    from torch import nn


def _microsoft_tiny(code: Path) -> nn.Module:
    return imported(code / "models", "swin_transformer").SwinTransformer()  # type: ignore[no-any-return]


def _microsoft_base_384(code: Path) -> nn.Module:
    swin = imported(code / "models", "swin_transformer")
    network: nn.Module = swin.SwinTransformer(
        img_size=384, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12
    )
    return network


REFERENCES: tuple[Reference, ...] = (
    Reference(
        name="swin_tiny_microsoft",
        repository="microsoft/Swin-Transformer",
        commit="f82860b",
        model="swin_tiny",
        format="microsoft/Swin-Transformer",
        size=224,
        build=_microsoft_tiny,
    ),
    Reference(
        name="swin_base_384_microsoft",
        repository="microsoft/Swin-Transformer",
        commit="f82860b",
        model="swin_base_384",
        format="microsoft/Swin-Transformer",
        size=384,
        build=_microsoft_base_384,
    ),
    Reference(
        name="swin_tiny_timm",
        repository="huggingface/pytorch-image-models",
        commit="aa4b5850",
        model="swin_tiny",
        format=None,
        size=224,
        build=of_timm("swin_tiny_patch4_window7_224"),
    ),
)
