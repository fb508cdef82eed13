"""Server of a runner: executes the requests that a host sends over standard input, and replies on standard output.

Requests, each with `op`:

    facts                               the machine: see `facts`; and the runtimes with their versions
    runtime    runtime                  version of a runtime, or why it is missing
    telemetry                           clocks, temperatures and load at this moment: see `telemetry`
    received   digests                  bytes of each file that have arrived; -1 if it is complete
    put        digest, offset, last     append the attachment `content` to a file if `offset` is its end; replies with
                                        the bytes that have arrived, as `received`
    get        digest, offset, count    a part of a file
    build      runtime, files, options  compile an engine; replies with the digests of its files
    inspect    runtime, files           describe an engine
    open       runtime, files           load an engine; replies with `session` and `batch`, and with `method` if it is
                                        timed on a GPU: see `tensorrt_engine.Execution.method`
    infer      session                  run one query: attachment `images`, replies with `logits`
    warm_up    session, seconds,        run queries for some time, on a GPU; replies with the number of `queries`
               power_mode, lock_clocks  (settings for the turn, see `turn`)
    time       session, count,          time queries: attachment `images`, replies with `latencies` in nanoseconds;
               end_to_end,              `end_to_end`: with the copies to and from the GPU
               power_mode, lock_clocks
    conditions                          clocks, temperatures, power and load since the first timed query
    close      session

A reply has `ok`; a failed request has `error` and `exit_code` instead. Before its reply, a request may send records
with `log` and `severity`. Engines are timed by one host at a time: see `turn`.
"""

from __future__ import annotations

import os
import select
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import facts, jobs, messages, runtimes, telemetry
from .cpu import half_precision, threads
from .errors import Damaged, Refused
from .files import Files, cache_folder, explained
from .turn import Turn

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import IO

_CHUNK = 1 << 22  # bytes of a file in one reply
_IDLE_S = 60.0  # without a request, until another host may time engines


