"""Power settings of a Jetson: set by name while engines are timed, and restored."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from targets.runner import power
from targets.runner.errors import Unable

# NVIDIA's /etc/nvpmodel.conf of the Jetson Orin Nano has these lines; names differ between modules.
CONFIGURATION = """\
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
"""
# A sudo that runs nothing: it logs, and nvpmodel's mode is a file.
SUDO = """\
#!/bin/sh
shift
echo "$*" >> {root}/log
case "$*" in *nvpmodel*) [ -e {root}/reboot ] || printf 'pmode:000%s' "$3" > {root}/var/lib/nvpmodel/status;; esac
[ ! -e {root}/refused ] || case "$*" in *"$(cat {root}/refused)") echo "sudo: a password is required"; exit 1;; esac
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("etc", "var/lib/nvpmodel", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "etc" / "nvpmodel.conf").write_text(CONFIGURATION)
    (tmp_path / "var" / "lib" / "nvpmodel" / "status").write_text("pmode:0000")
    (tmp_path / "bin" / "sudo").write_text(SUDO.format(root=tmp_path))
    (tmp_path / "bin" / "sudo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def commands(root: Path) -> list[str]:
    log = root / "log"
    return log.read_text().replace(f"{root}/", "").splitlines() if log.exists() else []


def test_mode_and_clocks_are_set_and_restored(root: Path) -> None:
    restore = power.applied("MAXN_SUPER", True, root / "clocks", root)
    assert commands(root) == [
        "usr/sbin/nvpmodel -m 2",
        "usr/bin/jetson_clocks --store clocks",
        "usr/bin/jetson_clocks",
    ]
    restore()
    restore()
    assert commands(root)[3:] == ["usr/bin/jetson_clocks --restore clocks", "usr/sbin/nvpmodel -m 0"]


@pytest.mark.parametrize("mode", ["", "15W"])
def test_nothing_is_set_that_is_set_already(root: Path, mode: str) -> None:
    power.applied(mode, False, root / "clocks", root)()
    assert commands(root) == []


def test_a_mode_that_the_board_does_not_have_is_refused(root: Path) -> None:
    with pytest.raises(Unable, match=r"^the device has no power mode MAXN; modes: 15W, 25W, MAXN_SUPER: correct"):
        power.applied("MAXN", True, root / "clocks", root)
    assert commands(root) == []


def test_a_mode_that_needs_a_reboot_is_named(root: Path) -> None:
    (root / "reboot").touch()
    with pytest.raises(Unable, match=r"power mode 25W needs a reboot: run `sudo nvpmodel -m 1` on the device"):
        power.applied("25W", False, root / "clocks", root)


def test_without_permission_the_sentence_names_the_remedy(root: Path) -> None:
    (root / "refused").touch()
    with pytest.raises(Unable, match=r"failed \(sudo: a password is required\): allow it in /etc/sudoers.d, or leave"):
        power.applied("25W", False, root / "clocks", root)


def test_the_mode_is_restored_if_locking_the_clocks_fails(root: Path) -> None:
    (root / "refused").write_text("jetson_clocks")
    with pytest.raises(Unable, match=r"/usr/bin/jetson_clocks` failed"):
        power.applied("25W", True, root / "clocks", root)
    assert commands(root) == [
        "usr/sbin/nvpmodel -m 1",
        "usr/bin/jetson_clocks --store clocks",
        "usr/bin/jetson_clocks",
        "usr/bin/jetson_clocks --restore clocks",
        "usr/sbin/nvpmodel -m 0",
    ]


def test_the_mode_is_restored_if_restoring_the_clocks_fails(root: Path) -> None:
    restore = power.applied("25W", True, root / "clocks", root)
    (root / "refused").write_text(f"--restore {root}/clocks")
    with pytest.raises(Unable, match=r"--restore .* failed"):
        restore()
    assert commands(root)[-1] == "usr/sbin/nvpmodel -m 0"


def test_a_machine_that_is_no_jetson_has_no_modes(tmp_path: Path) -> None:
    with pytest.raises(Unable, match=r"modes: none: /etc/nvpmodel.conf is missing"):
        power.applied("MAXN", False, tmp_path / "clocks", tmp_path)
