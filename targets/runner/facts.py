"""placeholder until merged"""

from __future__ import annotations

import platform
from typing import Any


def facts() -> dict[str, Any]:
    return {
        "hostname": platform.node(),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
