"""Texts of all files: no paths of the development machine, no marks for later, and a docstring for every module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GENERATED = {".git", ".venv", "build", "__pycache__"}  # and every other folder whose name begins with a dot, but .ci
OTHERS = {"LICENSE", "requirements.lock"}  # texts of others

# Spelled apart, so that this file does not contain them.
UNWANTED = {
    "a folder of one machine": re.compile(r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+)(?:/|\b)"),
    "a mark for later": re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX)\b"),
}


def texts() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part in GENERATED or (part[0] == "." and part != ".ci") for part in parts[:-1])
        if path.is_file() and not hidden and parts[-1] not in OTHERS:
            yield path


TEXTS = list(texts())
MODULES = [path for path in TEXTS if path.suffix == ".py" and path.stat().st_size]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_no_file_contains_paths_of_the_development_machine(path: Path) -> None:
    text = path.read_text(errors="replace")
    found = {kind: match[0] for kind, pattern in UNWANTED.items() if (match := pattern.search(text))}
    assert found == {}


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_every_module_opens_with_a_sentence(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_bytes()))
    assert text, "the module has no docstring"
    first = text.split("\n\n")[0].strip()
    assert first[0].isupper() or first[0] == "`", f"{first!r} does not begin like a sentence"
    assert first[-1] in ".:!", f"{first!r} does not end like a sentence"


def test_the_patterns_match_their_examples() -> None:
    examples = {
        "a folder of one machine": ["see /" + "work/main/x", "cd /" + "root"],
        "a mark for later": ["# TO" + "DO later"],
    }
    for kind, sentences in examples.items():
        assert all(UNWANTED[kind].search(sentence) for sentence in sentences), kind
    assert not any(pattern.search("the framework/tests in models/workbench") for pattern in UNWANTED.values())
