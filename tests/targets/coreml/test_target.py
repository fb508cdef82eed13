"""Core ML target on a network of three layers: the package matches the export, and every difference is named."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from calibration.fake_quant.symmetric import FakeQuant
from calibration.graph import exported_program as programs
from calibration.quantizer.quantizer import SchemeQuantizer
from calibration.recipe import Precision
from calibration.scheme import SHARED
from models.errors import CheckFailed
from targets.base import Export
from targets.coreml import package as coreml_package
from targets.coreml import target as coreml_target
from targets.coreml.conversion.workarounds import import_coremltools
from targets.coreml.target import PACKAGE, TARGET

SIZE, CLASSES = 16, 4
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")

quantized_decomposed = torch.ops.quantized_decomposed


class Toy(nn.Module):
    """conv - BatchNorm - SiLU - depthwise conv - attention-like scalar gate - pool - linear"""

    def __init__(self, *, stride: int = 2, kernel: int = 3, grouped: bool = True, hidden: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.SiLU()
        self.mix = nn.Conv2d(8, 8, 3, 1, 1, groups=8 if grouped else 1)
        self.scale = nn.Buffer(torch.tensor(0.3536))
        self.hidden = nn.Linear(8, 8) if hidden else nn.Identity()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.act(self.norm(self.stem(x)))) * self.scale
        logits: Tensor = self.head(self.hidden(x.mean((2, 3))))
        return logits


def quantized(model: nn.Module) -> torch.fx.GraphModule:
    prepared = prepare_pt2e(programs.export(model, SIZE).module(), SchemeQuantizer(SHARED))
    prepared(torch.rand(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)))
    for module in prepared.modules():
        if isinstance(module, FakeQuant):
            module.fix_range()
            module.mode = "frozen"
    converted: torch.fx.GraphModule = convert_pt2e(prepared)
    return converted


def exported(path: Path, precision: Precision, model: nn.Module, batch: int = 1) -> Export:
    path.mkdir(parents=True)
    model.eval()
    program = programs.export(quantized(model) if precision == "int8" else model, SIZE)
    programs.save(program.run_decompositions({}), path / "model.pt2")
    (path / "scales.json").write_text(json.dumps(programs.scales(program.module())))
    description = {
        "model": "toy",
        "recipe": precision,
        "size": SIZE,
        "classes": list("abcd"),
        "preprocess": {"crop": 1},
    }
    (path / "model.json").write_text(json.dumps(description))
    return Export(path=path, precision=precision, batch=batch)


def built(path: Path, export: Export) -> Path:
    path.mkdir(parents=True)
    TARGET.build(export, path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, tuple[Export, Path]]:
    """Return export and engine for each precision. Tests that damage one copy it first."""
    root = tmp_path_factory.mktemp("coreml")
    torch.manual_seed(0)
    exports = {precision: exported(root / precision / "export", precision, Toy()) for precision in PRECISIONS}
    return {precision: (export, built(root / precision / "engine", export)) for precision, export in exports.items()}


@pytest.fixture
def int8(made: dict[Precision, tuple[Export, Path]], tmp_path: Path) -> tuple[Export, Path]:
    """Return a copy of the INT8 export and engine that tests may damage."""
    export, engine = made["int8"]
    shutil.copytree(export.path, tmp_path / "export")
    shutil.copytree(engine, tmp_path / "engine")
    return dataclasses.replace(export, path=tmp_path / "export"), tmp_path / "engine"


# What is built


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_passes_its_inspection(made: dict[Precision, tuple[Export, Path]], precision: Precision) -> None:
    export, engine = made[precision]
    found = TARGET.inspect(export, engine)
    json.dumps(found)
    assert found["specification"] == (9 if precision == "int8" else 8)
    assert found["layers"] == 3
    assert found["quantized_layers"] == (3 if precision == "int8" else 0)
    assert found["max_rank"] == 4
    weights = engine / PACKAGE / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    assert found["weight_bytes"] == weights.stat().st_size


def test_an_int8_engine_quantizes_the_input_and_the_weight_of_each_layer(
    made: dict[Precision, tuple[Export, Path]],
) -> None:
    operators = TARGET.inspect(*made["int8"])["operators"]
    assert isinstance(operators, dict)
    assert operators["quantize"] == operators["dequantize"] == operators["constexpr_blockwise_shift_scale"] == 3


@pytest.mark.parametrize(("precision", "number"), [("fp32", "FLOAT32"), ("fp16", "FLOAT16"), ("int8", "FLOAT16")])
def test_input_and_output_have_the_type_that_is_computed_in(
    made: dict[Precision, tuple[Export, Path]], precision: Precision, number: str
) -> None:
    description = coreml_package.read(made[precision][1] / PACKAGE).spec.description
    (image,), (logits,) = description.input, description.output
    assert (image.name, logits.name) == ("image", "logits")
    for value in (image, logits):
        array = value.type.multiArrayType
        assert array.ArrayDataType.Name(array.dataType) == number


def test_a_package_has_a_description(made: dict[Precision, tuple[Export, Path]]) -> None:
    metadata = coreml_package.read(made["int8"][1] / PACKAGE).spec.description.metadata
    assert metadata.shortDescription == "toy, int8, 16 pixels"
    assert metadata.userDefined["edgeline.recipe"] == "int8"
    assert json.loads(metadata.userDefined["edgeline.preprocess"]) == {"crop": 1}
    assert json.loads(metadata.userDefined["edgeline.toolchain"]) == TARGET.toolchain()
    assert not metadata.license


def test_a_build_writes_one_package_and_leaves_nothing_behind(
    made: dict[Precision, tuple[Export, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    engine = built(tmp_path / "engine", dataclasses.replace(made["fp16"][0], batch=3))
    gc.collect()
    assert list(scratch.iterdir()) == []
    assert [file.name for file in engine.iterdir()] == [PACKAGE]
    assert sorted(file.name for file in (engine / PACKAGE).iterdir()) == ["Data", "Manifest.json"]
    out, err = capfd.readouterr()
    assert out == ""
    assert "MIL" not in err and "has not been tested" not in err

    (image,) = coreml_package.read(engine / PACKAGE).spec.description.input
    assert list(image.type.multiArrayType.shape) == [3, 3, SIZE, SIZE]


def test_importing_the_target_imports_nothing_heavy() -> None:
    code = "import sys, targets.coreml.target; print({'torch', 'coremltools', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_the_toolchain_is_determined_without_importing_it() -> None:
    assert TARGET.toolchain().keys() == {"coremltools", "torch"}
    assert TARGET.missing() is None


# What inspection finds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 1}, r"layer 1 of 3, stem: .* has stride \(1, 1\), expected \(2, 2\)"),
        ({"kernel": 5}, r"layer 1 of 3, stem: .* has shape \(8, 3, 5, 5\), expected \(8, 3, 3, 3\)"),
        ({"grouped": False}, r"layer 2 of 3, mix: .* has shape \(8, 8, 3, 3\), expected \(8, 1, 3, 3\)"),
        ({"hidden": True}, r"has 4 layers, expected 3: \w*linear\w* is not in the export"),
    ],
)
def test_a_package_of_a_different_network_is_refused(
    made: dict[Precision, tuple[Export, Path]], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    other = built(tmp_path / "engine", exported(tmp_path / "export", "fp32", Toy(**change)))
    with pytest.raises(CheckFailed, match=message):
        TARGET.inspect(made["fp32"][0], other)


def test_a_layer_too_few_or_too_many_is_named(made: dict[Precision, tuple[Export, Path]]) -> None:
    export, engine = made["int8"]
    expected = coreml_package.exported_layers(programs.load(export.program), export.scales())
    found = coreml_package.layers(coreml_package.read(engine / PACKAGE))
    with pytest.raises(CheckFailed, match=r"has 2 layers, expected 3: head is missing"):
        coreml_package.compare(expected, found[:2])
    with pytest.raises(CheckFailed, match=r"has 3 layers, expected 2: \w*linear\w* is not in the export"):
        coreml_package.compare(expected[:2], found)
    with pytest.raises(CheckFailed, match=r"has 2 layers, expected 3: mix is missing"):
        coreml_package.compare(expected, [found[0], found[2]])
    with pytest.raises(CheckFailed, match=r"layer 2 of 2, mix: .* has kind linear, expected conv"):
        coreml_package.compare(expected[:2], [found[0], found[2]])


def rescale_input(scales: dict[str, Any]) -> None:
    scales["mix"]["activation"] = float(np.nextafter(np.float16(scales["mix"]["activation"]), np.float16(1)))


def rescale_channel(scales: dict[str, Any]) -> None:
    scales["head"]["weight"][2] *= 2


def lose_a_channel(scales: dict[str, Any]) -> None:
    scales["head"]["weight"].pop()


def forget(scales: dict[str, Any]) -> None:
    del scales["mix"]


def invent(scales: dict[str, Any]) -> None:
    scales["mix.gate"] = scales["mix"]


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (rescale_input, "layer 2 of 3, mix: .* has activation scale .*, expected"),
        (rescale_channel, "layer 3 of 3, head: .* has weight scale .* at index 2, expected"),
        (lose_a_channel, "layer 3 of 3, head: .* has 4 weight scales, expected 3"),
        (forget, r"quantizes mix in model\.pt2 but not in scales\.json"),
        (invent, r"quantizes mix\.gate in scales\.json but not in model\.pt2"),
    ],
)
def test_scales_that_are_not_the_exported_ones_are_named(
    int8: tuple[Export, Path], sabotage: Callable[[dict[str, Any]], None], message: str
) -> None:
    export, engine = int8
    scales = export.scales()
    sabotage(scales)
    (export.path / "scales.json").write_text(json.dumps(scales))
    with pytest.raises(CheckFailed, match=message):
        TARGET.inspect(export, engine)


def test_one_changed_int8_weight_is_named(int8: tuple[Export, Path]) -> None:
    export, engine = int8
    integers = coreml_package.layers(coreml_package.read(engine / PACKAGE))[1].integers
    assert integers is not None
    file = engine / PACKAGE / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    content = bytearray(file.read_bytes())
    content[content.index(integers.tobytes()) + 7] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckFailed, match=r"layer 2 of 3, mix: .* has int8 weight -?\d+ at index 7, expected -?\d+"):
        TARGET.inspect(export, engine)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("quantize", "dequantize"), r"layer 1 of 3, stem: .* has activation scale 2.0, expected"),
        (("dequantize",), r"its input is quantized with scale .* and dequantized with scale 2.0"),
    ],
)
def test_a_changed_scale_in_the_package_is_named(
    int8: tuple[Export, Path], kinds: tuple[str, ...], message: str
) -> None:
    export, engine = int8
    spec = coreml_package.read(engine / PACKAGE).spec
    for kind in kinds:
        scale = argument(spec, first(spec, kind), "scale")
        scale.immediateValue.tensor.bytes.values = np.float16(2).tobytes()
    rewrite(engine, spec)
    with pytest.raises(CheckFailed, match=message):
        TARGET.inspect(export, engine)


def test_a_package_for_older_systems_is_refused(int8: tuple[Export, Path]) -> None:
    export, engine = int8
    spec = coreml_package.read(engine / PACKAGE).spec
    spec.specificationVersion = 10
    rewrite(engine, spec)
    with pytest.raises(CheckFailed, match=r"specification .* \(10, 'CoreML8'\), expected \(9, 'CoreML8'\)"):
        TARGET.inspect(export, engine)


def test_a_different_batch_is_refused(int8: tuple[Export, Path]) -> None:
    export, engine = int8
    with pytest.raises(CheckFailed, match=r"inputs of .*\[1, 3, 16, 16\].*, expected .*\[2, 3, 16, 16\]"):
        TARGET.inspect(dataclasses.replace(export, batch=2), engine)


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:100])])
@pytest.mark.parametrize("name", ["model.mlmodel", "weights/weight.bin"])
def test_a_damaged_package_is_refused(int8: tuple[Export, Path], name: str, damage: Callable[[Path], object]) -> None:
    export, engine = int8
    damage(engine / PACKAGE / "Data" / "com.apple.CoreML" / name)
    with pytest.raises(CheckFailed, match="cannot be read"):
        TARGET.inspect(export, engine)


def test_a_quantizer_that_no_layer_owns_is_named(made: dict[Precision, tuple[Export, Path]]) -> None:
    package = coreml_package.read(made["int8"][1] / PACKAGE)
    coreml_package.check_quantizers(package)
    without_head = tuple(operation for operation in package.operations if operation.op_type != "linear")
    with pytest.raises(CheckFailed, match=r"quantizes with scale .*, but its result is neither"):
        coreml_package.check_quantizers(dataclasses.replace(package, operations=without_head))


def test_a_zero_point_is_refused(tmp_path: Path) -> None:
    class Asymmetric(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            integers = quantized_decomposed.quantize_per_tensor(x, 0.5, 3, -128, 127, torch.int8)
            values: Tensor = quantized_decomposed.dequantize_per_tensor(integers, 0.5, 3, -128, 127, torch.int8)
            return values

    with pytest.raises(CheckFailed, match="has a zero point"):
        coreml_package.check_quantizers(converted(Asymmetric(), tmp_path))


def test_a_constant_of_the_wrong_type_is_named(made: dict[Precision, tuple[Export, Path]]) -> None:
    package = coreml_package.read(made["fp32"][1] / PACKAGE)
    with pytest.raises(CheckFailed, match="is fp32, expected fp16"):
        coreml_target._check_types(package, made["fp16"][0])


def test_scale_factors_of_an_upsampling_are_float32_in_a_package_of_any_precision(tmp_path: Path) -> None:
    class Enlarging(Toy):
        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.interpolate(self.norm(self.stem(x)), scale_factor=2.0, mode="nearest")
            return self.head(self.mix(y).mean((2, 3)))  # type: ignore[no-any-return]

    export = exported(tmp_path / "export", "fp16", Enlarging())
    engine = built(tmp_path / "engine", export)
    found = TARGET.inspect(export, engine)["operators"]
    assert isinstance(found, dict) and found["upsample_nearest_neighbor"] == 1


class Pair(nn.Module):
    """Two convolutions with weights of the module itself: one module, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.second = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(nn.functional.conv2d(x, self.first), self.second, padding=1)


