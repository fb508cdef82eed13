"""The CUDA driver API, by a toy driver."""

from __future__ import annotations

import pytest

from targets.runner import cuda, errors
from tests.support.stand_ins.toy_gpu import ToyDriver


def test_a_driver_without_a_gpu_is_no_gpu() -> None:
    assert cuda.Cuda(ToyDriver()).gpu() == cuda.Gpu("Toy", (8, 7), 8 << 30)
    with pytest.raises(errors.Unable, match="no NVIDIA GPU: the driver is there and found none"):
        cuda.Cuda(ToyDriver(gpus=0))
