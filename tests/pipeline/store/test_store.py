"""Store: ingredients of cache keys, atomic publication, damage, and concurrent builds."""

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

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from calibration.accuracy_budget import Budget
from calibration.recipe import Float, Ptq, budgeted
from models.errors import CannotRunHere
from pipeline.commands.engine import engine as make_engine
from pipeline.commands.verify import verify as make_verify
from pipeline.run import Run
from pipeline.stages.bundle import bundle
from pipeline.stages.engine import engine
from pipeline.stages.exported import exported
from pipeline.stages.quantized import quantized
from pipeline.stages.weights import weights
from pipeline.store import integrity
from pipeline.store.store import MANIFEST, Step, Store, plain, resumable
from targets.base import Bundles
from targets.onnxruntime import OnnxRuntimeTarget
from tests.support.tiny import ROOT, Colours, tiny_run

pytestmark = pytest.mark.slow

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
    return {step.stage: step.key for step in engine(run).chain()}


def changed(before: Run, after: Run) -> list[str]:
    """Return the stages whose keys differ, in order."""
    one, other = keys(before), keys(after)
    assert tuple(one) == tuple(other) == STAGES
    return [stage for stage in STAGES if one[stage] != other[stage]]


def left(root: Path) -> list[str]:
    """Return the files of a store, without locks and records of checks."""
    found = (path for path in root.rglob("*") if not path.name.startswith((".lock-", ".checked-")))
    return sorted(str(path.relative_to(root)) for path in found)


# --- What is part of a key ------------------------------------------------------------------------------------------


def test_the_same_request_has_the_same_keys() -> None:
    assert changed(tiny_run(), tiny_run()) == []


def test_targets_with_the_same_arithmetic_share_training() -> None:
    assert changed(tiny_run(target="cpu"), tiny_run(target="rtx")) == ["compiled", "engine"]
    assert changed(tiny_run(target="cpu"), tiny_run(target="null")) == ["compiled", "engine"]


def test_targets_with_different_arithmetic_do_not_share_training() -> None:
    assert changed(tiny_run(target="cpu"), tiny_run(target="onnxruntime"))[0] == "quantized"
    plainer = OnnxRuntimeTarget(scheme=replace(OnnxRuntimeTarget().scheme, per_channel_weights=False))
    assert changed(tiny_run(), tiny_run(target=plainer)) == ["quantized", "exported", "compiled", "engine"]
    assert changed(tiny_run("fp32"), tiny_run("fp32", target=plainer)) == []


def test_both_float_recipes_share_one_export() -> None:
    assert changed(tiny_run("fp32"), tiny_run("fp16")) == ["compiled", "engine"]
    assert exported(tiny_run("fp32")).label == exported(tiny_run("fp16")).label


