"""References of HAT-Net."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.models.golden.rule import Reference, imported

if TYPE_CHECKING:
    from torch import nn


def _authors(code: Path) -> nn.Module:
    return imported(code, "HAT_Net").HAT_Net_tiny()  # type: ignore[no-any-return]


REFERENCES: tuple[Reference, ...] = (
    Reference(
        name="hatnet_tiny_yunliu",
        repository="yun-liu/TransCNN",  # since renamed to yun-liu/HAT-Net
        commit="4b2e7bf",
        model="hatnet_tiny",
        format=None,
        size=224,
        build=_authors,
    ),
)
