"""References of Conformer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.models.golden.rule import Reference, imported

if TYPE_CHECKING:
    from torch import nn


def _authors(code: Path) -> nn.Module:
    """`Conformer_tiny_patch16` of models.py, which registers its variants with a timm of 2020."""
    return imported(code, "conformer").Conformer(  # type: ignore[no-any-return]
        patch_size=16, channel_ratio=1, embed_dim=384, depth=12, num_heads=6, mlp_ratio=4, qkv_bias=True
    )


REFERENCES: tuple[Reference, ...] = (
    Reference(
        name="conformer_tiny_pengzhiliang",
        repository="pengzhiliang/Conformer",
        commit="815aaad",
        model="conformer_tiny",
        format="pengzhiliang/Conformer",
        size=96,
        build=_authors,
        logits=lambda heads: heads[0] + heads[1],  # as in the evaluation of engine.py
    ),
)
