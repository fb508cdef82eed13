"""Built-in models by name."""

from models.catalog import SPECS
from models.spec import ModelSpec

ALL: dict[str, ModelSpec] = {spec.name: spec for spec in SPECS}
