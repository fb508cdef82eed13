"""`make tune`: the search finds the fastest placement, never one slower than float, and resumes after being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import calibration.recipe
from calibration.qdq_placement import parse
from models.errors import BadRequest, CannotRunHere
from pipeline.commands.tune import Log, Search, _parts, tune
from pipeline.stages.compiled import compiled
from pipeline.store.store import Store
from pipeline.timing.interleaved import ComparisonPlan
from targets.base import Accounts
from targets.null import NullTarget
from targets.onnx.reference import reference
from tests.support import hybrid
from tests.support.tiny import ROOT, surroundings, tiny_run

if TYPE_CHECKING:
    from targets.base import Images, Logits

pytestmark = pytest.mark.slow

MS = 1_000_000
# Milliseconds of a layer of the tiny network: (float, integer). Its fastest placement is `conv+small`.
COSTS = {"Conv": (4, 2), "Gemm": (1, 3)}
SLOW_INTEGERS = {"Conv": (4, 5), "Gemm": (1, 3)}


@dataclass(frozen=True, slots=True)
class PacedSession:
    """Session with the logits of ONNX Runtime, and latencies computed from the layers by its target."""

    engine: Path
    costs: dict[str, tuple[int, int]]
    batch: int = 1

    def infer(self, images: Images) -> Logits:
        return reference(self.engine / "model.onnx")(images)

    def latencies_ns(self, images: Images, count: int) -> list[int]:
        import onnx

        graph = onnx.load(self.engine / "model.onnx").graph
        makers = {name: node.op_type for node in graph.node for name in node.output}
        integer = {node.name: makers.get(node.input[1]) == "DequantizeLinear" for node in graph.node if node.input[1:]}
        layers = [node for node in graph.node if node.op_type in self.costs]
        return [sum(self.costs[node.op_type][integer[node.name]] for node in layers) * MS] * count


@dataclass(frozen=True, slots=True)
class PacedTarget(NullTarget):
    name: str = "paced"
    costs: dict[str, tuple[int, int]] = field(default_factory=lambda: COSTS)

    def not_executed(self) -> str | None:
        return None

    @contextmanager
    def open(self, engine: Path) -> Iterator[PacedSession]:
        yield PacedSession(engine=engine, costs=self.costs)


@pytest.fixture(scope="module", autouse=True)
def undisturbed() -> Iterator[None]:
    """Ignore the real conditions: paced sessions report their own times, which other processes do not affect."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.timing.interleaved._taken_by_others", lambda *_: 0.0)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, Any]:
    return tune(tiny_run("int8_ptq", PacedTarget()), root)


def test_the_fastest_placement_is_found_though_no_pattern_has_it(found: dict[str, Any]) -> None:
    assert (found["placement"], found["answer"], found["over"]) == ("conv+small", "conv+small", "fp32")
    assert (found["speedup"], found["ci"]) == (1.8, [1.8, 1.8])  # (4 + 4 + 1) / (2 + 2 + 1)
    assert found["drop"] <= 1.0
    assert found["next"] == "make engine MODEL=tiny TARGET=paced SIZE=16 RECIPE=int8_ptq PLACEMENT=conv+small"


def test_candidates_are_patterns_and_then_single_changes_of_the_best(found: dict[str, Any]) -> None:
    names = [candidate["placement"] for candidate in found["candidates"]]
    assert names[:3] == ["conv", "conv+linear", "conv+small+linear"]  # it has neither depthwise nor attention
    assert {"conv+small", "small", "conv+small-0", "conv+small-3"} <= set(names)
    assert len(names) == len(set(names))
    assert [candidate["placement"] for candidate in found["candidates"] if candidate["kept"]] == ["conv", "conv+small"]


def test_a_second_search_measures_nothing_again(found: dict[str, Any], root: Path) -> None:
    before = Path(found["log"]).read_bytes()
    assert tune(tiny_run("int8_ptq", PacedTarget()), root) == found
    assert Path(found["log"]).read_bytes() == before


