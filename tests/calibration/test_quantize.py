"""Quantization from float model to INT8 program: Q/DQ pairs follow the scheme, and converter traps are avoided."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

import calibration.recipe
from calibration.fake_quant.symmetric import FakeQuant
from calibration.graph import exported_program as programs
from calibration.metrics import snr_db
from calibration.ptq.calibrate import fake_quants
from calibration.quantize import Quantized, prepare, quantize
from calibration.recipe import Float, Ptq, Qat, Recipe
from calibration.scheme import SHARED, Scheme
from calibration.training.fit import TrainingPlan, evaluate, fit
from models.convmixer import ConvMixer
from tests.support.tiny import SIDE
from tests.support.toys import CLASSES, LAYERS, Hybrid, images, seeded

pytestmark = pytest.mark.slow

PTQ = Ptq(name="int8_ptq", samples=64, force=True)
QAT = Qat(name="int8_qat", warm_start=PTQ, epochs=3, learning_rate=0.03)

aten, integers = torch.ops.aten, torch.ops.quantized_decomposed


def made(model: nn.Module, recipe: Recipe, seed: int = 0) -> Quantized:
    return quantize(model, recipe, SHARED, images("train"), images("val"), seed=seed)


def integer_weights(program: ExportedProgram) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in program.state_dict.items() if tensor.dtype == torch.int8}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model = seeded(Hybrid)
    fit(model, images("train"), images("val"), TrainingPlan(epochs=4, learning_rate=1e-2), seed=0, title="toy")
    return model


@pytest.fixture(scope="module")
def ptq(trained: nn.Module) -> Quantized:
    return made(copy.deepcopy(trained), PTQ)


@pytest.fixture(scope="module")
def qat(trained: nn.Module) -> Quantized:
    return made(copy.deepcopy(trained), QAT)


@pytest.fixture(params=["ptq", "qat"])
def program(request: pytest.FixtureRequest) -> ExportedProgram:
    found: Quantized = request.getfixturevalue(request.param)
    return found.program


def nodes(program: ExportedProgram, target: Callable[..., object]) -> list[Node]:
    return [node for node in program.graph.nodes if node.target is target]


def stored(program: ExportedProgram, node: object) -> Tensor:
    """Return the tensor of a placeholder in the program's graph."""
    assert isinstance(node, Node) and node.op == "placeholder"
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found: Tensor = {**program.state_dict, **program.constants}[names[node.name]]
    return found


def logits(program: ExportedProgram) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return programs.logits(program.module(), images("val").batches(16))


def calibrated(model: nn.Module) -> torch.fx.GraphModule:
    prepared = prepare(model.eval(), SHARED, SIDE)
    programs.logits(prepared, images("train").batches(64))
    for fake_quant in fake_quants(prepared):
        fake_quant.fix_range()
    return prepared


def scales_of(model: nn.Module) -> list[Tensor]:
    return [fake_quant.scale.clone() for fake_quant in fake_quants(model)]


# --- Where the integers are -----------------------------------------------------------------------------------------


def test_each_layer_has_one_rounded_input_and_one_stored_integer_weight(program: ExportedProgram) -> None:
    layers = len(LAYERS)
    assert len(nodes(program, integers.quantize_per_tensor.default)) == layers
    assert len(nodes(program, integers.dequantize_per_tensor.default)) == layers
    assert len(nodes(program, integers.dequantize_per_channel.default)) == layers
    assert not nodes(program, integers.quantize_per_channel.default)
    for target in (integers.dequantize_per_tensor.default, integers.dequantize_per_channel.default):
        for node in nodes(program, target):
            assert [user.target in programs.WEIGHTED for user in node.users] == [True]


def test_integers_are_symmetric_with_zero_point_zero(program: ExportedProgram) -> None:
    for node in nodes(program, integers.quantize_per_tensor.default):
        assert node.args[2:] == (0, -128, 127, torch.int8)
    for node in nodes(program, integers.dequantize_per_channel.default):
        weight, scale, zero_point = (stored(program, argument) for argument in node.args[:3])
        assert weight.dtype == torch.int8 and weight.abs().max() <= 127
        assert scale.shape == zero_point.shape == weight.shape[:1] and not zero_point.any()
        assert node.args[3:] == (0, -127, 127, torch.int8)


def test_every_scale_is_a_positive_fp16_number(program: ExportedProgram) -> None:
    for layer in programs.scales(program.module()).values():
        scales = torch.tensor([layer["activation"], *layer["weight"]], dtype=torch.float64)
        assert torch.equal(scales, scales.half().double()) and (scales > 0).all()


