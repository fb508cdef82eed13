"""Errors of coremltools: one sentence with the operator and its line; errors of others pass unchanged."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.errors import BadRequest, CheckFailed
from targets.coreml.conversion.converter_errors import explained
from tests.support.packages import exported, package_of


class Unsupported(nn.Module):
    """An operator that coremltools has no converter for."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.special.bessel_j0(x)  # the faulty line
        return result


def test_an_operator_without_a_converter_is_named_with_its_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = exported(Unsupported())
    with pytest.raises(CheckFailed) as failed, explained():
        package_of(program, tmp_path / "model.mlpackage", half=False)
    said = str(failed.value)
    lines = Path(__file__).read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "# the faulty line" in text)
    assert said.startswith("TARGET=coreml: coremltools ") and "\n" not in said
    assert (
        f"cannot convert `special_bessel_j0` at tests/targets/coreml/conversion/test_converter_errors.py:{line}:"
        in said
    )
    assert not [record for record in caplog.records if "ERROR - converting" in record.getMessage()]


@pytest.mark.parametrize("error", [BadRequest("of ours"), OSError(28, "No space left on device")])
def test_errors_that_are_not_of_coremltools_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as passed, explained():
        raise error
    assert passed.value is error


def test_outside_of_operators_the_network_is_named_and_long_messages_are_cut() -> None:
    filters = list(logging.getLogger("coremltools").filters)
    sentence = r"cannot convert the network: ValueError: first x{194}; write it"
    with pytest.raises(CheckFailed, match=sentence) as failed, explained():
        raise ValueError(f"\n first {'x' * 500}\nsecond")
    assert isinstance(failed.value.__cause__, ValueError)
    assert set(logging.getLogger("coremltools").filters) == set(filters)
