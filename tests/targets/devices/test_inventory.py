"""`devices.toml`: devices by name, and one sentence with the line for each mistake."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from models.errors import BadRequest
from targets.devices import inventory
from targets.devices.inventory import Device

TARGETS = ["jetson", "onnxruntime", "cpu"]
GOOD = """\
# on the desk
[orin]
targets = ["jetson", "onnxruntime"]
host = "orin.local"
user = "nvidia"
port = 2222
lock_clocks = true
tags = ["desk"]

[pi]
targets = ["onnxruntime"]
host = "pi"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "devices.toml"


def test_devices_by_name_with_defaults(file: Path) -> None:
    file.write_text(GOOD)
    orin, pi = inventory.load(file, TARGETS).values()
    assert orin == Device(
        name="orin",
        targets=("jetson", "onnxruntime"),
        host="orin.local",
        user="nvidia",
        port=2222,
        lock_clocks=True,
        tags=("desk",),
    )
    assert (pi.user, pi.port, pi.python, pi.lock_clocks) == ("", None, "python3", False)


def test_without_the_file_there_are_no_devices(file: Path) -> None:
    assert inventory.load(file, TARGETS) == {}
    with pytest.raises(BadRequest, match=r"DEVICE=orin: .*devices.toml does not exist; write a table `\[orin\]`"):
        inventory.find(file, "orin", TARGETS)


def test_a_misspelt_device_gets_the_nearest_name(file: Path) -> None:
    file.write_text(GOOD)
    with pytest.raises(BadRequest, match=r"DEVICE=orinn: .* has no such device; did you mean orin\?"):
        inventory.find(file, "orinn", TARGETS)
    with pytest.raises(BadRequest, match=r"has no such device; devices: orin, pi$"):
        inventory.find(file, "xyz", TARGETS)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[orin\nhost = 1\n", r"devices.toml: .*line 1.*; expected TOML"),
        ("host = 'x'\n", r"line 1: `host` is not a table; write `\[device\]` above"),
        ("\n[a]\nhost='x'\n", r"line 2: `a` has no `targets`; write `targets = "),
        ("[a]\ntargets=['cpu']\n", r"line 1: `a` has no `host`; write `host = "),
        ("[a]\ntargets=['cpu']\nhost='x'\nprot=3\n", r"line 4: `prot` is no key of a device; did you mean `port`\?"),
        ("[a]\ntargets=['cpu']\nhost='x'\nport='3'\n", r"line 4: `port = '3'`: expected a number"),
        ("[a]\ntargets=['cpu']\nhost='x'\nport=true\n", r"line 4: `port = True`: expected a number"),
        ("[a]\ntargets=['cpu']\nhost='x'\nport=70000\n", r"line 4: .*expected a port from 1 to 65535"),
        ("[a]\ntargets='cpu'\nhost='x'\n", r"line 2: `targets = 'cpu'`: expected a list of texts"),
        ("[a]\ntargets=[1]\nhost='x'\n", r"line 2: .*expected a list of texts"),
        ("[a]\ntargets=['cpu']\nhost='-oProxyCommand=touch x'\n", r"line 3: .*this is no host"),
        ("[a]\ntargets=['cpu']\nhost='x y'\n", r"line 3: .*this is no host"),
        ("[a]\ntargets=['cpu']\nhost=''\n", r"line 3: .*expected a text without control characters"),
        ("[a]\ntargets=['cpu']\nhost='x'\nuser='-l'\n", r"line 4: .*this is no user"),
        ("[a]\ntargets=['cpu']\nhost='x'\ncontainer='a b'\n", r"line 4: .*this is no image"),
        ("[a]\ntargets=['cpu']\nhost='x'\npython=\"a\\u0007\"\n", r"line 4: .*without control characters"),
        (
            "[a]\ntargets=['onxruntime']\nhost='x'\n",
            r"line 2: .*; did you mean `onnxruntime`\?",
        ),
        ("[a]\ntargets=['coreml']\nhost='x'\n", r"`coreml` is no target that runs on devices; targets: jetson, onnx"),
        ("[a]\ntargets=[]\nhost='x'\n", r"line 2: .*expected at least one of jetson, onnxruntime, cpu"),
        ("[a.b]\ntargets=['cpu']\nhost='x'\n", r"line 1: `b` is no key of a device; write `\[\"a.b\"\]` for a device"),
        ("x = " + "[" * 5000 + "]" * 5000, r"expected TOML such as"),
        ("# x" * 400_000, r"it has more than 1 MiB; expected a text file"),
        ("[local]\ntargets=['cpu']\nhost='x'\n", r"line 1: `local` is no name of a device"),
        ("['-x']\ntargets=['cpu']\nhost='x'\n", r"line 1: `-x` is no name of a device"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_line(file: Path, text: str, sentence: str) -> None:
    file.write_text(text)
    with pytest.raises(BadRequest, match=sentence) as raised:
        inventory.load(file, TARGETS)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(str(file))


def test_a_byte_order_mark_does_no_harm(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert list(inventory.load(file, TARGETS)) == ["orin", "pi"]


def test_what_is_no_file_is_named_and_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, kind in (
        (tmp_path, "a folder"),
        (tmp_path / "fifo", "a FIFO"),
        (Path("/dev/zero"), "a character device"),
    ):
        with pytest.raises(BadRequest, match=f"this is {kind}, not a file; expected a text file"):
            inventory.load(path, TARGETS)
