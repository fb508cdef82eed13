"""User-supplied networks: the declarations of a file and of timm are read, and every error is one sentence."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from models.errors import BadRequest, CannotRunHere
from models.external import guard
from models.external import loader as external
from models.external.loader import External
from models.spec import Preprocess, Sizes

NET = """
from torch import nn

def net(classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)).eval()
"""
SPEC = """
from models.checkpoint import Format
from models.spec import ModelSpec, Preprocess, Sizes

FORMATS = (Format(name="somebody", signature="fc.weight"),)
SPEC = ModelSpec(
    name="my net/2", network="net", preprocess=Preprocess(size=48, crop=1.0), sizes=Sizes(multiple_of=8, minimum=16)
)
"""
needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed: it is none of the requirements"
)


def written(folder: Path, text: str, name: str = "net.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def found(request: str) -> External:
    spec = external.find(request)
    assert isinstance(spec, External)
    return spec


def refused(request: str) -> str:
    """Return the error for a model, raised when it is looked up or built."""
    with pytest.raises(BadRequest) as raised:
        found(request).build(10)
    said = str(raised.value)
    assert said.startswith(f"MODEL={request}: ") and "\n" not in said
    return said.removeprefix(f"MODEL={request}: ")


# --- A file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilevit_xs", "", "nobody", "net/py", "timm"])
def test_names_of_neither_form_are_left_to_the_catalog(name: str) -> None:
    assert external.find(name) is None


def test_a_file_alone_is_prepared_for_as_imagenet_is(tmp_path: Path) -> None:
    spec = found(f"{written(tmp_path / 'a folder: mine', NET)}:net")
    assert (spec.name, spec.family, spec.network) == ("net", "net", "net:net")
    assert (spec.preprocess, spec.sizes) == (Preprocess(size=224), Sizes(multiple_of=32, minimum=32))
    network = spec.build(7)
    assert network.training  # though the function returned it in evaluation mode
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert spec.head() == {"3.weight", "3.bias"}
    assert spec.formats == ()


def test_a_spec_beside_the_function_decides(tmp_path: Path) -> None:
    spec = found(f"{written(tmp_path, NET + SPEC)}:net")
    assert spec.name == "my_net_2"
    assert spec.preprocess == Preprocess(size=48, crop=1.0)
    assert 24 in spec.sizes and 12 not in spec.sizes
    assert [format.name for format in spec.formats] == ["somebody"]


def test_a_file_may_hold_several_variants_and_their_specs_in_a_tuple(tmp_path: Path) -> None:
    several = """
