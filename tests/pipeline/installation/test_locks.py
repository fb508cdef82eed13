"""Lock files: hashes of every package, equal versions for all systems, and the CPU build from the CUDA build."""

from __future__ import annotations

import re

from pipeline.installation import locks
from tests.support.tiny import ROOT


def test_the_environment_is_pinned_with_the_hashes_of_its_files() -> None:
    wanted = re.findall(r"^([A-Za-z][\w.-]*)", (ROOT / "requirements.in").read_text(), re.M)
    for name in ("requirements.lock", "requirements-cuda.lock", "requirements-macos.lock"):
        text = (ROOT / name).read_text()
        pinned = locks.entries(text)
        assert "".join(pinned) == text  # nothing but requirements
        for entry in pinned:
            first, *hashes = [line.removesuffix(" \\") for line in entry.splitlines()]
            assert re.fullmatch(r"[\w.-]+==[\w.+!-]+( ; .+)?", first)
            assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", line) for line in hashes)
            # torch's CPU build has other files wherever it is taken from.
            assert hashes or (first, name) == ("torch==2.13.0", "requirements.lock")
        names = {normalized(entry.partition("==")[0]) for entry in pinned}
        missing = {normalized(name) for name in wanted} - names
        assert missing == ({"tensorrt-rtx-cu13"} if "macos" in name else set())


def normalized(name: str) -> str:
    return name.lower().replace("_", "-")


def test_the_lock_files_agree_on_shared_packages() -> None:
    pins = [
        dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / f"requirements{name}.lock").read_text(), re.M))
        for name in ("", "-cuda", "-macos")
    ]
    for one in pins:
        for other in pins:
            assert {name: one[name] for name in one.keys() & other.keys()} == {
                name: other[name] for name in one.keys() & other.keys()
            }
    assert [name for name in pins[0] if name.startswith(("nvidia-", "cuda-", "triton"))] == []
    assert any(name.startswith("nvidia-") for name in pins[1])


def test_a_lock_of_the_cpu_build_is_that_of_the_cuda_build_without_cuda() -> None:
    digest = "0" * 64
    given = "".join(
        f"{name}==1.0 \\\n    --hash=sha256:{digest} \\\n    --hash=sha256:{digest}\n"
        for name in ("numpy", "nvidia-cublas", "tensorrt-rtx", "torch", "torchao", "triton", "tritonclient")
    )
    marker = ' ; sys_platform == "linux" and platform_machine == "x86_64"'
    found = [entry.splitlines() for entry in locks.entries(locks.cpu(given))]
    assert [lines[0] for lines in found] == [
        "numpy==1.0 \\",
        f"tensorrt-rtx==1.0{marker} \\",
        "torch==1.0",
        "torchao==1.0 \\",
        "tritonclient==1.0 \\",
    ]
    assert [len(lines) for lines in found] == [3, 3, 1, 3, 3]
