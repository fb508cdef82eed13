"""Telemetry: snapshots with and without `tegrastats`, series of samples, and this machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from targets.runner.telemetry import Sampler, Snapshot, snapshot, summarize
from tests.support.devices import boards

LINE = "CPU [0%@729,off] EMC_FREQ 43%@2133 GR3D_FREQ 63%@[621] cpu@53.968C VDD_IN 12479mW/12479mW VDD_SOC 2817mW/2817mW"


def test_tegrastats_completes_what_sysfs_lacks(tmp_path: Path) -> None:
    boards.write(
        tmp_path, {"sys/class/thermal/thermal_zone0/type": "tj", "sys/class/thermal/thermal_zone0/temp": 40000}
    )
    boards.program(tmp_path, "usr/bin/tegrastats", f"echo '{LINE}'; exec sleep 60")
    assert boards.known(tmp_path) == {
        "cpu_mhz": {"0": 729.0},
        "gpu_mhz": 621.0,
        "gpu_load": 0.63,
        "emc_mhz": 2133.0,
        "temperatures_c": {"tj": 40.0},
        "power_mw": {"VDD_IN": 12479.0, "VDD_SOC": 2817.0},
        "board_power_mw": 12479.0,
    }


def test_tegrastats_is_not_started_where_sysfs_has_all(tmp_path: Path) -> None:
    boards.program(boards.orin(tmp_path), "usr/bin/tegrastats", f"touch {tmp_path}/started; echo '{LINE}'")
    assert boards.known(tmp_path)["gpu_mhz"] == 612.0
    assert not (tmp_path / "started").exists()


def stat(root: Path, user: int, idle: int) -> None:
    boards.write(root, {"proc/stat": f"cpu  {user} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 0 0 1 0 0 0 0 0 0"})


def test_busy_is_the_share_of_time_since_the_previous_sample(tmp_path: Path) -> None:
    stat(tmp_path, 1000, 9000)
    with Sampler(60.0, tmp_path) as sampler:
        stat(tmp_path, 1300, 9100)
    busy = sampler.series()["values"]["busy"]
    assert busy == {"start": 0.75, "end": 0.75, "minimum": 0.75, "maximum": 0.75, "mean": 0.75}


EMPTY: Any = dict.fromkeys(Snapshot.__annotations__)


def test_energy_is_the_area_below_the_power() -> None:
    samples: list[Any] = [
        (10.0, {**EMPTY, "power_mw": {"VDD_IN": 1000.0}, "throttle_events": {"oc3": 5}}),
        (
            11.0,
            {**EMPTY, "power_mw": {"VDD_IN": 3000.0}, "gpus": [{"power_mw": 7, "throttle_reasons": ["sw_power_cap"]}]},
        ),
        (
            14.0,
            {**EMPTY, "power_mw": {"VDD_IN": 2000.0}, "throttle_events": {"oc3": 9}, "governor": {"0-3": "powersave"}},
        ),
    ]
    series = summarize(samples)
    assert (series["seconds"], series["samples"]) == (4.0, 3)
    assert series["energy_mj"]["power_mw.VDD_IN"] == 2000.0 * 1 + 2500.0 * 3
    power = series["values"]["power_mw.VDD_IN"]
    assert power == {"start": 1000.0, "end": 2000.0, "minimum": 1000.0, "maximum": 3000.0, "mean": 9500.0 / 4}
    events = series["values"]["throttle_events.oc3"]
    assert events["end"] - events["start"] == 4
    assert series["values"]["gpus.0.power_mw"]["mean"] == 7
    assert series["energy_mj"]["gpus.0.power_mw"] == 0.0, "one sample has no duration"
    assert series["seen"] == {"gpus.0.throttle_reasons": ["sw_power_cap"], "governor.0-3": ["powersave"]}


def test_a_series_without_samples_is_empty() -> None:
    assert summarize([]) == {"seconds": 0.0, "samples": 0, "values": {}, "seen": {}, "energy_mj": {}}


def test_the_sampler_encloses_the_measurement(tmp_path: Path) -> None:
    boards.orin(tmp_path)
    with Sampler(0.02, tmp_path) as sampler:
        boards.write(tmp_path, {"sys/class/devfreq/17000000.gpu/cur_freq": 918000000})
        deadline = time.monotonic() + 20.0
        while sampler.series()["samples"] < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        boards.write(tmp_path, {"sys/class/hwmon/hwmon3/oc3_event_cnt": 40})
    series = sampler.series()
    assert series["samples"] >= 5, "the first, at least three of the thread, and the last"
    assert series["values"]["gpu_mhz"]["start"] == 612.0
    assert series["values"]["gpu_mhz"]["maximum"] == 918.0
    assert series["values"]["throttle_events.oc3"]["end"] == 40
    constant = 4984 * 1856 / 1000
    assert series["energy_mj"]["board_power_mw"] == pytest.approx(constant * series["seconds"])
    count = series["samples"]
    time.sleep(0.1)
    assert sampler.series()["samples"] == count, "the thread has ended"


def test_the_sampler_ends_with_a_failed_measurement(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Sampler(60.0, tmp_path) as sampler:
        raise ZeroDivisionError
    assert sampler.series()["samples"] == 2


def test_of_an_empty_root_nothing_is_known(tmp_path: Path) -> None:
    assert boards.known(tmp_path) == {}


def test_this_machine_is_sampled_in_json() -> None:
    state = snapshot(interval_s=0.2)
    assert json.loads(json.dumps(state)) == state
    assert state.keys() == Snapshot.__annotations__.keys()
    assert state["busy"] is not None and 0.0 <= state["busy"] <= 1.0
