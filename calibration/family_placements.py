"""Default placement per model family: the operators that run in INT8, and the reasons.

There are two kinds of runtimes. On accelerators (TensorRT, Core ML) one checkpoint serves all, the other operators run
in FP16 at little cost, and each border between INT8 and FP16 may cost a layout conversion. On CPUs (OpenVINO, ONNX
Runtime) float layers cost a multiple of INT8 layers, so every layer runs in INT8, but residual additions only where
this was faster; `make tune` tries them for every family.

Float in every family:
- LayerNorm, softmax, SiLU and GELU: no placement has a kind for them. In min-max INT8 they reduce the top-1 of Swin-B
  from 83.6 to 25.6 % (FQ-ViT, arXiv 2111.13824); TensorRT runs LayerNorm and softmax in float, and Core ML has no pass
  that fuses quantization with any of the four.
- attention: TensorRT fuses INT8 attention only for heads of 16, 32 or 64 and up to 512 tokens, with softmax quantized
  as well; otherwise the fused FP16 attention is lost, too (TensorRT documentation, "Multi-Head Attention Fusion";
  observed in plans of TensorRT-RTX).
- residual additions, except for MobileNetV2 on CPUs: they have no multiply-accumulates, and in acmix, convmixer and
  conformer they have the lowest SQNR of all kinds.

Selected per family, on accelerators:
- depthwise convolutions: at most 7 % of the multiply-accumulates of the variants below. With them in INT8 the
  TensorRT-RTX plan of mobilevit_xs doubles, from 14.1 to 27.4 MB.
- convolutions of fewer than 8 channels, such as the first layer: INT8 if their SQNR is at least `SMALL_DB` when they
  are quantized alone. Kernels pad their channels, so the speedup is smallest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from calibration.qdq_placement import LAYERS, Kind, Placement

Runtime: TypeAlias = Literal["accelerator", "cpu"]

SMALL_DB: Final = 45.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyRecipe:
    """Placements of one family, and measurements per kind of operator."""

    accelerator: Placement
    because: str  # reason for an exception to the rules above, or their result
    # SQNR of the logits in dB with only one kind in INT8 and no corrections: the small variant trained on the digits at
    # 64 pixels, 64 validation images, one seed (`python -m tests.bench.quantization.families`).
    errors_db: Mapping[Kind, float]
    # Percent of all multiply-accumulates, for the kinds that a family selects or not: smallest published variant at its
    # published size (MobileViT: xs; MobileNetV2: 1.0).
    shares: Mapping[Kind, float]
    cpu: Placement = LAYERS


_BIG = Placement(kinds=("conv", "linear"))
_BIG_AND_FIRST = Placement(kinds=("conv", "small", "linear"))
_LAYERS_AND_SUMS = Placement(kinds=(*LAYERS.kinds, "elementwise"))

FAMILIES: Final[Mapping[str, FamilyRecipe]] = {
    "mobilevit": FamilyRecipe(
        accelerator=_BIG,
        because="depthwise and first layers are 3.7 % of the work and cost 3 dB",
        errors_db={
            "conv": 31.3,
            "small": 40.4,
            "depthwise": 34.7,
            "linear": 47.8,
            "attention": 61.3,
            "elementwise": 49.8,
        },
        shares={"small": 0.7, "depthwise": 3.0},
    ),
    "mobilenetv2": FamilyRecipe(
        accelerator=LAYERS,
        because="its depthwise layers are between INT8 layers on the largest tensors, whose traffic FP16 would "
        "double; published INT8 figures include them (Core ML, W8A8 QAT: 71.86 to 71.66 %)",
        errors_db={"conv": 33.4, "small": 36.7, "depthwise": 34.1, "linear": 48.4, "elementwise": 40.7},
        shares={"small": 3.6, "depthwise": 6.9},
        cpu=_LAYERS_AND_SUMS,  # 1.05 times as fast as without sums at 224 pixels (`make bench-speed`)
    ),
    "convmixer": FamilyRecipe(
        accelerator=_BIG_AND_FIRST,
        because="depthwise layers of 7 or 9 pixels a side are 6 % of the work, with as much error as all others",
        errors_db={"conv": 35.5, "small": 51.3, "depthwise": 35.5, "linear": 42.0, "elementwise": 32.2},
        shares={"small": 0.6, "depthwise": 6.0},
    ),
    "coatnet": FamilyRecipe(
        accelerator=_BIG,
        because="depthwise and first layers are 1.4 % of the work",
        errors_db={
            "conv": 32.5,
            "small": 43.8,
            "depthwise": 40.9,
            "linear": 47.6,
            "attention": 46.5,
            "elementwise": 37.8,
        },
        shares={"small": 0.5, "depthwise": 0.9},
    ),
    "conformer": FamilyRecipe(
        accelerator=_BIG,
        because="the first layer is 2.3 % of the work and has more error than all other convolutions",
        errors_db={"conv": 36.4, "small": 34.2, "linear": 42.1, "attention": 41.8, "elementwise": 32.9},
        shares={"small": 2.3, "depthwise": 0.0},
    ),
    "transcnn": FamilyRecipe(
        accelerator=_BIG,
        because="depthwise and first layers are 3.4 % of the work, and the first has nearly the error of all "
        "convolutions",
        errors_db={
            "conv": 30.8,
            "small": 33.2,
            "depthwise": 43.7,
            "linear": 45.0,
            "attention": 37.7,
            "elementwise": 32.9,
        },
        shares={"small": 0.2, "depthwise": 3.2},
    ),
    "hatnet": FamilyRecipe(
        accelerator=_BIG_AND_FIRST,
        because="depthwise layers are 2.1 % of the work",
        errors_db={
            "conv": 34.5,
            "small": 57.7,
            "depthwise": 45.5,
            "linear": 46.1,
            "attention": 42.0,
            "elementwise": 38.6,
        },
        shares={"small": 0.3, "depthwise": 2.1},
    ),
    "swin": FamilyRecipe(
        accelerator=_BIG_AND_FIRST,
        because="nearly all work is in linear layers",
        errors_db={"small": 49.5, "linear": 39.6, "attention": 42.3, "elementwise": 42.5},
        shares={"small": 0.3, "depthwise": 0.0},
    ),
    "acmix": FamilyRecipe(
        accelerator=_BIG,
        because="its first layer and its shifts have 3 or 4 channels on one side, with nearly the error of all others",
        errors_db={"conv": 36.1, "small": 38.4, "linear": 46.3, "elementwise": 30.2},
        shares={"small": 8.7, "depthwise": 0.0},
    ),
}


def default(family: str, runtime: Runtime = "accelerator") -> Placement:
    """Return the placement of `family` on `runtime`; all layers for an unknown family."""
    if family not in FAMILIES:
        return LAYERS
    return FAMILIES[family].cpu if runtime == "cpu" else FAMILIES[family].accelerator