def test_scales_are_listed_by_module_path(program: ExportedProgram, trained: nn.Module) -> None:
    scales = programs.scales(program.module())
    assert tuple(scales) == LAYERS
    for path, layer in scales.items():
        weight = trained.get_submodule(path).weight
        assert isinstance(weight, Tensor) and len(layer["weight"]) == len(weight)


def test_no_constant_and_no_scalar_is_rounded(program: ExportedProgram) -> None:
    """`stem(x) * 0.125` and the attention's scale stay floats: coremltools would fold them with int8 wrap-around."""
    for node in nodes(program, integers.quantize_per_tensor.default):
        value = node.args[0]
        assert isinstance(value, Node) and value.meta["val"].ndim >= 2
        assert value.op == "call_function" or value.name in program.graph_signature.user_inputs
    factors = [node.args[1] for node in nodes(program, aten.mul.Tensor) if isinstance(node.args[1], float)]
    assert factors == [0.125, 2**-0.5]
    for product in nodes(program, aten.matmul.default):
        assert not {argument.target for argument in product.all_input_nodes} & {
            integers.dequantize_per_tensor.default,
            integers.dequantize_per_channel.default,
        }


def test_a_scalar_tensor_is_left_alone_too() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, CLASSES, 3)
            self.gate = nn.Buffer(torch.tensor(0.3))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = (self.conv(x * self.gate) * self.gate).mean((2, 3))
            return found

    found = made(seeded(Gated), PTQ)
    (rounded,) = nodes(found.program, integers.quantize_per_tensor.default)
    assert isinstance(rounded.args[0], Node) and rounded.args[0].target is aten.mul.Tensor
    assert found.report is not None and found.report.layers == 1


@pytest.mark.parametrize(
    "scheme",
    [Scheme(activation_bits=6), Scheme(weight_bits=1), Scheme(weight_bits=16), Scheme(per_channel_weights=False)],
)
def test_an_unsupported_scheme_raises_an_error(scheme: Scheme) -> None:
    with pytest.raises(NotImplementedError, match="only activations of 8 bits and per-channel weights of 2 to 8"):
        prepare(seeded(Hybrid).eval(), scheme, SIDE)


def test_weights_of_four_bits_have_fifteen_levels_and_are_converted_as_they_are_trained() -> None:
    model = seeded(Hybrid).eval()
    scheme = replace(SHARED, weight_bits=4)
    found = quantize(model, replace(QAT, epochs=1), scheme, images("train"), images("val"), seed=0)
    weights = integer_weights(found.program).values()
    assert len(weights) == len(LAYERS) and all(int(tensor.abs().amax()) == 7 for tensor in weights)


# --- What it computes -----------------------------------------------------------------------------------------------


def test_converting_changes_nothing_that_the_fake_quantized_model_computes(ptq: Quantized, qat: Quantized) -> None:
    for quantized in (ptq, qat):
        assert quantized.report is not None
        assert quantized.report.converted_db >= 60
        assert 15 <= quantized.report.float_db <= 60
        assert quantized.report.layers == len(LAYERS)


def test_integers_stay_close_to_the_float_model(trained: nn.Module, ptq: Quantized, qat: Quantized) -> None:
    expected = programs.logits(trained, images("val").batches(16))
    assert 15 < snr_db(expected, logits(ptq.program)) < 60
    for quantized in (ptq, qat):
        assert evaluate(quantized.program.module(), images("val")) >= evaluate(trained, images("val")) - 4


def test_the_batch_is_dynamic(program: ExportedProgram) -> None:
    graph = program.module()
    for count in (1, 5):
        assert graph(torch.zeros(count, 3, SIDE, SIDE)).shape == (count, CLASSES)


def test_a_program_comes_back_from_disk(program: ExportedProgram, tmp_path: Path) -> None:
    programs.save(program, tmp_path / "program.pt2")
    loaded = programs.load(tmp_path / "program.pt2")
    assert np.array_equal(logits(loaded), logits(program))
    assert programs.scales(loaded.module()) == programs.scales(program.module())


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_a_float_recipe_leaves_the_model_as_it_is(trained: nn.Module, name: str) -> None:
    recipe = calibration.recipe.ALL[name]
    assert isinstance(recipe, Float)
    found = made(trained, recipe)
    assert found.report is None and programs.scales(found.program.module()) == {}
    assert not nodes(found.program, integers.quantize_per_tensor.default)
    assert snr_db(programs.logits(trained, images("val").batches(16)), logits(found.program)) > 100


