"""The targets that the pipeline can build for. To add a target, add a module here and its `TARGET` to the tuple."""

import os
import sys

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

# ONNX Runtime and OpenVINO send telemetry and write an identifier to the user's home, OpenVINO as soon as it is
# imported. Telemetry is disabled here, before a module of `targets` can import them. OpenVINO uses a stub where its
# telemetry package cannot be imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
