"""Typed variables: misspelt names, variables without effect, and the environment named in errors."""

from __future__ import annotations

import re
import sys

import pytest

from models.errors import BadRequest
from pipeline.cli.parser import parse
from pipeline.cli.request import read
from pipeline.cli.typed import naming_origin


def test_an_error_in_a_variable_of_the_environment_names_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    origin = "; TARGET is set in the environment: unset it or give TARGET on the command line"
    known = "^TARGET=orin: no such target; Known: jetson, .*, iphone"

    def error(*arguments: str) -> str:
        request = parse(["engine", *arguments])
        with pytest.raises(BadRequest) as refused, naming_origin(request.inherited):
            read(request)
        return str(refused.value)

    monkeypatch.setenv("TARGET", "orin")
    assert re.fullmatch(known + re.escape(origin), error())
    assert re.fullmatch(known, error("--target", "orin"))
    assert re.fullmatch("BATCH=0: expected a whole number from 1 to 256", error("--target", "cpu", "--batch", "0"))
    monkeypatch.setenv("EDGELINE_TYPED", "TARGET")  # make exports variables of its command line
    assert re.fullmatch(known, error())
    monkeypatch.delenv("EDGELINE_TYPED")
    monkeypatch.setenv("TARGET", "onnxruntime")
    assert error("--interface", "image").endswith(
        "not supported by TARGET=onnxruntime; use TARGET=coreml, or leave INTERFACE out" + origin
    )


@pytest.mark.parametrize("verb", ["tune", "placement", "engine", "models"])
def test_a_variable_of_the_environment_without_effect_is_a_warning(
    verb: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PLACEMENT", "conv")
    monkeypatch.setenv("TARGET", "jetson")
    monkeypatch.setattr(sys, "argv", ["pipeline", verb])
    parse()
    unread = {"tune": "PLACEMENT=conv", "placement": "TARGET=jetson"}.get(verb)
    sentence = f"{unread}, set in the environment, has no effect on make {verb}"
    assert caplog.messages == ([sentence] if unread else [])


def test_typed_variables_are_judged_for_a_process_and_not_for_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELINE_TYPED", "MODLE")
    assert parse(["models"]).verb == "models"
    monkeypatch.setattr(sys, "argv", ["pipeline", "models"])
    with pytest.raises(BadRequest, match=r"^MODLE=: no such variable; did you mean MODEL\?$"):
        parse()
