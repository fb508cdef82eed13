"""Every reference whose logits are kept, by name. One file per family builds them."""

from __future__ import annotations

from tests.models.golden import acmix, coatnet, conformer, convmixer, hatnet, mobilenetv2, mobilevit, swin, transcnn
from tests.models.golden.rule import Reference

_FAMILIES = (mobilevit, mobilenetv2, convmixer, coatnet, conformer, transcnn, hatnet, swin, acmix)
ALL: dict[str, Reference] = {reference.name: reference for family in _FAMILIES for reference in family.REFERENCES}
