"""Exports: the files that float recipes share, and the sample in a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.stages.exported import exported as exported_step
from pipeline.store.store import Store
from tests.support.tiny import tiny_run

pytestmark = pytest.mark.slow


def test_both_float_recipes_are_compiled_from_the_same_files(shared: Path) -> None:
    store = Store(shared)
    one, other = (store.get(exported_step(tiny_run(recipe))) for recipe in ("fp32", "fp16"))
    assert one.path == other.path
    assert other.cached


def test_the_sample_in_a_bundle_is_from_the_validation_part(shared: Path) -> None:
    exported = Store(shared).get(exported_step(tiny_run("fp32"))).path
    with np.load(exported / "sample.npz") as sample:
        expected, _ = next(tiny_run().images("val").batches(16))
        np.testing.assert_array_equal(sample["images"], expected.numpy())
        assert sample["logits"].shape == (16, 4)
