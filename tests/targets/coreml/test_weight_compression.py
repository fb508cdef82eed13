"""Packages with compressed weights: weights have the requested format, and the values that this format represents."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from calibration.graph import exported_program as programs
from calibration.metrics import snr_db
from calibration.recipe import ALL, WeightOnly
from models.errors import CheckFailed
from targets.base import Export
from targets.coreml import package as coreml_package
from targets.coreml import weight_compression
from targets.coreml.conversion.workarounds import import_coremltools, scales_above_zero
from targets.coreml.options import CoreMLOptions
from targets.coreml.target import PACKAGE, TARGET
from tests.targets.coreml.test_target import SIZE, built, exported

pytestmark = pytest.mark.slow

RECIPES = {name: recipe for name, recipe in ALL.items() if isinstance(recipe, WeightOnly)}
WEIGHTS = Path("Data") / "com.apple.CoreML" / "weights" / "weight.bin"
SILENT, FAINT = 5, 9  # channels of `narrow`: of zeros, and too small for an FP16 scale

Made = dict[str, tuple[Export, Path]]


class Plain(nn.Module):
    """Layers that are too small, divisible by every block, depthwise, and divisible by no block."""

    def __init__(self, *, kernel: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, 2, 1)
        self.narrow = nn.Conv2d(64, 48, 1, bias=False)
        self.depthwise = nn.Conv2d(48, 48, 3, 1, 1, groups=48)
        self.wide = nn.Conv2d(48, 72, kernel, 1, kernel // 2)
        self.head = nn.Linear(72, 40)
        with torch.no_grad():
            self.narrow.weight[SILENT] = 0
            self.narrow.weight[FAINT] *= 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.narrow(self.stem(x).relu()))
        logits: Tensor = self.head(self.wide(x).relu().mean((2, 3)))
        return logits


def plain_export(path: Path, *, seed: int = 0, kernel: int = 1) -> Export:
    torch.manual_seed(seed)
    export = exported(path, "fp16", Plain(kernel=kernel))
    (path / "model.json").write_text(json.dumps(export.description() | {"classes": [*map(str, range(40))]}))
    return export


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return export and engine of each recipe; `fp16`: uncompressed. Tests that damage one copy it first."""
    root = tmp_path_factory.mktemp("weights")
    export = plain_export(root / "export")
    asked = {"fp16": export} | {name: dataclasses.replace(export, storage=recipe) for name, recipe in RECIPES.items()}
    return {name: (export, built(root / name, export)) for name, export in asked.items()}


@pytest.fixture
def damaged(made: Made, tmp_path: Path) -> Callable[[str], tuple[Export, Path]]:
    def copied(name: str) -> tuple[Export, Path]:
        export, engine = made[name]
        return export, shutil.copytree(engine, tmp_path / name)

    return copied


def weights_of(made: Made, name: str) -> dict[str, Any]:
    """Return the report of an inspection on the weights."""
    found = TARGET.inspect(*made[name])["weights"]
    assert isinstance(found, dict)
    return found


def parts(engine: Path) -> list[Any]:
    """Return the operators that decompress the weights of the layers, in order of execution."""
    return [operation.weight.op for operation in coreml_package.weighted(coreml_package.read(engine / PACKAGE))]


# What is built


@pytest.mark.parametrize(
    ("name", "layers", "exception"),
    [
        ("w8a16", {"fp16": 2, "w8a16": 3}, None),
        ("w4a16", {"fp16": 2, "w4a16": 1, "w8a16": 2}, "input channels that are no multiple of 32: w8a16"),
        ("palette6", {"fp16": 2, "palette6": 3}, None),
        ("palette4", {"fp16": 2, "palette4": 1, "palette6": 2}, "output channels that are no multiple of 16: palette6"),
    ],
)
def test_weights_in_a_different_format_are_reported(
    made: Made, name: str, layers: dict[str, int], exception: str | None
) -> None:
    found = weights_of(made, name)
    json.dumps(found)
    assert found["layers"] == layers
    small = {"2048 weights or fewer: fp16": ["stem", "depthwise"]}
    assert found["exceptions"] == small | ({exception: ["wide", "head"]} if exception else {})


def test_a_float_package_has_no_report_of_compressed_weights(made: Made) -> None:
    assert "weights" not in TARGET.inspect(*made["fp16"])


