"""Operators that move values and compute none: reshape, transpose, slice, gather, pad, concatenate and their like."""

from __future__ import annotations
