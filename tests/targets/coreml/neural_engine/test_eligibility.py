"""Neural Engine rules: each on an operator that breaks it and one that does not; figures are counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models
from calibration.graph import exported_program as programs
from targets.base import Export
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.neural_engine.eligibility import RULES, Eligibility, Finding, eligibility, multiply_accumulates
from targets.coreml.package import read
from targets.coreml.target import PACKAGE, TARGET

pytestmark = pytest.mark.slow

Body = Callable[..., Any]  # of a program: from MIL's builder and the inputs to the output

HALF = np.float16
IMAGE = (1, 8, 16, 64)  # its last axis fills lines of 64 bytes


def operations(body: Body, *shapes: tuple[Any, ...], dtype: str = "fp16") -> list[Any]:
    """Return the operators of the program of `body` for inputs of these shapes, before any pass of coremltools."""
    coremltools = import_coremltools()
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function, Program, types

    inputs = {
        f"input_{place}": Builder.placeholder(shape=shape, dtype=types.string_to_builtin(dtype))
        for place, shape in enumerate(shapes)
    }
    program = Program()
    with Function(inputs, opset_version=coremltools.target.iOS18) as function:
        function.set_outputs([body(Builder, *function.inputs.values())])
        program.add_function("main", function)
    return list(program.functions["main"].operations)


def linted(body: Body, *shapes: tuple[Any, ...], dtype: str = "fp16") -> Eligibility:
    return eligibility(operations(body, *(shapes or (IMAGE,)), dtype=dtype))


def finding(found: Eligibility, rule: str) -> Finding:
    return next(finding for finding in found.findings if finding.rule == rule)


def weight(*shape: int) -> Any:
    return np.full(shape, 0.5, HALF)


def conv(mb: Any, x: Any, *sides: int, **attributes: Any) -> Any:
    kernel = sides or (1,) * (len(x.shape) - 2)
    return mb.conv(x=x, weight=weight(8, x.shape[1], *kernel), **attributes)


def pool(mb: Any, x: Any, side: int, stride: int) -> Any:
    return mb.max_pool(x=x, kernel_sizes=[side, side], strides=[stride, stride], pad_type="valid")


def reshaped(*shape: int) -> Body:
    return lambda mb, x: mb.reshape(x=x, shape=shape)


def norm_in_parts(mb: Any, x: Any) -> Any:
    mean = mb.reduce_mean(x=mb.square(x=x), axes=[1], keep_dims=True)
    return mb.mul(x=x, y=mb.rsqrt(x=mb.add(x=mean, y=HALF(1e-4))))


def palette(mb: Any, x: Any, stride: int) -> Any:
    found = mb.constexpr_lut_to_dense(
        indices=np.zeros((8, 8, 4, 4), types_of("uint4")), lut=weight(1, 1, 1, 1, 16, 1), vector_axis=None
    )
    return mb.conv(x=x, weight=found, strides=[stride, stride])


def types_of(name: str) -> Any:
    import_coremltools()
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(types.string_to_builtin(name))


def blocks(mb: Any, x: Any, count: int) -> Any:
    found = mb.constexpr_blockwise_shift_scale(data=np.ones((8, 8, 1, 1), np.int8), scale=weight(8, count, 1, 1))
    return mb.conv(x=x, weight=found)


def rolled(mb: Any, x: Any) -> Any:
    return mb.gather(x=x, indices=np.roll(np.arange(16), 3).astype(np.int32), axis=2)


def upsampled(factor: float) -> Body:
    return lambda mb, x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=factor, scale_factor_width=factor)


def sampled(mb: Any, x: Any) -> Any:
    return mb.resample(
        x=x,
        coordinates=np.zeros((1, 2, 2, 2), HALF),
        sampling_mode="bilinear",
        padding_mode="border",
        padding_value=HALF(0),
        coordinates_mode="unnormalized",
        align_corners=True,
    )


def padded(mode: str) -> Body:
    return lambda mb, x: mb.pad(x=x, pad=[1, 1, 1, 1], mode=mode)


# Rule, a program that breaks it, one that does not, and the shapes of their inputs, if not one IMAGE.
CASES: tuple[tuple[str, Body, Body, tuple[tuple[int, ...], ...]], ...] = (
    ("rank", reshaped(1, 2, 4, 4, 4, 64), reshaped(1, 8, 4, 4, 64), ()),
    ("integers", lambda mb, x: mb.cast(x=x, dtype="int32"), lambda mb, x: mb.cast(x=x, dtype="fp16"), ()),
    ("float32", lambda mb, x: mb.cast(x=x, dtype="fp32"), lambda mb, x: mb.relu(x=x), ()),
    ("extent", reshaped(1, 1, 2, 131072), reshaped(1, 1, 4, 65536), ((1, 4, 4, 16384),)),
    ("extent", reshaped(1, 131072, 1, 1), reshaped(1, 65536, 1, 2), ((1, 65536, 2),)),
    ("extent-before-a16", reshaped(1, 1, 2, 32768), reshaped(1, 1, 4, 16384), ((1, 2, 2, 16384),)),
    ("gather", rolled, lambda mb, x: mb.slice_by_index(x=x, begin=[0, 0, 0, 0], end=[1, 8, 3, 64]), ()),
    ("no-path", lambda mb, x: mb.reduce_prod(x=x, axes=[1]), lambda mb, x: mb.reduce_sum(x=x, axes=[1]), ()),
    ("volume", lambda mb, x: conv(mb, x, 1, 1, 1), lambda mb, x: mb.relu(x=x), ((1, 8, 4, 16, 64),)),
    ("pool", lambda mb, x: pool(mb, x, 14, 1), lambda mb, x: pool(mb, x, 13, 1), ()),
    ("pool-stride", lambda mb, x: pool(mb, x, 3, 3), lambda mb, x: pool(mb, x, 3, 4), ()),
    ("pool-stride", lambda mb, x: pool(mb, x, 5, 5), lambda mb, x: pool(mb, x, 5, 2), ()),
    ("upsampling", upsampled(3.0), upsampled(2.0), ()),
    ("padding", padded("reflect"), padded("constant"), ()),
    ("padding", padded("replicate"), padded("constant"), ()),
    ("softmax-axis", lambda mb, x: mb.softmax(x=x, axis=-1), lambda mb, x: mb.softmax(x=x, axis=-3), ()),
    (
        "attention",
        lambda mb, x: mb.scaled_dot_product_attention(query=x, key=x, value=x),
        lambda mb, x: mb.einsum(values=(x, mb.transpose(x=x, perm=[0, 3, 2, 1])), equation="nchw,nwhu->nchu"),
        (),
    ),
    (
        "products",
        lambda mb, x: mb.matmul(x=x, y=x, transpose_y=True),
        lambda mb, x: mb.matmul(x=x, y=weight(64, 64)),
        (),
    ),
    ("tokens", lambda mb, x: mb.linear(x=x, weight=weight(4, 64)), conv, ()),
    ("tokens", lambda mb, x: mb.matmul(x=x, y=weight(64, 4)), conv, ()),
    (
        "last-axis",
        lambda mb, x: mb.transpose(x=x, perm=[0, 2, 3, 1]),
        lambda mb, x: mb.transpose(x=x, perm=[0, 2, 1, -1]),
        (),
    ),
    ("last-axis", reshaped(1, 8, 1, 1024), reshaped(1, 128, 1, 64), ()),
    ("kernel", lambda mb, x: conv(mb, x, 9, 9), lambda mb, x: conv(mb, x, 7, 7), ()),
    ("kernel-width", lambda mb, x: conv(mb, x, 1, 14), lambda mb, x: conv(mb, x, 14, 13), ()),
    ("kernel", lambda mb, x: conv(mb, x, 14, 13), lambda mb, x: conv(mb, x, 1, 14), ()),
    ("dilation", lambda mb, x: conv(mb, x, 3, 3, dilations=[2, 2]), lambda mb, x: conv(mb, x, 3, 3), ()),
    ("stride", lambda mb, x: conv(mb, x, strides=[5, 5]), lambda mb, x: conv(mb, x, strides=[6, 6]), ()),
    ("stride", lambda mb, x: conv(mb, x, strides=[1, 2]), lambda mb, x: conv(mb, x, strides=[2, 2]), ()),
    ("stride", lambda mb, x: conv(mb, x, strides=[2, 6]), lambda mb, x: conv(mb, x, strides=[2, 4]), ()),
    ("stride", lambda mb, x: conv(mb, x, strides=[4, 8]), lambda mb, x: conv(mb, x, strides=[9, 2]), ()),
    ("palette-stride", lambda mb, x: palette(mb, x, 4), lambda mb, x: palette(mb, x, 2), ()),
    ("palette-stride", lambda mb, x: palette(mb, x, 4), lambda mb, x: conv(mb, x, strides=[4, 4]), ()),
    ("block-scales", lambda mb, x: blocks(mb, x, 2), lambda mb, x: blocks(mb, x, 1), ()),
    ("norm", norm_in_parts, lambda mb, x: mb.layer_norm(x=x, axes=[1]), ()),
    ("norm", norm_in_parts, lambda mb, x: mb.rsqrt(x=mb.reduce_mean(x=x, axes=[1])), ()),
    ("log-softmax", lambda mb, x: mb.log(x=mb.softmax(x=x, axis=1)), lambda mb, x: mb.log(x=mb.relu(x=x)), ()),
    ("mask", lambda mb, x: mb.add(x=x, y=HALF("-inf")), lambda mb, x: mb.add(x=x, y=HALF(-40000)), ()),
    ("lines", reshaped(1, 8, 64, 16), reshaped(1, 8, 32, 32), ()),
    (
        "broadcast",
        lambda mb, x: mb.mul(x=x, y=mb.reduce_mean(x=x, axes=[2, 3], keep_dims=True)),
        lambda mb, x: mb.mul(x=x, y=weight(1, 8, 1, 1)),
        (),
    ),
    (
        "int8",
        lambda mb, x: mb.quantize(input=x, scale=HALF(0.5), output_dtype="int8"),
        lambda mb, x: mb.relu(x=x),
        (),
    ),
    ("chip", lambda mb, x: mb.sin(x=x), lambda mb, x: mb.exp(x=x), ()),
    ("chip", sampled, lambda mb, x: mb.reduce_max(x=x, axes=[1]), ()),
    ("unlisted", lambda mb, x: mb.cumsum(x=x, axis=1), lambda mb, x: mb.cos(x=x), ()),
    ("unlisted", lambda mb, x: mb.cumsum(x=x, axis=1), lambda mb, x: mb.reduce_argmax(x=x, axis=1), ()),
    ("unlisted", lambda mb, x: mb.cumsum(x=x, axis=1), lambda mb, x: mb.reduce_sum(x=x, axes=[1]), ()),
)


@pytest.mark.parametrize(("rule", "breaks", "keeps", "shapes"), CASES, ids=[case[0] for case in CASES])
def test_a_rule_finds_exactly_the_operators_that_break_it(
    rule: str, breaks: Body, keeps: Body, shapes: tuple[tuple[int, ...], ...]
) -> None:
    broken, kept = linted(breaks, *shapes), linted(keeps, *shapes)
    assert rule in {finding.rule for finding in broken.findings}
    assert rule not in {finding.rule for finding in kept.findings}


def test_every_rule_has_a_case() -> None:
    assert {rule.name for rule in RULES} == {case[0] for case in CASES} | {"dynamic-shape"}
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_an_operator_of_a_side_that_varies_may_stay_and_its_products_are_not_counted() -> None:
    from coremltools.converters.mil.mil import get_new_symbol

    found = linted(conv, (1, 8, get_new_symbol(), 64))
    assert (found.operators, found.eligible, found.in_layout, found.macs) == (1, 1, 0, 0)
    assert finding(found, "dynamic-shape").hits[0].detail == "conv of dynamic shape"


def test_a_program_in_float32_has_nothing_for_the_engine() -> None:
    found = linted(lambda mb, x: mb.relu(x=mb.add(x=x, y=np.float32(1))), dtype="fp32")
    assert (found.operators, found.eligible) == (2, 0)
    assert {hit.detail for hit in finding(found, "float32").hits} == {"fp32"}


# Details


def test_a_roll_is_distinguished_from_other_gathers() -> None:
    picked = linted(lambda mb, x: mb.gather(x=x, indices=np.array([3, 1, 2], np.int32), axis=2))
    assert finding(picked, "gather").hits[0].detail == "gather"
    assert finding(linted(rolled), "gather").hits[0].detail == "gather that rolls an axis"


def test_the_conversion_of_torch_roll_is_not_eligible() -> None:
    class Roll(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.roll(x, (1, 2), (2, 3)).sum((2, 3))

    found = eligibility(converted(Roll(), 16))
    assert [hit.operator for hit in finding(found, "gather").hits] == ["gather", "gather"]
    assert found.operators - found.eligible == 2


def test_the_operators_that_left_rf_detr_leave_here_and_their_neighbours_stay() -> None:
    """roboflow/rf-detr#1495: topk, and expand_dims, tile and gather_along_axis of its indices; the rest stayed."""

    def body(mb: Any, x: Any) -> Any:
        tokens = mb.layer_norm(x=mb.linear(x=x, weight=weight(64, 64)), axes=[-1])
        scores = mb.reduce_max(x=tokens, axes=[-1])
        _, indices = mb.topk(x=scores, k=4, axis=1, output_indices_dtype="int32")
        every = mb.tile(x=mb.expand_dims(x=indices, axes=[-1]), reps=[1, 1, 64])
        return mb.softmax(x=mb.gather_along_axis(x=tokens, indices=every, axis=1), axis=-1)

    found = linted(body, (1, 16, 64))
    off = {hit.operator for finding in found.findings if finding.level == "off-engine" for hit in finding.hits}
    assert off == {"topk", "expand_dims", "tile", "gather_along_axis"}
    assert (found.operators, found.eligible) == (8, 4)


