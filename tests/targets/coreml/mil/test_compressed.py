"""Compressed weights and quantized activations in MIL: compared with values made by hand and with coremltools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from targets.coreml import package as coreml_package
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.mil.evaluator import Evaluator
from tests.support.mil_programs import Opset, Run, Type, in_memory, program, save, saved

Weight: TypeAlias = Callable[[Any], Any]  # of coremltools' builder; gives the constant expression

PALETTE_BITS = (1, 2, 3, 4, 6, 8)


def of_type(name: str, values: Any) -> npt.NDArray[Any]:
    """Return an array of a MIL type, including types that numpy does not have."""
    import_coremltools()
    from coremltools.converters.mil.mil import types

    return np.array(values).astype(types.nptype_from_builtin(types.string_to_builtin(name)))


def floats(values: Any) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


def worth(weight: Weight, shape: Sequence[int], opset: Opset = "iOS18") -> Tensor:
    """Return the value of a constant expression. An operator must read it, since programs cannot return constants."""
    (value,) = in_memory(lambda mb, x: mb.add(x=x, y=weight(mb)), {"x": shape}, opset=opset)(torch.zeros(*shape))
    return value


def hold_to_coremltools(
    weight: Weight, shape: Sequence[int], opset: Opset = "iOS18", *, folder: Path | None = None
) -> Tensor:
    """Return the value of a constant expression after comparing it and its inputs with coremltools. With `folder`, the
    expression is saved and read back first.
    """
    made = program(lambda mb, x: mb.add(x=x, y=weight(mb)), {"x": shape}, opset=opset)
    operations = made.functions["main"].operations
    if folder:
        operations = coreml_package.read(save(folder / "model.mlpackage", made, opset)).operations
    expressions = [operation for operation in operations if operation.op_type.startswith("constexpr_")]
    names = [output.name for operation in expressions for output in operation.outputs]
    found = Evaluator(operations, names, rounding="exact").run({"x": torch.zeros(*shape)})
    for operation in expressions:
        value = operation.materialized_val_inference()
        for output, expected in zip(operation.outputs, value if isinstance(value, tuple) else (value,), strict=True):
            came = found[output.name].numpy()
            assert came.shape == expected.shape
            np.testing.assert_allclose(came, expected.astype(came.dtype), rtol=1e-6, atol=1e-6)
    return found[names[-1]]


# Activations


def quantizes(dtype: Type = "uint8", *, shape: Sequence[int] = (8,), **parameters: Any) -> Run:
    return in_memory(lambda mb, x: mb.quantize(input=x, output_dtype=dtype, **parameters), {"x": shape})


def test_a_half_is_rounded_to_the_even_integer() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75, -1.25, 0.26, 1.2])
    (found,) = quantizes("int8", scale=np.float32(0.5))(x)
    assert found.dtype == torch.int8
    assert found.tolist() == [0, 2, 2, 0, -2, -2, 1, 2]


def test_a_zero_point_is_added_after_rounding() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75, -1.25, 0.26, 1.2])
    (found,) = quantizes("int8", scale=np.float32(0.5), zero_point=np.int8(1))(x)
    assert found.tolist() == [1, 3, 3, 1, -1, -1, 2, 3]  # an odd one, added before, would move every half


@pytest.mark.parametrize(("dtype", "lowest", "highest"), [("int8", -128, 127), ("uint8", 0, 255)])
def test_values_out_of_range_saturate(dtype: Type, lowest: int, highest: int) -> None:
    x = torch.tensor([-1e4, -200.0, -128.4, 0.0, 1.0, 127.4, 300.0, 6e4])
    (found,) = quantizes(dtype, scale=np.float32(1))(x)
    assert found.dtype == getattr(torch, dtype)
    assert (int(found[0]), int(found[-1])) == (lowest, highest)
    assert found.tolist() == [min(max(round(value), lowest), highest) for value in x.tolist()]


def test_a_zero_point_moves_the_range_that_fits() -> None:
    x = torch.tensor([-200.0, -128.0, -127.0, 0.0, 1.0, 127.0, 128.0, 300.0])
    (found,) = quantizes(scale=np.float32(1), zero_point=np.uint8(128))(x)
    assert found.tolist() == [0, 0, 1, 128, 129, 255, 255, 255]


@pytest.mark.parametrize("axis", [1, -2])
def test_scales_and_zero_points_along_an_axis(axis: int) -> None:
    x = torch.arange(12.0).reshape(2, 3, 2)
    scale, zero = floats([1, 2, 4]), of_type("uint8", [0, 10, 20])
    (found,) = quantizes(shape=(2, 3, 2), scale=scale, zero_point=zero, axis=axis)(x)
    assert found.tolist() == [[[0, 1], [11, 12], [21, 21]], [[6, 7], [14, 14], [22, 23]]]


@pytest.mark.parametrize("axis", [1, -2])
def test_dequantizing_along_an_axis_does_not_wrap_around(axis: int) -> None:
    scale, zero = floats([1, 2, 0.5]), of_type("int8", [-100, 100, 0])
    run = in_memory(
        lambda mb, x: mb.dequantize(input=x, scale=scale, zero_point=zero, axis=axis), {"x": (1, 3, 2)}, dtype="int8"
    )
    (found,) = run(torch.tensor([[[100, -128], [-128, 127], [1, -3]]], dtype=torch.int8))
    assert found.tolist() == [[[200, -28], [-456, 54], [0.5, -1.5]]]


@pytest.mark.parametrize(("dtype", "zero"), [("int8", None), ("int8", -7), ("uint8", None), ("uint8", 130)])
def test_quantizing_and_dequantizing_as_torch_does(tmp_path: Path, dtype: Type, zero: int | None) -> None:
    point = {} if zero is None else {"zero_point": of_type(dtype, zero)[()]}
    scale = np.float32(0.037)

    def body(mb: Any, x: Any) -> Any:
        return mb.dequantize(input=mb.quantize(input=x, output_dtype=dtype, scale=scale, **point), scale=scale, **point)

    limits = torch.iinfo(getattr(torch, dtype))
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 4
    expected = torch.fake_quantize_per_tensor_affine(x, float(scale), zero or 0, limits.min, limits.max)
    (found,) = saved(tmp_path, body, {"x": (5, 7)}, opset="iOS17")(x)
    torch.testing.assert_close(found, expected)


def test_an_fp16_scale_is_used_as_it_is_stored() -> None:
    """0.1 is 0.09998 in FP16."""
    scale = np.float16(0.1)

    def body(mb: Any, x: Any) -> Any:
        return mb.dequantize(input=mb.quantize(input=x, output_dtype="int8", scale=scale), scale=scale)

    (found,) = in_memory(body, {"x": (1,)}, dtype="fp16", rounding="exact")(torch.tensor([12.74]))
    assert found.item() == pytest.approx(127 * 0.09997559, rel=1e-6)


# Integers with scales


@pytest.mark.parametrize("scale", [np.float32(0.5), floats([0.5, 2, 4])])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_integers_of_ios_16(tmp_path: Path, dtype: str, scale: Any) -> None:
    data = of_type(dtype, np.random.default_rng(0).integers(0, 256, (2, 3, 4)) - (128 if dtype == "int8" else 0))
    zero = of_type(dtype, np.full(np.shape(scale), 100))[()]

    def weight(mb: Any) -> Any:
        return mb.constexpr_affine_dequantize(quantized_data=data, scale=scale, zero_point=zero, axis=1)

    found = hold_to_coremltools(weight, (2, 3, 4), "iOS17", folder=tmp_path)
    one = float(np.ravel(scale)[1 if np.ndim(scale) else 0])
    assert found[1, 1, 2] == (int(data[1, 1, 2]) - 100) * one  # 8 bits do not hold the difference


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8"])
@pytest.mark.parametrize("blocks", [(1, 1, 1), (4, 1, 1), (4, 3, 1), (2, 3, 5), (4, 6, 5)], ids=str)
@pytest.mark.parametrize("shifted", [False, True], ids=["", "offset"])
def test_integers_in_blocks(dtype: str, blocks: tuple[int, ...], shifted: bool) -> None:
    random, lowest = np.random.default_rng(0), {"int4": -8, "int8": -128}.get(dtype, 0)
    levels = 16 if dtype.endswith("4") else 256
    data, offset = (of_type(dtype, random.integers(lowest, lowest + levels, shape)) for shape in ((4, 6, 5), blocks))
    scale = random.random(blocks).astype(np.float32)

    def weight(mb: Any) -> Any:
        return mb.constexpr_blockwise_shift_scale(data=data, scale=scale, **({"offset": offset} if shifted else {}))

    hold_to_coremltools(weight, (4, 6, 5))


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8"])
def test_integers_in_blocks_are_read_back_from_disk(tmp_path: Path, dtype: str) -> None:
    data = of_type(dtype, np.arange(24).reshape(4, 6) % 16 - (8 if dtype.startswith("int") else 0))
    scale = floats([[1, 2], [3, 4]])
    found = hold_to_coremltools(
        lambda mb: mb.constexpr_blockwise_shift_scale(data=data, scale=scale), (4, 6), folder=tmp_path
    )
    np.testing.assert_array_equal(found.numpy(), data * np.kron(scale, np.ones((2, 3), np.float32)))


def test_a_block_is_a_run_of_neighbours() -> None:
    def weight(mb: Any) -> Any:
        return mb.constexpr_blockwise_shift_scale(
            data=of_type("int4", [[-8, 7, 1, 2], [3, 4, 5, -6]]),
            scale=floats([[1, 10], [100, 1000]]),
            offset=of_type("int4", [[7, 0], [0, -8]]),
        )

    assert worth(weight, (2, 4)).tolist() == [[-15, 0, 10, 20], [300, 400, 13000, 2000]]


# Palettes


def test_packed_indices_begin_at_the_least_significant_bit() -> None:
    def weight(mb: Any) -> Any:
        return mb.constexpr_lut_to_dense(
            indices=of_type("uint8", [0b01_10_11_00, 0b11]),
            lut=floats([1, 20, 300, 4000]),
            shape=of_type("uint32", [5]),
        )

    assert worth(weight, (5,), "iOS17").tolist() == [1, 4000, 300, 20, 4000]


def test_an_index_may_lie_across_two_bytes() -> None:
    def weight(mb: Any) -> Any:
        packed = 63 | 1 << 6 | 2 << 12 | 33 << 18  # four indices of six bits, in three bytes
        return mb.constexpr_lut_to_dense(
            indices=of_type("uint8", list(packed.to_bytes(3, "little"))),
            lut=np.arange(64, dtype=np.float32),
            shape=of_type("uint32", [2, 2]),
        )

    assert worth(weight, (2, 2), "iOS17").tolist() == [[63, 1], [2, 33]]


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_palettes_of_ios_16(tmp_path: Path, bits: int) -> None:
    random = np.random.default_rng(0)
    lut = random.random(2**bits).astype(np.float32)
    indices = random.integers(0, 2**bits, 105)
    packed = np.packbits((indices[:, None] >> np.arange(bits) & 1).astype(np.uint8), bitorder="little")

    def weight(mb: Any) -> Any:
        return mb.constexpr_lut_to_dense(indices=packed, lut=lut, shape=of_type("uint32", [3, 5, 7]))

    found = hold_to_coremltools(weight, (3, 5, 7), "iOS17", folder=tmp_path)
    np.testing.assert_array_equal(found.numpy().ravel(), lut[indices])


@pytest.mark.parametrize("bits", PALETTE_BITS)
@pytest.mark.parametrize("groups", [(1, 1, 1), (2, 1, 1), (6, 2, 1), (1, 4, 5)], ids=str)
def test_palettes_of_groups(bits: int, groups: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    lut = random.random((*groups, 2**bits, 1)).astype(np.float32)
    indices = of_type(f"uint{bits}", random.integers(0, 2**bits, (6, 4, 5)))
    hold_to_coremltools(lambda mb: mb.constexpr_lut_to_dense(indices=indices, lut=lut), (6, 4, 5))


@pytest.mark.parametrize("bits", PALETTE_BITS)
def test_palettes_of_groups_are_read_back_from_disk(tmp_path: Path, bits: int) -> None:
    random = np.random.default_rng(0)
    lut = random.random((2, 1, 2**bits, 1)).astype(np.float32)
    indices = of_type(f"uint{bits}", random.integers(0, 2**bits, (4, 6)))
    found = hold_to_coremltools(lambda mb: mb.constexpr_lut_to_dense(indices=indices, lut=lut), (4, 6), folder=tmp_path)
    expected = [lut[group, 0, indices[2 * group : 2 * group + 2], 0] for group in range(2)]
    np.testing.assert_array_equal(found.numpy(), np.concatenate(expected))


def test_each_group_looks_up_its_own_palette() -> None:
    """The example of MIL's specification."""

    def weight(mb: Any) -> Any:
        return mb.constexpr_lut_to_dense(
            indices=of_type("uint2", [[2, 3], [3, 0], [1, 0], [3, 0], [2, 1], [0, 3]]),
            lut=floats([1, 5, 9, 13, 2, 10, 18, 26]).reshape(2, 1, 4, 1),
        )

    assert worth(weight, (6, 2)).tolist() == [[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]]


