"""Files and output of programs: missing or unreadable is None, and numbers have their units."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from targets.runner.system.reading import (
    cpu_clusters,
    cpu_list,
    files,
    gpu_clocks,
    megahertz,
    number,
    output,
    text,
)
from tests.support.devices import boards


def test_text_has_no_surrounding_space_and_no_nul_bytes(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"NVIDIA Orin\xff Nano\0\n")
    assert text(tmp_path / "model") == "NVIDIA Orin\ufffd Nano"
    assert text(tmp_path / "absent") is None
    assert text(tmp_path) is None, "a folder has no text"


@pytest.mark.parametrize(
    ("contents", "value"), [("612000000\n", 612000000), ("-256000", -256000), ("", None), ("1.5", None), ("0x10", None)]
)
def test_a_number_is_a_whole_number_or_none(tmp_path: Path, contents: str, value: int | None) -> None:
    (tmp_path / "value").write_text(contents)
    assert number(tmp_path / "value") == value


def test_frequencies_are_converted_to_mhz(tmp_path: Path) -> None:
    boards.write(tmp_path, {"khz": 1984000, "hz": 612000000})
    assert (megahertz(tmp_path / "khz", 1000), megahertz(tmp_path / "hz", 1)) == (1984.0, 612.0)
    assert megahertz(tmp_path / "absent", 1) is None


def test_files_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for zone in (10, 2, 1):
        boards.write(tmp_path, {f"zone{zone}/temp": 0})
    assert [path.name for path in files(tmp_path, "zone*")] == ["zone1", "zone2", "zone10"]
    assert files(tmp_path, "absent*") == []


def test_clusters_are_named_by_their_cpus_and_those_that_are_off_are_left_out(tmp_path: Path) -> None:
    policies = "sys/devices/system/cpu/cpufreq/policy"
    boards.write(tmp_path, {f"{policies}{name}/affected_cpus": cpus for name, cpus in (("0", "0 1 2"), ("4", "4"))})
    boards.write(tmp_path, {f"{policies}6/affected_cpus": ""})
    assert {cpus: policy.name for cpus, policy in cpu_clusters(tmp_path).items()} == {"0-2": "policy0", "4": "policy4"}


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("17000000.ga10b", True),
        ("17000000.gpu", True),
        ("gpu-gpc-0", True),
        ("gpu-nvd-0", False),  # the video engine of Thor
        ("15340000.vic", False),
    ],
)
def test_of_the_scaled_devices_the_gpus_are_found(tmp_path: Path, device: str, gpu: bool) -> None:
    boards.write(tmp_path, {f"sys/class/devfreq/{device}/cur_freq": 1})
    assert [folder.name for folder in gpu_clocks(tmp_path)] == [device] * gpu


def test_the_output_of_a_program_that_succeeds_is_returned(tmp_path: Path) -> None:
    boards.program(tmp_path, "prints", 'echo " $* "; echo noise >&2')
    assert output(tmp_path / "prints", "-q", "x y") == "-q x y"
    boards.program(tmp_path, "fails", "echo something; exit 1")
    assert output(tmp_path / "fails") is None
    boards.write(tmp_path, {"no program": ""})
    assert output(tmp_path / "no program") is None


def test_a_program_that_hangs_is_stopped(tmp_path: Path) -> None:
    boards.program(tmp_path, "hangs", "exec sleep 60")
    started = time.monotonic()
    assert output(tmp_path / "hangs", timeout_s=0.1) is None
    assert time.monotonic() - started < 3.0
    assert output(tmp_path / "absent") is None


def test_lists_of_cpus() -> None:
    assert cpu_list("0,3-5") == cpu_list("0 3 4 5") == [0, 3, 4, 5]
    assert cpu_list("") == []