@pytest.mark.parametrize(
    ("body", "rule", "detail"),
    [
        (lambda mb, x: conv(mb, x, 9, 9), "kernel", "9x9 kernel (9 = 5 + 5 - 1)"),
        (lambda mb, x: conv(mb, x, 1, 8), "kernel", "1x8 kernel (8 = 5 + 4 - 1)"),
        (upsampled(4.0), "upsampling", "by 4"),
        (lambda mb, x: pool(mb, x, 14, 2), "pool", "14x14 window"),
        (padded("reflect"), "padding", "reflect padding"),
        (lambda mb, x: mb.softmax(x=x, axis=-1), "softmax-axis", "over axis 3 of 4"),
        (lambda mb, x: mb.add(x=x, y=HALF("-inf")), "mask", "constant of -inf"),
        (lambda mb, x: blocks(mb, x, 2), "block-scales", "2 scales per channel"),
        (reshaped(1, 8, 64, 16), "lines", "(1x8x64x16) takes 2 times its bytes"),
    ],
)
def test_a_finding_contains_its_evidence(body: Body, rule: str, detail: str) -> None:
    assert finding(linted(body), rule).hits[0].detail == detail


def test_a_finding_has_operator_place_reason_and_source() -> None:
    def body(mb: Any, x: Any) -> Any:
        x = mb.conv(x=x, weight=mb.const(val=weight(8, 8, 1, 1), name="p_stem_conv_weight_to_fp16"), name="first")
        for place in range(6):
            x = mb.softmax(x=x, axis=3, name=f"softmax_{place}")
        return x

    found = finding(linted(body), "softmax-axis")
    assert str(found) == (
        "warning: softmax-axis: softmax x6: over axis 3 of 4\n"
        "    at or after stem_conv; operators softmax_0, softmax_1, softmax_2, softmax_3 and 2 more\n"
        "    the Neural Engine prefers softmax over the channels, axis 1; put the keys on axis 1: (B, keys, heads, "
        "queries), or compute one head at a time\n"
        "    (documented: Apple, coreai-models, neural_engine_rules.md (2026))"
    )
    assert len(found.hits) == 6
    assert found.hits[5].module == "after stem_conv"


