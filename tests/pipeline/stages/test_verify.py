"""Verification refuses wrong artifacts with the first wrong step and tensor, and publishes nothing of them."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from calibration.accuracy_budget import Budget
from calibration.graph import exported_program as programs
from models.errors import CannotRunHere, CheckFailed
from pipeline.commands.engine import engine as make_engine
from pipeline.commands.profile import profile as make_profile
from pipeline.commands.verify import verify as make_verify
from pipeline.run import Run
from pipeline.stages.engine import deliverable
from pipeline.stages.engine import engine as engine_step
from pipeline.stages.exported import export_of
from pipeline.stages.verify import verify
from pipeline.store.store import MANIFEST, Store
from targets.base import Export
from targets.coreml.target import CoreMLTarget
from targets.null import NullTarget
from targets.onnxruntime import OnnxRuntimeTarget
from targets.openvino.target import CpuTarget
from targets.runner.cpu import HostSession
from tests.support.tiny import tiny_run

if TYPE_CHECKING:
    from targets.base import Executor

pytestmark = pytest.mark.slow

Floats = npt.NDArray[np.float32]
Change = Callable[[Floats], Floats]


def negated(weights: Floats) -> Floats:
    return -weights


def not_numbers(weights: Floats) -> Floats:
    return np.full_like(weights, np.nan)


@dataclass(frozen=True, slots=True)
class WrongOnnx(OnnxRuntimeTarget):
    """Target that compiles, and then changes the weights of the last layer."""

    name: str = "wrong-onnx"
    change: Change = negated

    def build(self, export: Export, out: Path) -> None:
        OnnxRuntimeTarget.build(self, export, out)
        change_last_weight(out / "model.onnx", self.change)


@dataclass(frozen=True, slots=True)
class WronglyFused(OnnxRuntimeTarget):
    """Target that compiles the correct graph, and executes it with noise of a third of the logits' magnitude."""

    name: str = "wrongly-fused"

    @contextmanager
    def open(self, engine: Path) -> Iterator[HostSession]:
        random = np.random.default_rng(0)

        def noisy(logits: Floats) -> Floats:
            noisy: Floats = (logits + random.normal(size=logits.shape) * 0.3 * np.abs(logits).max()).astype(np.float32)
            return noisy

        with OnnxRuntimeTarget.open(self, engine) as session:
            yield HostSession(batch=session.batch, run=lambda images: noisy(session.infer(images)))


@dataclass(frozen=True, slots=True)
class WrongBundle(NullTarget):
    """Target without a toolchain; the graph in its bundle has `change` of the export's weights in the last layer."""

    name: str = "wrong-bundle"
    change: Change = np.copy

    def missing(self) -> str | None:
        return "the board is somewhere else"

    def bundle(self, export: Export, out: Path) -> None:
        shutil.copyfile(export.onnx, out / "model.onnx")
        change_last_weight(out / "model.onnx", self.change)

    def next_command(self, bundle: Path) -> str:
        return f"carry {bundle.name}"


@dataclass(frozen=True, slots=True)
class WrongOpenVino(CpuTarget):
    """Target that compiles, and then negates the largest float tensor of the weights file."""

    name: str = "wrong-openvino"

    def build(self, export: Export, out: Path) -> None:
        CpuTarget.build(self, export, out)
        constants = re.findall(r'element_type="f32"[^>]* offset="(\d+)" size="(\d+)"', (out / "model.xml").read_text())
        offset, size = max(((int(start), int(length)) for start, length in constants), key=lambda found: found[1])
        content = bytearray((out / "model.bin").read_bytes())
        content[offset : offset + size] = (-np.frombuffer(content[offset : offset + size], np.float32)).tobytes()
        (out / "model.bin").write_bytes(content)


