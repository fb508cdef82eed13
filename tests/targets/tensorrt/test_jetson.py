"""Jetson: the command after a bundle, and the reason why no engine is built on another machine."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from models.errors import CannotRunHere
from targets.base import Bundles
from targets.runner import cuda
from targets.tensorrt import jetson, nvidia
from targets.tensorrt import target as tensorrt_target
from tests.support.tiny_export import tiny_export


def test_the_next_command_survives_spaces() -> None:
    bundle = Path("/tmp/my bundles/it's")
    assert isinstance(jetson.TARGET, Bundles) and isinstance(nvidia.TARGET, Bundles)
    copy, there = jetson.TARGET.next_command(bundle).split(" && ssh <user>@<jetson> ")
    assert shlex.split(copy) == ["scp", "-r", str(bundle), "<user>@<jetson>:"]
    (remote,) = shlex.split(there)
    assert shlex.split(remote) == ["cd", "it's", "&&", "python3", "-m", "runner"]
    copied, entered, run = (shlex.split(part) for part in nvidia.TARGET.next_command(bundle).split(" && "))
    assert (copied, entered) == (["cp", "-r", str(bundle), "it's"], ["cd", "it's"])
    assert run == ["python3", "-m", "runner"]


def test_elsewhere_than_on_a_jetson_the_bundle_is_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jetson, "_RELEASE", tmp_path / "nv_tegra_release")
    monkeypatch.setattr(jetson, "_DEVICE_TREE", tmp_path / "compatible")
    assert "copy the bundle to a Jetson" in str(jetson.TARGET.missing())
    (tmp_path / "compatible").write_bytes(b"nvidia,p3768-0000\0nvidia,tegra234\0")
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert "it comes with JetPack" in str(jetson.TARGET.missing())


@pytest.mark.parametrize("target", [jetson.TARGET, nvidia.TARGET])
def test_a_tensorrt_that_does_not_import_is_missing_and_named(
    target: jetson.JetsonTarget | nvidia.NvidiaTarget, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tensorrt.py").write_text(
        "raise ImportError('libnvdla_compiler.so: cannot open shared object file: No such file or directory')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(jetson, "_RELEASE", tmp_path)
    for module in (jetson, nvidia, tensorrt_target):
        monkeypatch.setattr(module, "find_gpu", lambda: cuda.Gpu("Orin", (8, 7), 8 << 30))
    for why_not in (target.missing(), target.not_executed()):
        assert why_not is not None
        assert why_not.startswith("the tensorrt package is there, but does not import (libnvdla_compiler.so: cannot")
        assert "`sudo apt install nvidia-l4t-dla-compiler`" in why_not
    with pytest.raises(CannotRunHere, match="does not import"):
        target.build(tiny_export(tmp_path / "export", "fp32"), tmp_path)