def test_a_module_is_named_by_its_weight_or_by_a_bias_that_is_not_zero() -> None:
    def body(mb: Any, x: Any) -> Any:
        ours = mb.const(val=np.ones(8, HALF), name="p_blocks_0_conv_weight_folded_bias_to_fp16")
        shared = mb.const(val=np.zeros(8, HALF), name="p_elsewhere_bias_to_fp16")
        nameless = blocks(mb, x, 1).op.weight
        x = mb.conv(x=x, weight=nameless, bias=ours, strides=[5, 5])
        return mb.conv(x=x, weight=nameless, bias=shared, strides=[5, 5])

    assert [hit.module for hit in finding(linted(body), "stride").hits] == ["blocks_0_conv", "after blocks_0_conv"]


# Figures


def test_a_warning_leaves_an_operator_eligible_and_a_note_leaves_it_in_layout() -> None:
    def body(mb: Any, x: Any) -> Any:
        x = conv(mb, x)  # nothing to say
        x = conv(mb, x, strides=[5, 5])  # a warning, and a note on its lines
        x = mb.band_part(x=x, lower=1, upper=1)  # off the engine
        return conv(mb, mb.reduce_mean(x=x, axes=[2, 3], keep_dims=True))  # notes alone

    found = linted(body)
    assert (found.operators, found.eligible, found.in_layout) == (5, 4, 3)
    whole, strided, pooled = 64 * 16 * 64, 64 * 4 * 13, 64
    assert found.macs == found.eligible_macs == whole + strided + pooled
    assert found.in_layout_macs == whole + pooled
    summary = found.summary()
    assert summary["in_layout_macs_share"] == pytest.approx((whole + pooled) / found.macs, abs=1e-4)
    assert summary["eligible_macs_share"] == 1.0
    assert summary["rules"] == {"no-path": 1, "stride": 1, "lines": 4}


