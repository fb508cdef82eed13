"""The README's table: three models, four recipes, every target that this machine can build for, on the digits.

Run it with `make bench`. It goes through the same command as a user does, keeps what it builds in build/, and prints
one row an engine; at the end, how many engines there are and which figures were missed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

MODELS = ("mobilevit_xs", "mobilenetv2_100", "convmixer_mini")
RECIPES = ("fp32", "fp16", "int8_ptq", "int8_qat")
TARGETS = ("cpu", "onnxruntime", "rtx", "coreml")

LEAST_FLOAT_TOP1 = 97.5  # percent
LARGEST_INT8_DROP = 0.6  # points of top-1

_COLUMNS = "{:16} {:9} {:12} {:9} {:>7} {:>7} {:>7} {:>6} {:>11}"


def main() -> int:
    print(_COLUMNS.format("model", "recipe", "target", "executed", "top-1", "float", "agree", "dB", "bytes"))
    cells = [(model, recipe, target) for model in MODELS for recipe in RECIPES for target in TARGETS]
    missed: list[str] = []
    for cell in cells:
        answer = _engine(*cell)
        print(_row(cell, answer), flush=True)
        missed += [f"{' '.join(cell)}: {problem}" for problem in _problems(answer)]
    print(f"{len(cells)} engines, {len(missed)} figures missed")
    print("\n".join(missed), end="\n" if missed else "")
    return 1 if missed else 0


def _engine(model: str, recipe: str, target: str) -> dict[str, Any]:
    """The JSON answer of `make engine`."""
    command = [sys.executable, "-m", "pipeline", "engine", "--model", model, "--recipe", recipe, "--target", target]
    found = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    answer: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return answer


def _row(cell: tuple[str, str, str], answer: dict[str, Any]) -> str:
    if "error" in answer:
        return f"{_COLUMNS.format(*cell, 'no', *'-----')}  {answer['error']}"
    figures = (f"{answer[name]:.2f}" for name in ("top1", "float_top1", "agreement"))
    bytes_ = f"{sum(answer['files'].values()):,}"
    return _COLUMNS.format(*cell, "yes" if answer["executed"] else "no", *figures, f"{answer['snr_db']:.1f}", bytes_)


def _problems(answer: dict[str, Any]) -> list[str]:
    if "error" in answer:
        return [str(answer["error"])]
    found = []
    if answer["float_top1"] < LEAST_FLOAT_TOP1:
        found.append(f"float top-1 {answer['float_top1']:.2f} % is below {LEAST_FLOAT_TOP1} %")
    drop = answer["float_top1"] - answer["top1"]
    if answer["recipe"].startswith("int8") and drop > LARGEST_INT8_DROP:
        found.append(f"{drop:.2f} points below float, more than {LARGEST_INT8_DROP}")
    return found


if __name__ == "__main__":
    sys.exit(main())