from models.spec import ModelSpec, Preprocess, Sizes
wide = narrow = net
SPECS = tuple(
    ModelSpec(name=name, network=name, preprocess=Preprocess(size=size), sizes=Sizes(multiple_of=16, minimum=16))
    for name, size in (("narrow", 32), ("wide", 64))
)
"""
    file = written(tmp_path, NET + several)
    assert [found(f"{file}:{name}").preprocess.size for name in ("narrow", "wide", "net")] == [32, 64, 224]


@pytest.mark.parametrize(
    ("function", "outputs"),
    [
        ("def net(classes): return nn.Linear(4, classes)", 10),
        ("def net(count): return nn.Linear(4, count)", 10),
        ("def net(pretrained=False, num_classes=1000): return nn.Linear(4, num_classes)", 10),
        ("def net(*, classes=1000): return nn.Linear(4, classes)", 10),
        ("def net(width=4): return nn.Linear(width, 5)", 5),
        ("def net(): return nn.Linear(4, 5)", 5),
        ("class net(nn.Linear):\n    def __init__(self, n_classes): super().__init__(4, n_classes)", 10),
    ],
)
def test_the_number_of_classes_is_passed_to_functions_that_accept_it(
    tmp_path: Path, function: str, outputs: int
) -> None:
    network = found(f"{written(tmp_path, f'from torch import nn{chr(10)}{function}')}:net").build(10)
    assert isinstance(network, nn.Linear)
    assert network.out_features == outputs


def test_a_file_imports_from_its_own_folder_and_leaves_no_trace(tmp_path: Path) -> None:
    written(tmp_path, "WIDTH = 12\n", "my_sizes.py")
    written(tmp_path, "DEPTH = 3\n", "my_depths.py")
    text = "import my_sizes\nfrom torch import nn\ndef net(classes):\n    import my_depths\n    return nn.Linear("
    file = written(tmp_path, text + "my_sizes.WIDTH, my_depths.DEPTH)\n")
    before = list(sys.path)
    network = found(f"{file}:net").build(10)
    assert isinstance(network, nn.Linear) and (network.in_features, network.out_features) == (12, 3)
    assert sys.path == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my_depths.py", "my_sizes.py", "net.py"]


def test_a_file_may_be_called_like_a_package(tmp_path: Path) -> None:
    file = written(tmp_path, NET, "models.py")
    assert found(f"{file}:net").name == "models_net"
    import models

    assert hasattr(models, "ALL")


def test_a_path_may_begin_with_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, NET)
    assert found("~/net.py:net").folder == tmp_path


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def net(classes)\n    pass", r"net\.py, line 1: SyntaxError: expected ':'$"),
        (
            "import os\nimport not_there_at_all",
            r"net\.py, line 2: ModuleNotFoundError: No module named 'not_there_at_all'$",
        ),
        ("import sys\nsys.exit('bye')", r"net\.py, line 2: SystemExit: bye$"),
        (
            "from . import other",
            r"net\.py, line 1: ImportError: attempted relative import with no known parent package$",
        ),
        ("def nett(classes): pass", r"defines no function `net`, as in MODEL=.*net\.py:nett$"),
        ("net = 3", r"defines no function `net`; it defines no functions$"),
        ("def net(classes):\n    raise ValueError('first\\nsecond')", r"net\.py, line 2: ValueError: first$"),
        ("import json\ndef net(classes):\n    json.loads('x')", r"net\.py, line 3: JSONDecodeError: Expecting value"),
        ("def net(classes): assert classes == 3", r"net\.py, line 1: AssertionError$"),
        ("def net(width, depth): pass", r"^TypeError: net\(\) missing 1 required positional argument: 'depth'$"),
        ("def net(classes): return {'model': 1}", r"^it returned a value of type dict, expected a torch\.nn\.Module$"),
        ("import torch\ndef net(classes): return torch.nn.Linear", r"^it returned a value of type type, expected"),
        (NET + SPEC.replace("size=48, ", ""), r"net\.py, line \d+: TypeError: .* argument: 'size'$"),
        (NET + SPEC.replace("size=48", "size='48'"), r"ModelSpec of net has sizes that are not positive integers$"),
        (NET + SPEC.replace("size=48", "size=47"), r"has preprocess\.size=47 pixels, which is not among its `sizes`$"),
        (NET + SPEC.replace("multiple_of=8", "multiple_of=0"), r"not positive integers$"),
        (NET + SPEC.replace("multiple_of=8", "multiple_of=2000"), r"allows no size: no multiple of 2000 is from 16 to"),
        (NET + SPEC.replace("crop=1.0", "crop=0"), r"has crop=0, expected a crop above 0 and up to 1$"),
        (NET + SPEC.replace("crop=1.0", "crop=None"), r"has crop=None, expected a crop above 0 and up to 1$"),
        (NET + SPEC.replace("crop=1.0", "crop='1'"), r"has crop='1', expected a crop above 0 and up to 1$"),
        (NET + SPEC.replace("crop=1.0", "crop=float('nan')"), r"has crop=nan, expected a crop above 0 and up to 1$"),
        (NET + SPEC.replace("crop=1.0", "mean='abc'"), r"has mean='abc', expected three means and three positive"),
        (NET + SPEC.replace("crop=1.0", "mean=None"), r"has mean=None, expected three means and three positive"),
        (NET + SPEC.replace("crop=1.0", "mean=0.5"), r"has mean=0\.5, expected three means and three positive"),
        (NET + SPEC.replace("crop=1.0", "mean=('a', 'b', 'c')"), r"has mean=\('a', 'b', 'c'\), expected three means"),
        (NET + SPEC.replace("crop=1.0", "std=(1.0, None, 1.0)"), r"has std=\(1\.0, None, 1\.0\), expected three means"),
        (
            NET + SPEC.replace("crop=1.0", "interpolation=2"),
            r"has interpolation=2, expected bilinear or bicubic",
        ),
        (NET + SPEC.replace("crop=1.0", "background='white'"), r"has background='white', expected three integers from"),
        (NET + SPEC.replace("crop=1.0", "background=None"), r"has background=None, expected three integers from 0 to"),
        (NET + SPEC.replace("crop=1.0", "background=(0, 0)"), r"has background=\(0, 0\), expected three integers from"),
        (
            NET + SPEC.replace("crop=1.0", "background=(0, 0, 256)"),
            r"has background=\(0, 0, 256\), expected three inte",
        ),
        (
            NET + SPEC.replace("crop=1.0", "background=(0, 0.5, 1)"),
            r"has background=\(0, 0\.5, 1\), expected three int",
        ),
        (NET + SPEC.replace("crop=1.0", "interpolation=[]"), r"has interpolation=\[\], expected bilinear"),
        (
            NET + SPEC.replace('network="net"', "network=None"),
            r"a ModelSpec has network=None, expected the name of a fu",
        ),
        (NET + SPEC.replace('network="net"', "network=net"), r"a ModelSpec has network=<function net .*, expected the"),
        (NET + SPEC.replace('"my net/2"', "None"), r"needs a `name` of type str"),
        (NET + SPEC.replace('"my net/2"', "b'net'"), r"needs a `name` of type str"),
        (NET + SPEC.replace("size=48", "size=True"), r"has sizes that are not positive integers$"),
        (NET + SPEC.replace("size=48", "size=48.0"), r"has sizes that are not positive integers$"),
        (
            NET + SPEC.replace("minimum=16", "minimum=16, maximum=10**9").replace("size=48", "size=10**8"),
            r"at most 4096",
        ),
        (
            NET + SPEC.replace('network="net"', 'network="net", classes="ten"'),
            r"has classes='ten', expected an integer",
        ),
        (NET + SPEC.replace('network="net"', 'network="net", top1="78"'), r"has top1='78', expected percent, or None$"),
        (NET + SPEC.replace('network="net"', 'network="net", hub=3'), r"needs `source` and `hub` of type str$"),
        (NET + SPEC.replace("crop=1.0", "std=(1.0, 0.0, 1.0)"), r"three positive deviations: red, green, blue$"),
        (NET + SPEC.replace("Sizes(multiple_of=8, minimum=16)", "(8, 16)"), r"needs a `name` of type str, .* `sizes="),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) and "\n" in value else "",
)
def test_an_error_in_a_file_is_one_sentence_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    assert re.search(sentence, refused(f"{written(tmp_path, text)}:net"))


@pytest.mark.parametrize("formats", ["None", "3", "('first',)", "{'a': 1}", "Format"])
def test_invalid_formats_are_refused(tmp_path: Path, formats: str) -> None:
    text = NET + SPEC.replace('(Format(name="somebody", signature="fc.weight"),)', formats)
    with pytest.raises(BadRequest, match=r"its FORMATS is not a tuple of models\.checkpoint\.Format$"):
        found(f"{written(tmp_path, text)}:net").formats  # noqa: B018


def test_a_format_whose_pattern_is_none_is_refused(tmp_path: Path) -> None:
    text = NET + SPEC.replace('signature="fc.weight"', 'signature="fc.(weight"')
    with pytest.raises(BadRequest, match=r"FORMATS: \w*(error|Error): missing \), unterminated subpattern"):
        found(f"{written(tmp_path, text)}:net").formats  # noqa: B018


def test_numbers_of_numpy_become_pythons(tmp_path: Path) -> None:
    numbers = "import numpy\nONE = numpy.float32(1)\n"
    text = (
        NET
        + numbers
        + SPEC.replace(
            "crop=1.0", "crop=ONE, mean=numpy.zeros(3).tolist(), std=[ONE, ONE, 2], background=[numpy.uint8(9)] * 3"
        )
    )
    preprocess = found(f"{written(tmp_path, text)}:net").preprocess
    assert preprocess == Preprocess(size=48, crop=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 2.0), background=(9, 9, 9))
    assert {type(number) for number in (preprocess.crop, *preprocess.mean, *preprocess.std)} == {float}
    assert {type(number) for number in preprocess.background} == {int}


CLASS = """
from torch import nn