def test_constants_and_their_decompression_are_not_counted() -> None:
    found = linted(lambda mb, x: blocks(mb, x, 1))
    assert (found.operators, found.macs) == (1, 64 * 16 * 64)


@pytest.mark.parametrize(
    ("body", "shapes", "expected"),
    [
        (lambda mb, x: conv(mb, x, 3, 3, pad_type="same"), [(2, 4, 5, 6)], 2 * 8 * 5 * 6 * 4 * 9),
        (lambda mb, x: mb.conv(x=x, weight=weight(4, 1, 3, 3), groups=4), [(1, 4, 5, 6)], 4 * 3 * 4 * 9),
        (lambda mb, x: mb.conv_transpose(x=x, weight=weight(4, 3, 2, 2), strides=[2, 2]), [(1, 4, 5, 6)], 120 * 12),
        (lambda mb, x: mb.linear(x=x, weight=weight(7, 6)), [(2, 5, 6)], 2 * 5 * 7 * 6),
        (lambda mb, x, y: mb.matmul(x=x, y=y), [(2, 3, 5, 6), (1, 3, 6, 7)], 2 * 3 * 5 * 6 * 7),
        (
            lambda mb, x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True),
            [(3, 6, 5), (3, 7, 6)],
            3 * 5 * 6 * 7,
        ),
        (
            lambda mb, x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
            [(2, 3, 4, 5), (2, 5, 4, 6)],
            2 * 3 * 4 * 5 * 6,
        ),
        (
            lambda mb, q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
            [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)],
            2 * 3 * (5 * 8 * 7 + 5 * 7 * 4),
        ),
        (lambda mb, x: mb.relu(x=x), [(1, 2)], 0),
    ],
)
def test_products_are_counted_as_by_hand(body: Body, shapes: list[tuple[int, ...]], expected: int) -> None:
    assert sum(map(multiply_accumulates, operations(body, *shapes))) == expected


