"""`make multifunction`: the runs that can be merged, and the merged artifact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.errors import BadRequest
from pipeline.cli.main import main
from pipeline.commands import multifunction
from pipeline.run import Run
from pipeline.stages.compiled import compiled as compiled_step
from pipeline.stages.engine import engine as engine_step
from pipeline.store.store import Store
from targets.coreml.options import CoreMLOptions
from targets.coreml.target import PACKAGE
from tests.support.tiny import SIDE, tiny_run

pytestmark = pytest.mark.slow


def runs(*recipes: str, **changes: object) -> list[Run]:
    return [tiny_run(recipe, "coreml", **changes) for recipe in recipes]


def test_functions_are_called_by_recipe_and_size_in_the_order_of_the_request() -> None:
    found = multifunction.named(runs("int8_ptq", "fp16"))
    assert list(found) == [f"int8_ptq_{SIDE}", f"fp16_{SIDE}"]


def test_a_single_function_is_refused_even_if_it_is_requested_twice() -> None:
    with pytest.raises(BadRequest, match=f"fp16_{SIDE} is a single function: give several resolutions in SIZES"):
        multifunction.named(runs("fp16", "fp16"))


def test_a_target_without_functions_is_refused() -> None:
    with pytest.raises(BadRequest, match="TARGET=onnxruntime: engines with several functions are not supported; use"):
        multifunction.named([tiny_run("fp32"), tiny_run("int8_ptq")])


def test_a_system_that_is_too_old_is_refused_before_anything_is_built() -> None:
    with pytest.raises(BadRequest, match="DEPLOYMENT=iOS17"):
        multifunction.named(runs("fp32", "fp16", options=CoreMLOptions(deployment="iOS17")))


def test_a_different_order_is_a_different_artifact() -> None:
    one, other = (
        multifunction.merged(multifunction.named(runs(*order))) for order in (("fp32", "fp16"), ("fp16", "fp32"))
    )
    assert one.key != other.key


def test_the_engines_go_into_one_artifact_with_a_report(shared: Path) -> None:
    store = Store(shared)
    functions = multifunction.named(runs("fp16", "int8_ptq"))
    engines = {name: store.get(engine_step(run)) for name, run in functions.items()}
    artifact = store.get(multifunction.merged(functions))
    report = json.loads((artifact.path / "report.json").read_text())
    assert [(row["function"], row["key"]) for row in report["functions"]] == [
        (name, engine.key) for name, engine in engines.items()
    ]
    assert {name.split("/")[0] for name in artifact.files()} == {PACKAGE, "MODEL_CARD.md", "report.json"}
    size = sum(bytes_ for name, bytes_ in artifact.files().items() if name.startswith(PACKAGE))
    assert report["bytes"] == size < report["bytes_apart"]
    card = (artifact.path / "MODEL_CARD.md").read_text()
    for name, engine in engines.items():
        assert f"| {name} |" in card and engine.key[:12] in card
        assert report["functions"][list(engines).index(name)]["top1"] is not None


def test_an_engine_contains_its_facts_and_its_inputs_are_unchanged(shared: Path) -> None:
    store = Store(shared)
    run = tiny_run("fp16", "coreml")
    compiled = store.get(compiled_step(run))
    manifest = json.loads((compiled.path / "artifact.json").read_text())
    engine = store.get(engine_step(run))
    from pipeline.store.store import file_digest
    from targets.coreml import package as coreml_package

    assert {name: file_digest(compiled.path / name) for name in manifest["files"]} == manifest["files"]
    told = coreml_package.read(engine.path / PACKAGE).spec.description.metadata.userDefined
    assert told["edgeline.key"] == engine.key
    assert json.loads(told["edgeline.top1"]) == json.loads((engine.path / "report.json").read_text())["top1"]
    assert engine.key[:12] in (engine.path / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "fp16 int9"], "RECIPES=int9: no such recipe; "),
        (["--sizes", "64 65"], "SIZES=65: convmixer_mini takes sides from "),
        (["--sizes", "64 1000000"], "SIZES=1000000: convmixer_mini takes sides from "),
        (["--sizes", "64", "--recipe", "fp16"], "fp16_64 is a single function"),
        (["--sizes", "64 128", "--target", "cpu"], "TARGET=cpu: engines with several functions are not"),
        (
            ["--sizes", "64 128", "--deployment", "iOS17", "--recipe", "fp16"],
            "DEPLOYMENT=iOS17: a package with several",
        ),
    ],
)
def test_a_wrong_request_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["multifunction", "--model", "convmixer_mini", "--target", "coreml", "--store", str(tmp_path), *arguments]
    assert main(given) == 2
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["error"].startswith(message)
    assert list(tmp_path.iterdir()) == []
