"""What every process of the pipeline asks of the libraries around it, before any of them is imported."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from models.errors import escaped
from targets._host import threads

_CHATTY = ("torch", "torchao", "onnxscript", "onnx_ir", "coremltools", "openvino", "sqlalchemy", "httpx2")


class _Escaping(logging.Formatter):
    """Log lines without terminal escapes: names of files and classes are the user's, and may hold any byte."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record), keep="\n\t")


def settle() -> None:
    _be_quiet()
    _share_the_machine()


def _be_quiet() -> None:
    """Let only this project speak, on stderr: libraries announce optional parts that nobody asked for."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Escaping("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TORCH_LOGS", "-all")


def _share_the_machine() -> None:
    """Let OpenMP threads sleep while they wait. Spinning ones make a training step ten times slower as soon as another
    process wants the same cores, and gain a few percent where none does. Read when torch is imported: not before here.

    OpenMP counts the processors of the affinity alone: with a CPU quota below that, as in containers, its threads would
    spend most of each period waiting for the next one.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if hasattr(os, "sched_getaffinity") and threads() < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(threads()))
