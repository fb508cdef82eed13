"""Run one command line: parse it, call the function of the verb, and print the result.

Names and values are checked before a verb runs. The log goes to stderr; the last line of stdout is one JSON object with
the result. Exit codes: 0 done, 2 bad request, 3 not possible on this machine, 4 the artifact failed its check.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from calibration.data.dataset import Described
from models.errors import BadRequest, CannotRunHere, EdgelineError
from models.external.user_files import kind
from pipeline import process_setup
from pipeline.cli import options, termination
from pipeline.cli.parser import Shown, parse
from pipeline.cli.request import Request
from pipeline.cli.typed import naming_origin
from pipeline.cli.verbs import VERBS, runs_in
from pipeline.commands.artifacts import Answer
from pipeline.run import Run
from pipeline.store import storage_errors

# Error numbers of files that cannot be read or written; any other OSError shows its traceback.
_DENIED = frozenset(
    {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.EIO, errno.ESTALE}
    | {errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO, errno.ENODEV}
)

log = logging.getLogger("edgeline")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line, by default that of this process, and return the exit code."""
    started = time.monotonic()
    termination.open_streams()
    process_setup.settle()
    answer: Answer = {**dict.fromkeys(("verb", "model", "target", "recipe", "artifact", "key")), "cached": False}
    code, store = 0, Path("build")
    try:
        with termination.by_exception():
            request = parse(arguments)
            store = request.store
            with naming_origin(request.inherited):
                _carry_out(request, answer)
    except Shown as shown:
        code = _print(str(shown).rstrip()) if str(shown) else 0
        return 0 if code == termination.UNREAD else code
    except Exception as error:
        refusal = _refusal(error, store)
        if refusal is None:
            raise
        log.error("%s", refusal)
        answer |= {"error": str(refusal), **refusal.answer}
        code = refusal.exit_code
    except SystemExit as error:
        ended = BadRequest(f"MODEL={answer['model']}: its code ended the process (SystemExit: {error.code})")
        log.error("%s", ended)
        answer |= {"error": str(ended)}
        code = ended.exit_code
    except KeyboardInterrupt as error:
        how = str(error) or "interrupted"
        log.error("%s; finished stages are kept: run the same command again to resume", how)
        answer |= {"error": how}
        code = error.exit_code if isinstance(error, termination.Ended) else 130
    return _finish(answer, started, code)


def _carry_out(request: Request, answer: Answer) -> None:
    """Run the verb of `request`. `answer` is filled step by step, so that it is useful after an error too."""
    verb = VERBS[request.verb]
    requested = {"model": options.MODEL, "target": options.TARGET, "recipe": options.RECIPE}
    answer |= {"verb": verb.name, **{name: request.given(option) for name, option in requested.items()}}
    if device := request.given(options.DEVICE):
        answer |= {"device": device}
    if recipes := request.given(options.RECIPES):
        answer |= {"recipe": recipes}
    if verb.store:
        _check_store(request.store)
    arguments = verb.arguments(request)
    for run in runs_in(arguments)[:1]:
        _log_data(run)
        answer |= {"target": run.target.name}
    answer |= verb.load()(*arguments)


def _log_data(run: Run) -> None:
    """Log the number of classes and images in a data folder, and warn of files that are not used."""
    if isinstance(run.data, Described):
        log.info("%s", run.data.summary())
        for note in run.data.notes:
            log.warning("%s", note)


def _refusal(error: Exception, store: Path) -> EdgelineError | None:
    """Return the error to report for `error`; None for a programming error, which shows its traceback."""
    if isinstance(error, EdgelineError):
        return error
    if refusal := storage_errors.refusal(error, store):
        return refusal
    return _denied(error, store) if isinstance(error, OSError) and error.errno in _DENIED else None


def _denied(error: OSError, store: Path) -> EdgelineError:
    """Return the error for a file that the operating system does not allow to write (in the store) or to read.

    An error of an open file has no file name.
    """
    if error.filename is None and error.errno != errno.EROFS:
        return CannotRunHere(
            f"a file cannot be read or written: {error.strerror}; check the disks of {store} and of the files in the "
            "request"
        )
    file = error.filename or store
    if Path(file).absolute().is_relative_to(store.absolute()) or error.errno == errno.EROFS:
        return CannotRunHere(f"{file} cannot be written: {error.strerror}; make room in the folder of artifacts")
    return BadRequest(f"{file} cannot be read: {error.strerror}")


def _check_store(store: Path) -> None:
    """Raise BadRequest if `store` is not a folder, CannotRunHere if it or a parent is a dangling link: no folder can be
    created there.
    """
    if store.exists() and not store.is_dir():
        raise BadRequest(f"--store {store}: expected a folder of artifacts, such as build; this is {kind(store)}")
    for folder in (store, *store.parents):
        if folder.is_symlink() and not os.path.exists(folder):  # noqa: PTH110 - the method raises on a loop
            there = os.readlink(folder)  # noqa: PTH115
            raise CannotRunHere(f"{folder} is a link to {there}, which is not there; create it, or remove the link")


def _finish(answer: Answer, started: float, code: int) -> int:
    """Print the answer and return the exit code."""
    return _print(json.dumps(answer | {"seconds": round(time.monotonic() - started, 3)}), code)


def _print(text: str, code: int = 0) -> int:
    """Print `text` and return the exit code. If stdout has no reader, success becomes `termination.UNREAD`."""
    try:
        read = termination.answered(text)
    except OSError as error:  # stdout is a file
        log.error("the result cannot be written: %s", error.strerror)
        termination.discard_stdout()
        return CannotRunHere.exit_code
    return code if read else code or termination.UNREAD
