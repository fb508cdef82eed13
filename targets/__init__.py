"""Every target the pipeline can build for. A new one is one file here and one name in the tuple."""

from targets import coreml, cpu, jetson, null, nvidia, onnxruntime, rtx, torch_tensorrt
from targets.base import Target

_TARGETS: tuple[Target, ...] = (
    jetson.TARGET,
    nvidia.TARGET,
    rtx.TARGET,
    coreml.TARGET,
    cpu.TARGET,
    onnxruntime.TARGET,
    torch_tensorrt.TARGET,
    null.TARGET,
)
ALL: dict[str, Target] = {target.name: target for target in _TARGETS}
ALIASES: dict[str, str] = {"apple": "coreml", "mac": "coreml", "iphone": "coreml"}  # what else users type