@dataclass(frozen=True, slots=True)
class WrongCoreML(CoreMLTarget):
    """Target that converts a changed program, with the last convolution negated."""

    name: str = "wrong-coreml"

    def build(self, export: Export, out: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            copy = replace(export, path=shutil.copytree(export.path, Path(scratch) / "export"))
            program = programs.load(copy.program)
            kernels = [name for name, tensor in program.state_dict.items() if tensor.ndim == 4]
            program.state_dict[kernels[-1]].data.neg_()
            programs.save(program, copy.program)
            CoreMLTarget.build(self, copy, out)


@dataclass(frozen=True, slots=True)
class RoughCoreML(CoreMLTarget):
    """Target that converts the export correctly, and evaluates the package wrongly."""

    name: str = "rough-coreml"

    def not_executed(self) -> str | None:
        return "needs macOS"

    def evaluate(self, export: Export, engine: Path) -> Executor:
        executor = CoreMLTarget.evaluate(self, export, engine)
        return lambda images: -executor(images)


@dataclass(frozen=True, slots=True)
class TwoUnits(OnnxRuntimeTarget):
    """Target with two compute units; on the unit `wrong`, all logits are negated."""

    name: str = "two-units"
    wrong: str = ""

    @property
    def units(self) -> tuple[str, ...]:
        return ("ALL", "SLOW")

    @contextmanager
    def open_on(self, engine: Path, unit: str) -> Iterator[HostSession]:
        sign = np.float32(-1 if unit == self.wrong else 1)
        with OnnxRuntimeTarget.open(self, engine) as session:
            yield HostSession(batch=session.batch, run=lambda images: sign * session.infer(images))


def change_last_weight(path: Path, change: Change) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 2]
    assert weights
    weights[-1].CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weights[-1])), weights[-1].name))
    onnx.save(model, path)


def refused(run: Run, shared: Path) -> str:
    """Return the error of a run whose engine is refused, and whose earlier stages are accepted."""
    store = Store(shared)
    step = deliverable(run)
    with pytest.raises(CheckFailed) as caught:
        make_engine(run, shared)
    assert caught.value.exit_code == 4
    assert not store.has(step)
    assert not list((shared / step.stage).glob(f"*{store.path(step).name}/**/*")), "an incomplete artifact was left"
    assert all(store.has(needed) for needed in step.inputs.values())
    return str(caught.value)


def test_an_engine_that_does_not_match_is_refused_with_the_operator(shared: Path) -> None:
    said = refused(tiny_run("fp32", WrongOnnx()), shared)
    assert re.match(
        r"operator `logits` of wrong-onnx's graph does not match the torch program on the same inputs: ", said
    )


def test_a_wrong_openvino_model_is_refused_with_the_operator(shared: Path) -> None:
    said = refused(tiny_run("fp32", WrongOpenVino()), shared)
    assert re.match(r"operator `conv2d_1` of wrong-openvino's graph does not match the torch program", said), said


@pytest.mark.parametrize("recipe", ["fp32", "fp16"])
def test_the_operator_is_found_where_a_query_is_larger_than_the_test_part(recipe: str, shared: Path) -> None:
    said = refused(tiny_run(recipe, WrongOnnx(), batch=64), shared)
    assert said.startswith("operator `logits` of wrong-onnx's graph")


def test_an_engine_whose_logits_are_nan_is_refused(shared: Path) -> None:
    said = refused(tiny_run("fp32", WrongOnnx(name="no-numbers", change=not_numbers)), shared)
    assert re.match(r"operator `logits` of no-numbers's graph does not match .*: -200\.0 dB", said)


@pytest.mark.parametrize("recipe", ["fp32", "int8_ptq"])
def test_a_fault_of_no_single_operator_is_found_end_to_end(recipe: str, shared: Path) -> None:
    """A runtime that fuses wrongly: each operator of its graph matches."""
    said = refused(tiny_run(recipe, WronglyFused()), shared)
    assert re.match(r"wrongly-fused does not match onnxruntime, on the export: -?\d+\.\d dB, where two correct", said)
    assert re.search(
        r"in f32 agree to \d+\.\d dB, and \d+ of 48 predictions changed beyond that noise \(\d+ ties not", said
    )


def test_every_compute_unit_runs_the_test_part(shared: Path) -> None:
    answer = make_engine(tiny_run("fp32", TwoUnits()), shared)
    report = json.loads((Path(str(answer["artifact"])) / "report.json").read_text())
    assert list(report["units"]) == ["ALL", "SLOW"]
    assert all(unit == {"top1": 100, "agreement": 100, "snr_db": 200} for unit in report["units"].values())
    assert report["inspected"]["parity"]["two-units"]["operators"] > 5


def test_a_compute_unit_whose_predictions_differ_is_named(shared: Path) -> None:
    said = refused(tiny_run("fp32", TwoUnits(name="one-wrong", wrong="SLOW")), shared)
    assert re.match(
        r"one-wrong on SLOW does not match one-wrong: -6\.0 dB, where .* and \d+ of 48 predictions changed", said
    )
    assert said.endswith("; one-wrong is correct")


