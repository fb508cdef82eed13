"""References of CoAtNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.models.golden.rule import Reference, imported

if TYPE_CHECKING:
    from torch import nn

# timm's closest to the paper has the stride in the depthwise convolution, average pooling, and SiLU in squeeze and
# excitation; its options give the paper's.
_PAPER = {
    "conv_stride_mode": "1x1",
    "conv_pool_type": "max2",
    "conv_attn_act_layer": "gelu",
    "transformer_pool_type": "max2",
}


def _timm(name: str, **options: Any) -> Callable[[Path], nn.Module]:
    return lambda code: imported(code, "timm").create_model(name, **options)


def _reference(model: str, size: int, **options: Any) -> Reference:
    return Reference(
        name=f"{model}_timm",
        repository="huggingface/pytorch-image-models",
        commit="aa4b5850",
        model=model,
        format=None,
        size=size,
        build=_timm(f"{model}_224", img_size=size, **options),
    )


# Tables are as large as the input asks for, in timm; relative biases from an MLP fit any size.
REFERENCES: tuple[Reference, ...] = (
    _reference("coatnet_0", 224, **_PAPER),
    _reference("coatnet_0_rw", 224),
    _reference("coatnet_bn_0_rw", 224),
    _reference("coatnet_rmlp_1_rw", 160),
    _reference("coatnet_rmlp_2_rw", 96),
)
