"""The memory of the pipeline: what is part of a key, and that artifacts are built once and published whole."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.budget import Budget
from calibration.recipe import Float, Ptq, budgeted
from pipeline import stages
from pipeline.stages import Run
from pipeline.store import MANIFEST, Step, Store, plain, resumable
from targets.onnxruntime import OnnxRuntimeTarget
from tests.tiny import ROOT, Colours, tiny_run

Build = Callable[[Mapping[str, Path], Path], None]
STAGES = ("weights", "quantized", "exported", "compiled", "engine")


def write(inputs: Mapping[str, Path], out: Path) -> None:
    (out / "folder").mkdir()
    (out / "folder" / "half").write_text("first")
    (out / "whole").write_text(" ".join(sorted(inputs)))


def toy(
    build: Build = write,
    *,
    label: str = "toy",
    inputs: Mapping[str, Step] | None = None,
    code: tuple[str, ...] = (),
    **params: object,
) -> Step:
    return Step(stage="toys", label=label, inputs=inputs or {}, params=params, code=code, build=build)


def keys(run: Run) -> dict[str, str]:
    return {step.stage: step.key for step in stages.engine(run).chain()}


def changed(before: Run, after: Run) -> list[str]:
    """The stages whose keys differ, in their order."""
    one, other = keys(before), keys(after)
    assert tuple(one) == tuple(other) == STAGES
    return [stage for stage in STAGES if one[stage] != other[stage]]


def left(root: Path) -> list[str]:
    """What lies in a store, its empty lock files apart."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.name.startswith(".lock-"))


# --- What is part of a key ------------------------------------------------------------------------------------------


def test_the_same_request_has_the_same_keys() -> None:
    assert changed(tiny_run(), tiny_run()) == []


def test_targets_with_the_same_arithmetic_share_training() -> None:
    assert changed(tiny_run(target="cpu"), tiny_run(target="rtx")) == ["compiled", "engine"]
    assert changed(tiny_run(target="cpu"), tiny_run(target="null")) == ["compiled", "engine"]


def test_a_target_with_another_arithmetic_has_a_training_of_its_own() -> None:
    assert changed(tiny_run(target="cpu"), tiny_run(target="onnxruntime"))[0] == "quantized"
    plainer = OnnxRuntimeTarget(scheme=replace(OnnxRuntimeTarget().scheme, per_channel_weights=False))
    assert changed(tiny_run(), tiny_run(target=plainer)) == ["quantized", "exported", "compiled", "engine"]
    assert changed(tiny_run("fp32"), tiny_run("fp32", target=plainer)) == []


def test_both_float_recipes_share_one_export() -> None:
    assert changed(tiny_run("fp32"), tiny_run("fp16")) == ["compiled", "engine"]
    assert stages.exported(tiny_run("fp32")).label == stages.exported(tiny_run("fp16")).label


def test_another_recipe_rebuilds_from_quantization_on() -> None:
    assert changed(tiny_run("int8_ptq"), tiny_run("int8_qat")) == ["quantized", "exported", "compiled", "engine"]


def test_a_retuned_recipe_rebuilds_from_quantization_on() -> None:
    before = tiny_run("int8_ptq")
    after = replace(before, recipe=Ptq(name="int8_ptq", samples=64))
    assert changed(before, after) == ["quantized", "exported", "compiled", "engine"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 1}, STAGES),
        ({"preprocess": replace(tiny_run().preprocess, size=24)}, STAGES),
        ({"preprocess": replace(tiny_run().preprocess, mean=(0.0, 0.0, 0.0))}, STAGES),
        ({"data": Colours(version=2)}, STAGES),
        ({"model": replace(tiny_run().model, network="models.convmixer:convmixer_mini")}, STAGES),
        ({"model": replace(tiny_run().model, top1=71.0, parameters=7, source="an erratum")}, ()),
        ({"batch": 4}, ("compiled", "engine")),
        ({"max_drop": Budget(value=0.5)}, ("engine",)),
    ],
    ids=str,
)
def test_a_change_rebuilds_what_depends_on_it_and_nothing_else(
    changes: dict[str, Any], expected: tuple[str, ...]
) -> None:
    assert changed(tiny_run(), tiny_run(**changes)) == list(expected)


