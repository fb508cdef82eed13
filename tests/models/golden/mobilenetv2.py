"""References of MobileNetV2."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tests.models.golden.rule import Reference, imported, of_timm

if TYPE_CHECKING:
    from torch import nn


def _tonylins(code: Path) -> nn.Module:
    return imported(code, "MobileNetV2").mobilenet_v2(pretrained=False)  # type: ignore[no-any-return]


def _torchvision(code: Path) -> nn.Module:
    """Import the network file and its dependencies without the package, which would load compiled operators."""
    for name in ("torchvision", "torchvision.models", "torchvision.ops", "torchvision.transforms"):
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [str(code.joinpath(*name.split(".")))]
    presets = sys.modules["torchvision.transforms._presets"] = ModuleType("presets")
    presets.__dict__["ImageClassification"] = object  # for images, of which there is none
    return imported(code, "torchvision.models.mobilenetv2").mobilenet_v2()  # type: ignore[no-any-return]


REFERENCES: tuple[Reference, ...] = (
    Reference(
        name="mobilenetv2_100_tonylins",
        repository="tonylins/pytorch-mobilenet-v2",
        commit="99f2136",
        model="mobilenetv2_100",
        format="tonylins/pytorch-mobilenet-v2",
        size=96,
        build=_tonylins,
    ),
    Reference(
        name="mobilenetv2_100_torchvision",
        repository="pytorch/vision",
        commit="v0.28.0",
        model="mobilenetv2_100",
        format="pytorch/vision",
        size=96,
        build=_torchvision,
    ),
    Reference(
        name="mobilenetv2_050_timm",
        repository="huggingface/pytorch-image-models",
        commit="aa4b5850",
        model="mobilenetv2_050",
        format=None,
        size=96,
        build=of_timm("mobilenetv2_050"),
    ),
)
