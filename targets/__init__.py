"""Every target the pipeline can build for. A new one is one file here and one name in the tuple."""

import os
import sys

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

# Two runtimes report to their makers and leave an identity in the user's home, OpenVINO as soon as it is imported. They
# look for consent then, so it is withheld before anything of `targets` can import them: OpenVINO replaces a telemetry
# package that is not there by a stub.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
