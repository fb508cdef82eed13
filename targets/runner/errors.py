"""Errors of the runner. One sentence explains each; the command exits with `exit_code`."""

from __future__ import annotations


class Refused(Exception):
    """Base class of the errors."""

    exit_code = 1


class Damaged(Refused):
    """A file of the bundle is missing or changed."""

    exit_code = 2


class Unable(Refused):
    """This machine cannot build or run the engine."""

    exit_code = 3


class Rejected(Refused):
    """TensorRT rejected the graph, or the engine failed a check."""

    exit_code = 4
