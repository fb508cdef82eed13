"""`make zoo`: it builds the given models, reports each result, and does not build twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import models
import targets
from models.errors import CheckFailed
from pipeline.commands import zoo
from pipeline.commands.zoo import zoo as make_zoo
from tests.support.tiny import SPEC, python

pytestmark = pytest.mark.slow

ready = pytest.mark.skipif(
    any(targets.ALL[name].missing() for name in zoo.TARGETS),
    reason="; ".join(str(targets.ALL[name].missing()) for name in zoo.TARGETS),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoo")
    (path / "zoo").mkdir()
    return path


@pytest.fixture(scope="module")
def rows(root: Path) -> list[zoo.Row]:
    return zoo.rows_of(SPEC, root)


@ready
def test_a_model_is_built_for_every_target_and_recipe(rows: list[zoo.Row]) -> None:
    assert [(row.recipe, row.target) for row in rows] == [(r, t) for r in zoo.RECIPES for t in zoo.TARGETS]
    for row in rows:
        assert row.status == zoo.BUILT
        assert row.rank == 4 and row.nodes is not None and row.nodes > 5
        assert row.bytes is not None and row.bytes > 1000
        assert row.seconds is not None and row.seconds > 0
        assert 0.1 < row.peak_gib < 20
    fp16, int8 = rows[0], rows[2]
    assert int8.nodes is not None and fp16.nodes is not None and int8.nodes > fp16.nodes  # quantizers


@ready
def test_built_models_are_reported_again_without_building(
    rows: list[zoo.Row], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "_row", None)  # would be called
    assert zoo.rows_of(SPEC, root) == rows
    other = replace(SPEC, preprocess=replace(SPEC.preprocess, size=24))
    with pytest.raises(TypeError):
        zoo.rows_of(other, root)


@ready
def test_a_model_that_cannot_be_built_is_a_row_with_the_reason_and_is_tried_again(root: Path) -> None:
    refused = replace(SPEC, name="vast", network=f"{__name__}:vast")
    rows = zoo.rows_of(refused, root)
    assert len(rows) == 4
    assert all("cannot convert" in row.status and row.nodes is None for row in rows)
    assert not (root / "zoo" / "vast.json").exists()


def vast(classes: int) -> object:
    """A network with an operator that ONNX does not have."""
    from torch import Tensor, nn

    class Vast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.head = nn.Linear(8, classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).flatten(2).median(2)[0])  # type: ignore[no-any-return]

    return Vast()


def test_the_zoo_has_the_published_models_that_fit_an_edge_device() -> None:
    names = [spec.name for spec in zoo.default_models()]
    assert "mobilevit_xs" in names and "convmixer_1536_20" in names
    assert not any(name.endswith("_mini") for name in names)
    assert {spec.family for spec in models.ALL.values()} == {spec.family for spec in zoo.default_models()}
    assert all(models.ALL[name].parameters <= 60e6 for name in names)


def test_a_process_that_dies_is_a_row_too(tmp_path: Path) -> None:
    with pytest.raises(
        CheckFailed, match=r"^1 of 1 were not built; the first: nobody: it failed; .*nobody\.log"
    ) as told:
        make_zoo([replace(SPEC, name="nobody")], tmp_path)
    rows = told.value.answer["rows"]
    assert isinstance(rows, list) and [(row["target"], row["bytes"]) for row in rows] == [("all", None)]
    assert (tmp_path / "zoo" / "nobody.log").read_text()
    assert "| nobody | all |" in (tmp_path / "zoo" / "zoo.md").read_text()


def test_an_unknown_name_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    found = python("-m", "pipeline", "zoo", "--models", "swin_tiny mobilevit_xt", "--store", str(tmp_path))
    assert found.returncode == 2
    error = json.loads(found.stdout.splitlines()[-1])["error"]
    assert error.startswith("MODELS=mobilevit_xt: no such model; did you mean mobilevit_xs?")
    assert list(tmp_path.iterdir()) == []
