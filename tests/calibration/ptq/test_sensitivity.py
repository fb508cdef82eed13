"""Sensitivity: a layer that was made sensitive on purpose is found, and only this layer stays float."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from calibration.accuracy_budget import Budget
from calibration.graph import exported_program as programs
from calibration.ptq.calibrate import CalibrationSplit, fake_quants
from calibration.ptq.sensitivity import Probe, by_kind, operators_of, partly, sensitivity, within_budget
from calibration.qdq_placement import Placement
from calibration.quantize import calibrated, quantize
from calibration.recipe import Ptq, Qat, budgeted
from calibration.scheme import SHARED
from calibration.training.fit import TrainingPlan, evaluate, fit
from models.errors import CheckFailed
from tests.support.tiny import SIDE, net
from tests.support.toys import CLASSES, Hybrid, images, seeded

# Without corrections, which would remove the sensitivity that these tests introduce.
PTQ = Ptq(name="int8_ptq", samples=64, force=True, equalize=False, bias_correction=False)
VICTIM = "3"  # the second of the three layers of `net`
OUTLIER = 2.0**14
TIGHT = Budget(value=1.0)


@pytest.fixture(scope="module")
def fragile() -> nn.Module:
    """Return a trained network with unchanged output in which one input channel of the second convolution is thousands
    of times as large, and its weights as much smaller: with one range for all channels, the others are rounded to
    zero.
    """
    torch.manual_seed(0)
    model = net(CLASSES)
    assert isinstance(model, nn.Sequential)
    fit(model, images("train"), images("val"), TrainingPlan(epochs=4, learning_rate=1e-2), seed=0, title="toy")
    with torch.no_grad():
        norm, after = model[1], model[3]
        assert isinstance(norm, nn.BatchNorm2d) and isinstance(after, nn.Conv2d)
        norm.weight[0] *= OUTLIER
        norm.bias[0] *= OUTLIER
        after.weight[:, 0] /= OUTLIER
    return model.eval()


@pytest.fixture(scope="module")
def prepared(fragile: nn.Module) -> GraphModule:
    return calibrated(PTQ, SHARED, CalibrationSplit.draw(fragile, PTQ, images("train"), seed=0))


@pytest.fixture(scope="module")
def probe(prepared: GraphModule) -> Probe:
    return Probe(prepared=prepared, val=images("val"))


# --- The table ------------------------------------------------------------------------------------------------------


def test_the_module_with_an_outlier_comes_first(probe: Probe) -> None:
    effects = sensitivity(probe)
    assert effects[0].path == VICTIM
    assert effects[0].snr_db < 15 < 25 < min(effect.snr_db for effect in effects[1:])
    assert effects[0].top1 is not None and effects[0].top1 < 90


def test_shares_of_the_work_sum_to_one(probe: Probe) -> None:
    """A convolution of 3x3x3 onto 16 channels at 8x8, one of 3x3x16 onto 32 at 4x4, and a linear layer."""
    macs = {"0": 27 * 16 * 64, "3": 144 * 32 * 16, "8": 32 * CLASSES}
    found = {effect.path: effect.macs for effect in sensitivity(probe, worst=0)}
    assert found == {path: pytest.approx(count / sum(macs.values()), abs=1e-4) for path, count in macs.items()}


def test_accuracy_is_measured_for_the_requested_number_of_modules(probe: Probe) -> None:
    effects = sensitivity(probe, worst=1)
    assert [effect.top1 is None for effect in effects] == [False, True, True]


def test_a_module_counts_with_all_that_it_contains() -> None:
    """The products of an attention are traced in the module that also holds its linear layers."""
    recipe = replace(PTQ, placement=Placement(kinds=("conv", "linear", "attention")))
    split = CalibrationSplit.draw(seeded(Hybrid).eval(), recipe, images("train"), seed=0)
    effects = sensitivity(Probe(prepared=calibrated(recipe, SHARED, split), val=images("val")))
    found = {effect.path: effect for effect in effects}
    attention, qkv = found["block.transformer.0.attn"], found["block.transformer.0.attn.qkv"]
    assert attention.kinds == ("linear", "attention") and qkv.kinds == ("linear",)
    assert attention.macs > qkv.macs and attention.snr_db <= qkv.snr_db + 3


def test_all_operators_of_a_kind_are_measured_together(probe: Probe) -> None:
    found = by_kind(probe)
    assert [effect.kinds for effect in found] == [("conv",), ("small",), ("linear",)]
    assert min(found, key=lambda effect: effect.snr_db).path == "conv"
    assert sum(effect.macs for effect in found) == pytest.approx(1, abs=1e-3)


# --- Graphs that round in part --------------------------------------------------------------------------------------


def test_a_graph_that_rounds_nothing_is_the_float_model(fragile: nn.Module, prepared: GraphModule) -> None:
    batches = list(images("val").batches(32))
    floats = partly(prepared, ())
    assert not list(fake_quants(floats))
    np.testing.assert_allclose(
        programs.logits(floats, batches), programs.logits(fragile, batches), rtol=1e-3, atol=1e-3
    )


def test_a_graph_that_rounds_everything_is_the_prepared_one(prepared: GraphModule) -> None:
    batches = list(images("val").batches(32))
    whole = partly(prepared, operators_of(prepared, SIDE))
    np.testing.assert_array_equal(programs.logits(whole, batches), programs.logits(prepared, batches))


def test_a_part_shares_its_tensors_and_leaves_the_graph_as_it_was(prepared: GraphModule) -> None:
    before = str(prepared.graph)
    part = partly(prepared, [operator for operator in operators_of(prepared, SIDE) if operator.path == VICTIM])
    assert len(list(fake_quants(part))) == 2
    assert str(prepared.graph) == before
    theirs = {tensor.data_ptr() for tensor in prepared.state_dict().values()}
    assert {tensor.data_ptr() for tensor in part.parameters()} <= theirs


# --- The budget -----------------------------------------------------------------------------------------------------


def test_the_budget_keeps_exactly_the_sensitive_module_in_float(fragile: nn.Module) -> None:
    made = quantize(fragile, budgeted(PTQ, TIGHT), SHARED, images("train"), images("val"), seed=0)
    assert made.report is not None and made.report.search is not None
    assert made.report.search.keep_float == (VICTIM,)
    assert list(programs.scales(made.program.module())) == ["0", "8"]
    found = evaluate(made.program.module(), images("val"))
    assert found == made.report.search.val_top1
    assert found >= evaluate(fragile, images("val")) - 100 / len(images("val"))


def test_without_a_budget_everything_is_rounded(fragile: nn.Module) -> None:
    made = quantize(fragile, PTQ, SHARED, images("train"), images("val"), seed=0)
    assert list(programs.scales(made.program.module())) == ["0", "3", "8"]
    assert evaluate(made.program.module(), images("val")) < evaluate(fragile, images("val")) - 10


def test_a_budget_that_holds_costs_nothing(probe: Probe) -> None:
    kept = within_budget(probe, Budget(value=100.0), float_top1=100.0, otherwise="")
    assert kept.paths == ()


def test_a_budget_is_met_after_training_too(fragile: nn.Module) -> None:
    """One training step at this rate does not restore the accuracy."""
    recipe = budgeted(Qat(name="int8_qat", warm_start=PTQ, epochs=1, learning_rate=1e-9), TIGHT)
    made = quantize(fragile, recipe, SHARED, images("train"), images("val"), seed=0)
    assert made.report is not None and made.report.training is not None and made.report.search is not None
    assert made.report.search.keep_float == (VICTIM,)


def test_an_unreachable_budget_is_refused_with_the_nearest_result(probe: Probe) -> None:
    tight = Budget(value=100.0, unit="percent")
    with pytest.raises(CheckFailed, match=r"MAX_DROP=100%: .* at best .* of its 3 modules in float; .*; try that") as e:
        within_budget(probe, tight, float_top1=140.0, otherwise="try that")
    assert e.value.exit_code == 4