VECTORS = floats([[1, 2, 3], [4, 5, 6]]).reshape(1, 1, 1, 2, 3)
FIRST_BITS = [[[0, 0], [1, 0]], [[1, 1], [0, 0]]]


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (1, [[[1, 1], [2, 2], [3, 3], [4, 1], [5, 2], [6, 3]], [[4, 4], [5, 5], [6, 6], [1, 1], [2, 2], [3, 3]]]),
        (2, [[[1, 2, 3, 1, 2, 3], [4, 5, 6, 1, 2, 3]], [[4, 5, 6, 4, 5, 6], [1, 2, 3, 1, 2, 3]]]),
        (-1, [[[1, 2, 3, 1, 2, 3], [4, 5, 6, 1, 2, 3]], [[4, 5, 6, 4, 5, 6], [1, 2, 3, 1, 2, 3]]]),
    ],
)
def test_vectors_are_laid_along_their_axis(axis: int, expected: list[Any]) -> None:
    """The example of MIL's specification."""

    def weight(mb: Any) -> Any:
        return mb.constexpr_lut_to_dense(indices=of_type("uint1", FIRST_BITS), lut=VECTORS, vector_axis=np.int32(axis))

    assert worth(weight, np.shape(expected)).tolist() == expected


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("groups", [(1, 1, 1), (2, 1, 1), (1, 2, 1)], ids=str)
def test_palettes_of_vectors(axis: int, groups: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    lut = random.random((*groups, 16, 2)).astype(np.float32)
    indices = of_type("uint4", random.integers(0, 16, (4, 6, 3)))
    shape = [length * (2 if place == axis else 1) for place, length in enumerate((4, 6, 3))]

    def weight(mb: Any) -> Any:
        return mb.constexpr_lut_to_dense(indices=indices, lut=lut, vector_axis=np.int32(axis))

    if groups[axis] == 1:  # with several, coremltools 9.0 swaps the wrong axes of its own palettes
        hold_to_coremltools(weight, shape)
    found = worth(weight, shape).numpy()
    place = (3, 5, 2)
    group = tuple(index * count // length for index, count, length in zip(place, groups, (4, 6, 3), strict=True))
    first = tuple(index * (2 if at == axis else 1) for at, index in enumerate(place))
    second = tuple(index + (at == axis) for at, index in enumerate(first))
    assert [found[first], found[second]] == lut[group][int(indices[place])].tolist()


# Sparse


def test_a_packed_mask_begins_at_the_least_significant_bit() -> None:
    def weight(mb: Any) -> Any:
        return mb.constexpr_sparse_to_dense(
            nonzero_data=floats([7, 8]), mask=of_type("uint8", [0b0000_1100]), shape=of_type("uint32", [5])
        )

    assert worth(weight, (5,), "iOS16").tolist() == [0, 0, 7, 8, 0]


def test_sparse_weights_of_ios_16(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    dense = random.random((3, 5, 7)).astype(np.float32) * (random.random((3, 5, 7)) > 0.6)
    mask = np.packbits(dense.ravel() != 0, bitorder="little")

    def weight(mb: Any) -> Any:
        return mb.constexpr_sparse_to_dense(
            nonzero_data=dense[dense != 0], mask=mask, shape=of_type("uint32", [3, 5, 7])
        )

    np.testing.assert_array_equal(hold_to_coremltools(weight, (3, 5, 7), "iOS17", folder=tmp_path), dense)


def test_sparse_weights_of_ios_18(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    dense = random.random((3, 5, 7)).astype(np.float32) * (random.random((3, 5, 7)) > 0.6)

    def weight(mb: Any) -> Any:
        return mb.constexpr_sparse_to_dense(nonzero_data=dense[dense != 0], mask=of_type("uint1", dense != 0))

    np.testing.assert_array_equal(hold_to_coremltools(weight, (3, 5, 7), folder=tmp_path), dense)


MASK = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]]


def test_sparse_integers_with_scales(tmp_path: Path) -> None:
    """The example of MIL's specification: absent elements are 0, not -offset * scale."""

    def weight(mb: Any) -> Any:
        mask, values = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=of_type("uint1", MASK),
            nonzero_data=of_type("int8", [10, 11, 3, 4, 5, 6, 7, 8, 9]),
            scale=floats([[1, 2, 3, 4]]),
            offset=of_type("int8", [[1, 2, 3, 4]]),
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask)

    found = hold_to_coremltools(weight, (4, 4), folder=tmp_path)
    assert found.tolist() == [[9, 18, 0, 0], [2, 4, 6, 0], [0, 0, 9, 12], [7, 14, 0, 0]]


@pytest.mark.parametrize(("length", "axis"), [(1, None), (2, 0), (2, 1)])
def test_sparse_palettes(tmp_path: Path, length: int, axis: int | None) -> None:
    lut = floats(range(1, 1 + 2 * length)).reshape(1, 1, 2, length)
    shape = [4 * (length if place == axis else 1) for place in range(2)]

    def weight(mb: Any) -> Any:
        mask, values = mb.constexpr_lut_to_sparse(
            indices_mask=of_type("uint1", MASK),
            indices_nonzero_data=of_type("uint1", [0, 1, 1, 0, 1, 1, 0, 0, 1]),
            lut=lut,
            **({} if axis is None else {"vector_axis": np.int32(axis)}),
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask)

    found = hold_to_coremltools(weight, shape, folder=tmp_path)
    assert int((found != 0).sum()) == 9 * length


# Others


def test_fp16_constants_are_cast(tmp_path: Path) -> None:
    values = of_type("fp16", [[1.5, -0.1], [65504, 6e-8]])
    found = hold_to_coremltools(
        lambda mb: mb.constexpr_cast(source_val=values, output_dtype="fp32"), (2, 2), "iOS17", folder=tmp_path
    )
    np.testing.assert_array_equal(found.numpy(), values.astype(np.float32))


def test_a_palette_may_itself_be_quantized() -> None:
    random = np.random.default_rng(0)

    def weight(mb: Any) -> Any:
        lut = mb.constexpr_blockwise_shift_scale(
            data=of_type("int8", random.integers(-128, 128, (2, 1, 16, 1))),
            scale=np.full((1, 1, 1, 1), 0.25, np.float32),
        )
        indices = of_type("uint4", random.integers(0, 16, (4, 6)))
        return mb.constexpr_lut_to_dense(indices=indices, lut=lut)

    found = worth(weight, (4, 6))
    assert (found * 4 == torch.round(found * 4)).all() and len(set(found.flatten().tolist())) > 8


def test_constant_expressions_are_computed_once_and_rounded_to_fp16() -> None:
    def weight(mb: Any) -> Any:
        return mb.constexpr_blockwise_shift_scale(data=of_type("int8", [[127, 3]]), scale=of_type("fp16", [[0.1]]))

    made = program(lambda mb, x: mb.add(x=x, y=weight(mb)), {"x": (1, 2)}, dtype="fp16")
    main = made.functions["main"]
    seen: list[str] = []
    evaluator = Evaluator(main.operations, [main.outputs[0].name])
    x = {"x": torch.zeros(1, 2)}
    (found,) = evaluator.run(x, watch=lambda operation, _, __: seen.append(operation.op_type)).values()
    assert seen == ["add"]
    assert found.tolist() == [[12.6953125, 0.2998046875]]  # of 12.6969 and 0.29993