FORMS = {
    "w8a16": [("int8", (48, 1, 1, 1)), ("int8", (72, 1, 1, 1)), ("int8", (40, 1))],
    "w4a16": [("int4", (48, 2, 1, 1)), ("int8", (72, 1, 1, 1)), ("int8", (40, 1))],
    "palette4": [("uint4", (3, 1, 1, 1, 16, 1)), ("uint6", (1, 1, 1, 1, 64, 1)), ("uint6", (1, 1, 64, 1))],
}


@pytest.mark.parametrize("name", FORMS)
def test_integers_scales_and_palettes_have_the_shapes_of_the_recipe(made: Made, name: str) -> None:
    import_coremltools()
    from coremltools.converters.mil.mil import types

    found = []
    for part in parts(made[name][1]):
        if part.op_type != "const":
            data, shared = (part.indices, part.lut) if "lut" in part.op_type else (part.data, part.scale)
            found.append((types.builtin_to_string(data.dtype), tuple(shared.shape)))
    assert found == FORMS[name]


def test_one_palette_a_tensor_has_the_form_that_older_systems_read(made: Made) -> None:
    found = [part for part in parts(made["palette6"][1]) if part.op_type != "const"]
    assert [(part.lut.shape, part.indices.shape) for part in found] == [
        ((64,), (n * 6 // 8,)) for n in (3072, 3456, 2880)
    ]


def test_fewer_bits_take_fewer_bytes(made: Made) -> None:
    bytes_of = {name: (engine / PACKAGE / WEIGHTS).stat().st_size for name, (_, engine) in made.items()}
    compressed, rest = 3072 + 3456 + 2880, bytes_of["fp16"] - 2 * (3072 + 3456 + 2880)
    assert bytes_of["w8a16"] == pytest.approx(rest + compressed + 2 * (48 + 72 + 40), abs=400)
    assert bytes_of["palette6"] == pytest.approx(rest + 0.75 * compressed + 3 * 128, abs=400)
    assert bytes_of["w4a16"] == pytest.approx(bytes_of["w8a16"] - 3072 // 2 + 2 * 48, abs=400)
    assert bytes_of["palette4"] == pytest.approx(bytes_of["palette6"] - 3072 // 4 - 128 + 3 * 32, abs=400)


@pytest.mark.parametrize("name", RECIPES)
def test_the_reported_bits_match_the_file(made: Made, name: str) -> None:
    (_, plain), (_, engine) = made["fp16"], made[name]
    saved = (plain / PACKAGE / WEIGHTS).stat().st_size - (engine / PACKAGE / WEIGHTS).stat().st_size
    weights = 1728 + 432 + 3072 + 3456 + 2880
    found = weights_of(made, name)
    assert found["share"] == round(9408 / weights, 4)
    assert (16 - found["bits"]) * weights / 8 == pytest.approx(saved, abs=500)  # records are of 64 bytes


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_but_weights_differs_from_the_float_package(made: Made, name: str) -> None:
    def operators(engine: Path) -> list[str]:
        found = [operation.op_type for operation in coreml_package.read(engine / PACKAGE).operations]
        return [kind for kind in found if kind != "const" and not kind.startswith("constexpr_")]

    assert operators(made[name][1]) == operators(made["fp16"][1])


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_export_makes_the_same_bytes(made: Made, name: str, tmp_path: Path) -> None:
    export, engine = made[name]
    again = built(tmp_path / "again", export)
    assert (again / PACKAGE / WEIGHTS).read_bytes() == (engine / PACKAGE / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("name", "least"), [("w8a16", 40), ("palette6", 25), ("w4a16", 15), ("palette4", 15)])
def test_the_package_is_close_to_the_float_package(made: Made, name: str, least: float) -> None:
    images = np.random.default_rng(0).standard_normal((4, 3, SIZE, SIZE)).astype(np.float32)
    reference, found = (TARGET.evaluate(*made[key])(images) for key in ("fp16", name))
    assert least < snr_db(reference, found) < 80


@pytest.mark.parametrize("name", RECIPES)
def test_operators_without_weights_are_compared_with_torch(made: Made, name: str) -> None:
    image = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)
    every, found = (TARGET.replay(*made[key], image) for key in ("fp16", name))
    assert (every["compared"], found["compared"]) == (8, 3)  # two ReLUs and a mean, without the five layers
    assert found["least_db"] == 200


def test_a_channel_of_zeros_and_one_of_next_to_nothing_stay_so(made: Made) -> None:
    for name in ("w8a16", "w4a16"):
        part = parts(made[name][1])[1]
        assert (part.scale.val > 0).all()
        value = part.materialized_val_inference()
        assert not value[SILENT].any()
        assert 0 < np.abs(value[FAINT]).max() < 1e-6


def test_the_worst_layer_is_named(made: Made) -> None:
    found = weights_of(made, "w4a16")
    assert found["worst_layer"] == "narrow"  # the one in 4 bits
    assert 15 < found["worst_snr_db"] < 25


def test_compression_draws_one_bar(made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of a division by a scale of zero
        built(tmp_path / "engine", made["w4a16"][0])
    out, err = capfd.readouterr()
    assert out == ""
    assert "compression pass" not in err and "MIL" not in err and "Skipped" not in err
    assert re.findall(r"^(.*): \d+ (?:steps|weights) in [\d.]+ s$", err, re.M) == ["Core ML fp16", "Core ML w4a16"]
    assert "\r" not in err and "%|" not in err and "\n\n" not in err


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((32, 64, 1, 1), ("w8a16", None, "palette6", None)),  # as small as 2,048
        ((33, 64, 1, 1), ("w8a16", "w4a16", "palette6", "palette6")),
        ((64, 33), ("w8a16", "w8a16", "palette6", "palette4")),
        ((512, 1, 7, 7), ("w8a16", "w8a16", "palette6", "palette4")),
        ((64, 64, 3, 3), ("w8a16", "w4a16", "palette6", "palette4")),
    ],
    ids=str,
)
def test_a_layer_takes_the_recipe_that_divides_its_channels(shape: tuple[int, ...], expected: tuple[str, ...]) -> None:
    forms = [weight_compression.form_of(shape, recipe) for recipe in RECIPES.values()]
    if shape == (32, 64, 1, 1):
        assert forms == [None] * 4
    else:
        assert tuple(form.name for form in forms if form) == expected


# Palettes


def squared_error(values: npt.NDArray[Any], entries: npt.NDArray[Any]) -> float:
    return float(np.square(values[:, None] - entries[None, :]).min(1).sum())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-40, 40), min_size=1, max_size=9))
