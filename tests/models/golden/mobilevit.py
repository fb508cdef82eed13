"""References of MobileViT."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from tests.models.golden.rule import Reference, imported, of_timm

if TYPE_CHECKING:
    from torch import nn


def _cvnets(code: Path) -> nn.Module:
    """The network of config/classification/mobilevit_xx_small.yaml, which was trained on images that OpenCV had read:
    channels blue, green, red. The hook reorders the channels; every other model here gets red, green, blue.
    """
    options = {
        "model.classification.name": "mobilevit",
        "model.classification.classifier_dropout": 0.1,
        "model.classification.mit.mode": "xx_small",
        "model.classification.mit.number_heads": 4,
        "model.classification.mit.conv_kernel_size": 3,
        "model.activation.name": "swish",
        "model.normalization.name": "batch_norm",
        "model.layer.conv_init": "kaiming_normal",
        "model.layer.linear_init": "trunc_normal",
    }
    classification = imported(code, "cvnets.models.classification")
    network: nn.Module = classification.build_classification_model(Namespace(**options))
    network.register_forward_pre_hook(lambda _, images: (images[0].flip(1),))
    return network


REFERENCES: tuple[Reference, ...] = (
    Reference(
        name="mobilevit_xxs_cvnets",
        repository="apple/ml-cvnets",
        commit="cvnets-v0.1",
        model="mobilevit_xxs",
        format="apple/ml-cvnets",
        size=128,
        build=_cvnets,
    ),
    Reference(
        name="mobilevit_xs_timm",
        repository="huggingface/pytorch-image-models",
        commit="aa4b5850",
        model="mobilevit_xs",
        format=None,
        size=128,
        build=of_timm("mobilevit_xs"),
    ),
)
