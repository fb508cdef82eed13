"""Every target the pipeline can build for. A new one is one file here and one name in the tuple."""

from targets import null, onnxruntime
from targets.base import Target

_TARGETS: tuple[Target, ...] = (onnxruntime.TARGET, null.TARGET)
ALL: dict[str, Target] = {target.name: target for target in _TARGETS}
ALIASES: dict[str, str] = {}
