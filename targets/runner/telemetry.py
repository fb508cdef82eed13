"""placeholder until merged"""

from __future__ import annotations

from typing import Any


def snapshot() -> dict[str, Any]:
    return {}