def test_a_palette_is_the_best_there_is(values: list[int]) -> None:
    """Compared with all partitions of a few values into four intervals."""
    weight = np.array(values, np.float32)
    found, indices = weight_compression.palette(weight, bits=2)
    ordered = np.sort(weight)
    cuts = itertools.combinations_with_replacement(range(len(values) + 1), 3)
    errors = [
        sum(float(np.square(part - part.mean()).sum()) for part in np.split(ordered, cut) if len(part)) for cut in cuts
    ]
    assert squared_error(weight, found) == pytest.approx(min(errors), rel=1e-4, abs=1e-4)
    assert len(found) == 4 and (np.diff(found) >= 0).all()
    np.testing.assert_array_equal(np.abs(weight - found[indices]), np.abs(weight[:, None] - found).min(1))


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("freedom", [2, 30])
def test_a_palette_is_better_than_scikit_learns(bits: int, freedom: int) -> None:
    """Also where a few weights are far from the others: Student's t with two degrees of freedom."""
    from sklearn.cluster import KMeans

    weight = (np.random.default_rng(0).standard_t(freedom, 20_000) * 0.05).astype(np.float16)
    found, indices = weight_compression.palette(weight, bits=bits)
    theirs = KMeans(2**bits, n_init=1, random_state=0).fit(weight[:, None]).inertia_
    exact = weight.astype(np.float64)
    ours = np.square(exact - found[indices].astype(np.float64)).sum()
    assert ours < theirs
    assert ours == pytest.approx(squared_error(exact, found.astype(np.float64)))


def test_a_palette_of_fewer_values_than_entries_is_exact() -> None:
    weight = (np.arange(60).reshape(3, 20) % 7 / 8).astype(np.float16)
    found, indices = weight_compression.palette(weight, bits=6)
    assert found.dtype == np.float16 and found.shape == (64,)
    np.testing.assert_array_equal(found[indices].reshape(3, 20), weight)