# --- The traps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "frozen"])
def test_evaluating_any_number_of_times_leaves_every_scale_unchanged(trained: nn.Module, mode: str) -> None:
    prepared = calibrated(copy.deepcopy(trained))
    for fake_quant in fake_quants(prepared):
        fake_quant.mode = mode  # type: ignore[assignment]
    before = scales_of(prepared)
    assert len(before) == 2 * len(LAYERS)
    answers = [evaluate(prepared, images("val")) for _ in range(3)]
    assert len(set(answers)) == 1
    assert all(torch.equal(old, new) for old, new in zip(before, scales_of(prepared), strict=True))


@pytest.fixture(scope="module")
def zero_gammas() -> Quantized:
    """Train a ConvMixer with all gammas zero; its BatchNorms follow activations and are therefore not folded."""
    torch.manual_seed(0)
    model = ConvMixer(CLASSES, dim=8, depth=1, kernel=3, patch=4, act=nn.ReLU)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    return made(model, replace(QAT, epochs=1))


def test_zero_gammas_survive_training(zero_gammas: Quantized) -> None:
    assert np.isfinite(logits(zero_gammas.program)).all()
    assert all(tensor.isfinite().all() for tensor in zero_gammas.program.state_dict.values())


def test_a_folded_norm_with_zero_gamma_survives_training() -> None:
    model = seeded(Hybrid)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    assert np.isfinite(logits(made(model, replace(QAT, epochs=1)).program)).all()


def test_no_batch_is_counted_and_no_input_is_mutated(ptq: Quantized, qat: Quantized, zero_gammas: Quantized) -> None:
    assert nodes(zero_gammas.program, aten.batch_norm.default)  # or there would be nothing to count
    for program in (ptq.program, qat.program, zero_gammas.program):
        signature = program.graph_signature
        assert not signature.buffers_to_mutate and not signature.user_inputs_to_mutate
        assert not [name for name in program.state_dict if "num_batches_tracked" in name]
        assert not [name for name in signature.inputs_to_buffers.values() if "num_batches_tracked" in name]


def test_quantization_aware_training_changes_weights_and_keeps_the_best_epoch(ptq: Quantized, qat: Quantized) -> None:
    before, after = integer_weights(ptq.program), integer_weights(qat.program)
    assert before.keys() == after.keys() and len(before) == len(LAYERS)
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(LAYERS) / 2
    assert qat.report is not None and qat.report.training is not None
    training = qat.report.training
    assert len(training.epochs) == QAT.epochs
    assert training.gain.kept_epoch >= 1
    kept = training.epochs[training.gain.kept_epoch - 1]
    assert evaluate(qat.program.module(), images("val")) == pytest.approx(kept.val_top1, abs=1e-9)
    assert training.val_top1_before == training.gain.val_top1[0]


def test_the_same_seed_makes_the_same_bits(trained: nn.Module, ptq: Quantized, qat: Quantized) -> None:
    for recipe, first in ((PTQ, ptq), (QAT, qat)):
        again = made(copy.deepcopy(trained), recipe).program.state_dict
        assert again.keys() == first.program.state_dict.keys()
        assert all(torch.equal(tensor, first.program.state_dict[name]) for name, tensor in again.items())


def test_a_different_seed_draws_different_images(trained: nn.Module, ptq: Quantized) -> None:
    other = made(copy.deepcopy(trained), PTQ, seed=1)
    assert programs.scales(other.program.module()) != programs.scales(ptq.program.module())


def test_only_training_images_are_calibrated_with(trained: nn.Module) -> None:
    """Validation and test images do not affect scales: without them, the scales are the same."""
    recipe = replace(PTQ, calibrator="mse", equalize=False)
    prepared = prepare(copy.deepcopy(trained).eval(), SHARED, SIDE)
    chosen = images("train").stratified(recipe.samples, 0)
    programs.logits(prepared, images("train").batches(32, chosen))
    watched = [fake_quant for fake_quant in prepared.modules() if isinstance(fake_quant, FakeQuant)]
    for fake_quant in watched:
        fake_quant.fix_range()
    expected = sorted(layer["activation"] for layer in programs.scales(made(trained, recipe).program.module()).values())
    assert sorted(fake_quant.scale.item() for fake_quant in watched if fake_quant.scale.numel() == 1) == expected
