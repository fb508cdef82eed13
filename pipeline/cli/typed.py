"""Check of the variables on make's command line: a misspelt variable is an error, a variable that the rule does not
read is a warning.

The Makefile lists their names in `EDGELINE_TYPED`. Environment variables are not checked.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Final

from models.errors import BadRequest
from pipeline.cli.values import nearest
from pipeline.cli.verbs import all_variables, variables_of

TYPED: Final = "EDGELINE_TYPED"

log = logging.getLogger("edgeline")


def judge(rules: Sequence[str]) -> None:
    """Raise BadRequest for the first variable that no rule reads; warn of each variable that `rules` do not read."""
    known = all_variables()
    typed = os.environ.get(TYPED, "").split()
    for name in typed:
        if name not in known:
            close = nearest(name, known)
            hint = f"did you mean {close}?" if close else f"known: {', '.join(known)}"
            raise BadRequest(f"{_shown(name)}: no such variable; {hint}")
    read = frozenset().union(*map(variables_of, rules))
    for name in typed:
        if name not in read:
            log.warning("%s has no effect on make %s", _shown(name), " ".join(rules))


def _shown(name: str) -> str:
    return f"{name}={os.environ.get(name, '')}"