def test_a_palette_of_mostly_zeros_keeps_the_others() -> None:
    weight = np.zeros(100_000, np.float16)
    weight[:1000] = np.linspace(1e-3, 2e-3, 1000)
    weight[-1] = 30
    found, indices = weight_compression.palette(weight, bits=4)
    assert np.isfinite(found).all()
    assert found[indices[-1]] == 30 and found[indices[5000]] == pytest.approx(0, abs=1e-4)
    assert np.abs(found[indices[:1000]] - weight[:1000]).max() < 3e-4


# What inspection finds


@pytest.mark.parametrize(
    ("built_as", "asked", "message"),
    [
        (
            "fp16",
            "w8a16",
            r"^narrow: .* stores its weight as fp16, expected int8 with scales of shape \(48, 1, 1, 1\)$",
        ),
        ("w8a16", "w4a16", r"^narrow: .* as int8 .*, expected int4 with scales of shape \(48, 2, 1, 1\)$"),
        (
            "w4a16",
            "w8a16",
            r"^narrow: .* as int4 with scales of shape \(48, 2, 1, 1\), expected int8 .* \(48, 1, 1, 1\)$",
        ),
        ("palette6", "palette4", r"^narrow: .* as uint6 .*, expected uint4 with palettes of shape \(3, 1, 1, 1\)$"),
        ("palette4", "palette6", r"^narrow: .* as uint4 .*, expected uint6 with palettes of shape \(1, 1, 1, 1\)$"),
        ("palette6", "w8a16", r"^narrow: .* as uint6 .*, expected int8 "),
    ],
)
def test_a_format_other_than_the_requested_one_is_named(made: Made, built_as: str, asked: str, message: str) -> None:
    export, engine = made[asked][0], made[built_as][1]
    package = coreml_package.read(engine / PACKAGE)
    assert export.storage is not None
    with pytest.raises(CheckFailed, match=message):
        weight_compression.inspect(package, programs.load(export.program), export.storage)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w8a16", r"layer 2 of 5, narrow: .* has int8 weights, expected float"),
        ("w4a16", r"weight scales of shape \(48, 2, 1, 1\), expected one scale per output channel"),
        (
            "palette4",
            r"\(constexpr_lut_to_dense\) stores a weight in a form that the export does not have; expected only",
        ),
    ],
)
def test_compressed_weights_in_a_float_package_are_refused(made: Made, name: str, message: str) -> None:
    float_export = dataclasses.replace(made["fp16"][0], options=CoreMLOptions(deployment="iOS18"))
    with pytest.raises(CheckFailed, match=message):
        TARGET.inspect(float_export, made[name][1])


@pytest.mark.parametrize("name", RECIPES)
def test_one_changed_weight_is_named(damaged: Callable[[str], tuple[Export, Path]], name: str) -> None:
    export, engine = damaged(name)
    part = parts(engine)[3]  # 8 bits an integer or 6 an index, in all four
    stored = part.data.val if name.startswith("w") else part.indices.val
    content = bytearray((engine / PACKAGE / WEIGHTS).read_bytes())
    needle = packed(stored, 8 if name.startswith("w") or stored.ndim == 1 else 6)
    place = bytes(content).index(needle)
    content[place + 3] ^= 2
    (engine / PACKAGE / WEIGHTS).write_bytes(content)
    with pytest.raises(
        CheckFailed, match=r"^wide: .* has weight -?[\d.e-]+ at index [345], expected -?[\d.e-]+ to within"
    ):
        TARGET.inspect(export, engine)


def packed(integers: npt.NDArray[Any], bits: int) -> bytes:
    """Return unsigned integers packed from the least significant bit on; bytes are unchanged."""
    if bits == 8:
        return integers.tobytes()
    stream = (integers.ravel()[:, None] >> np.arange(bits) & 1).astype(np.uint8)
    return np.packbits(stream, bitorder="little").tobytes()