def test_a_budget_that_may_keep_modules_in_float_quantizes_again() -> None:
    run = tiny_run()
    assert changed(run, replace(run, recipe=budgeted(run.recipe, Budget(value=0.5)))) == list(STAGES[1:])


def test_an_engine_that_tells_what_was_published_of_its_model_is_told_of_an_erratum() -> None:
    model = tiny_run().model
    corrected = replace(model, top1=71.0, source="an erratum")
    assert changed(tiny_run(target="coreml"), tiny_run(target="coreml", model=corrected)) == ["engine"]


def test_a_weights_file_counts_by_its_content_wherever_it_lies(tmp_path: Path) -> None:
    one, copy, other = (tmp_path / name for name in ("a.pt", "b.pt", "c.pt"))
    one.write_bytes(b"weights")
    copy.write_bytes(b"weights")
    other.write_bytes(b"weightz")
    assert changed(tiny_run(weights=one), tiny_run(weights=copy)) == []
    assert changed(tiny_run(weights=one), tiny_run(weights=other)) == list(STAGES)
    assert changed(tiny_run(weights=one), tiny_run()) == list(STAGES)


@pytest.mark.parametrize(
    ("package", "expected"),
    [
        ("torch", STAGES),
        ("scikit-learn", STAGES),
        ("torchao", STAGES[1:]),
        ("onnxscript", STAGES[2:]),
        ("onnxruntime", STAGES[2:]),
        ("openvino", STAGES[3:]),
    ],
)
def test_another_version_of_a_tool_rebuilds_what_it_made(
    package: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(tiny_run(target="cpu"))
    installed = importlib.metadata.version
    with monkeypatch.context() as patched:
        patched.setattr("importlib.metadata.version", lambda name: "0.0.1" if name == package else installed(name))
        after = keys(tiny_run(target="cpu"))
    assert tuple(stage for stage in STAGES if before[stage] != after[stage]) == expected


def test_a_device_that_appears_has_the_engine_verified_again() -> None:
    @dataclass(frozen=True, slots=True)
    class Unplugged(OnnxRuntimeTarget):
        def not_executed(self) -> str | None:
            return "the device is not plugged in"

    class Plugged(Unplugged):
        def not_executed(self) -> str | None:
            return None

    assert changed(tiny_run(target=Unplugged()), tiny_run(target=Plugged())) == ["engine"]


# --- The code in a key ----------------------------------------------------------------------------------------------

PRINT_KEYS = """
import json
import calibration.recipe, models, targets
from calibration.data import Digits
from pipeline import stages
run = stages.Run(model=models.ALL["mobilevit_xs"], recipe=calibration.recipe.ALL["int8_qat"],
                 target=targets.ALL["cpu"], data=Digits(), preprocess=models.ALL["mobilevit_xs"].preprocess)
print(json.dumps({step.stage: step.key for step in stages.engine(run).chain()}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, to be edited."""
    root = tmp_path_factory.mktemp("source")
    for layer in ("pipeline", "targets", "calibration", "models"):
        shutil.copytree(ROOT / layer, root / layer, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.fixture(scope="module")
def keys_before(source: Path) -> dict[str, str]:
    return keys_of_source(source)


def keys_of_source(root: Path) -> dict[str, str]:
    result = subprocess.run(
        [sys.executable, "-B", "-c", PRINT_KEYS], cwd=root, capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(result.stdout)
    return found


def put_behind(line: str) -> Callable[[str], str]:
    return lambda text: f"{text}\n{line}\n"


def put_for(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return edit


STATEMENT = put_behind("ANEW = 1")


@pytest.mark.parametrize(
    ("file", "edit", "expected"),
    [
        pytest.param("calibration/train.py", put_behind("# why"), (), id="a comment"),
        pytest.param("models/mobilevit.py", put_for('"""', '"""Anew: '), (), id="a docstring"),
        pytest.param(
            "pipeline/stages.py", put_for("-> Export:\n", '-> Export:\n    """Anew."""\n'), (), id="a first docstring"
        ),
        pytest.param("calibration/train.py", STATEMENT, STAGES, id="the training"),
        pytest.param("calibration/preprocess.py", STATEMENT, STAGES, id="the preprocessing"),
        pytest.param("models/mobilevit.py", STATEMENT, STAGES, id="the network"),
        pytest.param("models/convmixer.py", STATEMENT, (), id="another network"),
        pytest.param("models/catalog.py", STATEMENT, (), id="the catalog"),
        pytest.param("calibration/quantizer.py", STATEMENT, STAGES[1:], id="the quantizer"),
        pytest.param("pipeline/export.py", STATEMENT, STAGES[2:], id="the export"),
        # The export imports targets/onnxruntime.py, and that one _onnx.py inside a function.
        pytest.param("targets/_onnx.py", STATEMENT, STAGES[2:], id="a helper imported in a function"),
        pytest.param("targets/cpu.py", STATEMENT, STAGES[3:], id="the target"),
        pytest.param("targets/coreml.py", STATEMENT, (), id="another target"),
        pytest.param("pipeline/verify.py", STATEMENT, STAGES[4:], id="the verification"),
        pytest.param("pipeline/dashboard.py", STATEMENT, (), id="what no stage uses"),
        # All stages stand in one file, each with code of its own.
        pytest.param("pipeline/stages.py", put_for("_IMAGES = 16", "_IMAGES = 8"), STAGES[2:], id="a stage's constant"),
        pytest.param("pipeline/stages.py", put_for('"test_top1": top1(', '"top1": top1('), STAGES, id="its helper"),
        pytest.param(
            "pipeline/stages.py", put_for("os.link(", "os.symlink("), STAGES[4:], id="the last stage's helper"
        ),
    ],
)
def test_the_code_of_a_stage_is_part_of_its_key(
    source: Path, keys_before: dict[str, str], file: str, edit: Callable[[str], str], expected: tuple[str, ...]
) -> None:
    path = source / file
    text = path.read_text()
    path.write_text(edit(text))
    try:
        after = keys_of_source(source)
    finally:
        path.write_text(text)
    assert tuple(stage for stage in STAGES if keys_before[stage] != after[stage]) == expected


def test_code_is_imported_from_where_it_stands() -> None:
    """Digests do not follow what a package re-exports: a stage would not see that it has changed."""
    for file in (
        file for layer in ("pipeline", "targets", "calibration", "models") for file in (ROOT / layer).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.ImportFrom) and node.module and (ROOT / node.module.replace(".", "/")).is_dir():
                parts = [ROOT / node.module.replace(".", "/") / f"{alias.name}.py" for alias in node.names]
                assert file.name == "__init__.py" or all(part.is_file() for part in parts), (
                    f"{file}: {ast.unparse(node)}"
                )


# --- Descriptions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Described:
    size: int
    note: str = field(default="", compare=False)


@pytest.mark.parametrize("value", [Path("somewhere"), {1: "one"}, {"a": {2, 3}}, len, b"bytes", Described], ids=repr)
def test_a_key_refuses_what_it_cannot_describe(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be part of an artifact key; use numbers, strings"):
        plain({"value": value})


def test_what_two_objects_are_not_compared_by_is_not_part_of_a_key() -> None:
    assert plain(Described(size=1, note="one")) == plain(Described(size=1)) != plain(Described(size=2))


def test_different_kinds_of_the_same_values_have_different_keys() -> None:
    assert plain(Float(name="fp32", precision="fp32")) != plain({"name": "fp32", "precision": "fp32"})
    assert toy(value=1).key != toy(value="1").key != toy(value=True).key


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)


def reversed_order(value: object) -> object:
    if isinstance(value, dict):
        return {name: reversed_order(value[name]) for name in reversed(value)}
    if isinstance(value, list):
        return [reversed_order(item) for item in value]
    return value


@settings(deadline=None)
@given(value=values)
def test_the_order_in_which_something_is_described_does_not_matter(value: object) -> None:
    assert plain(reversed_order(value)) == plain(value) == value
    assert toy(value=reversed_order(value)).key == toy(value=value).key


@settings(deadline=None)
@given(value=values, other=values)
def test_different_descriptions_have_different_keys(value: object, other: object) -> None:
    same = json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (toy(value=value).key == toy(value=other).key) is same


# --- Building -------------------------------------------------------------------------------------------------------


def test_a_second_call_builds_nothing(tmp_path: Path) -> None:
    first = Store(tmp_path).get(toy())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = Store(tmp_path).get(toy())
    assert (first.cached, again.cached) == (False, True)
    assert again.path == first.path
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_inputs_are_built_first_and_only_where_they_are_needed(tmp_path: Path) -> None:
    first, second = toy(label="first"), toy(label="second")
    last = toy(label="last", inputs={"b": second, "a": first})
    store = Store(tmp_path)
    assert (store.get(last).path / "whole").read_text() == "a b"
    shutil.rmtree(store.path(first))
    assert store.get(last).cached
    assert not store.has(first)


def test_the_chain_names_each_step_once_inputs_first() -> None:
    first = toy(label="first")
    second = toy(label="second", inputs={"first": first})
    last = toy(label="last", inputs={"first": toy(label="first"), "second": second})
    assert [step.label for step in last.chain()] == ["first", "second", "last"]


def test_the_manifest_tells_what_went_in_and_the_digest_of_every_file(tmp_path: Path) -> None:
    step = toy(inputs={"source": toy(label="source")}, samples=7)
    artifact = Store(tmp_path).get(step)
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    assert (
        manifest["key"]
        == step.key
        == hashlib.sha256(json.dumps(manifest["ingredients"], sort_keys=True).encode()).hexdigest()
    )
    assert manifest["ingredients"]["params"] == {"samples": 7}
    assert manifest["ingredients"]["inputs"] == {"source": step.inputs["source"].key}
    assert manifest["files"] == {
        name: hashlib.sha256((artifact.path / name).read_bytes()).hexdigest() for name in ("folder/half", "whole")
    }
    assert artifact.files() == {"folder/half": 5, "whole": 6}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failed_build_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    def explode(inputs: Mapping[str, Path], out: Path) -> None:
        write(inputs, out)
        raise failure("boom")

    with pytest.raises(failure, match="boom"):
        Store(tmp_path).get(toy(explode))
    assert left(tmp_path) == ["toys"]
    assert not Store(tmp_path).has(toy(explode))


def test_what_a_build_can_go_on_from_outlives_its_failure_and_goes_when_it_is_published(tmp_path: Path) -> None:
    found: list[bool] = []

    def build(inputs: Mapping[str, Path], out: Path) -> None:
        note = resumable(out) / "note"
        found.append(note.exists())
        note.parent.mkdir(exist_ok=True)
        note.write_text("half")
        if len(found) == 1:
            raise KeyboardInterrupt

    store, other = Store(tmp_path), toy(build, seed=1)
    with pytest.raises(KeyboardInterrupt):
        store.get(toy(build))
    artifact = store.get(other)  # of the same label: what is left is of one key alone
    assert store.get(toy(build)).files() == {} and artifact.files() == {}
    assert found == [False, False, True]
    assert not [name for name in left(tmp_path) if "resume" in name]


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.get(toy()).path
    (path / MANIFEST).unlink()  # as somebody leaves it who is interrupted while deleting
    assert not store.has(toy())
    assert not store.get(toy()).cached
    assert store.has(toy())


# --- Explanations ---------------------------------------------------------------------------------------------------


def test_explain_names_what_changed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    source = toy(label="source")
    assert store.explain(toy()) == ["it was never built"]
    store.get(toy(inputs={"source": source}, code=("models.errors",), recipe={"epochs": 3, "name": "qat"}))
    later = toy(inputs={"source": toy(label="source", seed=1)}, recipe={"epochs": 5, "name": "qat"})
    assert store.explain(later) == [
        "the code of models.errors changed",
        "its input `source` is another one",
        "recipe.epochs was 3, is 5",
    ]
    store.get(later)
    assert store.explain(later) == ["nothing that it depends on has changed"]


def test_explain_compares_with_the_latest_of_the_same_label(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed in (1, 2):
        path = store.get(toy(seed=seed)).path
        os.utime(path / MANIFEST, (1e9 + seed, 1e9 + seed))
    store.get(toy(label="toy-of-another-name", seed=3))
    assert store.explain(toy(seed=4)) == ["seed was 2, is 4"]


def test_labels_may_hold_what_a_pattern_would_read_as_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.get(toy(label="[cats] *?", seed=1))
    assert store.explain(toy(label="[cats] *?", seed=2)) == ["seed was 1, is 2"]


def test_a_dataset_may_have_any_name() -> None:
    label = stages.weights(tiny_run(data=Colours(name="[my] pictures/\n" + "ü" * 300))).label
    assert label == f"tiny-_my_pictures_{'ü' * 27}-16"


# --- Several processes ----------------------------------------------------------------------------------------------

PROCESS = """
import logging, sys, time
from pathlib import Path
from typing import Any
from pipeline.store import Step, Store

root, log, slow = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")

def build(inputs, out):
    (out / "half").write_text("half")
    with log.open("a") as file:
        file.write("building\\n")
    while slow.exists():
        time.sleep(0.02)
    (out / "half").rename(out / "whole")

artifact = Store(root).get(Step(stage="toys", label="slow", inputs={}, params={}, code=(), build=build))
print(artifact.cached, artifact.path.name, sorted(artifact.files()))
"""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Builders of one artifact, each a process of its own, that take as long as the file `slow` exists."""

    root: Path

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def slow(self) -> Path:
        return self.root / "slow"

    @property
    def store(self) -> Path:
        return self.root / "store"

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(self.store), str(self.log), str(self.slow)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def builds(self) -> int:
        return self.log.read_text().count("building") if self.log.exists() else 0

    def wait_for_build(self, number: int) -> None:
        deadline = time.monotonic() + 20
        while self.builds() < number:
            assert time.monotonic() < deadline, f"build {number} did not begin"
            time.sleep(0.01)


@pytest.fixture
def processes(tmp_path: Path) -> Processes:
    return Processes(root=tmp_path)


def test_four_processes_at_once_build_one_artifact_exactly_once(processes: Processes) -> None:
    processes.slow.touch()
    running = [processes.start() for _ in range(4)]
    processes.wait_for_build(1)
    time.sleep(0.5)  # for the other three to come up to the lock
    processes.slow.unlink()
    answers = [process.communicate(timeout=30) for process in running]
    (name,) = {out.split()[1] for out, _ in answers}
    assert sorted(out.split()[0] for out, _ in answers) == ["False", "True", "True", "True"]
    assert processes.builds() == 1
    assert left(processes.store) == ["toys", f"toys/{name}", f"toys/{name}/{MANIFEST}", f"toys/{name}/whole"]


def test_a_killed_build_publishes_nothing_and_the_next_call_cleans_up(processes: Processes) -> None:
    processes.slow.touch()
    killed = processes.start()
    processes.wait_for_build(1)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.communicate()
    scratch, half = left(processes.store)[1:]
    assert Path(scratch).name.startswith(".building-slow-")
    assert half == f"{scratch}/half"

    processes.slow.unlink()
    out, _ = processes.start().communicate(timeout=30)
    cached, name, files = out.split(maxsplit=2)
    assert (cached, files.strip()) == ("False", "['whole']")
    assert left(processes.store) == ["toys", f"toys/{name}", f"toys/{name}/{MANIFEST}", f"toys/{name}/whole"]


def test_whoever_waits_for_a_killed_build_takes_over(processes: Processes) -> None:
    processes.slow.touch()
    killed = processes.start()
    processes.wait_for_build(1)
    waiting = processes.start()
    assert waiting.stderr is not None
    assert "wait   another process is building" in waiting.stderr.readline()
    killed.kill()
    killed.communicate()
    processes.wait_for_build(2)
    processes.slow.unlink()
    out, _ = waiting.communicate(timeout=30)
    assert out.startswith("False slow-")
    assert processes.builds() == 2
