"""Element by element, along axes, and from type to type: arithmetic, activations, reductions, softmax, casts."""

from __future__ import annotations