def test_padding_to_lines_is_counted_as_by_hand() -> None:
    def body(mb: Any, x: Any) -> Any:
        x = mb.reshape(x=x, shape=[1, 4, 3, 1])  # 12 numbers in 12 lines
        x = mb.reshape(x=x, shape=[1, 12])  # in one
        return mb.quantize(input=x, scale=HALF(1), output_dtype="int8")  # a byte each, in one

    found = linted(body, (1, 3, 4))
    assert found.activation_bytes == 24 + 24 + 12
    assert found.padded_bytes == 12 * 64 + 64 + 64
    assert found.summary()["wasted_bytes_share"] == round(1 - 60 / 896, 4)
    hits = finding(found, "lines").hits
    assert [hit.wasted_bytes for hit in hits] == [744, 52, 40]  # the worst first
    assert found.layout_operators == 2


def test_the_summary_is_one_sentence() -> None:
    assert str(linted(lambda mb, x: mb.softmax(x=conv(mb, x), axis=-1))) == (
        "2 of 2 operators are eligible for the Neural Engine, 100.0% of 0.1 M MACs; without a warning: 1, with "
        "100.0% of MACs; transposes and reshapes: 0; activations: 0.0 MB, 0% of it padding"
    )


def test_findings_begin_with_operators_that_are_not_eligible() -> None:
    found = linted(lambda mb, x: mb.band_part(x=mb.softmax(x=x, axis=-1), lower=1, upper=1))
    assert [finding.level for finding in found.findings] == ["off-engine", "warning"]
    json.dumps([asdict(finding) for finding in found.findings])


