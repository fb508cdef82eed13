"""Contract of all targets: reasons are one line, and engines can be moved, opened and timed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import targets
from calibration.metrics import snr_db
from calibration.recipe import Precision
from calibration.scheme import Scheme
from models.errors import CannotRunHere
from targets.base import Bundles, Export, Target

pytestmark = pytest.mark.slow

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
# Decibels against the torch program: bfloat16, the least precise half, keeps 8 bits of each number.
LEAST_DB = {"fp32": 50.0, "fp16": 15.0, "int8": 12.0}

every_target = pytest.mark.parametrize("target", targets.ALL.values(), ids=targets.ALL)


def ready(target: Target) -> None:
    reason = target.missing()
    if reason is not None:
        pytest.skip(f"{target.name}: {reason}")


@pytest.fixture(params=[(precision, batch) for precision in PRECISIONS for batch in (1, 3)], ids=str)
def export(request: pytest.FixtureRequest) -> Export:
    """Return exports of the same toy in every precision, for batches of one and three images."""
    precision, batch = request.param
    made: Export = request.getfixturevalue("int8_export" if precision == "int8" else "float_export")
    return replace(made, precision=precision, batch=batch)


@pytest.mark.parametrize("name", targets.ALL)
def test_a_target_is_registered_under_its_name(name: str) -> None:
    assert targets.ALL[name].name == name


def test_other_names_lead_to_targets_and_hide_none() -> None:
    assert set(targets.ALIASES.values()) <= targets.ALL.keys()
    assert not targets.ALIASES.keys() & targets.ALL.keys()
    assert {targets.ALIASES[name] for name in ("apple", "mac", "iphone")} == {"coreml"}


def test_the_targets_that_were_promised_are_there() -> None:
    promised = {"jetson", "nvidia", "rtx", "coreml", "cpu", "onnxruntime", "torch_tensorrt", "null"}
    assert targets.ALL.keys() == promised


@every_target
def test_a_target_describes_itself_in_one_line(target: Target) -> None:
    assert target.summary and "\n" not in target.summary and not target.summary.endswith(".")
    assert isinstance(target.scheme, Scheme)


@every_target
def test_the_reason_of_missing_is_one_sentence_for_the_end_of_a_message(target: Target) -> None:
    for reason in (target.missing(), target.not_executed()):
        if reason is not None:
            assert reason.strip() == reason and len(reason) > 10 and "\n" not in reason
            assert not reason.endswith(".")
            assert reason in (target.missing(), target.not_executed())  # the same each time


@every_target
def test_targets_that_cannot_build_here_cannot_execute_here_either(target: Target) -> None:
    if target.missing() is not None:
        assert target.not_executed() is not None


@every_target
def test_the_toolchain_is_versions_by_name_and_the_same_each_time(target: Target) -> None:
    if target.missing() is None or isinstance(target, Bundles):
        found = target.toolchain()
        assert found and found == target.toolchain()
        assert all(isinstance(value, str) and value for entry in found.items() for value in entry)


@every_target
def test_engines_of_a_ready_target_can_be_moved_opened_and_timed(
    target: Target, export: Export, tmp_path: Path
) -> None:
    ready(target)
    built, engine = tmp_path / "scratch", tmp_path / "moved here" / "engine"
    built.mkdir()
    target.build(export, built)
    assert any(built.iterdir())
    engine.parent.mkdir()
    built.rename(engine)

    inspected = target.inspect(export, engine)
    assert json.loads(json.dumps(inspected)) == inspected
    graph = target.graph(engine)
    assert graph is None or graph.is_file()

    if target.not_executed() is not None:
        with pytest.raises(CannotRunHere, match=r"\w"), target.open(engine):
            pass
        return
    with np.load(export.path / "sample.npz") as sample:
        images, logits = sample["images"][: export.batch], sample["logits"][: export.batch]
    with target.open(engine) as session:
        assert session.batch == export.batch
        found = session.infer(images)
        kept = found.copy()
        assert found.shape == logits.shape and found.dtype == np.float32
        latencies = session.latencies_ns(images, 5)
        session.infer(-images)
    assert np.array_equal(found, kept)  # an answer is not overwritten by the next
    assert snr_db(logits, found) > LEAST_DB[export.precision]
    assert len(latencies) == 5 and all(isinstance(value, int) and value > 0 for value in latencies)


@every_target
def test_an_engine_that_cannot_be_executed_here_is_not_opened(target: Target, tmp_path: Path) -> None:
    if target.not_executed() is None:
        pytest.skip(f"{target.name} is executed here")
    with pytest.raises(CannotRunHere, match=r"\w"), target.open(tmp_path):
        pass


@every_target
def test_a_target_whose_engines_are_built_elsewhere_leaves_a_bundle(
    target: Target, int8_export: Export, tmp_path: Path
) -> None:
    if not isinstance(target, Bundles) or target.missing() is None:
        pytest.skip(f"{target.name} builds here or nowhere")
    bundle = tmp_path / "a bundle"
    bundle.mkdir()
    target.bundle(int8_export, bundle)
    assert (bundle / "model.onnx").is_file()
    command = target.next_command(bundle)
    assert command and "\n" not in command and bundle.name in command