class Server:
    """One connection of a host. `folder` keeps files and jobs of all hosts."""

    def __init__(self, source: IO[bytes], sink: IO[bytes], folder: Path) -> None:
        self._source, self._sink, self._folder = source, sink, folder
        self._files = Files(folder)
        self._sessions: dict[int, Any] = {}
        self._turn: Turn | None = None  # while engines are timed

    def run(self) -> None:
        """Execute requests until the host closes the connection."""
        self._sink.write(messages.GREETING)
        self._sink.flush()
        try:
            while True:
                self._wait()
                try:
                    fields, attachments = messages.read(self._source)
                except messages.Broken:
                    return
                reply, values = self._execute(fields, attachments)
                messages.write(self._sink, reply, values)
        finally:
            with ExitStack() as ending:  # each step runs even if another one fails
                ending.callback(self._end_turn)
                for session in self._sessions.values():
                    ending.callback(session.close)

    def _wait(self) -> None:
        """Wait for a request. The turn ends after a minute without one: the host may be gone, with no end of stream."""
        if self._turn is not None and not select.select([self._source], [], [], _IDLE_S)[0]:
            self._end_turn()

    def _execute(self, fields: Mapping[str, Any], attachments: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        operation = getattr(self, f"_op_{fields.get('op')}", None)
        if operation is None:
            return {"error": f"the runner has no operation {fields.get('op')!r}", "exit_code": 3}, None
        try:
            reply, values = operation(fields, attachments)
        except Refused as error:
            return {"error": str(error), "exit_code": error.exit_code}, None
        except Exception as error:  # of a runtime: the connection continues
            return {"error": explained(error, self._folder), "exit_code": 3}, None
        return dict(reply, ok=True), values

    def _say(self, severity: str, message: str) -> None:
        messages.write(self._sink, {"log": message, "severity": severity})

    # --- Machine ----------------------------------------------------------------------------------------------------

    def _op_facts(self, fields: Mapping[str, Any], _: object) -> tuple[dict[str, Any], None]:
        free = shutil.disk_usage(self._folder).free  # where engines are kept, which may be another file system
        machine = dict(facts.facts(), disk_free_bytes=free)
        return {"facts": machine, "threads": threads(), "half": half_precision()}, None

    def _op_runtime(self, fields: Mapping[str, Any], _: object) -> tuple[dict[str, Any], None]:
        return runtimes.described(fields["runtime"]), None

    def _op_telemetry(self, fields: Mapping[str, Any], _: object) -> tuple[dict[str, Any], None]:
        return {"telemetry": telemetry.snapshot()}, None

    # --- Files ------------------------------------------------------------------------------------------------------

    def _op_received(self, fields: Mapping[str, Any], _: object) -> tuple[dict[str, Any], None]:
        return {"received": [self._files.received(digest) for digest in fields["digests"]]}, None

    def _op_put(self, fields: Mapping[str, Any], attachments: Mapping[str, Any]) -> tuple[dict[str, Any], None]:
        received = self._files.append(fields["digest"], fields["offset"], attachments["content"], last=fields["last"])
        return {"received": received}, None

    def _op_get(self, fields: Mapping[str, Any], _: object) -> tuple[dict[str, Any], dict[str, bytes]]:
        path = self._files.path(fields["digest"])
        if not path.exists():
            raise Damaged(f"the file {fields['digest'][:12]} is not on the device: build the engine again")
        with path.open("rb") as file:
            file.seek(fields["offset"])
            content = file.read(min(fields["count"], _CHUNK))
        return {"size": path.stat().st_size}, {"content": content}

    # --- Engines ----------------------------------------------------------------------------------------------------

    def _op_build(self, fields: Mapping[str, Any], _: object) -> tuple[dict[str, Any], None]:
        name, names = fields["runtime"], fields["files"]
        made_by = [Path(__file__).parents[1].name, runtimes.described(name)]  # digest of the runner, and the runtime
        task = {"runtime": name, "files": names, "options": fields["options"], "made by": made_by}
        return jobs.collected(self._folder, task, self._say), None

    def _op_inspect(self, fields: Mapping[str, Any], _: object) -> tuple[dict[str, Any], None]:
        engine = self._files.engine(fields["files"])
        return {"inspected": runtimes.runtime(fields["runtime"]).inspect(engine, threads())}, None

    def _op_open(self, fields: Mapping[str, Any], _: object) -> tuple[dict[str, Any], None]:
        engine = self._files.engine(fields["files"])
        session = runtimes.runtime(fields["runtime"]).open_engine(engine, threads(), self._say)
        number = max(self._sessions, default=0) + 1
        self._sessions[number] = session
        method = getattr(session, "method", None)
        return {"session": number, "batch": session.batch, **({} if method is None else {"method": method})}, None

    def _op_infer(self, fields: Mapping[str, Any], attachments: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        return {}, {"logits": self._session(fields).infer(attachments["images"])}

    def _op_warm_up(self, fields: Mapping[str, Any], _: object) -> tuple[dict[str, Any], None]:
        session = self._session(fields)
        self._take_turn(fields)
        return {"queries": session.warm_up(fields["seconds"])}, None

    def _op_time(self, fields: Mapping[str, Any], attachments: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        session = self._session(fields)
        self._take_turn(fields)
        timed = session.end_to_end_ns if fields["end_to_end"] else session.latencies_ns
        return {"latencies": list(timed(attachments["images"], fields["count"]))}, None

    def _op_close(self, fields: Mapping[str, Any], _: object) -> tuple[dict[str, Any], None]:
        self._sessions.pop(fields["session"]).close()
        if not self._sessions:
            self._end_turn()
        return {}, None

    def _op_conditions(self, fields: Mapping[str, Any], _: object) -> tuple[dict[str, Any], None]:
        return {"conditions": self._turn.conditions() if self._turn else None}, None

    def _take_turn(self, fields: Mapping[str, Any]) -> None:
        if self._turn is None:
            self._turn = Turn(self._folder, fields["power_mode"], fields["lock_clocks"], self._say)

    def _end_turn(self) -> None:
        if self._turn is not None:
            turn, self._turn = self._turn, None
            turn.end()

    def _session(self, fields: Mapping[str, Any]) -> Any:
        return self._sessions[fields["session"]]


def serve(folder: Path | None = None) -> int:
    """Serve one host over standard input and output. Other output of this process goes to standard error."""
    folder = folder or cache_folder()
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print to standard output
    try:
        server = Server(sys.stdin.buffer, sink, folder)
    except OSError as error:
        sys.exit(f"{folder} cannot be written: {error.strerror}")
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(serve())