def test_two_layers_of_one_module_are_distinguished(tmp_path: Path) -> None:
    model = Toy()
    model.mix = Pair()  # type: ignore[assignment]
    export = exported(tmp_path / "export", "int8", model)
    assert export.scales().keys() == {"stem", "mix", "mix#2", "head"}
    assert TARGET.inspect(export, built(tmp_path / "engine", export))["quantized_layers"] == 4


class Grouped(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)  # type: ignore[assignment]


def test_group_norm_is_written_in_rank_4(tmp_path: Path) -> None:
    export = exported(tmp_path / "export", "fp16", Grouped())
    found = TARGET.inspect(export, built(tmp_path / "engine", export))
    assert found["max_rank"] == 4


def test_a_tensor_of_rank_six_is_named(made: dict[Precision, tuple[Export, Path]]) -> None:
    export, engine = made["fp32"]
    wide = SimpleNamespace(name="patches", op_type="reshape", outputs=[SimpleNamespace(dtype=None, rank=6)])
    package = dataclasses.replace(coreml_package.read(engine / PACKAGE), operations=(wide,))
    with pytest.raises(CheckFailed, match=r"patches of the Core ML package .* rank 6, expected at most 5"):
        coreml_target._check_types(package, export)


# Quantized scalars


class ScalarConstant(nn.Module):
    """x times a quantized scalar: 100 with zero point -100 and scale 0.001 is 0.2."""

    def __init__(self, *, zero_point: int) -> None:
        super().__init__()
        self.zero_point = zero_point
        self.integer = nn.Buffer(torch.tensor(100, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        scale = quantized_decomposed.dequantize_per_tensor(self.integer, 0.001, self.zero_point, -128, 127, torch.int8)
        product: Tensor = x * scale
        return product


def test_our_quantizer_leaves_scalars_alone(made: dict[Precision, tuple[Export, Path]]) -> None:
    graph = programs.load(made["int8"][0].program).graph
    dequantized = [node for node in graph.nodes if "dequantize_per" in str(node.target)]
    assert len(dequantized) == 6
    for node in dequantized:
        assert node.meta["val"].dim() >= 2
        assert {user.target for user in node.users} <= programs.WEIGHTED


def test_a_quantized_scalar_is_folded_and_no_layer() -> None:
    assert coreml_package.exported_layers(programs.export(ScalarConstant(zero_point=-100), SIZE), {}) == []


def test_an_export_that_quantizes_anything_but_layers_is_refused() -> None:
    class Stray(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            integers = quantized_decomposed.quantize_per_tensor(x, 0.5, 0, -128, 127, torch.int8)
            values: Tensor = quantized_decomposed.dequantize_per_tensor(integers, 0.5, 0, -128, 127, torch.int8)
            return values * 2

    with pytest.raises(CheckFailed, match="dequantize_per_tensor of the export is read by mul"):
        coreml_package.exported_layers(programs.export(Stray(), SIZE), {})


# Helpers


def converted(model: nn.Module, folder: Path) -> coreml_package.Package:
    """Return `model` converted by coremltools without workarounds."""
    coremltools = import_coremltools()
    program = torch.export.export(model.eval(), (torch.zeros(1, 3, SIZE, SIZE),)).run_decompositions({})
    coremltools.convert(
        program,
        minimum_deployment_target=coremltools.target.iOS18,
        skip_model_load=True,
        package_dir=str(folder / PACKAGE),
    )
    return coreml_package.read(folder / PACKAGE)


def rewrite(engine: Path, spec: Any) -> None:
    (engine / PACKAGE / "Data" / "com.apple.CoreML" / "model.mlmodel").write_bytes(spec.SerializeToString())


def operations(spec: Any) -> Any:
    main = spec.mlProgram.functions["main"]
    return main.block_specializations[main.opset].operations


def first(spec: Any, kind: str) -> Any:
    return next(operation for operation in operations(spec) if operation.type == kind)


def argument(spec: Any, operation: Any, name: str) -> Any:
    """Return the constant input `name` of an operation in the protobuf message."""
    (binding,) = operation.inputs[name].arguments
    if binding.WhichOneof("binding") == "value":
        return binding.value
    (constant,) = (other for other in operations(spec) if other.outputs and other.outputs[0].name == binding.name)
    return constant.attributes["val"]
