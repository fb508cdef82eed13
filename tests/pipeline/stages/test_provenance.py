"""Provenance of an engine: paper, origin of the weights, and published accuracy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import models
from pipeline.stages.provenance import facts, paper, version
from targets.base import Accuracy
from tests.support.tiny import SPEC, tiny_run

ACCURACY = Accuracy(executed=True, why_not=None, by="cpu", top1=1.0, float_top1=1.0, images=100)
FAMILIES = {spec.family: spec for spec in models.ALL.values()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_cites_its_paper(family: str) -> None:
    found = paper(FAMILIES[family])
    assert found is not None
    assert re.fullmatch(r'[A-Z].+, ".+",.* arXiv \d{4}\.\d{5}', found)


def test_a_network_that_cites_nothing_has_no_paper() -> None:
    assert paper(SPEC) is None


def test_the_origin_of_weights_is_described(tmp_path: Path) -> None:
    def weights(**changes: object) -> str:
        return facts(tiny_run(**changes), "k", ACCURACY).weights  # type: ignore[arg-type]

    assert weights() == "trained on colours"
    assert weights(weights=tmp_path / "mine.pt") == "read from mine.pt"
    assert weights(trained=False) == "random: to be timed, not to be used"


def test_facts_are_those_of_the_run() -> None:
    found = facts(tiny_run("fp16"), "key", ACCURACY)
    assert (found.key, found.recipe, found.model, found.data) == ("key", "fp16", "tiny", "colours")
    assert found.published is None and found.accuracy == ACCURACY
    assert re.fullmatch(r"\d+\.\d+\.\d+", found.version) and found.version == version()
    published = facts(tiny_run(model=models.ALL["mobilevit_xs"]), "key", ACCURACY).published
    assert published == "74.62 % top-1 on ImageNet-1k (timm results-imagenet.csv, cvnets_in1k weights)"