def test_a_changed_float_weight_is_named(damaged: Callable[[str], tuple[Export, Path]]) -> None:
    export, engine = damaged("w8a16")
    content = bytearray((engine / PACKAGE / WEIGHTS).read_bytes())
    content[bytes(content).index(parts(engine)[0].outputs[0].val.tobytes()) + 21] ^= 8
    (engine / PACKAGE / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckFailed, match=r"^stem: .* has weight .* at index 10, expected"):
        TARGET.inspect(export, engine)


def test_weights_of_a_different_network_are_named(made: Made, tmp_path: Path) -> None:
    export = dataclasses.replace(plain_export(tmp_path / "export", seed=1), storage=RECIPES["palette6"])
    with pytest.raises(CheckFailed, match=r"^stem: .* has weight "):
        TARGET.inspect(export, made["palette6"][1])


def test_geometry_is_compared_as_ever(made: Made, tmp_path: Path) -> None:
    export = plain_export(tmp_path / "export", kernel=3)
    for name, recipe in RECIPES.items():
        with pytest.raises(CheckFailed, match=r"layer 4 of 5, wide: .* has shape \(72, 48, 1, 1\), expected"):
            TARGET.inspect(dataclasses.replace(export, storage=recipe), made[name][1])


def test_quantized_activations_are_no_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export = exported(tmp_path / "export", "int8", Plain())
    package = coreml_package.read(built(tmp_path / "engine", export) / PACKAGE)
    with pytest.raises(CheckFailed, match=r"\(quantize\) is not the weight of a layer; this recipe compresses only"):
        weight_compression.inspect(package, programs.load(export.program), RECIPES["w8a16"])


def test_a_compressed_constant_that_no_layer_owns_is_named(made: Made) -> None:
    export, engine = made["w8a16"]
    package = coreml_package.read(engine / PACKAGE)
    others = tuple(operation for operation in package.operations if operation.op_type != "linear")
    with pytest.raises(CheckFailed, match=r"\(constexpr_blockwise_shift_scale\) is not the weight of a layer"):
        weight_compression.inspect(
            dataclasses.replace(package, operations=others), programs.load(export.program), RECIPES["w8a16"]
        )


# Faults of coremltools


def test_coremltools_still_draws_progress_bars(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    """When this fails, check whether `one_bar_for_weights` is still needed."""
    coremltools = import_coremltools()
    from coremltools.optimize import coreml as optimize

    model = coremltools.models.MLModel(str(made["fp16"][1] / PACKAGE), skip_model_load=True)
    config = optimize.OptimizationConfig(global_config=optimize.OpLinearQuantizerConfig())
    with np.errstate(divide="ignore", invalid="ignore"):
        optimize.linear_quantize_weights(model, config)
    err = capfd.readouterr().err
    assert "Running compression pass" in err and "Running MIL default pipeline" in err


def scales_of_zeros() -> npt.NDArray[Any]:
    import_coremltools()
    from coremltools.converters.mil.mil import types
    from coremltools.optimize import _utils

    weight = np.array([[0, 0, 0], [1, 2, 3]], np.float16)
    found = _utils.compute_qparams_by_dtype(weight, types.int8, "LINEAR_SYMMETRIC", [1, 0])
    scales: npt.NDArray[Any] = found[1]
    return scales


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_coremltools_still_divides_by_a_scale_of_zero() -> None:
    """When this fails, check whether `scales_above_zero` is still needed: it also rounds scales up."""
    assert scales_of_zeros()[0] == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["int4", "int8"]), st.integers(-24, 8))
def test_quantized_weights_are_within_half_a_step(seed: int, dtype: str, exponent: int) -> None:
    import_coremltools()
    from coremltools.converters.mil.mil import types
    from coremltools.optimize import _utils

    weight = (np.random.default_rng(seed).standard_normal((8, 64)) * 2.0**exponent).astype(np.float16)
    with scales_above_zero():
        integers, scales, zero = _utils.compute_qparams_by_dtype(
            weight, types.string_to_builtin(dtype), "LINEAR_SYMMETRIC", [1, 32]
        )
    assert zero is None and scales.shape == (8, 2) and scales.dtype == np.float16 and (scales > 0).all()
    steps = scales.astype(np.float64).repeat(32, 1)
    assert (np.abs(integers * steps - weight.astype(np.float64)) <= steps * (0.5 + 1e-9)).all()
    with scales_above_zero():
        assert (scales_of_zeros() > 0).all()