def test_for_training_the_search_is_that_of_its_start(found: dict[str, Any], root: Path) -> None:
    answer: dict[str, Any] = tune(tiny_run("int8_qat", PacedTarget()), root)
    assert (answer["placement"], answer["candidates"]) == (found["placement"], found["candidates"])
    assert "RECIPE=int8_qat" in answer["next"]


def test_float_is_chosen_if_no_placement_is_faster(root: Path) -> None:
    answer: dict[str, Any] = tune(tiny_run("int8_ptq", PacedTarget(name="slow", costs=SLOW_INTEGERS)), root)
    assert (answer["placement"], answer["answer"], answer["speedup"]) == (None, "float", None)
    assert answer["next"] == "make engine MODEL=tiny TARGET=slow SIZE=16 RECIPE=fp32"
    assert {candidate["why_not"] for candidate in answer["candidates"]} == {"not faster than fp32"}


def test_nothing_is_kept_on_the_ground_of_doubtful_timings_and_the_same_command_times_again(
    root: Path, found: dict[str, Any]
) -> None:
    """Recorded conditions: other processes use the processor during the first search, and not during the second."""
    run = tiny_run("int8_ptq", PacedTarget(name="shared"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.timing.interleaved._taken_by_others", lambda *_: 0.84)
        first: dict[str, Any] = tune(run, root)
    doubt = "other processes used 84% of the processor, more than 25%"
    assert (first["placement"], first["answer"], first["speedup"]) == (None, "undecided", None)
    assert {candidate["doubt"] for candidate in first["candidates"]} == {doubt}
    assert not any(candidate["kept"] for candidate in first["candidates"])
    assert first["why_undecided"].startswith(
        "undecided: 3 of 3 candidates were timed under doubtful conditions (other processes used 84%"
    )
    assert first["next"] == "make tune MODEL=tiny TARGET=shared SIZE=16 RECIPE=int8_ptq"
    second: dict[str, Any] = tune(run, root)
    assert (second["placement"], second["why_undecided"]) == ("conv+small", None)
    lasting = [_lasting(line) for line in second["candidates"]]
    assert lasting == [_lasting(line) for line in found["candidates"]]


def test_a_winner_whose_confirmation_is_doubtful_is_not_kept(root: Path) -> None:
    run = tiny_run("int8_ptq", PacedTarget(name="late"))
    search = Search(run=run, root=root)
    best = search.search()
    assert str(best) == "conv+small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.timing.interleaved._taken_by_others", lambda *_: 0.5)
        answer: dict[str, Any] = tune(run, root)
    assert (answer["placement"], answer["answer"]) == (None, "undecided")
    assert tune(run, root)["placement"] == "conv+small"


def test_a_candidate_beyond_the_budget_is_not_kept_but_its_neighbours_are_tried(root: Path) -> None:
    search = Search(run=tiny_run("int8_ptq", PacedTarget(name="strict")), root=root)
    search._answered[search._floats["fp32"]] = 200.0  # percent, so that everybody loses
    assert search.search() is None
    tried = [line for line in search.record.lines if "kept" in line]
    assert all("points of top-1" in line["why_not"] for line in tried if line["speedup"] > 1)
    assert "conv+small" in {line["placement"] for line in tried}


def test_on_a_real_target_the_chosen_placement_is_faster_than_float(root: Path) -> None:
    answer: dict[str, Any] = tune(tiny_run("int8_ptq", "cpu"), root, ComparisonPlan(max_seconds=0.5))
    assert len(answer["candidates"]) >= 3
    if answer["placement"] is None:
        assert answer["answer"] == ("float" if answer["why_undecided"] is None else "undecided")
    else:
        assert answer["speedup"] >= 1.02 and answer["ci"][0] > 1


KILLED = """
import sys
from pathlib import Path
from pipeline.commands.tune import tune
from tests.pipeline.commands.test_tune import PacedTarget
from tests.support.tiny import tiny_run
import pipeline.timing.interleaved
pipeline.timing.interleaved._taken_by_others = lambda *_: 0.0
tune(tiny_run("int8_ptq", PacedTarget(name="killed")), Path(sys.argv[1]))
"""


def test_a_search_that_was_killed_goes_on_where_it_was(root: Path, found: dict[str, Any]) -> None:
    environment = surroundings() | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(root)], cwd=ROOT, env=environment)
    try:
        until = time.monotonic() + 120
        while not (first := _lines(root)) and time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert first
    (path,) = (root / "tune").glob("*killed*")
    with path.open("ab") as file:
        file.write(b'{"placement": "conv+li')  # as an end in the middle of a write leaves it
    answer: dict[str, Any] = tune(tiny_run("int8_ptq", PacedTarget(name="killed")), root)
    assert [_lasting(line) for line in answer["candidates"]] == [_lasting(line) for line in found["candidates"]]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[: len(first)] == [json.loads(line) for line in first]
    assert len(lines) == len(answer["candidates"]) + 1


