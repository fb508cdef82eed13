"""`make lint-model`: operators of a network that accelerators refuse or run slowly."""

from __future__ import annotations

from dataclasses import asdict
from logging import getLogger

from models.errors import CheckFailed
from models.spec import Form, ModelSpec
from pipeline.commands.artifacts import Answer
from pipeline.stages import validate_model
from targets.base import Target

log = getLogger("edgeline")


def lint_model(model: ModelSpec, target: Target, form: Form, size: int) -> Answer:
    """Return the lint findings for `model` with random weights and an input of `size` x `size` pixels.

    Raises CheckFailed, with all findings in its answer, if the export would refuse the network.
    """
    from calibration.quantize import traced
    from pipeline.stages.lint import lint

    validate_model.check_trace(model, size)
    findings = lint(traced(model.build(model.classes, form).eval(), size), target.name)
    for finding in findings:
        log.info("%s", finding)
    errors = sum(finding.level == "error" for finding in findings)
    answer: Answer = {
        "size": size,
        "errors": errors,
        "warnings": len(findings) - errors,
        "findings": [asdict(finding) for finding in findings],
    }
    counts = f"{model.name} at {size} pixels: errors: {errors}, warnings: {len(findings) - errors}"
    if errors:
        raise CheckFailed(f"{counts}; the export refuses the network until the errors are fixed", answer=answer)
    log.info("%s", counts)
    return answer
