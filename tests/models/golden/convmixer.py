"""References of ConvMixer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.models.golden.rule import Reference, imported, of_timm

if TYPE_CHECKING:
    from torch import nn


def _locuslab(code: Path) -> nn.Module:
    return imported(code, "convmixer").ConvMixer(1024, 20, kernel_size=9, patch_size=14)  # type: ignore[no-any-return]


REFERENCES: tuple[Reference, ...] = (
    Reference(
        name="convmixer_1024_20_locuslab",
        repository="locuslab/convmixer",
        commit="4704811",
        model="convmixer_1024_20",
        format="locuslab/convmixer",
        size=112,
        build=_locuslab,
    ),
    Reference(
        name="convmixer_768_32_timm",
        repository="huggingface/pytorch-image-models",
        commit="aa4b5850",
        model="convmixer_768_32",
        format=None,
        size=56,
        build=of_timm("convmixer_768_32"),
    ),
)
