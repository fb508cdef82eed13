"""The targets that the pipeline can build for. To add a target, add a module here and its `TARGET` to the tuple."""

from targets import null, onnxruntime
from targets.base import Target
from targets.coreml import target as coreml_target
from targets.openvino import target as openvino_target
from targets.tensorrt import jetson, nvidia, rtx, torch_tensorrt

_TARGETS: tuple[Target, ...] = (
    jetson.TARGET,
    nvidia.TARGET,
    rtx.TARGET,
    coreml_target.TARGET,
    openvino_target.TARGET,
    onnxruntime.TARGET,
    torch_tensorrt.TARGET,
    null.TARGET,
)
ALL: dict[str, Target] = {target.name: target for target in _TARGETS}
ALIASES: dict[str, str] = {"apple": "coreml", "mac": "coreml", "iphone": "coreml"}  # alternative names of targets