# Real packages


def converted(model: nn.Module, size: int) -> list[Any]:
    """Return the operators of a torch network after coremltools' conversion and passes."""
    coremltools = import_coremltools()
    program = programs.export(model.eval(), size).module()
    fixed = torch.export.export(program, (torch.zeros(1, 3, size, size),)).run_decompositions({})
    package: Any = coremltools.convert(
        fixed,
        minimum_deployment_target=coremltools.target.iOS18,
        inputs=[coremltools.TensorType(name="image", dtype=np.float16)],
        skip_model_load=True,
    )
    return list(package._mil_program.functions["main"].operations)


@pytest.fixture(scope="module", params=["swin_mini", "conformer_mini"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Export, Path]:
    """Return the name, the export and the engine of a small network."""
    path = tmp_path_factory.mktemp(request.param)
    program = programs.export(models.ALL[request.param].build(10).eval(), 64)
    programs.save(program.run_decompositions({}), path / "model.pt2")
    (path / "scales.json").write_text("{}")
    description = {"model": request.param, "recipe": "fp16", "size": 64, "classes": list("abcdefghij")}
    (path / "model.json").write_text(json.dumps(description | {"preprocess": {"crop": 1}}))
    export = Export(path=path, precision="fp16", batch=1)
    (path / "engine").mkdir()
    TARGET.build(export, path / "engine")
    return request.param, export, path / "engine"


def test_the_macs_of_a_package_match_the_catalog(family: tuple[str, Export, Path]) -> None:
    name, _, engine = family
    found = eligibility(read(engine / PACKAGE).operations)
    assert found.macs == pytest.approx(models.ALL[name].macs, rel=0.01)
    assert found.eligible_macs == found.macs
    assert found.in_layout_macs < found.macs  # its attention is on tokens


def test_the_inspection_of_an_engine_has_the_figures(family: tuple[str, Export, Path]) -> None:
    name, export, engine = family
    figures = TARGET.inspect(export, engine)["neural_engine"]
    assert isinstance(figures, dict)
    assert figures == eligibility(read(engine / PACKAGE).operations).summary()
    assert figures["operators"] == figures["eligible"]
    assert ("upsampling" in figures["rules"]) == (name == "conformer_mini")  # by 4
