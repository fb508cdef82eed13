"""Origin of variables: make's command line, or the environment of the shell.

The Makefile lists the names on its command line in `EDGELINE_TYPED`. A misspelt one is an error, and one that the rule
does not read is a warning. Of the environment only the variables of a run are checked, as other programs use it too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from models.errors import BadRequest, EdgelineError, printable
from pipeline.cli import options
from pipeline.cli.values import nearest
from pipeline.cli.verbs import VERBS, all_variables, variables_of

TYPED: Final = "EDGELINE_TYPED"

log = logging.getLogger("edgeline")


def judge(rules: Sequence[str]) -> None:
    """Raise BadRequest for the first typed variable that no rule reads, or that is called differently in `rules`, as
    MODEL and MODELS are. Warn of each other variable that `rules` do not read.
    """
    known = all_variables()
    typed = _typed()
    for name in typed:
        if name not in known:
            close = nearest(name, known)
            hint = f"did you mean {close}?" if close else f"known: {', '.join(known)}"
            raise BadRequest(f"{_shown(name)}: no such variable; {hint}")
    read, command = frozenset().union(*map(variables_of, rules)), " ".join(rules)
    for name in typed:
        if name not in read:
            if other := read & {f"{name}S", name.removesuffix("S")}:
                raise BadRequest(f"{_shown(name)}: make {command} reads {min(other)} instead; use {min(other)}=...")
            log.warning("%s has no effect on make %s", _shown(name), command)
    if any(rule in VERBS and options.MODEL in VERBS[rule].options for rule in rules):
        for name in inherited(option.name for option in options.RUN if option.name not in read):
            log.warning("%s, set in the environment, has no effect on make %s", _shown(name), command)


def inherited(names: Iterable[str]) -> dict[str, str]:
    """Return the values of the variables in `names` that come from the environment of the shell: they are not empty,
    and not on make's command line.
    """
    typed = _typed()
    found = {name: os.environ.get(name, "").strip() for name in names if name not in typed}
    return {name: text for name, text in found.items() if text}


@contextlib.contextmanager
def naming_origin(values: Mapping[str, str]) -> Iterator[None]:
    """Extend the message of an error in the context if it is about a variable in `values`, which come from the
    environment.
    """
    try:
        yield
    except EdgelineError as error:
        message = str(error)
        origins = [
            f"{name} is set in the environment: unset it or give {name} on the command line"
            for name, text in values.items()
            if _is_about(message, name, printable(text))
        ]
        error.args = ("; ".join([message, *origins]),)
        raise


def _is_about(message: str, name: str, text: str) -> bool:
    return message.startswith(f"{name}=") or bool(re.search(rf"\b{name}={re.escape(text)}(?!\w)", message))


def _typed() -> list[str]:
    return os.environ.get(TYPED, "").split()


def _shown(name: str) -> str:
    return f"{name}={os.environ.get(name, '')}"