class Odd(BaseException):
    def __str__(self):
        raise ValueError("no words")

class net(nn.Module):
    def __init__(self, classes):
        super().__init__()
"""


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("raise Odd()", r"^\S*net\.py, line 11: Odd$"),
        ("raise BaseException('end')", r"^\S*net\.py, line 11: BaseException: end$"),
        ("import sys; sys.exit(0)", r"^\S*net\.py, line 11: SystemExit: 0$"),
        ("raise GeneratorExit", r"^\S*net\.py, line 11: GeneratorExit$"),
        ("raise ValueError('\\x1b[31mred\\x07')", r"^\S*net\.py, line 11: ValueError: \?\[31mred\?$"),
        ("while True: pass", r"^\S*net\.py, line 11: not finished after 0\.5 s; an endless loop, or too much work"),
        ("import time; time.sleep(60)", r"^\S*net\.py, line 11: not finished after 0\.5 s"),
        ("self.again = self", r"^its modules form a cycle: `again` is `the network` again; store such a reference in"),
        (
            "self.a = nn.Sequential(nn.ReLU()); self.a.b = nn.Sequential(self.a)",
            r"^its modules form a cycle: `a\.b\.0` is `a` again; store such a reference in a tuple",
        ),
        ("self.train = lambda mode=True: 1 / 0", r"^\S*net\.py, line 11: ZeroDivisionError: division by zero$"),
    ],
)
def test_every_failure_while_building_a_network_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, sentence: str
) -> None:
    monkeypatch.setattr(guard, "LIMIT_S", 0.5)
    said = refused(f"{written(tmp_path, f'{CLASS}        {line}{chr(10)}')}:net")
    assert re.search(sentence, said), said


@pytest.mark.parametrize("line", ["while True: pass", "try:\n    while True: pass\nexcept Exception: pass"])
def test_a_file_that_never_ends_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr(guard, "LIMIT_S", 0.5)
    said = refused(f"{written(tmp_path, f'{line}{chr(10)}')}:net")
    assert re.search(r"^\S*net\.py, line [12]: not finished after 0\.5 s", said), said


def test_shared_modules_are_no_circle(tmp_path: Path) -> None:
    line = "part = nn.Linear(2, 2); self.a = part; self.b = nn.Sequential(part, nn.Sequential(part)); self.none = None"
    found(f"{written(tmp_path, f'{CLASS}        {line}{chr(10)}')}:net").build(10)


def test_a_chain_of_many_modules_is_no_circle(tmp_path: Path) -> None:
    line = "self.parts = nn.Sequential(*(nn.ReLU() for _ in range(3000)))"
    found(f"{written(tmp_path, f'{CLASS}        {line}{chr(10)}')}:net").build(10)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")  # users still have it
@pytest.mark.parametrize(
    "norm",
    ["torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm", "torch.nn.utils.parametrizations.weight_norm"],
)
def test_norms_of_weights_can_be_copied(tmp_path: Path, norm: str) -> None:
    text = f"import torch\n{NET}".replace("nn.Conv2d(3, 8, 3)", f"{norm}(nn.Conv2d(3, 8, 3))")
    network = found(f"{written(tmp_path, text)}:net").build(10).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(copy.deepcopy(network)(images), network(images))
    network.requires_grad_(True).train()(images).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_line_is_that_of_the_file_that_fails(tmp_path: Path) -> None:
    written(tmp_path, "\n\nraise RuntimeError('no luck')\n", "part_that_fails.py")
    said = refused(f"{written(tmp_path, 'import part_that_fails')}:net")
    assert re.search(r"part_that_fails\.py, line 3: RuntimeError: no luck$", said)


def test_a_path_that_is_not_a_python_file_is_refused(tmp_path: Path) -> None:
    assert "there is no file `net`; give <file>.py:<function>, timm:<name>, or" in refused("net:net")
    assert "there is no file `~nobody-of-this-name/n.py`" in refused("~nobody-of-this-name/n.py:net")
    assert "there is no file ``" in refused(":net")
    assert "is not a Python file" in refused(f"{written(tmp_path, NET, 'net.txt')}:net")
    file = written(tmp_path, NET)
    assert refused(f"{file}").startswith(f"name the function that returns the network, as in MODEL={file}:net")
    assert refused(f"{file}:").endswith(f"MODEL={file}:net")
    assert "there is no file" in refused(f"{tmp_path}/x.py")


def test_a_long_name_is_cut_for_the_folders(tmp_path: Path) -> None:
    text = NET + SPEC.replace("my net/2", "../" + "é" * 300)
    name = found(f"{written(tmp_path, text)}:net").name
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", name) and not name.startswith(".")


# --- timm -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_without_timm_the_error_has_the_install_command() -> None:
    with pytest.raises(CannotRunHere) as raised:
        external.find("timm:resnet18")
    assert re.fullmatch(
        r"MODEL=timm:resnet18: timm cannot be imported here \(ModuleNotFoundError: No module named 'timm'\); it is not "
        r"among the requirements: `\S+ -m pip install --upgrade timm torchvision torch==[\d.]+ "
        r"--extra-index-url https://download\.pytorch\.org/whl/\w+` installs it and the matching torchvision",
        str(raised.value),
    )


def test_a_timm_that_fails_to_import_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example if its torchvision was built for a different torch."""
    written(tmp_path / "timm", "raise RuntimeError('operator torchvision::nms does not exist')", "__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(CannotRunHere, match=r"\(RuntimeError: operator torchvision::nms does not exist\); it is not"):
        external.find("timm:resnet18")


@needs_timm
def test_preprocessing_of_timm_models_is_read_from_timm() -> None:
    spec = found("timm:resnet18")
    assert (spec.name, spec.family, spec.hub) == ("timm_resnet18", "timm", "timm/resnet18.a1_in1k")
    assert spec.preprocess == Preprocess(size=224, crop=0.95)
    assert 64 in spec.sizes and 48 not in spec.sizes
    assert spec.build(7)(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    assert spec.head() == {"fc.weight", "fc.bias"}
    assert spec.formats == ()


@needs_timm
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_tiny_patch16_224", Sizes(multiple_of=224, minimum=224, maximum=224)),
        ("swin_tiny_patch4_window7_224.ms_in1k", Sizes(multiple_of=224, minimum=224, maximum=224)),
        ("efficientnet_b1", Sizes(multiple_of=16, minimum=32)),
    ],
)
def test_input_sizes_of_timm_models_are_read_from_timm(name: str, sizes: Sizes) -> None:
    spec = found(f"timm:{name}")
    assert spec.sizes == sizes
    assert spec.preprocess.size in sizes


@needs_timm
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet_18", "; did you mean timm:resnet18?"),
        ("resnet18.a1_in2k", "; did you mean timm:resnet18.a1_in1k?"),
        ("", ""),
        ("hf-hub:timm/resnet18.a1_in1k", ""),
    ],
)
def test_an_unknown_timm_name_is_refused(name: str, hint: str) -> None:
    said = refused(f"timm:{name}")
    assert re.match(r"timm [\d.]+ has no such model", said)
    assert hint in said
