"""Execution of user code: a time limit, and detection and reversal of changes to process-wide settings."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

LIMIT_S = 45.0  # for one step: importing a file, building a network, a forward pass of a few images
TRACING_LIMIT_S = 180.0  # torch.export of a network of hundreds of layers takes a minute on a busy machine
_AGAIN_S = 3.0  # interval of further signals: a bare `except:` may swallow the first exception

log = logging.getLogger(__name__)


class TooLong(BaseException):
    """A step exceeded its time limit. Not a subclass of Exception, which user code may catch."""


@contextmanager
def limited(seconds: float | None = None) -> Iterator[None]:
    """Raise TooLong in the context after `seconds` (None: LIMIT_S) of wall-clock time.

    Signals are delivered to the main thread only: in other threads there is no limit. A single call of compiled library
    code is not interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    limit = LIMIT_S if seconds is None else seconds

    def stop(*_: object) -> None:
        raise TooLong(f"not finished after {limit:g} s; an endless loop, or too much work for a few images")

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, limit, _AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # remaining time of an enclosing limit
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)


def settings() -> dict[str, object]:
    """Return the process-wide settings that affect numbers, errors or messages of the pipeline, by name."""
    return {name: get() for name, (get, _) in _settings().items()}


def restored(before: Mapping[str, object]) -> list[str]:
    """Restore the settings that differ from `before`, and return their names."""
    changed = []
    for name, (get, put) in _settings().items():
        if get() != before[name]:
            put(before[name])
            changed.append(name)
    return changed


@contextmanager
def kept(who: str, doing: str) -> Iterator[None]:
    """Restore settings that change within the context, and log a warning with their names."""
    before = settings()
    try:
        yield
    finally:
        if changed := restored(before):
            log.warning("%s: %s changed %s; restored", who, doing, ", ".join(changed))


def _settings() -> dict[str, tuple[Callable[[], object], Callable[[Any], object]]]:
    """Return the getter and the setter of each setting, by name."""
    import numpy as np
    import torch

    def deterministic(value: tuple[bool, bool]) -> None:
        torch.use_deterministic_algorithms(value[0], warn_only=value[1])

    def errors() -> tuple[object, ...]:
        return tuple(entry for entry in warnings.filters if entry[0] == "error")

    def only(value: tuple[object, ...]) -> None:
        for entry in list(warnings.filters):
            if entry[0] == "error" and entry not in value:
                warnings.filters.remove(entry)  # type: ignore[attr-defined]

    return {
        "gradients (torch.set_grad_enabled)": (torch.is_grad_enabled, torch.set_grad_enabled),
        "the default dtype (torch.set_default_dtype)": (torch.get_default_dtype, torch.set_default_dtype),
        "the default device (torch.set_default_device)": (
            torch.get_default_device,
            lambda value: torch.set_default_device(None if value.type == "cpu" else value),
        ),
        "deterministic algorithms (torch.use_deterministic_algorithms)": (
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            deterministic,
        ),
        "autocast": (
            lambda: torch.is_autocast_enabled("cpu"),
            lambda value: torch.set_autocast_enabled("cpu", value),
        ),
        "anomaly detection (torch.autograd.set_detect_anomaly)": (
            torch.is_anomaly_enabled,
            torch.autograd.set_detect_anomaly,
        ),
        "the number of threads (torch.set_num_threads)": (torch.get_num_threads, torch.set_num_threads),
        "the precision of products (torch.set_float32_matmul_precision)": (
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
        ),
        "oneDNN (torch.backends.mkldnn.enabled)": (
            torch._C._get_mkldnn_enabled,
            torch.backends.mkldnn.set_flags,
        ),
        "floating-point errors (numpy.seterr)": (np.geterr, lambda value: np.seterr(**value)),
        "warnings to errors (warnings.filterwarnings)": (errors, only),
        "logging (logging.disable)": (lambda: logging.root.manager.disable, logging.disable),
        "the working directory (os.chdir)": (os.getcwd, os.chdir),
    }