def test_a_different_recipe_rebuilds_from_quantization_on() -> None:
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
def test_a_change_rebuilds_only_dependent_stages(changes: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert changed(tiny_run(), tiny_run(**changes)) == list(expected)


def test_a_budget_that_may_keep_modules_in_float_quantizes_again() -> None:
    run = tiny_run()
    assert changed(run, replace(run, recipe=budgeted(run.recipe, Budget(value=0.5)))) == list(STAGES[1:])


def test_a_changed_published_figure_rebuilds_only_engines_that_contain_it() -> None:
    model = tiny_run().model
    corrected = replace(model, top1=71.0, source="an erratum")
    assert changed(tiny_run(target="coreml"), tiny_run(target="coreml", model=corrected)) == ["engine"]


def test_a_weights_file_is_identified_by_its_content_and_not_its_path(tmp_path: Path) -> None:
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
def test_a_different_version_of_a_tool_rebuilds_its_artifacts(
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
from calibration.data.digits import Digits
from models.errors import CannotRunHere
from pipeline.run import Run
from pipeline.stages.engine import engine
run = Run(model=models.ALL["mobilevit_xs"], recipe=calibration.recipe.ALL["int8_qat"],
          target=targets.ALL["cpu"], data=Digits(), preprocess=models.ALL["mobilevit_xs"].preprocess)
print(json.dumps({step.stage: step.key for step in engine(run).chain()}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the sources, to be edited."""
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
        pytest.param("calibration/training/fit.py", put_behind("# why"), (), id="a comment"),
        pytest.param("models/mobilevit.py", put_for('"""', '"""Anew: '), (), id="a docstring"),
        pytest.param(
            "pipeline/stages/weights.py",
            put_for("-> None:\n    from", '-> None:\n    """Anew."""\n    from'),
            (),
            id="a first docstring",
        ),
        pytest.param("calibration/training/fit.py", STATEMENT, STAGES, id="the training"),
        pytest.param("calibration/data/preprocess.py", STATEMENT, STAGES, id="the preprocessing"),
        pytest.param("models/mobilevit.py", STATEMENT, STAGES, id="the network"),
        pytest.param("models/convmixer.py", STATEMENT, (), id="another network"),
        pytest.param("models/catalog.py", STATEMENT, (), id="the catalog"),
        pytest.param("calibration/quantizer/quantizer.py", STATEMENT, STAGES[1:], id="the quantizer"),
        pytest.param("calibration/data/image_decoding.py", STATEMENT, STAGES, id="the decoding of images"),
        pytest.param("pipeline/run.py", STATEMENT, STAGES, id="the run"),
        pytest.param("pipeline/stages/onnx_export.py", STATEMENT, STAGES[2:], id="the export"),
        # The export imports targets/onnx/fp16_ranges.py, and that one onnx/graph.py inside a function.
        pytest.param("targets/onnx/graph.py", STATEMENT, STAGES[2:], id="a helper imported in a function"),
        pytest.param("targets/openvino/target.py", STATEMENT, STAGES[3:], id="the target"),
        pytest.param("targets/coreml/target.py", STATEMENT, (), id="another target"),
        pytest.param("pipeline/stages/verify.py", STATEMENT, STAGES[4:], id="the verification"),
        pytest.param("pipeline/reports/dashboard.py", STATEMENT, (), id="what no stage uses"),
        *(
            pytest.param(f"pipeline/stages/{stage}.py", STATEMENT, STAGES[place:], id=f"the file of the stage {stage}")
            for place, stage in enumerate(STAGES)
        ),
        pytest.param(
            "pipeline/stages/exported.py", put_for("_IMAGES = 16", "_IMAGES = 8"), STAGES[2:], id="a stage's constant"
        ),
        pytest.param(
            "pipeline/stages/common.py",
            put_for("importlib.metadata.version(package)", "package"),
            STAGES,
            id="a shared helper",
        ),
        pytest.param(
            "pipeline/stages/engine.py", put_for("os.link(", "os.symlink("), STAGES[4:], id="the last stage's helper"
        ),
        pytest.param("pipeline/stages/bundle.py", STATEMENT, (), id="a stage that makes no engine"),
        pytest.param("pipeline/commands/engine.py", STATEMENT, (), id="the command"),
        pytest.param("targets/base.py", STATEMENT, STAGES, id="the interface of targets, of which a run has defaults"),
        # targets/base.py imports it for type checkers, and the target because it runs.
        pytest.param("calibration/family_placements.py", STATEMENT, STAGES[3:], id="a module imported for types"),
        # It refuses a network or lets it pass; it leaves nothing in an artifact.
        pytest.param("pipeline/stages/validate_model.py", STATEMENT, (), id="the validation of a network"),
        pytest.param("models/hub.py", STATEMENT, STAGES, id="the origin of published weights"),
        pytest.param(
            "pipeline/stages/provenance.py", STATEMENT, STAGES[4:], id="the provenance, which an engine publishes"
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


NETWORK = models.ALL["mobilevit_xs"]  # the module of the tiny network imports the whole pipeline


def test_no_stage_has_the_file_of_a_later_one_in_its_key() -> None:
    for step in engine(tiny_run(target="cpu", model=NETWORK)).chain():
        later = STAGES[STAGES.index(step.stage) + 1 :]
        assert not code_of(step) & {f"pipeline.stages.{stage}" for stage in later}, step.stage
        assert f"pipeline.stages.{step.stage}" in code_of(step)


# Modules that a stage imports and its key lacks, since they do not affect the artifact. The file of a stage is digested
# without its imports.
UNTRACKED = {"pipeline.store.store", "pipeline.stages.validate_model"}
# Imported to choose between stages, and for parameters, which are in the key.
UNBUILT = {"engine": {"pipeline.stages.bundle"}, "bundle": {"pipeline.stages.compiled"}}


@pytest.mark.parametrize("target", ["cpu", "coreml", "nvidia"])
def test_the_imports_of_a_stage_are_in_its_key_or_in_that_of_an_input(target: str) -> None:
    run = tiny_run(target=target, model=NETWORK)
    for step in (bundle(run) if isinstance(run.target, Bundles) else engine(run)).chain():
        known = set().union(*(code_of(needed) for needed in step.chain()))
        assert imported_by(f"pipeline/stages/{step.stage}.py") - known <= UNTRACKED | UNBUILT.get(step.stage, set())


def code_of(step: Step) -> set[str]:
    code = step.ingredients["code"]
    assert isinstance(code, dict)
    return set(code)


def imported_by(file: str) -> set[str]:
    """Return the project's modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if (ROOT / (name.replace(".", "/") + ".py")).is_file()}


def test_code_is_imported_from_the_defining_module() -> None:
    """Digests do not follow re-exports of packages: a change would not rebuild the stage."""
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
def test_a_key_refuses_types_without_a_description(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be part of an artifact key; use numbers, strings"):
        plain({"value": value})


def test_fields_that_are_not_compared_are_not_part_of_a_key() -> None:
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
def test_the_order_of_a_description_does_not_matter(value: object) -> None:
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


def test_the_manifest_has_the_ingredients_and_the_digest_of_every_file(tmp_path: Path) -> None:
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


def test_resumable_state_outlives_a_failed_build_and_is_removed_on_publication(tmp_path: Path) -> None:
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
    artifact = store.get(other)  # of the same label: the remains belong to a single key
    assert store.get(toy(build)).files() == {} and artifact.files() == {}
    assert found == [False, False, True]
    assert not [name for name in left(tmp_path) if "resume" in name]


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.get(toy()).path
    (path / MANIFEST).unlink()  # as after an interrupted deletion
    assert not store.has(toy())
    assert not store.get(toy()).cached
    assert store.has(toy())


# --- Damage ---------------------------------------------------------------------------------------------------------


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flipped_in_secret(file: Path) -> None:
    """Flip a bit, and restore size and mtime."""
    before = file.stat()
    flipped(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(file: Path) -> None:
    """Replace a file by a different file of the same size and mtime."""
    before, other = file.stat(), file.with_name("other")
    other.write_bytes(file.read_bytes())
    flipped(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def linked(file: Path) -> None:
    copy = file.parent.parent.parent / "copy"
    file.replace(copy)
    file.symlink_to(copy)


def made_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = (flipped, flipped_in_secret, replaced, truncated, emptied, Path.unlink, linked, made_a_folder)


@pytest.mark.parametrize("damaged", DAMAGES)
def test_no_damage_to_a_file_of_a_run_is_silent(shared: Path, tmp_path: Path, damaged: Callable[[Path], None]) -> None:
    """Each file of each stage, about 20, is damaged in the way of the parameter."""
    step = engine(tiny_run())
    Store(shared).get(step)
    seen = 0
    for needed in step.chain():
        source, store = Store(shared).path(needed), Store(tmp_path)
        path = store.path(needed)
        for file in [path / found.relative_to(source) for found in source.rglob("*") if found.is_file()]:
            shutil.copytree(source, path)
            assert store.has(needed)  # and its metadata is recorded
            damaged(file)
            found = store.damage(needed)
            assert found is not None and not store.has(needed)
            assert found.file == str(file.relative_to(path))
            assert found.expected != found.found
            shutil.rmtree(path)
            seen += 1
    assert seen >= 20


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.get(toy()).path
    for file in (path / MANIFEST, path / "whole", path / "folder" / "half"):
        content = file.read_bytes()
        for bit in range(0, 8 * len(content), 61):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            assert not store.has(toy()), (file.name, bit)
        file.write_bytes(content)
        assert store.has(toy())


def test_a_file_that_is_not_the_artifacts_is_damage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.get(toy()).path
    (path / "folder" / "more").write_text("12345")
    assert str(store.damage(toy())) == "folder/more: expected no such file, found a file of 5 bytes"


def test_a_manifest_with_a_different_key_is_damage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one, other = toy(seed=1), toy(seed=2)
    shutil.copytree(store.get(one).path, store.path(other))
    assert str(store.damage(other)) == f"{MANIFEST}: expected key {other.key}, found key {one.key}"


def test_damage_is_reported_quarantined_and_repaired(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    path = store.get(toy()).path
    good = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != MANIFEST}
    flipped_in_secret(path / "folder" / "half")
    bad = (path / "folder" / "half").read_bytes()
    digests = [hashlib.sha256(content).hexdigest() for content in (good[path / "folder" / "half"], bad)]
    why = f"folder/half: expected {digests[0]}, found {digests[1]} (5 bytes); "
    assert store.explain(toy())[0].startswith(f"damaged: {why}")

    with caplog.at_level("INFO"):
        assert not store.get(toy()).cached
    (kept,) = (tmp_path / "quarantine" / "toys").iterdir()
    assert (kept / "folder" / "half").read_bytes() == bad
    assert {file: file.read_bytes() for file in good} == good
    said = caplog.messages
    assert said[0] == (f"toys       damaged {path}: {why}moved to {kept}")
    assert said[-1] == "toys       restored: every file is as it was published before"
    assert store.get(toy()).cached


def test_a_rebuilt_artifact_that_differs_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def build(inputs: Mapping[str, Path], out: Path) -> None:
        (out / "same").touch()
        (out / "now").write_text(str(time.monotonic_ns()))

    store = Store(tmp_path)
    flipped(store.get(toy(build)).path / "now")
    with caplog.at_level("INFO"):
        store.get(toy(build))
    assert caplog.messages[-1] == "toys       differs from what was published before in now"


def test_a_damaged_input_is_rebuilt_before_it_is_used(tmp_path: Path) -> None:
    source = toy(label="source")

    def copy(inputs: Mapping[str, Path], out: Path) -> None:
        (out / "copy").write_bytes((inputs["source"] / "folder" / "half").read_bytes())

    store = Store(tmp_path)
    flipped_in_secret(store.get(source).path / "folder" / "half")
    assert (store.get(toy(copy, inputs={"source": source})).path / "copy").read_bytes() == b"first"
    assert store.has(source)


def test_an_input_that_changes_while_it_is_used_is_rebuilt_and_used_again(tmp_path: Path) -> None:
    source, store, seen = toy(label="source", inputs={"a": toy(label="first")}), Store(tmp_path), list[str]()

    def build(inputs: Mapping[str, Path], out: Path) -> None:
        if not seen:
            flipped_in_secret(inputs["source"] / "whole")
        seen.append((inputs["source"] / "whole").read_text())
        (out / "copy").write_text(seen[-1])

    last = toy(build, label="last", inputs={"source": source})
    assert (store.get(last).path / "copy").read_text() == "a"
    assert len(seen) == 2 and seen[0] != "a"


def test_a_disk_that_keeps_changing_inputs_is_given_up(tmp_path: Path) -> None:
    source = toy(label="source", inputs={"a": toy(label="first")})

    def build(inputs: Mapping[str, Path], out: Path) -> None:
        flipped_in_secret(inputs["source"] / "whole")
        raise RuntimeError("what a library says of a damaged file")

    last = toy(build, label="last", inputs={"source": source})
    with pytest.raises(CannotRunHere, match=r"the inputs of .*last-.* changed on disk 3 times while it was built; "):
        Store(tmp_path).get(last)
    assert not Store(tmp_path).has(last)


def test_an_artifact_is_hashed_once_and_then_checked_by_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = Store(tmp_path), list[str]()
    store.get(toy())
    digest = integrity.file_digest

    def noted(path: Path) -> str:
        read.append(path.name)
        return digest(path)

    monkeypatch.setattr(integrity, "file_digest", noted)
    assert store.has(toy()) and read == []  # the publication has recorded it
    os.utime(store.path(toy()) / "whole")
    assert store.has(toy()) and sorted(read) == ["half", "whole"]
    assert store.has(toy()) and len(read) == 2
    record = json.loads(store.record(toy()).read_text())
    store.record(toy()).write_text(json.dumps(record | {"boot": "an earlier one"}))  # the machine was started again
    assert store.has(toy()) and len(read) == 4
    store.record(toy()).write_text("{")
    assert store.has(toy()) and len(read) == 6
    assert store.has(toy()) and len(read) == 6


def test_hard_links_to_an_artifact_are_no_damage(shared: Path) -> None:
    """An engine's files are hard links to those that were compiled: a new link changes the ctime of both."""
    store, step = Store(shared), engine(tiny_run())
    store.get(step)
    assert all(store.has(needed) for needed in step.chain())


def test_a_damaged_input_is_not_used_for_a_different_recipe(shared: Path, tmp_path: Path) -> None:
    before, after = (quantized(tiny_run(recipe)) for recipe in ("fp32", "int8_ptq"))
    good = Store(shared).get(after)
    for step in before.chain():
        shutil.copytree(Store(shared).get(step).path, Store(tmp_path).path(step))
    source = before.inputs["weights"]
    flipped_in_secret(Store(tmp_path).path(source) / "weights.safetensors")
    found = Store(tmp_path).get(after)
    assert found.key == good.key
    assert np.array_equal(*(np.load(artifact.path / "test.npz")["logits"] for artifact in (good, found)))
    assert (Store(tmp_path).path(source) / "weights.safetensors").read_bytes() == (
        Store(shared).path(source) / "weights.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("verb", [make_engine, make_verify])
def test_a_command_rebuilds_the_damaged_stage(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, verb: Callable[[Run, Path], dict[str, object]]
) -> None:
    """Also if the engine itself is undamaged."""
    run, store = tiny_run(), Store(tmp_path)
    chain = list(engine(run).chain())
    Store(shared).get(chain[-1])
    for step in chain:
        shutil.copytree(Store(shared).path(step), store.path(step))
    before = {step.stage: integrity.manifest_of(store.path(step)) for step in chain}
    for step in chain:
        flipped_in_secret(max(store.path(step).rglob("*.*"), key=lambda file: file.stat().st_size))
    with caplog.at_level("INFO"):
        assert verb(run, tmp_path)["key"] == chain[-1].key
    assert [line.split()[0] for line in caplog.messages if " damaged " in line] == [step.stage for step in chain]
    assert not [line for line in caplog.messages if " hit " in line]
    after = {step.stage: integrity.manifest_of(store.path(step)) for step in chain}
    for stage, manifest in before.items():
        found = after[stage]
        assert manifest is not None and found is not None
        same = {name for name in manifest["files"] if manifest["files"][name] == found["files"][name]}
        assert set(manifest["files"]) - same <= TIMED.get(stage, set())


# Files with durations or times of creation.
TIMED: dict[str, set[str]] = {"weights": {"report.json"}, "quantized": {"report.json"}, "engine": {"report.json"}}


def test_processes_that_find_the_same_damage_rebuild_once(processes: Processes) -> None:
    out, _ = processes.start().communicate(timeout=30)
    path = processes.store / "toys" / out.split()[1]
    flipped_in_secret(path / "whole")
    running = [processes.start() for _ in range(4)]
    answers = [process.communicate(timeout=30) for process in running]
    assert sorted(out.split()[0] for out, _ in answers) == ["False", "True", "True", "True"]
    assert sum(said.count("damaged") for _, said in answers) == 1
    assert len(list((processes.store / "quarantine" / "toys").iterdir())) == 1
    assert processes.builds() == 2


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_modes_are_those_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    def build(inputs: Mapping[str, Path], out: Path) -> None:
        (out / "folder").mkdir(mode=0o700)
        for name, mode in {"private": 0o600, "folder/open": 0o666, "folder/program": 0o700}.items():
            (out / name).touch()
            (out / name).chmod(mode)

    before = os.umask(umask)
    try:
        path = Store(tmp_path).get(toy(build)).path
    finally:
        os.umask(before)
    modes = {str(file.relative_to(path)): file.stat().st_mode & 0o777 for file in path.rglob("*")}
    assert modes == {
        "folder": 0o777 & ~umask,
        "private": 0o666 & ~umask,
        "folder/open": 0o666 & ~umask,
        "folder/program": 0o777 & ~umask,
        MANIFEST: 0o666 & ~umask,
    }


# --- Explanations ---------------------------------------------------------------------------------------------------


def test_explain_names_the_changed_ingredients(tmp_path: Path) -> None:
    store = Store(tmp_path)
    source = toy(label="source")
    assert store.explain(toy()) == ["it was never built"]
    store.get(toy(inputs={"source": source}, code=("models.errors",), recipe={"epochs": 3, "name": "qat"}))
    later = toy(inputs={"source": toy(label="source", seed=1)}, recipe={"epochs": 5, "name": "qat"})
    assert store.explain(later) == [
        "the code of models.errors changed",
        "input `source` changed",
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


def test_labels_may_hold_pattern_characters(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.get(toy(label="[cats] *?", seed=1))
    assert store.explain(toy(label="[cats] *?", seed=2)) == ["seed was 1, is 2"]


def test_a_dataset_may_have_any_name() -> None:
    label = weights(tiny_run(data=Colours(name="[my] pictures/\n" + "ü" * 300))).label
    assert label == f"tiny-_my_pictures_{'ü' * 27}-16"


# --- Several processes ----------------------------------------------------------------------------------------------

PROCESS = """
import logging, sys, time
from pathlib import Path
from typing import Any
from pipeline.store.store import Step, Store

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
    """Processes that build the same artifact while the file `slow` exists."""

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


def test_a_process_that_waits_for_a_killed_build_takes_over(processes: Processes) -> None:
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
