"""Model catalog: every model matches its spec in parameters, MACs, sizes, classes and published accuracy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from models.spec import ModelSpec, Sizes

# Millions of parameters and multiply-accumulates as others count or publish them, and top-1 in percent. Counts include
# attention products and every depthwise convolution. Sources: MobileViT: arXiv 2110.02178 Table 4 and
# apple/ml-cvnets; MobileNetV2: torch models of timm (keras counts no BatchNorm statistics: 1 % less); ConvMixer:
# locuslab/convmixer. Accuracies: timm results-imagenet.csv; keras.applications for 0.35 and 0.75; ConvMixer README.
# CoAtNet: parameters, accuracies: arXiv 2106.04803 Table 4; multiply-accumulates: as its definition was counted apart
# from this code. Table 4 has 1 to 2 % more (4.2, 8.4, 15.7, 34.7 G; 189.5 G for coatnet_4 at 384 pixels, where ours has
# 186.5), presumably element-wise operations. Of `rw`: timm benchmark-infer-amp-nchw-pt240-cu124-rtx4090-dynamo.csv.
# TransCNN, HAT-Net: README of yun-liu/TransCNN; multiply-accumulates: the authors' code, counted in the same way (the
# README of HAT-Net has 2.0, 4.3, 8.3 and 11.5 G: without attention products).
# Conformer: pengzhiliang/Conformer README.
# Swin: timm results-imagenet.csv; multiply-accumulates: README of microsoft/Swin-Transformer.
# ACmix: accuracies: README of LeapLabTHU/ACmix; the rest: the authors' code, counted in the same way (the README has
# 10.6, 14.6, 18.6, 30 and 51 M parameters, and 2.3, 2.9, 3.6, 4.6 and 9.0 G, which their code does not have). Of the
# ResNets, ours has 15 M less: three blocks with stride 2, where the authors mix taps of pixels that are then dropped.
PUBLISHED = {
    "mobilevit_xxs": (1.272, 407, 68.94),
    "mobilevit_xs": (2.318, 1026, 74.62),
    "mobilevit_s": (5.579, 2001, 78.30),
    "mobilenetv2_035": (1.677, 59, 60.3),
    "mobilenetv2_050": (1.969, 97, 65.93),
    "mobilenetv2_075": (2.636, 209, 69.8),
    "mobilenetv2_100": (3.505, 301, 72.91),
    "mobilenetv2_130": (5.34, 509, 74.4),
    "mobilenetv2_140": (6.109, 582, 76.53),
    "convmixer_768_32": (21.11, 20_680, 80.16),
    "convmixer_1024_20": (24.38, 5_950, 76.94),
    "convmixer_1536_20": (51.63, 51_100, 81.37),
    "transcnn_tiny": (13.3, 2_850, 80.4),
    "transcnn_small": (26.5, 5_650, 83.1),
    "transcnn_medium": (48.3, 9_520, 83.8),
    "transcnn_large": (80.0, 15_460, 84.2),
    "hatnet_tiny": (12.7, 2_128, 79.8),
    "hatnet_small": (25.7, 4_548, 82.6),
    "hatnet_medium": (42.9, 8_777, 84.0),
    "hatnet_large": (63.1, 12_075, 84.2),
    "coatnet_0": (25.0, 4_140, 81.6),
    "coatnet_1": (42.0, 8_240, 83.3),
    "coatnet_2": (75.0, 15_500, 84.1),
    "coatnet_3": (168.0, 34_370, 84.5),
    "coatnet_4": (275.0, 60_230, None),
    "coatnet_0_rw": (27.44, 4_430, 82.40),
    "coatnet_1_rw": (41.72, 8_040, 83.62),
    "coatnet_2_rw": (73.87, 15_090, 86.58),
    "coatnet_bn_0_rw": (27.44, 4_670, 82.39),
    "coatnet_rmlp_1_rw": (41.69, 7_850, 83.35),
    "coatnet_rmlp_2_rw": (73.88, 15_180, 84.61),
    "conformer_tiny": (23.5, 5_200, 81.3),
    "conformer_small": (37.7, 10_600, 83.4),
    "conformer_base": (83.3, 23_300, 84.1),
    "swin_tiny": (28.29, 4_500, 81.39),
    "swin_small": (49.61, 8_700, 83.23),
    "swin_base": (87.77, 15_400, 85.28),
    "swin_base_384": (87.90, 47_100, 86.44),
    "swin_large": (196.53, 34_500, 86.32),
    "swin_large_384": (196.74, 103_900, 87.14),
    "acmix_resnet26": (10.488, 2_155, 76.1),
    "acmix_resnet38": (14.411, 2_761, 77.4),
    "acmix_resnet50": (18.334, 3_367, 77.8),
    "acmix_swin_tiny": (28.650, 4_645, 81.9),
    "acmix_swin_small": (50.345, 8_993, 83.5),
}

MINIS = [name for name in models.ALL if name.endswith("_mini")]
SMALL = ["mobilevit_xxs", "mobilenetv2_035", *MINIS]  # small enough to compute with

every_model = pytest.mark.parametrize("spec", models.ALL.values(), ids=models.ALL)


def built(spec: ModelSpec, classes: int) -> nn.Module:
    """Return the network on the meta device: shapes and counts are exact, and large networks take no time."""
    with torch.device("meta"):
        return spec.build(classes)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def forward_shape(network: nn.Module, size: int, images: int = 2) -> tuple[int, ...]:
    device = next(network.parameters()).device
    return tuple(network(torch.zeros(images, 3, size, size, device=device)).shape)


def members(sizes: Sizes) -> Iterator[int]:
    return (size for size in range(1, sizes.maximum + 1) if size in sizes)


@every_model
def test_parameters_are_counted_exactly(spec: ModelSpec) -> None:
    assert parameters(built(spec, spec.classes)) == spec.parameters


@every_model
def test_multiplications_are_counted_exactly_attention_products_included(spec: ModelSpec) -> None:
    network = built(spec, spec.classes).eval()
    with FlopCounterMode(display=False) as counter:
        forward_shape(network, spec.preprocess.size, images=1)
    assert counter.get_total_flops() / 2 == spec.macs


@every_model
def test_a_different_number_of_classes_changes_only_the_classifiers(spec: ModelSpec) -> None:
    few, many = built(spec, 3).state_dict(), built(spec, 7).state_dict()
    assert few.keys() == many.keys()
    changed = {name for name in few if few[name].shape != many[name].shape}
    heads = {name.rpartition(".")[0] for name in changed}
    assert changed == spec.head() == {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    assert all(few[f"{head}.bias"].shape == (3,) for head in heads)
    assert list(few)[-1] in changed


@every_model
def test_a_network_comes_in_training_mode_without_a_zero_gamma(spec: ModelSpec) -> None:
    assert built(spec, 2).training
    if spec.parameters < 3e6:
        norms = [
            module
            for module in spec.build(2).modules()
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm)
        ]
        assert norms and all((norm.weight == 1).all() for norm in norms)


@every_model
def test_the_smallest_sizes_work(spec: ModelSpec) -> None:
    network = built(spec, 5).eval()
    for size in itertools.islice(members(spec.sizes), 3):
        assert forward_shape(network, size) == (2, 5)


@pytest.mark.parametrize("name", SMALL)
def test_the_smallest_size_computes_and_trains(name: str) -> None:
    spec = models.ALL[name]
    network = spec.build(5)
    smallest = next(members(spec.sizes))
    logits = network(torch.randn(2, 3, smallest, smallest))
    assert logits.shape == (2, 5) and logits.isfinite().all()
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", SMALL)
def test_images_do_not_see_each_other(name: str) -> None:
    spec = models.ALL[name]
    network = spec.build(4).eval()
    size = next(members(spec.sizes))
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(network(images)[1:2], network(images[1:2]), rtol=1e-4, atol=1e-5)


@every_model
def test_the_published_size_is_one_that_works(spec: ModelSpec) -> None:
    assert spec.preprocess.size in spec.sizes


@every_model
def test_sizes_between_the_multiples_and_beyond_the_ends_are_refused(spec: ModelSpec) -> None:
    sizes = spec.sizes
    assert 0 not in sizes and -sizes.multiple_of not in sizes
    assert sizes.minimum - sizes.multiple_of not in sizes
    assert sizes.minimum + 1 not in sizes
    assert (sizes.maximum // sizes.multiple_of + 1) * sizes.multiple_of not in sizes


@every_model
def test_figures_are_within_one_percent_of_the_published_ones(spec: ModelSpec) -> None:
    if spec.name in MINIS:
        assert spec.top1 is None
        return
    millions, mega_macs, top1 = PUBLISHED[spec.name]
    assert spec.parameters == pytest.approx(millions * 1e6, rel=0.01)
    assert spec.macs == pytest.approx(mega_macs * 1e6, rel=0.01)
    assert spec.top1 == top1


def test_every_published_variant_is_there() -> None:
    assert models.ALL.keys() == PUBLISHED.keys() | set(MINIS)


@every_model
def test_a_name_consists_of_family_and_variant(spec: ModelSpec) -> None:
    assert spec.name.startswith(f"{spec.family}_")
    assert spec.module == f"models.{spec.family}"
