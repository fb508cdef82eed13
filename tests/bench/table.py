"""Table of all targets and recipes: the small model of every family, four recipes, and every target that this machine
can build for, on the digits.

Run it with `make bench`. It uses the command line, keeps its artifacts in build/, and prints a row for each recipe,
then the number of engines and the missed goals.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

import models
from pipeline.cli.main import main as edgeline

MODELS = ("mobilevit_xs", "mobilenetv2_100", *(name for name in models.ALL if name.endswith("_mini")))
RECIPES = ("fp32", "fp16", "int8_ptq", "int8_qat")
TARGETS = ("cpu", "onnxruntime", "rtx", "coreml")

LEAST_FLOAT_TOP1 = 97.5  # percent
LARGEST_INT8_DROP = 0.6  # points of top-1

_COLUMNS = "{:24} {:9} {:>6} " + " ".join("{:>14}" for _ in TARGETS) + " {:>6}"


def main(names: tuple[str, ...] = MODELS) -> int:
    print(_COLUMNS.format("model", "recipe", "float", *TARGETS, "dB"))
    engines = 0
    missed: list[str] = []
    for model in names or MODELS:
        for recipe in RECIPES:
            answers = {target: built(model, recipe, target) for target in TARGETS}
            print(_row(model, recipe, answers), flush=True)
            engines += len(answers)
            missed += [
                f"{model} {recipe} {target}: {problem}"
                for target, answer in answers.items()
                for problem in _problems(answer)
            ]
    print("* built, not executed here: the figure is that of the graph that the engine was compiled from")
    print(f"{engines} engines, {len(missed)} figures missed")
    print("\n".join(missed), end="\n" if missed else "")
    return 1 if missed else 0


def built(model: str, recipe: str, target: str, **variables: str) -> dict[str, Any]:
    """Return the JSON result of `make engine` with further variables."""
    told, variables = io.StringIO(), {"model": model, "recipe": recipe, "target": target, **variables}
    with contextlib.redirect_stdout(told):
        edgeline(["engine", *(f"--{name}={value}" for name, value in variables.items())])
    answer: dict[str, Any] = json.loads(told.getvalue().splitlines()[-1])
    return answer


def _row(model: str, recipe: str, answers: dict[str, dict[str, Any]]) -> str:
    """Return top-1 of each target's engine in percent, and the least agreement of their logits with the float model."""
    whole = [answer for answer in answers.values() if "error" not in answer]
    float_top1 = f"{whole[0]['float_top1']:.2f}" if whole else "-"
    least = f"{min(answer['snr_db'] for answer in whole):.1f}" if whole else "-"
    return _COLUMNS.format(model, recipe, float_top1, *(_top1(answer) for answer in answers.values()), least)


def _top1(answer: dict[str, Any]) -> str:
    return "not built" if "error" in answer else f"{answer['top1']:.2f}{' ' if answer['executed'] else '*'}"


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
    sys.exit(main(tuple(sys.argv[1:])))
