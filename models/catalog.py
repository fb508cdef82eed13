"""Every model variant and the figures published for it. A new variant is one entry here; a new family, one file beside
this one that defines its networks.

Parameters and MACs are those of the authors' definition (checked by tests against the networks); top-1 is quoted.
"""

from __future__ import annotations

from collections.abc import Iterator

from models.spec import ModelSpec, Preprocess, Sizes


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
            # The published checkpoints expect [0, 1] pixels: no mean, no deviation.
            preprocess=Preprocess(size=256, crop=0.9, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
            # Three of the five stages cut their map into 2x2 patches, the last of them at 1/32 of the input.
            sizes=Sizes(multiple_of=64, minimum=64),
            parameters=parameters,
            macs=macs,
            top1=top1,
            source="timm results-imagenet.csv, cvnets_in1k weights",
        )


def _mobilenetv2() -> Iterator[ModelSpec]:
    keras, timm = "keras.applications.mobilenet_v2", "timm results-imagenet.csv, ra_in1k weights"
    figures = (
        ("mobilenetv2_035", 1_677_128, 59_285_808, 60.3, keras),
        ("mobilenetv2_050", 1_968_680, 97_131_840, 65.93, timm),
        ("mobilenetv2_075", 2_636_424, 209_069_792, 69.8, keras),
        ("mobilenetv2_100", 3_504_872, 300_774_272, 72.91, timm),
        ("mobilenetv2_140", 6_108_776, 582_195_824, 76.53, timm),
    )
    for name, parameters, macs, top1, source in figures:
        yield ModelSpec(
            name=name,
            network=f"models.mobilenetv2:{name}",
            preprocess=Preprocess(size=224, crop=0.875),
            sizes=Sizes(multiple_of=32, minimum=32),  # five strides of 2
            parameters=parameters,
            macs=macs,
            top1=top1,
            source=source,
        )


def _convmixer() -> Iterator[ModelSpec]:
    figures = (
        ("convmixer_768_32", 7, 21_110_248, 20_676_851_712, 80.16),
        ("convmixer_1024_20", 14, 24_383_464, 5_948_547_072, 76.94),
        ("convmixer_1536_20", 7, 51_625_960, 51_099_168_768, 81.37),
    )
    for name, patch, parameters, macs, top1 in figures:
        yield ModelSpec(
            name=name,
            network=f"models.convmixer:{name}",
            preprocess=Preprocess(size=224, crop=0.96),
            sizes=Sizes(multiple_of=patch, minimum=4 * patch),
            parameters=parameters,
            macs=macs,
            top1=top1,
            source="locuslab/convmixer README",
        )
    yield ModelSpec(
        name="convmixer_mini",
        network="models.convmixer:convmixer_mini",
        preprocess=Preprocess(size=64, crop=0.96),
        sizes=Sizes(multiple_of=4, minimum=16),
        parameters=129_930,
        macs=31_655_168,
        top1=None,
        source="a small variant of our own, counted with 10 classes",
        classes=10,
    )


def _coatnet() -> Iterator[ModelSpec]:
    yield from ()


def _conformer() -> Iterator[ModelSpec]:
    yield from ()


def _transcnn() -> Iterator[ModelSpec]:
    yield from ()


def _hatnet() -> Iterator[ModelSpec]:
    yield from ()


def _swin() -> Iterator[ModelSpec]:
    yield from ()


def _acmix() -> Iterator[ModelSpec]:
    yield from ()


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