def _lasting(candidate: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that do not depend on other processes on the machine."""
    return {name: value for name, value in candidate.items() if name != "busy"}


def _lines(root: Path) -> list[str]:
    whole = "".join(path.read_text().rpartition("\n")[0] for path in (root / "tune").glob("*killed*"))
    return whole.splitlines()


def test_half_a_last_line_is_dropped_before_the_next_one_is_written(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b"')
    log = Log(path)
    assert log.lines == [{"a": 1}]
    log.append({"c": 3})
    assert path.read_bytes() == b'{"a": 1}\n{"c": 3}\n'
    path.write_bytes(b'{"b"')
    assert Log(path).lines == []
    assert path.read_bytes() == b""


def test_damaged_lines_of_a_log_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(
        b'{"a": 1}\n\x00\xff\n[1]\n7\n{"placement": "conv"}\n' + b"[" * 100_000 + b'\n{"confirmed": "x"}\n'
    )
    assert Log(path).lines == [{"a": 1}, {"confirmed": "x"}]


def test_a_recipe_without_integers_has_no_placement(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"RECIPE=fp32 is not quantized to INT8.*use RECIPE=int8_ptq"):
        tune(tiny_run("fp32", "cpu"), tmp_path)


def test_a_target_that_is_not_here_cannot_be_tuned_for(tmp_path: Path) -> None:
    with pytest.raises(CannotRunHere, match=r"cannot be timed for null here.*use TARGET=cpu"):
        tune(tiny_run("int8_ptq", "null"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_parts_are_the_numbered_stages_and_the_modules_beside_them() -> None:
    assert _parts(["stem.conv", "stages.0.1.conv", "stages.0.2.conv", "stages.1.0", "head"]) == [
        "stem",
        "stages.0",
        "stages.1",
        "head",
    ]


@pytest.mark.parametrize(("target", "placement"), [("cpu", "all"), ("onnxruntime", "attention")])
def test_every_kind_of_operator_comes_through_the_export(target: str, placement: str, root: Path) -> None:
    """On the smallest network that has all kinds."""
    run = tiny_run("int8_ptq", target, model=hybrid.SPEC, trained=False)
    recipe = run.recipe
    assert isinstance(recipe, calibration.recipe.Ptq)
    run = replace(run, recipe=replace(recipe, placement=parse(placement)))
    engine = Store(root).get(compiled(run)).path
    assert isinstance(run.target, Accounts)
    macs = run.target.macs(engine)
    # Sums over layers: 16 * 27 * 64 + 16 * 9 * 16 + 16 * 16 * 16 + 16 * 16 * 48 + 2 products of 16 * 16 * 16 + 16 * 4.
    assert sum(macs.values()) == 54_592
    products = 2 * 16**3
    assert macs["i8"] == products if placement == "attention" else macs["i8"] > 2 * products
