"""What a network of somebody else's is asked before it is trained, and what is said where it does not keep to that."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from models import external
from models.errors import BadRequest, CheckFailed
from models.external import External
from pipeline import contract
from tests.tiny import SPEC

HEAD = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Linear(8, classes)

    def features(self, x):
        return self.conv(x).mean((2, 3))

    def forward(self, x):
        f = self.features(x)
"""
AT = HEAD.count("\n")  # the last line of HEAD; what a test adds comes after it


def model(folder: Path, forward: str, init: str = "", module: str = "") -> External:
    """A network whose forward ends in `forward`, from a line `AT + 1` on."""
    text = HEAD.replace("8, classes)\n", f"8, classes)\n        {init}\n") if init else HEAD
    lines = "".join(f"        {line}\n" for line in forward.splitlines())
    (folder / "net.py").write_text(f"{text}{lines}{module}")
    found = external.find(f"{folder / 'net.py'}:Net")
    assert isinstance(found, External)
    return found


def refused(spec: External, classes: int | None = 10) -> str:
    with pytest.raises(BadRequest) as raised:
        if classes:
            contract.check(spec, 32, classes)
        else:
            contract.check_trace(spec, 32)
    said = str(raised.value)
    assert said.startswith(f"MODEL={spec.asked}: ") and "\n" not in said
    return said.removeprefix(f"MODEL={spec.asked}: ")


def test_a_network_that_keeps_to_it_passes(tmp_path: Path) -> None:
    spec = model(tmp_path, "return self.head(f)")
    contract.check(spec, 32, 10)
    contract.check_trace(spec, 32)


def test_our_own_are_taken_at_their_word() -> None:
    contract.check(SPEC, 0, 10)  # a size at which it could not be run
    contract.check_trace(SPEC, 0)


@pytest.mark.parametrize(
    ("forward", "sentence"),
    [
        ("return self.head(f), f", r"^in training it returns a tuple, expected one tensor of logits \(N, classes\)$"),
        ("return {'logits': self.head(f)}", r"^in training it returns a dict, expected one tensor of logits"),
        ("return self.head(f) if self.training else [f]", r"^in evaluation it returns a list, expected"),
        (
            "return self.head(self.conv(x))",
            rf"^it fails in training on images \(2, 3, 32, 32\): .*, line {AT + 1}: Runti",
        ),
        (
            "return self.head(f.reshape(2, 8))",
            rf"^it fails in evaluation on images \(3, .*, line {AT + 1}: RuntimeError",
        ),
        (
            "return f",
            r"^in training it returns a tensor \(2, 8\) for images \(2, 3, 32, 32\), expected logits \(2, 10\); a "
            r"function with a parameter `classes` is told their number$",
        ),
        ("return self.head(f).mean(0)", r"returns a tensor \(10,\) for .* expected logits \(2, 10\)$"),
        ("return self.head(f)[:1]", r"returns a tensor \(1, 10\) for"),
        ("return self.head(f).double()", r"returns torch\.float64, expected torch\.float32$"),
        ("return self.head(f).detach()", r"^its logits do not depend on parameters that could be trained$"),
        (
            "if f.sum() > 0:\n    f = -f\nreturn self.head(f)",
            rf"^torch\.export cannot trace it: \S*net\.py, line {AT + 1}: a Python `if`, .* on what a tensor holds",
        ),
        ("assert f.isfinite().all()\nreturn self.head(f)", rf"line {AT + 1}: a Python `if`, `while`, `assert`"),
        (
            "return self.head(torch.from_numpy(f.detach().numpy()) + f)",
            rf"^torch\.export cannot trace it: \S*net\.py, line {AT + 1}: RuntimeError: ",
        ),
        (
            "return torch.cat([self.head(self.features(image[None])) for image in x])",
            r"^torch\.export cannot trace it for any number of images: somewhere Python counts them",
        ),
        ("f = f + 1 if x.shape[0] == 2 else f\nreturn self.head(f)", r"for any number of images: somewhere Python"),
    ],
)
def test_what_breaks_it_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], forward: str, sentence: str
) -> None:
    said = refused(model(tmp_path, forward))
    assert re.search(sentence, said), said
    assert capfd.readouterr() == ("", "")  # torch would print its graph


def test_without_data_any_number_of_logits_will_do(tmp_path: Path) -> None:
    contract.check_trace(model(tmp_path, "return f"), 32)


def test_without_data_the_rest_is_asked_all_the_same(tmp_path: Path) -> None:
    said = refused(model(tmp_path, "return self.head(f).mean(0)"), None)
    assert said.endswith("expected logits (2, classes)")


def test_a_mask_of_infinities_is_no_weight(tmp_path: Path) -> None:
    mask = 'self.register_buffer("mask", torch.full((8,), -torch.inf)'
    forward = "return self.head(f + self.mask.exp())"
    said = refused(model(tmp_path, forward, f"{mask})"))
    assert said.startswith("`mask` of the new network holds NaN or infinite values; what is no weight")
    (tmp_path / "other").mkdir()
    contract.check(model(tmp_path / "other", forward, f"{mask}, persistent=False)"), 32, 10)


def test_the_linter_speaks_before_the_training(tmp_path: Path) -> None:
    spec = model(
        tmp_path, "f = nn.functional.unfold(x, 16, stride=16).mean(2)\nreturn self.head(f[:, :8] + self.features(x))"
    )
    contract.check_trace(spec, 32)
    with pytest.raises(CheckFailed, match=rf"^not exported: \S*net\.py:{AT + 1}: error: "):
        contract.check(spec, 32, 10)


def test_an_operator_that_onnx_lacks_is_named_before_the_training(tmp_path: Path) -> None:
    spec = model(tmp_path, "return self.head(f + torch.linalg.svdvals(x[:, 0])[:, :8])")
    with pytest.raises(CheckFailed, match=r"torch\.onnx cannot convert the network: .*aten\._linalg_svd"):
        contract.check(spec, 32, 10)


def test_a_layer_without_a_shape_is_no_layer_yet(tmp_path: Path) -> None:
    said = refused(model(tmp_path, "return self.late(f)", "self.late = nn.LazyLinear(10)"))
    assert said.startswith("`late.weight` of the new network has no shape yet")


def test_a_fault_in_a_file_beside_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "my_part.py").write_text("def twice(x):\n    return x if x.sum() > 0 else 2 * x\n")
    said = refused(model(tmp_path, "return self.head(twice(f))", module="\nfrom my_part import twice\n"))
    assert re.search(r"my_part\.py, line 2: a Python `if`", said)


def test_a_network_that_counts_its_queries_is_refused(tmp_path: Path) -> None:
    spec = model(
        tmp_path,
        "self.seen += 1\nreturn self.head(f) * self.seen",
        init="self.register_buffer('seen', torch.zeros(()))",
    )
    said = r"^in evaluation it changes its buffer `seen`; an engine keeps nothing between two queries$"
    assert re.search(said, refused(spec))


def test_a_norm_whose_gamma_is_computed_is_converted_as_it_is(tmp_path: Path) -> None:
    norm = "nn.functional.batch_norm(y, self.m, self.v, y.mean((0, 2, 3)))"
    forward = f"y = self.conv(x)\nreturn self.head({norm}.mean((2, 3)))"
    spec = model(tmp_path, forward, init="self.m = nn.Buffer(torch.zeros(8)); self.v = nn.Buffer(torch.ones(8))")
    contract.check(spec, 32, 10)
