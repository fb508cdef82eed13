"""Number of threads for runtimes on this machine's CPU: affinity, and quotas of control groups of both versions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from targets.runner.cpu import threads
from tests.support.tiny import ROOT

HERE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def counted(tmp_path: Path, stated: str, files: dict[str, str]) -> int:
    """Return `threads` for the cgroup entries `stated` and the files `files`."""
    (tmp_path / "cgroup").write_text(stated)
    for name, content in files.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(content)
    return threads(tmp_path / "cgroup", tmp_path / "mounted")


GROUP = "cpu,cpuacct/docker/abc/cpu.cfs"
V1 = "5:memory:/x\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    ("stated", "files", "expected"),
    [
        ("", {}, HERE),
        ("0::/\n", {"cpu.max": "max 100000\n"}, HERE),
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "199999 100000\n"}, 1),
        ("0::/\n", {"cpu.max": f"{HERE * 50_000} 50000\n"}, HERE),
        ("0::/\n", {"cpu.max": f"{(HERE + 7) * 100_000} 100000\n"}, HERE),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "100000 100000\n"}, 1),  # the tightest one holds
        ("0::/a/b\n", {"a/c/cpu.max": "100000 100000\n"}, HERE),
        ("0::/host/path\n", {"cpu.max": "100000 100000\n"}, 1),  # a container that has its own group for a root
        ("0::/../a\n", {"a/cpu.max": "100000 100000\n"}, 1),
        ("0::/a:b\n", {"a:b/cpu.max": "100000 100000\n"}, 1),
        (V1, {f"{GROUP}_quota_us": "-1", f"{GROUP}_period_us": "100000"}, HERE),
        (V1, {f"{GROUP}_quota_us": "100000", f"{GROUP}_period_us": "100000"}, 1),
        (V1, {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        (V1, {"memory/x/cpu.cfs_quota_us": "100000\n", "memory/x/cpu.cfs_period_us": "100000\n"}, HERE),
        ("0::/\n", {"cpu.max": "nonsense\n"}, HERE),
        ("0::/\n", {"cpu.max": "100000 0\n"}, HERE),
        ("nonsense\n", {"cpu.max": "100000 100000\n"}, HERE),
    ],
)  # fmt: skip
def test_a_quota_limits_the_threads(tmp_path: Path, stated: str, files: dict[str, str], expected: int) -> None:
    assert counted(tmp_path, stated, files) == expected


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert threads(tmp_path / "nowhere", tmp_path) == HERE


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_an_affinity_limits_the_threads() -> None:
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from targets.runner.cpu import threads; "
    )
    result = subprocess.run(
        [sys.executable, "-c", script + "print(threads())"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "1\n"