def test_a_bundle_is_left_with_the_next_command(shared: Path) -> None:
    run = tiny_run("fp32", WrongBundle(name="far"))
    with pytest.raises(
        CannotRunHere, match=r"the board is somewhere else\. All host work is done; next: carry"
    ) as caught:
        make_engine(run, shared)
    answer = caught.value.answer
    bundle = Path(str(answer["artifact"]))
    assert (caught.value.exit_code, answer["executed"], answer["why_not"]) == (
        3,
        False,
        "not executed: the board is somewhere else",
    )
    assert answer["next"] == f"carry {bundle.name}"
    assert (bundle.parent.name, answer["top1"]) == ("bundle", 100)
    assert sorted(path.name for path in bundle.iterdir()) == [MANIFEST, "model.onnx", "report.json", "subject.json"]
    with pytest.raises(CannotRunHere) as again:
        make_engine(run, shared)
    assert again.value.answer == answer | {"cached": True}


def test_a_bundle_with_a_wrong_graph_is_refused(shared: Path) -> None:
    said = refused(tiny_run("fp32", WrongBundle(change=negated)), shared)
    assert said.startswith("operator `logits` of the bundle's graph does not match the torch program")


def test_a_core_ml_package_that_does_not_match_is_refused_with_the_operator(shared: Path) -> None:
    said = refused(tiny_run("fp16", WrongCoreML()), shared)
    assert re.match(r"conv2d_1\S* of the Core ML package \(conv\), computed from torch's inputs, does not match", said)


def test_a_core_ml_package_whose_operators_match_only_one_by_one_is_refused(shared: Path) -> None:
    said = refused(tiny_run("fp16", RoughCoreML()), shared)
    assert "reference evaluator does not match onnxruntime, on the export" in said
    assert said.endswith("computed without FP16 rounding, matches torch: try RECIPE=fp32")


@pytest.mark.parametrize("recipe", ["fp16", "int8_ptq", "palette4"])
def test_a_core_ml_package_is_evaluated_without_a_mac(recipe: str, shared: Path) -> None:
    run = tiny_run(recipe, "coreml")
    if not run.target.not_executed():
        pytest.skip("this is a Mac, which computes it itself")
    answer = make_verify(run, shared)
    assert (answer["executed"], answer["by"]) == (True, "reference evaluator")
    assert str(answer["why_not"]).startswith("computed by the reference evaluator, not by coreml itself: needs macOS")
    assert answer["top1"] == 100
    report = json.loads((Path(str(answer["artifact"])) / "report.json").read_text())
    # Both ReLUs, the mean and the flattening; and the layers, unless their weights are not torch's.
    assert report["inspected"]["replayed"]["compared"] >= (3 if recipe == "palette4" else 5)
    assert (report["inspected"]["replayed"]["integers"] > 0) == (recipe == "int8_ptq")


@pytest.mark.parametrize("verb", [make_verify, make_profile])
def test_a_bundle_is_no_engine(verb: Callable[[Run, Path], object], shared: Path) -> None:
    with pytest.raises(CannotRunHere, match="there is no engine for far on this machine: the board is somewhere else"):
        verb(tiny_run("fp32", WrongBundle(name="far")), shared)


# --- Reports of artifacts that are already there --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A finished run, and copies of the files that its verification reads."""

    run: Run
    export: Export
    engine: Path
    before: dict[str, Path]

    def verify(self) -> dict[str, Any]:
        return verify(self.run, self.export, self.engine, self.before).content()

    def doctor(self, stage: str, **arrays: npt.NDArray[Any]) -> None:
        """Replace arrays in the test results of a stage."""
        path = self.before[stage] / "test.npz"
        with np.load(path) as found:
            changed = dict(found) | arrays
        path.unlink()
        np.savez(path, **changed)

    def test_part(self, stage: str) -> dict[str, npt.NDArray[Any]]:
        with np.load(self.before[stage] / "test.npz") as found:
            return dict(found)


@pytest.fixture
def finished(shared: Path, tmp_path: Path) -> Finished:
    run = tiny_run("int8_ptq", "onnxruntime")
    store = Store(shared)
    step = engine_step(run)
    engine = store.get(step).path
    before = {
        name: Path(shutil.copytree(store.get(needed).path, tmp_path / name)) for name, needed in step.inputs.items()
    }
    return Finished(
        run=run,
        export=export_of(run, before["exported"]),
        engine=Path(shutil.copytree(engine, tmp_path / "engine")),
        before=before,
    )


def test_an_engine_within_its_budget_passes(finished: Finished) -> None:
    report = finished.verify()
    assert (report["top1"], report["executed"], report["by"]) == (100, True, "onnxruntime")


