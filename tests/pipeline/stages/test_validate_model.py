"""Validation of user-supplied models before training: each violation is refused in one sentence."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models
import targets
from calibration import sanity_checks
from calibration.data.batches import Images
from calibration.data.dataset import Part
from calibration.data.image_folder import Folder
from models.errors import BadRequest, CheckFailed
from models.external import guard
from models.external import loader as external
from models.external.loader import External
from models.spec import Preprocess
from pipeline.run import Run
from pipeline.stages import validate_model
from pipeline.stages.weights import weights
from pipeline.store.store import Store
from tests.models.external.test_guard import SWITCHES
from tests.support.tiny import SPEC, Colours, python, tiny_run

pytestmark = pytest.mark.slow

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
AT = HEAD.count("\n")  # the last line of HEAD; tests add lines after it


def model(folder: Path, forward: str, init: str = "", module: str = "") -> External:
    """Return the spec of a network whose forward ends in `forward`, from line `AT + 1` on."""
    text = HEAD.replace("8, classes)\n", f"8, classes)\n        {init}\n") if init else HEAD
    lines = "".join(f"        {line}\n" for line in forward.splitlines())
    folder.mkdir(exist_ok=True)
    (folder / "net.py").write_text(f"{text}{lines}{module}")
    found = external.find(f"{folder / 'net.py'}:Net")
    assert isinstance(found, External)
    return found


def refused(spec: External, classes: int | None = 10) -> str:
    with pytest.raises(BadRequest) as raised:
        if classes:
            validate_model.check(spec, 32, classes)
        else:
            validate_model.check_trace(spec, 32)
    said = str(raised.value)
    assert said.startswith(f"MODEL={spec.asked}: ") and "\n" not in said
    return said.removeprefix(f"MODEL={spec.asked}: ")


def test_a_valid_network_passes(tmp_path: Path) -> None:
    spec = model(tmp_path, "return self.head(f)")
    validate_model.check(spec, 32, 10)
    validate_model.check_trace(spec, 32)


def test_built_in_models_are_not_validated() -> None:
    validate_model.check(SPEC, 0, 10)  # a size at which it could not be run
    validate_model.check_trace(SPEC, 0)


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
            r"function with a parameter `classes` receives their number$",
        ),
        ("return self.head(f).mean(0)", r"returns a tensor \(10,\) for .* expected logits \(2, 10\)$"),
        ("return self.head(f)[:1]", r"returns a tensor \(1, 10\) for"),
        ("return self.head(f).double()", r"returns torch\.float64, expected torch\.float32$"),
        ("return self.head(f).detach()", r"^its logits do not depend on trainable parameters$"),
        (
            "if f.sum() > 0:\n    f = -f\nreturn self.head(f)",
            rf"^torch\.export cannot trace it: \S*net\.py, line {AT + 1}: a Python `if`, .* on tensor values",
        ),
        ("assert f.isfinite().all()\nreturn self.head(f)", rf"line {AT + 1}: a Python `if`, `while`, `assert`"),
        (
            "return self.head(torch.from_numpy(f.detach().numpy()) + f)",
            rf"^torch\.export cannot trace it: \S*net\.py, line {AT + 1}: RuntimeError: ",
        ),
        (
            "return torch.cat([self.head(self.features(image[None])) for image in x])",
            r"^torch\.export cannot trace it with a dynamic batch size: Python code uses the number of images",
        ),
        ("f = f + 1 if x.shape[0] == 2 else f\nreturn self.head(f)", r"with a dynamic batch size: Python code uses"),
    ],
)
def test_each_violation_is_refused_in_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], forward: str, sentence: str
) -> None:
    said = refused(model(tmp_path, forward))
    assert re.search(sentence, said), said
    assert capfd.readouterr() == ("", "")  # torch would print its graph


def test_without_data_any_number_of_logits_is_accepted(tmp_path: Path) -> None:
    validate_model.check_trace(model(tmp_path, "return f"), 32)


def test_without_data_all_other_checks_are_made(tmp_path: Path) -> None:
    said = refused(model(tmp_path, "return self.head(f).mean(0)"), None)
    assert said.endswith("expected logits (2, classes)")


def test_infinities_in_a_persistent_buffer_are_refused(tmp_path: Path) -> None:
    mask = 'self.register_buffer("mask", torch.full((8,), -torch.inf)'
    forward = "return self.head(f + self.mask.exp())"
    said = refused(model(tmp_path, forward, f"{mask})"))
    assert said.startswith(
        "`mask` of the new network holds NaN or infinite values; register buffers that are not weights"
    )
    (tmp_path / "other").mkdir()
    validate_model.check(model(tmp_path / "other", forward, f"{mask}, persistent=False)"), 32, 10)


def test_lint_errors_are_reported_before_the_training(tmp_path: Path) -> None:
    spec = model(
        tmp_path, "f = nn.functional.unfold(x, 16, stride=16).mean(2)\nreturn self.head(f[:, :8] + self.features(x))"
    )
    validate_model.check_trace(spec, 32)
    with pytest.raises(CheckFailed, match=rf"^not exported: \S*net\.py:{AT + 1}: error: "):
        validate_model.check(spec, 32, 10)


def test_an_operator_that_onnx_lacks_is_named_before_the_training(tmp_path: Path) -> None:
    spec = model(tmp_path, "return self.head(f + torch.linalg.svdvals(x[:, 0])[:, :8])")
    with pytest.raises(CheckFailed, match=rf"the network, at \S*net\.py:{AT + 1}: .*aten\._linalg_svd"):
        validate_model.check(spec, 32, 10)


# --- Determinism ----------------------------------------------------------------------------------------------------

RANDOM = "in evaluation it is random: "
AGAIN = r"in evaluation its logits of the same images change from run to run \(-?[\d.]+ dB\)"
REBUILT = r"a second instance with the same state_dict gives other logits \(-?[\d.]+ dB\)"
TRACE = r"its trace by torch\.export gives other logits \(-?[\d.]+ dB\)"


@pytest.mark.parametrize(
    ("init", "forward", "sentence"),
    [
        # Random operators.
        ("", "f = nn.functional.dropout(f, 0.3)", rf"{RANDOM}`dropout` at \S*net\.py:{AT + 1}; make it depend on"),
        ("", "f = nn.functional.dropout2d(x, 0.3).mean((2, 3)) @ torch.ones(3, 8)", rf"{RANDOM}`feature_dropout` at"),
        ("", "f = f + 0.1 * torch.randn_like(f)", rf"{RANDOM}`randn_like` at \S*net\.py:{AT + 1}; "),
        ("", "f = f * torch.rand(1)", rf"{RANDOM}`rand` at \S*net\.py:{AT + 1}; "),
        ("", "torch.manual_seed(0)\nf = f + torch.rand(8)", rf"{RANDOM}`rand` at \S*net\.py:{AT + 2}; "),
        ("", "f = torch.bernoulli(f.sigmoid())", rf"{RANDOM}`bernoulli` at \S*net\.py:{AT + 1}; "),
        ("", "f = f + torch.zeros(8).uniform_()", rf"{RANDOM}`uniform_` at \S*net\.py:{AT + 1}; "),
        ("", "f = nn.functional.rrelu(f, training=True)", rf"{RANDOM}`rrelu` at"),
        (
            "",
            "q = f[:, None]\nf = nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)[:, 0]",
            rf"{RANDOM}`scaled_dot_product_attention` at \S*net\.py:{AT + 2}; ",
        ),
        (
            "self.drop = nn.Dropout(0.5); self.drop.train = lambda mode=True: self.drop; self.drop.training = True",
            "f = self.drop(f)",
            rf"{RANDOM}`dropout` at \S*net\.py:{AT + 2} in `drop`; ",
        ),
        # Random numbers and counters in Python.
        ("", "import random\nf = f * random.random()", rf"{AGAIN}: Python code draws random numbers or counts calls"),
        ("", "import numpy\nf = f + torch.from_numpy(numpy.random.rand(8)).float()", AGAIN),
        ("", "import time\nf = f + time.perf_counter() % 1", AGAIN),
        (
            "self.calls = 0",
            "self.calls += not self.training\nf = f if self.calls < 6 else -f",
            rf"{AGAIN}: `calls` changed; an engine keeps no state between queries",
        ),
        ("self.seen = []", "self.seen.append(1)\nf = f * len(self.seen)", rf"{AGAIN}: `seen\[\d\]`.* changed"),
        # State outside the state dict, or initialized from the first images.
        ("self.pattern = torch.randn(8)", "f = f + self.pattern", rf"{REBUILT}: `pattern` differs and is not in the"),
        ("self.pattern = 0.01 * torch.randn(8)", "f = f + self.pattern", rf"{REBUILT}: `pattern` differs"),
        ("self.parts = {'a': [torch.randn(8)]}", "f = f + self.parts['a'][0]", rf"{REBUILT}: `parts\['a'\]\[0\]` diff"),
        (
            "self.register_buffer('pattern', torch.randn(8), persistent=False)",
            "f = f + self.pattern",
            rf"{REBUILT}: `pattern` differs and is not in the state_dict; values that are random, or taken from",
        ),
        (
            "import numpy; self.pattern = nn.Buffer(torch.from_numpy(numpy.random.rand(8)).float(), persistent=False)",
            "f = f + self.pattern",
            rf"{REBUILT}: `pattern` differs",
        ),
        (
            "import numpy; self.noise = numpy.random.rand(8)",
            "f = f + torch.tensor(self.noise).float()",
            f"{REBUILT}: `noi",
        ),
        ("import random; self.scale = random.random()", "f = f * self.scale", rf"{REBUILT}: `scale` differs"),
        (
            "noise = torch.randn(8); self.call = lambda x: x + noise",
            "f = self.call(f)",
            rf"{REBUILT}; values that are random",
        ),
        ("import random; self.flip = random.random() < 2", "f = -f if self.flip else f", ""),
        (
            "self.mean = None",
            "self.mean = f.detach().mean(0) if self.mean is None else self.mean\nf = f - self.mean",
            rf"{REBUILT}|{TRACE}|other logits",
        ),
        # Logits that depend on the other images of the batch.
        ("", "f = f - f.mean(0)", r"in evaluation its logits of an image depend on the other images of the batch"),
        ("", "f = f.softmax(0)", r"in evaluation its logits of an image depend on the other images of the batch"),
        (
            "self.norm = nn.BatchNorm1d(8, track_running_stats=False)",
            "f = self.norm(f)",
            r"in evaluation its logits of an image depend on|Expected more than 1 value per channel",
        ),
        # In-place changes of the images, or of a buffer.
        (
            "",
            "x *= 2\nf = self.features(x)",
            rf"in evaluation it changes its input in place: `mul_` at \S*net\.py:{AT + 1}; write `x = x \* 2`",
        ),
        ("", "x.mul_(0.5).add_(0.25)\nf = self.features(x)", rf"its input in place: `mul_` at \S*net\.py:{AT + 1}; "),
        ("", "nn.functional.relu_(x)\nf = self.features(x)", rf"its input in place: `relu_` at \S*net\.py:{AT + 1}; "),
        ("self.r = nn.ReLU(inplace=True)", "f = self.features(self.r(x))", r"in place: `relu_` at .* in `r`; "),
        ("", "x[:, 0] = 0\nf = self.features(x)", rf"its input in place: `\w+` at \S*net\.py:{AT + 1}; "),
        (
            "",
            "x.flatten(2)[:, :, 3].add_(1)\nf = self.features(x)",
            rf"its input in place: `add_` at \S*net\.py:{AT + 1}",
        ),
        ("", "x.clamp_(-20, 20)\nf = self.features(x)", rf"its input in place: `clamp_` at \S*net\.py:{AT + 1}; "),
        ("", "if not self.training:\n    x.sub_(1)\nf = self.features(x)", r"its input in place: `sub_` at"),
        (
            "self.norm = nn.BatchNorm1d(8); self.norm.train = lambda mode=True: self.norm; self.norm.training = True",
            "f = self.norm(f)",
            r"in evaluation it changes its buffer `norm\.(running_mean|num_batches_tracked)`",
        ),
        ("self.seen = nn.Buffer(torch.zeros(8))", "self.seen = self.seen + 1", r"it changes its buffer `seen`"),
    ],
)
def test_logits_that_depend_on_more_than_the_image_are_refused(
    tmp_path: Path, init: str, forward: str, sentence: str
) -> None:
    spec = model(tmp_path, f"{forward}\nreturn self.head(f)", init)
    if not sentence:
        validate_model.check_trace(spec, 32)
        return
    said = refused(spec, None)
    assert re.search(sentence, said), said


@pytest.mark.parametrize(
    ("init", "forward"),
    [
        ("self.drop = nn.Dropout(0.5)", "f = self.drop(f)"),
        ("", "f = nn.functional.dropout(f, 0.3, self.training)"),
        ("", "f = f + 0.1 * torch.randn_like(f) if self.training else f"),
        ("", "f = nn.functional.rrelu(f)"),
        ("", "f = nn.functional.dropout(f, 0.0)"),
        ("", "q = f[:, None]\nf = nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]"),
        ("", "unused = torch.rand(3)"),
        ("", "f = f.add_(1).relu_()"),
        ("", "x = x.clone()\nx *= 2\nf = self.features(x)"),
        ("", "x = 2 * x\nnn.functional.relu_(x)\nf = self.features(x)"),
        ("self.norm = nn.BatchNorm1d(8)", "f = self.norm(f)"),
        ("self.pattern = torch.arange(8.0)", "f = f + self.pattern"),
        ("torch.manual_seed(7); self.pattern = torch.randn(8)", "f = f + self.pattern"),
        ("self.register_buffer('pattern', torch.randn(8))", "f = f + self.pattern"),
        ("self.grid = None", "self.grid = torch.arange(8.0) if self.grid is None else self.grid\nf = f + self.grid"),
        ("self.register_parameter('p', None); self.none = None", "f = f"),
    ],
)
def test_near_misses_pass(tmp_path: Path, init: str, forward: str) -> None:
    validate_model.check_trace(model(tmp_path, f"{forward}\nreturn self.head(f)", init), 32)


def test_a_counter_without_effect_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    validate_model.check_trace(model(tmp_path, "self.calls += 1\nreturn self.head(f)", "self.calls = 0"), 32)
    assert any(
        message.endswith("in evaluation it changes `calls`; an engine keeps nothing between two queries")
        for message in caplog.messages
    )


# --- Global state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SWITCHES)
def test_global_switches_that_a_forward_changes_are_refused(tmp_path: Path, name: str) -> None:
    before = guard.settings()
    said = refused(model(tmp_path, f"{SWITCHES[name]}\nreturn self.head(f)"), None)
    assert said.startswith(
        f"in training its forward switches {name} without restoring it; use a context manager, such as"
    ), said
    assert guard.settings() == before


@pytest.mark.parametrize(
    ("forward", "sentence"),
    [
        ("self.train()\nreturn self.head(f)", r"in evaluation its forward switches `the network` to training"),
        ("self.eval()\nreturn self.head(f)", r"in training its forward switches `the network` to evaluation"),
        (
            "self.head.train()\nreturn self.head(f)",
            r"in evaluation its forward switches `head` to training mode without",
        ),
        (
            "if not self.training:\n    torch.set_grad_enabled(True)\nreturn self.head(f)",
            r"in evaluation its forward switches gradients \(torch\.set_grad_enabled\)",
        ),
    ],
)
def test_a_training_mode_that_a_forward_changes_is_refused(tmp_path: Path, forward: str, sentence: str) -> None:
    assert re.search(sentence, refused(model(tmp_path, forward), None))


def test_the_random_generators_are_restored(tmp_path: Path) -> None:
    spec = model(tmp_path, "return self.head(f)")

    def state() -> tuple[object, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]

    before = state()
    validate_model.check_trace(spec, 32)
    assert state() == before


# --- Failures of the user's code ------------------------------------------------------------------------------------


HOSTILE = [
    ("import sys; sys.exit(0)", r"^it fails in training on images \(2, 3, 32, 32\): \S*, line LINE: SystemExit: 0$"),
    ("raise BaseException('end')", r"^it fails in training .*, line LINE: BaseException: end$"),
    ("class Odd(Exception):\n    __str__ = None\nraise Odd", r"^it fails in training .*, line \d+: Odd$"),
    ("if not self.training: exit()", r"^it fails in evaluation on images .*, line LINE: SystemExit"),
    ("while True: f = f", r"^it fails in training .*, line LINE: not finished after 1 s; an endless loop, or too"),
    ("while not self.training: f = f", r"^it fails in evaluation .*, line LINE: not finished after 1 s"),
    ("import time; time.sleep(99)", r"^it fails in training .*, line LINE: not finished after 1 s"),
    ("return self.forward(x)", r"^it fails in training .*, line \d+: RecursionError: maximum recursion depth"),
    ("import os; os.kill(os.getpid(), 14)", r"not finished after 1 s"),
    ("f = f.abs_().sigmoid().mul_(2)", r"^its gradients cannot be computed: RuntimeError: one of the variables needed"),
]
REFUSALS = """
import faulthandler, json, sys
from pathlib import Path
from tests.pipeline.stages import test_validate_model as tests
faulthandler.enable()
tests.guard.LIMIT_S = 1.0
for number, (forward, _) in enumerate(tests.HOSTILE):
    spec = tests.model(Path(sys.argv[1]) / str(number), f"{forward}\\nreturn self.head(f)")
    print(json.dumps([number, tests.refused(spec, None)]), flush=True)
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Return the refusal of each hostile forward. They run in a separate process, as in a command: they send signals
    and exit.
    """
    result = python("-W", "ignore", "-c", REFUSALS, str(tmp_path_factory.mktemp("hostile")))
    lines = result.stdout.splitlines()
    assert result.returncode == 0, f"after {len(lines)} networks: {result.returncode}\n{result.stderr}"
    return dict(map(json.loads, lines))


@pytest.mark.parametrize(("forward", "sentence"), HOSTILE)
def test_any_failure_of_a_forward_is_one_sentence(refusals: dict[int, str], forward: str, sentence: str) -> None:
    said = refusals[HOSTILE.index((forward, sentence))]
    assert re.search(sentence.replace("LINE", str(AT + 1)), said), said


def test_a_network_that_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    said = refused(model(tmp_path, "return self.head(f)", "self.lock = __import__('threading').Lock()"), None)
    assert said.startswith("it cannot be copied (copy.deepcopy): TypeError: cannot pickle")


# Outdated norms of torch, which users still have, assign the weight in each forward pass.
@pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning",
    "ignore:The tensor attribute self.conv.weight was assigned during export:UserWarning",
)
@pytest.mark.parametrize("norm", ["utils.weight_norm", "utils.spectral_norm", "utils.parametrizations.weight_norm"])
def test_weight_and_spectral_norms_pass(tmp_path: Path, norm: str) -> None:
    validate_model.check(model(tmp_path, "return self.head(f)", f"self.conv = nn.{norm}(self.conv)"), 32, 10)


# --- Images ---------------------------------------------------------------------------------------------------------


def pictures(folder: Path) -> Images:
    """Return a folder of black, white and grey images in two classes."""
    for label in ("a", "b"):
        for index, value in enumerate([128] * 10 + [0, 255]):
            (folder / label).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (value,) * 3).save(folder / label / f"{index:02}-{value}.png")
    data = Folder.scan(folder, 0)
    return Images(data=data, part="train", preprocess=Preprocess(size=32, crop=1.0, mean=(0, 0, 0), std=(1, 1, 1)))


@pytest.mark.parametrize(
    ("forward", "value"),
    [("return self.head(f / (x - 128 / 255).abs().amax((2, 3)).max(1, keepdim=True)[0])", "inf|nan")],
)
def test_the_image_whose_logits_are_not_finite_is_named(tmp_path: Path, forward: str, value: str) -> None:
    spec = model(tmp_path / "code", forward)
    found = pictures(tmp_path / "data")
    with pytest.raises(BadRequest, match=rf"its logits are not finite: -?({value}) for \w+/\d\d-128\.png; expec"):
        validate_model.check(spec, 32, 2, pictures=found)


def test_untrained_batch_norm_statistics_are_accepted(tmp_path: Path) -> None:
    init = "self.norm = nn.BatchNorm1d(8); self.far = nn.BatchNorm1d(8)"
    spec = model(tmp_path, "return self.head(self.far(self.norm(f * 1e25) * 1e25))", init)
    validate_model.check_trace(spec, 32)


def test_the_logits_of_all_images_are_checked(tmp_path: Path) -> None:
    found = pictures(tmp_path)
    logits = np.zeros((len(found), 2), np.float32)
    assert sanity_checks.unfinite(found, logits) is None
    logits[3, 1], logits[5, 0] = -np.inf, np.nan
    name = re.escape(sanity_checks.picture(found, 3))
    assert re.fullmatch(
        rf"the logits of 2 of {len(found)} pictures are not finite; the first: {name}, with -inf",
        sanity_checks.unfinite(found, logits) or "",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class OneBlank(Colours):
    """Dataset of coloured noise with one uniform image."""

    part: str = "test"

    def image(self, part: Part, index: int) -> Image.Image:
        # Not super(), which a dataclass with slots does not have.
        return (
            Image.new("RGB", (16, 16), (90, 90, 90))
            if (part, index) == (self.part, 7)
            else Colours.image(self, part, index)
        )


@pytest.mark.parametrize("part", ["test", "val"])
def test_logits_of_the_trained_network_that_are_not_finite_are_refused(tmp_path: Path, part: str) -> None:
    spread = "(x - x[:, :, :1, :1]).abs().amax((1, 2, 3))[:, None]"
    spec = model(tmp_path / "code", f"return self.head(f) if self.training else self.head(f) / {spread}")
    run = replace(tiny_run("fp32", model=spec), data=OneBlank(part=part))
    expected = f"pictures are not finite; the first: picture 7 of colours, {part}, with "
    with pytest.raises(CheckFailed, match=re.escape(expected)):
        Store(tmp_path / "store").get(weights(run))


def test_a_checkpoint_of_a_different_network_is_refused_first(tmp_path: Path) -> None:
    spec = model(tmp_path / "code", "raise ValueError('asked')")
    torch.save({"conv.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "w.pt")
    step = weights(replace(tiny_run("fp32", model=spec), weights=tmp_path / "w.pt"))
    with pytest.raises(
        BadRequest, match=r"not a checkpoint of this model: it lacks conv\.bias, head\.bias, head\.weight;"
    ):
        Store(tmp_path / "store").get(step)


def test_the_network_is_validated_with_the_loaded_weights(tmp_path: Path) -> None:
    spec = model(tmp_path / "code", "return self.head(f / self.scale)", "self.scale = nn.Parameter(torch.ones(8))")
    state = spec.build(4).state_dict()
    torch.save({**state, "scale": torch.zeros(8)}, tmp_path / "w.pt")
    step = weights(replace(tiny_run("fp32", model=spec), weights=tmp_path / "w.pt"))
    with pytest.raises(BadRequest, match=r"its logits are not finite: -?(inf|nan) for picture 0 of colours, tr"):
        Store(tmp_path / "store").get(step)


MINIS = [name for name in models.ALL if name.endswith("_mini")]


@pytest.mark.parametrize("name", MINIS)
def test_networks_of_the_catalog_are_valid(tmp_path: Path, name: str) -> None:
    module, _, function = models.ALL[name].network.partition(":")
    (tmp_path / "ours.py").write_text(f"from {module} import {function}\n")
    spec = external.find(f"{tmp_path / 'ours.py'}:{function}")
    assert spec
    validate_model.check_trace(spec, models.ALL[name].sizes.nearest(32)[0])


# --- Converters -----------------------------------------------------------------------------------------------------


def coreml(spec: External) -> Run:
    return tiny_run("fp32", "coreml", model=spec, preprocess=Preprocess(size=32, crop=1.0))


REFUSED = {
    "y = y.clone(); y[:, [1, 3]] = 0.5": r"\w+",
}


@pytest.mark.parametrize("line", REFUSED)
def test_an_operator_that_core_ml_refuses_is_named_for_core_ml_alone(tmp_path: Path, line: str) -> None:
    spec = model(tmp_path, f"y = self.conv(x)\n{line}\nreturn self.head(y.mean((2, 3)))")
    run = coreml(spec)
    with pytest.raises(CheckFailed) as raised:
        validate_model.check(spec, 32, 4, run=run)
    said = str(raised.value)
    name = REFUSED[line]
    assert re.search(
        rf"^TARGET=coreml: coremltools [\d.]+ cannot convert `{name}` at \S*net\.py:{AT + 2}: \w+: .*; write it with",
        said,
    ), said
    assert "\n" not in said
    validate_model.check(spec, 32, 4, run=replace(run, target=targets.ALL["cpu"]))


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("y = y.unfold(2, 2, 2).mean(-1)", "unfold"),
        ("y = y.reshape(-1, 2, 4, 4, 4, 2, 8).transpose(3, 4).reshape(-1, 8, 16, 16)", "rank"),
    ],
)
def test_an_operator_that_only_core_ml_refuses_is_an_error_for_it_only(tmp_path: Path, line: str, rule: str) -> None:
    spec = model(tmp_path, f"y = self.conv(x)\n{line}\nreturn self.head(y.mean((2, 3)))")
    with pytest.raises(CheckFailed, match=rf"net\.py:{AT + 2}: error: {rule}: .*: TARGET=coreml: "):
        validate_model.check(spec, 32, 4, run=coreml(spec))
    for name in ("cpu", "onnxruntime", "rtx"):
        validate_model.check(spec, 32, 4, run=replace(coreml(spec), target=targets.ALL[name]))


def test_a_network_that_core_ml_supports_passes(tmp_path: Path) -> None:
    spec = model(tmp_path, "return self.head(f)")
    validate_model.check(spec, 32, 4, run=coreml(spec))
    validate_model.check_target(coreml(spec))


def test_a_lazy_layer_is_refused(tmp_path: Path) -> None:
    said = refused(model(tmp_path, "return self.late(f)", "self.late = nn.LazyLinear(10)"))
    assert said.startswith("`late.weight` of the new network has no shape yet")


def test_a_fault_in_an_imported_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "my_part.py").write_text("def twice(x):\n    return x if x.sum() > 0 else 2 * x\n")
    said = refused(model(tmp_path, "return self.head(twice(f))", module="\nfrom my_part import twice\n"))
    assert re.search(r"my_part\.py, line 2: a Python `if`", said)


def test_a_network_that_counts_its_queries_is_refused(tmp_path: Path) -> None:
    spec = model(
        tmp_path,
        "self.seen += 1\nreturn self.head(f) * self.seen",
        init="self.register_buffer('seen', torch.zeros(()))",
    )
    said = r"^in evaluation it changes its buffer `seen`; an engine keeps no state between queries$"
    assert re.search(said, refused(spec))


def test_a_norm_whose_gamma_is_computed_is_converted_as_it_is(tmp_path: Path) -> None:
    norm = "nn.functional.batch_norm(y, self.m, self.v, 1 + 0 * y.mean((0, 2, 3)))"
    forward = f"y = self.conv(x)\nreturn self.head({norm}.mean((2, 3)))"
    spec = model(tmp_path, forward, init="self.m = nn.Buffer(torch.zeros(8)); self.v = nn.Buffer(torch.ones(8))")
    validate_model.check(spec, 32, 10)
