"""The subject of measurements that are made elsewhere."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from pipeline.timing.measurement_identity import identity
from pipeline.timing.results_db import Row
from pipeline.timing.subject import Subject, subject_params
from tests.pipeline.commands.elsewhere.made import SUBJECT
from tests.support.tiny import tiny_run


def test_a_subject_is_read_as_it_was_written(tmp_path: Path) -> None:
    SUBJECT.write(tmp_path)
    found = Subject.read(tmp_path)
    assert found == SUBJECT and found.identity.weights_from == SUBJECT.identity.weights_from


def test_its_fields_are_columns_of_a_row() -> None:
    assert {item.name for item in fields(Subject)} < {item.name for item in fields(Row)}


def test_the_key_of_a_bundle_depends_on_the_names_in_its_subject() -> None:
    run = tiny_run("fp32")
    named = identity(run)
    assert subject_params(run) == {
        "subject": {"model": "tiny", "family": "tiny", "network": named.network, "weights_from": named.weights_from}
    }
    assert subject_params(replace(run, trained=False)) != subject_params(run)
