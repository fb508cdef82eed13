"""Weights that a package stores smaller than it computes with, and the rounding of activations to integers."""

from __future__ import annotations
