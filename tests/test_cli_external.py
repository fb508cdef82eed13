"""User-supplied networks from the command line to an engine: the documented example, cache keys, and refusals."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.accuracy_budget import Budget
from models.external import loader as external
from models.spec import ModelSpec
from pipeline.stages.engine import engine
from pipeline.stages.quantized import quantized
from pipeline.stages.weights import weights
from pipeline.store.store import Store
from tests.pipeline.cli.test_main import call, refused
from tests.support import pages
from tests.support.tiny import tiny_run

pytestmark = pytest.mark.slow

NET = """
from torch import nn
from my_widths import WIDTH

def net(classes):
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, classes))
"""


def found(folder: Path, files: dict[str, str], request: str) -> ModelSpec:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    spec = external.find(f"{folder}/{request}")
    assert spec
    return spec


# --- The example of the README --------------------------------------------------------------------------------------


@pytest.fixture
def example(tmp_path: Path) -> ModelSpec:
    text = pages.python_block()
    return found(tmp_path / "user", {"smallnet.py": text}, "smallnet.py:smallnet")


def test_the_example_of_the_readme_becomes_an_engine(tmp_path: Path, example: ModelSpec) -> None:
    run = tiny_run(model=example, preprocess=replace(example.preprocess, size=32))
    artifact = Store(tmp_path / "store").get(engine(run))
    assert artifact.path.name.startswith("smallnet-colours-32-int8_ptq-onnxruntime-")
    assert (artifact.path / "model.onnx").is_file()
    assert {item.name for item in (tmp_path / "user").iterdir()} == {"smallnet.py"}


def test_the_documented_error_example_fails_as_documented(tmp_path: Path, example: ModelSpec) -> None:
    file = tmp_path / "user" / "smallnet.py"
    first = "        x = self.stem(x)"
    assert first in file.read_text()
    file.write_text(file.read_text().replace(first, f"        if x.mean() > 0:\n            x = -x\n{first}"))
    said = refused(tmp_path, 2, "engine", "--model", f"{file}:smallnet")
    shown = re.findall(r"^MODEL=smallnet\.py:smallnet: .*$", pages.TEXT, re.M)
    assert [said.replace(f"{file.parent}/", "")] == shown


# --- Keys -----------------------------------------------------------------------------------------------------------


def keys(spec: ModelSpec) -> tuple[str, str]:
    run = tiny_run(model=spec)
    return weights(run).key, quantized(run).key


def test_the_code_of_a_model_file_is_part_of_the_keys_and_its_path_is_not(tmp_path: Path) -> None:
    files = {"net.py": NET, "my_widths.py": "WIDTH = 8\n"}
    same = {
        "elsewhere": files,
        "comments": {**files, "net.py": f'"""Mine."""{NET}# the end', "my_widths.py": "WIDTH = 8  # pixels"},
        "a file that nobody imports": {**files, "other.py": "x = 1"},
    }
    others = {
        "the network": {**files, "net.py": NET.replace("3, WIDTH, 3", "3, WIDTH, 5")},
        "what it imports": {**files, "my_widths.py": "WIDTH = 16\n"},
        "the name": {"nets.py": NET, "my_widths.py": "WIDTH = 8\n"},
    }
    before = keys(found(tmp_path / "here", files, "net.py:net"))
    for folder, changed in same.items():
        assert keys(found(tmp_path / folder, changed, "net.py:net")) == before, folder
    for folder, changed in others.items():
        now = keys(found(tmp_path / folder, changed, f"{next(iter(changed))}:net"))
        assert all(was != is_ for was, is_ in zip(before, now, strict=True)), folder


def test_the_code_of_packages_beside_a_file_and_of_ours_counts_and_versions_of_others_do(tmp_path: Path) -> None:
    files = {
        "net.py": "import os, numpy, my_blocks.deep\nfrom models._layers import attend\nfrom torch.nn import Linear",
        "my_blocks/__init__.py": "from . import wide",
        "my_blocks/wide.py": "",
        "my_blocks/deep/__init__.py": "from ..narrow import x",
        "my_blocks/narrow.py": "x = 1",
        "my_blocks/unused.py": "",
    }
    spec = found(tmp_path, files, "net.py:Linear")
    code = weights(tiny_run(model=spec)).ingredients["code"]
    assert isinstance(code, dict)
    assert {name for name in code if "/" in name or name.endswith(".py")} == files.keys() - {"my_blocks/unused.py"}
    assert "models._layers" in code
    assert code["numpy"] == importlib.import_module("numpy").__version__
    assert "os" not in code


def test_explain_names_the_changed_file(tmp_path: Path) -> None:
    spec = found(tmp_path, {"net.py": NET, "my_widths.py": "WIDTH = 8\n"}, "net.py:net")
    run = tiny_run("fp32", "null", model=spec)
    store = Store(tmp_path / "store")
    store.get(weights(run))
    changed = found(tmp_path / "later", {"net.py": NET, "my_widths.py": "WIDTH = 16\n"}, "net.py:net")
    step = weights(replace(run, model=changed))
    assert store.explain(step) == ["the code of my_widths.py changed"]


# --- The command line -----------------------------------------------------------------------------------------------


def test_a_file_is_explained_and_linted_like_any_model(tmp_path: Path) -> None:
    found(tmp_path / "my nets", {"net.py": NET, "my_widths.py": "WIDTH = 8\n"}, "net.py:net")
    request = f"{tmp_path}/my nets/net.py:net"
    code, said, _ = call(tmp_path, "explain", "--model", request)
    assert (code, said["model"]) == (0, request)
    code, said, story = call(tmp_path, "lint-model", "--model", request, "--size", "32")
    assert (code, said["errors"], story[-1]) == (0, 0, "net at 32 pixels: errors: 0, warnings: 0")


@pytest.mark.parametrize(
    ("text", "request_", "verb", "sentence"),
    [
        (
            "",
            "no.py:net",
            "engine",
            r"there is no file `\S*no\.py`; give <file>\.py:<function>, timm:<name>, or a name",
        ),
        ("def nett(): pass", "net.py:net", "explain", r"defines no function `net`, as in MODEL=\S*net\.py:nett$"),
        ("1 +", "net.py:net", "explain", r"net\.py, line 1: SyntaxError: invalid syntax$"),
        ("raise OSError(13, 'no')", "net.py:net", "engine", r"net\.py, line 1: PermissionError: \[Errno 13\] no$"),
        (
            "def net(): return 1",
            "net.py:net",
            "lint-model",
            r"it returned a value of type int, expected a torch\.nn\.Module$",
        ),
        (
            "def net(): return 1",
            "net.py:net",
            "engine",
            r"it returned a value of type int, expected a torch\.nn\.Module$",
        ),
        ("import torch\ndef net(): return torch.nn.Identity()", "net.py:net", "lint-model", r"expected logits \(2, cl"),
    ],
)
def test_a_file_that_cannot_serve_gets_one_sentence(
    tmp_path: Path, text: str, request_: str, verb: str, sentence: str
) -> None:
    (tmp_path / "net.py").write_text(text)
    said = refused(tmp_path, 2, verb, "--model", f"{tmp_path}/{request_}")
    assert said.startswith(f"MODEL={tmp_path}/{request_}: ")
    assert re.search(sentence, said)


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_without_timm_its_models_cannot_be_had_here(tmp_path: Path) -> None:
    assert "timm cannot be imported here" in refused(tmp_path, 3, "engine", "--model", "timm:resnet18")


@pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed: it is none of the requirements"
)
def test_a_model_of_timm_becomes_an_engine(tmp_path: Path) -> None:
    spec = external.find("timm:mobilenetv3_small_050")
    assert spec
    run = tiny_run("fp32", model=spec, preprocess=replace(spec.preprocess, size=32), max_drop=Budget(value=100.0))
    assert Store(tmp_path).get(engine(run)).path.name.startswith("timm_mobilenetv3_small_050-colours-32-fp32-")