def test_an_artifact_that_loses_too_much_accuracy_is_refused(finished: Finished) -> None:
    """The labels are random, and the float model predicts all of them."""
    labels = np.random.default_rng(0).integers(0, 4, len(finished.test_part("weights")["labels"]))
    finished.doctor("weights", labels=labels, logits=np.eye(4, dtype=np.float32)[labels])
    with pytest.raises(
        CheckFailed,
        match=r"^the int8_ptq artifact of tiny loses \d\d\.\d\d points \[\d\d\.\d\d, \d\d\.\d\d\] of top-1 on 48 test "
        r"images, from 100\.00 % in float to \d\d\.\d\d %; 2\.08 points are allowed; try RECIPE=int8_qat, or "
        r"MAX_DROP=1, which keeps the most sensitive modules in float until it holds, or a different CALIBRATOR=; "
        r"most sensitive modules: \d, \d, \d \(`make sensitivity` lists all\)$",
    ):
        finished.verify()


@pytest.mark.parametrize(("wrong", "passes"), [(1, True), (2, False)])
def test_one_image_is_always_within_the_budget(finished: Finished, wrong: int, passes: bool) -> None:
    """One of 48 images is two points: a loss of one image is accepted although the budget is one point."""
    labels, logits = finished.test_part("weights")["labels"].copy(), finished.test_part("weights")["logits"].copy()
    labels[:wrong] = (labels[:wrong] + 1) % 4
    logits[:wrong] = np.eye(4, dtype=np.float32)[labels[:wrong]] * 10
    finished.doctor("weights", labels=labels, logits=logits)
    if passes:
        assert finished.verify()["top1"] == pytest.approx(100 - 100 / 48, abs=1e-3)
    else:
        with pytest.raises(CheckFailed, match=r"loses 4\.17 points .*; 2\.08 points are allowed; the budget lies in"):
            finished.verify()


def test_a_larger_budget_lets_more_pass(finished: Finished) -> None:
    labels, logits = finished.test_part("weights")["labels"].copy(), finished.test_part("weights")["logits"].copy()
    labels[:2] = (labels[:2] + 1) % 4
    logits[:2] = np.eye(4, dtype=np.float32)[labels[:2]] * 10
    finished.doctor("weights", labels=labels, logits=logits)
    generous = replace(finished, run=replace(finished.run, max_drop=Budget(value=5.0)))
    assert generous.verify()["float_top1"] == 100


def test_an_export_that_does_not_match_the_torch_program_is_refused_with_the_tensor(finished: Finished) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(finished.export.onnx)
    kernels = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4]
    kernels[0].CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(kernels[0]), kernels[0].name))
    onnx.save(model, finished.export.onnx)
    with pytest.raises(CheckFailed, match=r"^operator `dequantize_per_channel\w*` of the ONNX export does not match"):
        finished.verify()


@pytest.mark.parametrize(("noise_db", "passes"), [(130, True), (15, False)])
def test_the_tolerance_of_a_step_is_the_difference_of_two_correct_executions(
    finished: Finished, noise_db: float, passes: bool
) -> None:
    logits = finished.test_part("quantized")["logits"]
    noise = np.random.default_rng(0).normal(size=logits.shape) * np.sqrt(
        np.square(logits).mean() / 10 ** (noise_db / 10)
    )
    finished.doctor("quantized", logits=(logits + noise).astype(np.float32))
    if passes:
        assert finished.verify()["executed"]
    else:
        message = (
            r"^onnxruntime, on the export does not match torch quantized: 1\d\.\d dB, where two correct executions"
        )
        with pytest.raises(CheckFailed, match=message):
            finished.verify()


def test_the_report_holds_the_noise_the_ties_and_the_interval(finished: Finished) -> None:
    report = finished.verify()
    assert [step["name"] for step in report["steps"]][2:] == ["onnxruntime, on the export", "onnxruntime"]
    for step in report["steps"][2:]:
        assert step["noise_db"] > 20 and (step["changed"], step["ties"]) == (0, 0)
    assert report["lost"]["images"] == 48 and report["lost"]["points"] == 0
    low, high = report["lost"]["interval"]
    assert low < 0 < high < 5
    assert set(report["inspected"]["parity"]) == {"export", "onnxruntime"}


def test_a_quantized_program_whose_logits_are_nan_is_refused(finished: Finished) -> None:
    logits = finished.test_part("quantized")["logits"]
    finished.doctor("quantized", logits=np.full_like(logits, np.nan))
    with pytest.raises(CheckFailed, match=r"does not match torch quantized: -200.0 dB"):
        finished.verify()
