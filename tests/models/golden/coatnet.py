"""References of CoAtNet."""

from __future__ import annotations

from tests.models.golden.rule import Reference

REFERENCES: tuple[Reference, ...] = ()
