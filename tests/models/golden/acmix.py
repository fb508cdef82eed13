"""References of ACmix."""

from __future__ import annotations

from tests.models.golden.rule import Reference

REFERENCES: tuple[Reference, ...] = ()
