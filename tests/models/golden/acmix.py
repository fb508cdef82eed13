"""References of ACmix."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

from tests.models.golden.rule import Reference, imported

if TYPE_CHECKING:
    from torch import nn


def _resnet26(code: Path) -> nn.Module:
    # A module that torchvision has dropped; the code imports a name from it and never uses it.
    dropped = types.ModuleType("torchvision.models.utils")
    dropped.load_state_dict_from_url = None  # type: ignore[attr-defined]
    sys.modules["torchvision.models.utils"] = dropped
    return imported(code / "ResNet", "ResNet_ImageNet").ACmix_ResNet(layers=[1, 2, 4, 1])  # type: ignore[no-any-return]


def _swin_tiny(code: Path) -> nn.Module:
    return imported(code / "Swin-Transformer/models", "swin_transformer_acmix").SwinTransformer_acmix()  # type: ignore[no-any-return]


REFERENCES: tuple[Reference, ...] = (
    Reference(
        name="acmix_resnet26_authors",
        repository="LeapLabTHU/ACmix",
        commit="81dddb6",
        model="acmix_resnet26",
        format=None,
        size=224,
        build=_resnet26,
    ),
    Reference(
        name="acmix_swin_tiny_authors",
        repository="LeapLabTHU/ACmix",
        commit="81dddb6",
        model="acmix_swin_tiny",
        format="LeapLabTHU/ACmix, Swin-Transformer",
        size=224,
        build=_swin_tiny,
    ),
)
