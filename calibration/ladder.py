"""Steps from the float model to an artifact: the logits of each step are compared with those of the previous step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from calibration.metrics import Labels, Logits, agreement, snr_db, top1
from calibration.recipe import FloatType
from calibration.reports import StepResult, UnitResult
from calibration.rounding_noise import Noise
from models.errors import CheckFailed


@dataclass(kw_only=True, slots=True)
class Ladder:
    """Steps from the float model to the artifact. Each step is compared with the previous step when it is added."""

    labels: Labels
    float_logits: Logits
    logits: Logits  # of the last step
    noise: Noise
    steps: list[StepResult] = field(default_factory=list)

    def add(self, name: str, logits: Logits, *, float_type: FloatType, diverging: Callable[[], str]) -> None:
        """Add a step that must match the previous step up to rounding in `float_type`.

        Raises CheckFailed if the step differs from the previous step by more than the noise of two correct executions,
        beyond chance. `diverging` returns the sentence that ends the message.
        """
        self.steps.append(self._within_noise(name, logits, float_type, diverging))
        self.logits = logits

    def beside(self, name: str, logits: Logits, *, float_type: FloatType) -> UnitResult:
        """Return the accuracy of a second execution of the last step, without adding a step.

        Raises CheckFailed as `add` does.
        """
        step = self._within_noise(name, logits, float_type, lambda: f"{self.steps[-1].name} is correct")
        same = agreement(self.float_logits, logits)
        return UnitResult(top1=round(step.top1, 3), agreement=round(same, 3), snr_db=step.snr_db)

    def note(self, name: str, logits: Logits) -> None:
        """Add a step that may differ from the previous step; the accuracy budget limits the difference."""
        self.steps.append(self._compared(name, logits))
        self.logits = logits

    def _within_noise(
        self, name: str, logits: Logits, float_type: FloatType, diverging: Callable[[], str]
    ) -> StepResult:
        distance = self.noise.yardstick(float_type).distance(self.logits, logits)
        if distance.exceeds:
            raise CheckFailed(
                f"{name} does not match {self.steps[-1].name}: {distance.snr_db:.1f} dB, where two correct executions "
                f"in {float_type} agree to {distance.noise_db:.1f} dB, and {distance.changed} of {len(self.labels)} "
                f"predictions changed beyond that noise ({distance.ties} ties not counted), expected at most "
                f"{distance.allowed}; {diverging()}"
            )
        return replace(
            self._compared(name, logits),
            noise_db=distance.noise_db,
            changed=distance.changed,
            ties=distance.ties,
        )

    def _compared(self, name: str, logits: Logits) -> StepResult:
        return StepResult(
            name=name,
            top1=top1(logits, self.labels),
            agreement=agreement(self.logits, logits),
            snr_db=round(snr_db(self.logits, logits), 2),
        )
