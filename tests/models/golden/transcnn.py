"""References of TransCNN."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.models.golden.rule import Reference, imported

if TYPE_CHECKING:
    from torch import nn


def _authors(code: Path) -> nn.Module:
    return imported(code, "TransCNN").TransCNN_Tiny()  # type: ignore[no-any-return]


REFERENCES: tuple[Reference, ...] = (
    Reference(
        name="transcnn_tiny_yunliu",
        repository="yun-liu/TransCNN",
        commit="4685e37",
        model="transcnn_tiny",
        format=None,
        size=256,
        build=_authors,
    ),
)
