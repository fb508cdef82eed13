"""Weighted layers, matrix products, pools, norms, attention and resampling, as MIL defines them."""

from __future__ import annotations
