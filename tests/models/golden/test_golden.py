"""Reference logits: each model, loaded from a checkpoint in the authors' format, has the logits of the authors' code.

The checkpoint is filled by a fixed rule (`tests/models/golden/rule.py`); of the reference only its keys, their shapes
and its logits are kept (made by `tests/models/golden/make.py`).
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from models import checkpoint
from models.errors import BadRequest
from tests.models.golden.references import ALL
from tests.models.golden.rule import CLASSES, Reference, fill, filled, image, load

FILE = Path("w.pt")
RELATIVE = 1e-4

# Networks without memory behind their weights take none in.
pytestmark = pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
every_reference = pytest.mark.parametrize("reference", ALL.values(), ids=ALL)


@functools.cache
def shapes(reference: Reference) -> dict[str, tuple[int, ...]]:
    return load(reference)[0]


def empty(reference: Reference) -> dict[str, Tensor]:
    """Return the keys and shapes of the reference's checkpoint without values."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes(reference).items()}


@every_reference
def test_a_checkpoint_in_the_format_of_the_reference_gives_its_logits(reference: Reference) -> None:
    spec = models.ALL[reference.model]
    keys, expected = load(reference)
    model = spec.build(CLASSES)
    assert checkpoint.load_into(model, filled(keys), FILE, formats=spec.formats, head=spec.head()) == ()
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(image(reference.size)))[0].numpy()
    assert np.abs(expected).max() > 0.1 and np.std(expected) > 0.05  # logits that say something
    assert np.abs(found - expected).max() <= RELATIVE * np.abs(expected).max()


@every_reference
def test_the_format_is_recognised(reference: Reference) -> None:
    found = checkpoint.recognised(empty(reference), models.ALL[reference.model].formats)
    assert (found.name if found else None) == reference.format


@every_reference
def test_a_missing_key_is_an_error_that_names_it(reference: Reference) -> None:
    spec = models.ALL[reference.model]
    state = empty(reference)
    lost = next(name for name in reversed(state) if name.endswith("weight"))
    del state[lost]
    found = checkpoint.recognised(state, spec.formats)
    with torch.device("meta"):
        model = spec.build(CLASSES)
    with pytest.raises(BadRequest, match=f"it lacks {re.escape(found.renamed(lost) if found else lost)}[,;]"):
        checkpoint.load_into(model, state, FILE, formats=spec.formats, head=spec.head())


@every_reference
def test_an_extra_key_is_an_error_that_names_it(reference: Reference) -> None:
    spec = models.ALL[reference.model]
    with torch.device("meta"):
        model = spec.build(CLASSES)
    with pytest.raises(BadRequest, match=re.escape("it has unknown extra_block.weight")):
        checkpoint.load_into(
            model, empty(reference) | {"extra_block.weight": torch.zeros(3)}, FILE, formats=spec.formats
        )


@every_reference
def test_a_key_with_a_different_shape_is_an_error_that_names_it(reference: Reference) -> None:
    spec = models.ALL[reference.model]
    with torch.device("meta"):
        model = spec.build(CLASSES)
    state = empty(reference)
    bent = next(name for name, tensor in state.items() if tensor.ndim == 4)
    state[bent] = torch.zeros(()).expand((*state[bent].shape[:-1], state[bent].shape[-1] + 2))
    with pytest.raises(BadRequest, match=re.escape(f"`{bent}` has shape")):
        checkpoint.load_into(model, state, FILE, formats=spec.formats, head=spec.head())


@every_reference
def test_a_different_number_of_classes_leaves_only_the_head_to_train(reference: Reference) -> None:
    spec = models.ALL[reference.model]
    with torch.device("meta"):
        model = spec.build(7)
    fresh = checkpoint.load_into(model, empty(reference), FILE, formats=spec.formats, head=spec.head())
    assert set(fresh) == spec.head()


def test_the_rule_depends_on_name_and_shape_alone_and_never_changes() -> None:
    assert np.array_equal(fill("a.weight", (4, 3)), fill("a.weight", (4, 3)))
    assert not np.array_equal(fill("a.weight", (4, 3)), fill("b.weight", (4, 3)))
    expected = [[-0.754861, 0.374194], [0.721680, 0.290582]]
    np.testing.assert_allclose(fill("stem.conv.weight", (2, 2)), expected, atol=1e-6)
    noise = fill("x.weight", (1000, 300))
    assert noise.std() == pytest.approx(300**-0.5, rel=0.01) and abs(noise.mean()) < 1e-3
