"""Catalog of all built-in models with their published figures. To add a variant, add an entry here; to add a family,
add a module beside this file that defines its networks.

Parameters and MACs follow the authors' definitions and are checked by tests against the networks; top-1 is quoted.
"""

from __future__ import annotations

from collections.abc import Iterator

from models.spec import Form, ModelSpec, Preprocess, Sizes

_BOTH: tuple[Form, ...] = ("tokens", "channels")


def _mini(
    name: str,
    preprocess: Preprocess,
    sizes: Sizes,
    parameters: int,
    macs: int,
    *,
    forms: tuple[Form, ...] = ("tokens",),
) -> ModelSpec:
    """Return the spec of a small variant for small images, not from the paper; its name starts with the family."""
    return ModelSpec(
        name=name,
        network=f"models.{name.partition('_')[0]}:{name}",
        preprocess=preprocess,
        sizes=sizes,
        parameters=parameters,
        macs=macs,
        top1=None,
        source="a small variant of our own, counted with 10 classes",
        classes=10,
        forms=forms,
    )


def _mobilevit() -> Iterator[ModelSpec]:
    figures = (
        ("mobilevit_xxs", 1_272_024, 407_364_096, 68.94),
        ("mobilevit_xs", 2_317_848, 1_025_911_808, 74.62),
        ("mobilevit_s", 5_578_632, 2_000_831_488, 78.30),
    )
    for name, parameters, macs, top1 in figures:
        yield ModelSpec(
            name=name,
            network=f"models.mobilevit:{name}",
            # The published checkpoints expect pixels in [0, 1], without subtraction of a mean or division by a std.
            preprocess=Preprocess(size=256, crop=0.9, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
            # Three of the five stages divide their feature map into 2x2 patches, the last at 1/32 of the input.
            sizes=Sizes(multiple_of=64, minimum=64),
            parameters=parameters,
            macs=macs,
            top1=top1,
            source="timm results-imagenet.csv, cvnets_in1k weights",
            hub=f"timm/{name}.cvnets_in1k",
            forms=_BOTH,
        )


def _mobilenetv2() -> Iterator[ModelSpec]:
    # The last column is the tag of timm's weights; without a tag, the accuracy is that of
    # keras.applications.mobilenet_v2.
    figures = (
        ("mobilenetv2_035", 1_677_128, 59_285_808, 60.3, None),
        ("mobilenetv2_050", 1_968_680, 97_131_840, 65.93, "lamb_in1k"),
        ("mobilenetv2_075", 2_636_424, 209_069_792, 69.8, None),
        ("mobilenetv2_100", 3_504_872, 300_774_272, 72.91, "ra_in1k"),
        ("mobilenetv2_130", 5_386_792, 509_374_560, 74.4, None),
        ("mobilenetv2_140", 6_108_776, 582_195_824, 76.53, "ra_in1k"),
    )
    for name, parameters, macs, top1, tag in figures:
        yield ModelSpec(
            name=name,
            network=f"models.mobilenetv2:{name}",
            preprocess=Preprocess(size=224, crop=0.875),
            sizes=Sizes(multiple_of=32, minimum=32),  # five strides of 2
            parameters=parameters,
            macs=macs,
            top1=top1,
            source=f"timm results-imagenet.csv, {tag} weights" if tag else "keras.applications.mobilenet_v2",
            hub=f"timm/{name}.{tag}" if tag else None,
        )


def _convmixer() -> Iterator[ModelSpec]:
    figures = (
        ("convmixer_768_32", 7, 21_110_248, 20_676_851_712, 80.16),
        ("convmixer_1024_20", 14, 24_383_464, 5_948_547_072, 76.94),
        ("convmixer_1536_20", 7, 51_625_960, 51_099_168_768, 81.37),
    )
    for name, patch, parameters, macs, top1 in figures:
        in_timm = f"{name}_ks9_p14" if name == "convmixer_1024_20" else name
        yield ModelSpec(
            name=name,
            network=f"models.convmixer:{name}",
            preprocess=Preprocess(size=224, crop=0.96),
            sizes=Sizes(multiple_of=patch, minimum=4 * patch),
            parameters=parameters,
            macs=macs,
            top1=top1,
            source="locuslab/convmixer README",
            hub=f"timm/{in_timm}.in1k",
        )
    yield _mini("convmixer_mini", Preprocess(size=64, crop=0.96), Sizes(multiple_of=4, minimum=16), 129_930, 31_655_168)


def _coatnet() -> Iterator[ModelSpec]:
    paper, timm = "arXiv 2106.04803 Table 4", "timm results-imagenet.csv"
    figures = (
        ("coatnet_0", 25_036_820, 4_141_888_512, 81.6, paper),
        ("coatnet_1", 42_225_776, 8_238_879_744, 83.3, paper),
        ("coatnet_2", 74_684_744, 15_502_290_944, 84.1, paper),
        ("coatnet_3", 166_966_264, 34_372_257_792, 84.5, paper),
        ("coatnet_4", 275_425_288, 60_235_941_888, None, f"{paper} has it at 384 pixels and above only"),
        ("coatnet_0_rw", 27_435_562, 4_406_300_928, 82.40, timm),
        ("coatnet_1_rw", 41_721_502, 7_992_160_512, 83.62, timm),
        ("coatnet_2_rw", 73_868_400, 15_019_256_832, 86.58, timm),
        ("coatnet_bn_0_rw", 27_435_562, 4_647_145_728, 82.39, timm),
        ("coatnet_rmlp_1_rw", 41_691_982, 7_807_099_392, 83.35, timm),
        ("coatnet_rmlp_2_rw", 73_881_264, 15_114_828_800, 84.61, timm),
    )
    half, pretrained = (0.5, 0.5, 0.5), {"coatnet_2_rw": "sw_in12k_ft_in1k"}
    for name, parameters, macs, top1, source in figures:
        weights = pretrained.get(name, "sw_in1k") if source is timm else None
        yield ModelSpec(
            name=name,
            network=f"models.coatnet:{name}",
            preprocess=Preprocess(size=224, crop=0.95, mean=half, std=half)
            if weights and name != "coatnet_bn_0_rw"
            else Preprocess(size=224, crop=0.95),
            # Five strides of 2. 512 is the paper's largest size. Relative biases grow with the fourth power of the
            # side: at larger sizes, the two largest models would exceed the 2 GiB limit of an ONNX file.
            sizes=Sizes(multiple_of=32, minimum=32, maximum=384 if name in ("coatnet_3", "coatnet_4") else 512),
            parameters=parameters,
            macs=macs,
            top1=top1,
            source=f"{source}, {weights} weights" if weights else source,
            hub=f"timm/{name}_224.{weights}" if weights else None,
            forms=_BOTH,
        )
    yield _mini(
        "coatnet_mini",
        Preprocess(size=64, crop=0.95),
        Sizes(multiple_of=16, minimum=32, maximum=256),
        513_286,
        28_349_696,
        forms=_BOTH,
    )


def _conformer() -> Iterator[ModelSpec]:
    figures = (
        ("conformer_tiny", 23_524_704, 5_225_936_896, 81.3),
        ("conformer_small", 37_673_424, 10_599_350_272, 83.4),
        ("conformer_base", 83_289_136, 23_325_745_152, 84.1),
    )
    for name, parameters, macs, top1 in figures:
        yield ModelSpec(
            name=name,
            network=f"models.conformer:{name}",
            preprocess=Preprocess(size=224, crop=0.875),
            sizes=Sizes(multiple_of=16, minimum=16),  # the side of a token, one pixel of the last stage
            parameters=parameters,
            macs=macs,
            top1=top1,
            source="pengzhiliang/Conformer README",
        )
    yield _mini(
        "conformer_mini", Preprocess(size=64, crop=0.875), Sizes(multiple_of=16, minimum=16), 834_724, 25_292_672
    )


def _transcnn() -> Iterator[ModelSpec]:
    figures = (
        ("transcnn_tiny", 13_315_976, 2_850_541_568, 80.4),
        ("transcnn_small", 26_538_824, 5_651_615_744, 83.1),
        ("transcnn_medium", 48_322_504, 9_519_825_920, 83.8),
        ("transcnn_large", 80_033_352, 15_460_808_704, 84.2),
    )
    for name, parameters, macs, top1 in figures:
        yield ModelSpec(
            name=name,
            network=f"models.transcnn:{name}",
            preprocess=Preprocess(size=256, crop=0.875),
            sizes=Sizes(multiple_of=128, minimum=128),  # windows of 8 pixels divide the map at 1/16 of the input
            parameters=parameters,
            macs=macs,
            top1=top1,
            source="yun-liu/TransCNN README, tag v1.0",
        )
    minis = (("transcnn_mini", 32, 650_410, 17_568_000), ("transcnn_multilevel_mini", 64, 904_298, 20_349_184))
    for name, multiple, parameters, macs in minis:
        yield _mini(
            name, Preprocess(size=64, crop=0.875), Sizes(multiple_of=multiple, minimum=multiple), parameters, macs
        )


def _hatnet() -> Iterator[ModelSpec]:
    figures = (
        ("hatnet_tiny", 12_655_912, 2_128_134_912, 79.8),
        ("hatnet_small", 25_747_784, 4_548_314_112, 82.6),
        ("hatnet_medium", 42_942_472, 8_777_348_096, 84.0),
        ("hatnet_large", 63_132_488, 12_074_854_656, 84.2),
    )
    for name, parameters, macs, top1 in figures:
        yield ModelSpec(
            name=name,
            network=f"models.hatnet:{name}",
            preprocess=Preprocess(size=224, crop=0.875),
            # Windows of 7 pixels must divide the map at 1/16 of the input, pooling by 8 the map at 1/4.
            sizes=Sizes(multiple_of=224, minimum=224),
            parameters=parameters,
            macs=macs,
            top1=top1,
            source="yun-liu/HAT-Net README, tag v2.0",
        )
    yield _mini("hatnet_mini", Preprocess(size=64, crop=0.875), Sizes(multiple_of=32, minimum=32), 626_634, 17_289_472)


def _swin() -> Iterator[ModelSpec]:
    # The weights from which published quantized results start; those of the small models are trained on ImageNet-1k
    # only.
    small, large = "ms_in1k", "ms_in22k_ft_in1k"
    figures = (
        ("swin_tiny", 224, "tiny_patch4_window7_224", small, 28_288_354, 4_490_566_656, 81.39),
        ("swin_small", 224, "small_patch4_window7_224", small, 49_606_258, 8_740_875_264, 83.23),
        ("swin_base", 224, "base_patch4_window7_224", large, 87_768_224, 15_430_946_816, 85.28),
        ("swin_base_384", 384, "base_patch4_window12_384", large, 87_903_584, 47_083_134_976, 86.44),
        ("swin_large", 224, "large_patch4_window7_224", large, 196_532_476, 34_475_759_616, 86.32),
        ("swin_large_384", 384, "large_patch4_window12_384", large, 196_735_516, 103_919_087_616, 87.14),
    )
    for name, size, published, weights, parameters, macs, top1 in figures:
        yield ModelSpec(
            name=name,
            network=f"models.swin:{name}",
            preprocess=Preprocess(size=size, crop=1.0 if size == 384 else 0.9),
            # Windows of 7 (12) tokens must divide the map at 1/32 of the input as well.
            sizes=Sizes(multiple_of=size, minimum=size),
            parameters=parameters,
            macs=macs,
            top1=top1,
            source=f"timm results-imagenet.csv, {weights} weights",
            hub=f"timm/swin_{published}.{weights}",
            forms=_BOTH,
        )
    yield _mini(
        "swin_mini",
        Preprocess(size=64, crop=0.9),
        Sizes(multiple_of=64, minimum=64),
        568_198,
        21_234_944,
        forms=_BOTH,
    )


def _acmix() -> Iterator[ModelSpec]:
    # Preprocessing of the authors' evaluation: torchvision's defaults for ResNets, that of Swin for the Swin variants.
    resnet, swin = Preprocess(size=224, interpolation="bilinear"), Preprocess(size=224)
    figures = (
        # Five strides of 2; reflection padding of 3 pixels needs a feature map of at least 4 pixels.
        ("acmix_resnet26", Sizes(multiple_of=32, minimum=64), resnet, 10_487_816, 2_140_248_064, 76.1),
        ("acmix_resnet38", Sizes(multiple_of=32, minimum=128), resnet, 14_410_896, 2_746_073_088, 77.4),
        ("acmix_resnet50", Sizes(multiple_of=32, minimum=128), resnet, 18_333_976, 3_351_898_112, 77.8),
        # Windows of 7 tokens must divide the map at 1/32 of the input as well.
        ("acmix_swin_tiny", Sizes(multiple_of=224, minimum=224), swin, 28_649_908, 4_645_008_384, 81.9),
        ("acmix_swin_small", Sizes(multiple_of=224, minimum=224), swin, 50_345_080, 8_992_859_136, 83.5),
    )
    for name, sizes, preprocess, parameters, macs, top1 in figures:
        # `macs` do not include the products of the ResNets' attention (61, 98 and 135 M), which are element-wise.
        yield ModelSpec(
            name=name,
            network=f"models.acmix:{name}",
            preprocess=preprocess,
            sizes=sizes,
            parameters=parameters,
            macs=macs,
            top1=top1,
            source="LeapLabTHU/ACmix README",
        )
    yield _mini("acmix_mini", Preprocess(size=64), Sizes(multiple_of=8, minimum=32), 150_892, 21_006_848)


SPECS: tuple[ModelSpec, ...] = (
    *_mobilevit(),
    *_mobilenetv2(),
    *_convmixer(),
    *_coatnet(),
    *_conformer(),
    *_transcnn(),
    *_hatnet(),
    *_swin(),
    *_acmix(),
)
