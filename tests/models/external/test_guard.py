"""Guard around user code: time limits inside time limits, and settings that the code changes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from models.external import guard
from models.external import loader as external
from models.external.loader import External

NET = """
from torch import nn

def net(classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)).eval()
"""


def written(folder: Path, text: str, name: str = "net.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def found(request: str) -> External:
    spec = external.find(request)
    assert isinstance(spec, External)
    return spec


def test_a_limit_inside_a_limit_leaves_the_outer_one_running() -> None:
    with pytest.raises(guard.TooLong, match=r"after 0\.3 s"), guard.limited(0.3):
        with guard.limited(30):
            pass
        time.sleep(10)
    time.sleep(0.4)  # nothing is left that rings


SWITCHES = {
    "gradients (torch.set_grad_enabled)": "torch.set_grad_enabled(False)",
    "the default dtype (torch.set_default_dtype)": "torch.set_default_dtype(torch.float64)",
    "the default device (torch.set_default_device)": "torch.set_default_device('meta')",
    "deterministic algorithms (torch.use_deterministic_algorithms)": "torch.use_deterministic_algorithms(True)",
    "autocast": "torch.set_autocast_enabled('cpu', True)",
    "anomaly detection (torch.autograd.set_detect_anomaly)": "torch.autograd.set_detect_anomaly(True)",
    "the number of threads (torch.set_num_threads)": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "the precision of products (torch.set_float32_matmul_precision)": "torch.set_float32_matmul_precision('high')",
    "oneDNN (torch.backends.mkldnn.enabled)": "torch.backends.mkldnn.enabled = False",
    "floating-point errors (numpy.seterr)": "import numpy; numpy.seterr(all='raise')",
    "warnings to errors (warnings.filterwarnings)": "import warnings; warnings.simplefilter('error', UserWarning)",
    "logging (logging.disable)": "import logging; logging.disable(logging.CRITICAL)",
    "the working directory (os.chdir)": "import os; os.chdir('/')",
}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("place", ["importing it", "building it"])
def test_settings_that_a_file_changes_are_restored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, place: str
) -> None:
    before = guard.settings()
    layer = "    return nn.Sequential(nn.Conv2d(3, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    inside = f"    {SWITCHES[name]}\n" if place == "building it" else ""
    above = f"{SWITCHES[name]}\n" if place == "importing it" else ""
    request = (
        f"{written(tmp_path, f'import torch{chr(10)}from torch import nn{chr(10)}def net(classes):{chr(10)}')}:net"
    )
    (tmp_path / "net.py").write_text(
        (tmp_path / "net.py").read_text() + layer.replace("    return", f"{inside}    return")
    )
    (tmp_path / "net.py").write_text(f"import torch\n{above}{(tmp_path / 'net.py').read_text()}")
    found(request).build(10)
    assert guard.settings() == before
    assert f"MODEL={request}: {place} changed {name}; restored" in caplog.messages


def test_a_file_that_switches_nothing_is_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found(f"{written(tmp_path, NET)}:net").build(10)
    assert not caplog.messages
