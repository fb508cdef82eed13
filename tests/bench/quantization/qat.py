"""Cost of a step of quantization-aware training, as ratio to a step of float training on the same batch; all steps are
timed in alternation.

Run it with `make bench-qat`, or `python -m tests.bench.quantization.qat [MODEL] [SIZE] [ROUNDS]`. Only ratios are
printed, the median of all rounds and the 10th and 90th percentile: on a shared machine, seconds are not comparable. The
float teacher is not part of a step: it runs once per image of a training. The last line names a missed goal.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import (
    FusedMovingAvgObsFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationSpec

import models
from calibration.fake_quant.symmetric import ActivationFakeQuant, Mode
from calibration.graph import exported_program
from calibration.ptq.calibrate import fake_quants, set_mode
from calibration.quantize import prepare
from calibration.quantizer.quantizer import SchemeQuantizer
from calibration.scheme import SHARED
from calibration.training import qat
from calibration.training.relative_adam import RelativeAdam
from pipeline import process_setup

MODEL, SIZE, ROUNDS = "mobilevit_xs", 64, 30
MOST = 1.45  # times a float step, while ranges follow and when they are frozen

_CLASSES, _BATCH = 10, 32
_FLOAT, _FOLLOWING, _FROZEN, _LEARNED = "float", "ranges follow", "ranges frozen", "step sizes learned"
_ROW = "{:26} {:>6}  {:>6} {:>6}"

Step = Callable[[], object]


class Plain(SchemeQuantizer):
    """The same quantized edges with torchao's own fake quantization."""

    def __init__(self) -> None:
        super().__init__(SHARED)
        per_tensor = FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver)
        per_channel = FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver)
        self.activation = QuantizationSpec(torch.int8, per_tensor, -128, 127, torch.per_tensor_symmetric)
        self.weight = QuantizationSpec(torch.int8, per_channel, -127, 127, torch.per_channel_symmetric, ch_axis=0)


def main(name: str, size: int, rounds: int) -> int:
    torch.manual_seed(0)
    model = models.ALL[name].build(_CLASSES).eval()
    images, labels = torch.randn(_BATCH, 3, size, size), torch.randint(_CLASSES, (_BATCH,))
    ratios = measured(steps(model, images, labels), rounds)
    print(f"{name} at {size} pixels, {_BATCH} images a step, {torch.get_num_threads()} threads, {rounds} rounds")
    print(_ROW.format("step", "median", "10 %", "90 %"))
    for step, found in ratios.items():
        print(_ROW.format(step, *(f"{value:.2f}" for value in np.percentile(found, (50, 10, 90)))))
    missed = [step for step in (_FOLLOWING, _FROZEN) if np.median(ratios[step]) > MOST]
    print(f"missed: {', '.join(missed)}, asked: {MOST}" if missed else f"no figure missed: at most {MOST}")
    return 1 if missed else 0


def measured(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the time of each step relative to the float step of its round; the first round is a warm-up."""
    found: dict[str, list[float]] = {name: [] for name in steps if name != _FLOAT}
    for turn in range(rounds + 1):
        seconds = {name: _seconds(step) for name, step in steps.items()}
        for name, ratios in found.items():
            ratios += [seconds[name] / seconds[_FLOAT]] * (turn > 0)
    return found


def steps(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Step]:
    """Return the steps by name, each with its own weights and optimizer."""
    size = images.shape[-1]
    plain = prepare_qat_pt2e(exported_program.export(copy.deepcopy(model).train(), size).module(), Plain())
    return {
        _FLOAT: float_step(copy.deepcopy(model).train(), images, labels),
        _FOLLOWING: qat_step(calibrated(model, images, "train"), model, images),
        _FROZEN: qat_step(calibrated(model, images, "frozen"), model, images),
        _LEARNED: qat_step(calibrated(model, images, "learn"), model, images),
        "torchao's own": qat_step(plain, model, images),
    }


def calibrated(model: nn.Module, images: Tensor, mode: Mode) -> GraphModule:
    prepared = prepare(model, SHARED, images.shape[-1])
    exported_program.logits(prepared, [(images, images)])
    for quantizer in fake_quants(prepared):
        quantizer.fix_range()
        if mode == "learn" and isinstance(quantizer, ActivationFakeQuant):
            quantizer.learn()
    set_mode(prepared, mode)
    return prepared


def qat_step(prepared: GraphModule, teacher: nn.Module, images: Tensor) -> Step:
    optimizer = RelativeAdam([{"params": list(prepared.parameters())}], lr=1e-6)
    targets = torch.from_numpy(exported_program.logits(teacher, [(images, images)])).to(images.device)
    return lambda: qat.step(prepared, images, targets, 1.0, optimizer)


def float_step(model: nn.Module, images: Tensor, labels: Tensor) -> Step:
    optimizer = _optimizer(model)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-6)


def _seconds(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


if __name__ == "__main__":
    process_setup.settle()
    asked = [*sys.argv[1:], *map(str, (MODEL, SIZE, ROUNDS)[len(sys.argv) - 1 :])]
    sys.exit(main(asked[0], int(asked[1]), int(asked[2])))
