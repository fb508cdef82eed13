"""Every target the pipeline can build for. A new one is one file here and one name in the tuple."""

from targets import cpu, null, onnxruntime, torch_tensorrt
from targets.base import Target

_TARGETS: tuple[Target, ...] = (cpu.TARGET, onnxruntime.TARGET, torch_tensorrt.TARGET, null.TARGET)
ALL: dict[str, Target] = {target.name: target for target in _TARGETS}
ALIASES: dict[str, str] = {}  # other names that users type -> the target's own
