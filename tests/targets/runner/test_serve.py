"""The server of a runner, in this process over a pair of pipes: every operation, and errors that end no connection."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import targets
from calibration.recipe import Precision
from targets.base import Export
from targets.runner import jobs, messages, runtimes, serve
from targets.runner.cpu import HostSession, half_precision, threads
from targets.runner.errors import Damaged, Rejected
from targets.runner.facts import Facts
from targets.runner.files import cache_folder
from targets.runner.runtimes import OnnxRuntime
from targets.runner.serve import Server
from targets.runner.telemetry import Snapshot
from tests.support.tiny import ROOT, surroundings
from tests.support.tiny_export import CLASSES, SIZE, tiny_export
from tests.targets.runner.test_turn import free

BATCH = 2
IMAGES = np.random.default_rng(0).normal(size=(BATCH, 3, SIZE, SIZE)).astype(np.float32)
CONTENT = bytes(range(100))
DIGEST = hashlib.sha256(CONTENT).hexdigest()
PLAIN = {"power_mode": "", "lock_clocks": False, "end_to_end": False}  # fields of `time`


class Host:
    """A host that is connected to a server with the files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log: list[tuple[str, str]] = []
        requests, self._sink = _pipe()
        self._source, replies = _pipe()
        self._thread = threading.Thread(target=_served, args=(requests, replies, folder))
        self._thread.start()
        assert messages.skip_to_greeting(self._source) == b""

    def reply(
        self, op: str, attachments: Mapping[str, object] | None = None, **fields: object
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Send a request and return the fields and attachments of the reply; log records are kept in `log`."""
        messages.write(self._sink, {"op": op, **fields}, attachments)
        while True:
            reply, values = messages.read(self._source)
            if "log" not in reply:
                return reply, values
            self.log.append((reply["severity"], reply["log"]))

    def request(self, op: str, attachments: Mapping[str, object] | None = None, **fields: object) -> dict[str, Any]:
        """Send a request that succeeds, and return the fields of the reply."""
        reply, _ = self.reply(op, attachments, **fields)
        assert reply.pop("ok", None) is True, reply
        return reply

    def put(self, content: bytes) -> str:
        """Send a file and return its digest."""
        digest = hashlib.sha256(content).hexdigest()
        self.request("put", {"content": content}, digest=digest, offset=0, last=True)
        return digest

    def opened(self, runtime: str, files: Mapping[str, str]) -> int:
        """Load an engine and return the number of the session."""
        reply = self.request("open", runtime=runtime, files=files)
        assert reply["batch"] == BATCH
        session: int = reply["session"]
        return session

    def write(self, content: bytes) -> None:
        """Send bytes that are no message."""
        self._sink.write(content)
        self._sink.flush()

    def close(self) -> None:
        """Close the connection and wait until the server has ended."""
        with self._source:
            self._sink.close()
            self._thread.join(20.0)
            assert not self._thread.is_alive()
            assert self._source.read() == b""


def _pipe() -> tuple[io.BufferedReader, io.BufferedWriter]:
    source, sink = os.pipe()
    return os.fdopen(source, "rb"), os.fdopen(sink, "wb")


def _served(requests: io.BufferedReader, replies: io.BufferedWriter, folder: Path) -> None:
    with requests, replies:
        Server(requests, replies, folder).run()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with closing(Host(tmp_path / "cache")) as connected:
        yield connected


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Export]:
    folder = tmp_path_factory.mktemp("exports")
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    return {precision: tiny_export(folder / precision, precision, batch=BATCH) for precision in precisions}


@pytest.fixture(scope="module")
def engines(exports: dict[Precision, Export], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of an engine for each runtime of the CPU, of the int8 export."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("onnxruntime", "openvino")}
    targets.ALL["onnxruntime"].build(exports["int8"], folders["onnxruntime"])
    targets.ALL["cpu"].build(exports["int8"], folders["openvino"])
    return folders


def sent(host: Host, engine: Path) -> dict[str, str]:
    """Send the files of an engine and return their digests by name."""
    return {file.name: host.put(file.read_bytes()) for file in engine.iterdir()}


# --- Machine


def test_the_facts_are_those_of_this_machine(host: Host) -> None:
    reply = host.request("facts")
    assert reply["facts"].keys() == Facts.__annotations__.keys()
    assert (reply["threads"], reply["half"]) == (threads(), half_precision())


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "tvm"])
def test_a_runtime_is_described(host: Host, name: str) -> None:
    found = runtimes.described(name)
    assert host.request("runtime", runtime=name) == found
    assert (found["missing"] is None) == (name != "tvm")


def test_telemetry_is_a_snapshot(host: Host) -> None:
    assert host.request("telemetry")["telemetry"].keys() == Snapshot.__annotations__.keys()


# --- Files


def test_a_file_is_sent_in_parts_and_read_back(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.request("received", digests=[DIGEST, "0" * 64]) == {"received": [0, 0]}
    host.request("put", {"content": CONTENT[:60]}, digest=DIGEST, offset=0, last=False)
    assert host.request("received", digests=[DIGEST]) == {"received": [60]}
    host.request("put", {"content": CONTENT[60:]}, digest=DIGEST, offset=60, last=True)
    assert host.request("received", digests=["0" * 64, DIGEST]) == {"received": [0, -1]}
    monkeypatch.setattr(serve, "_CHUNK", 64)
    parts = []
    for offset, count in ((0, 10), (10, 1000), (74, 1000)):
        reply, values = host.reply("get", digest=DIGEST, offset=offset, count=count)
        assert reply == {"ok": True, "size": len(CONTENT)}
        parts.append(values["content"])
    assert [len(part) for part in parts] == [10, 64, 26]
    assert b"".join(parts) == CONTENT


def test_a_part_for_another_byte_is_not_kept_and_the_reply_has_the_bytes_that_arrived(host: Host) -> None:
    reply, _ = host.reply("put", {"content": CONTENT}, digest=DIGEST, offset=7, last=True)
    assert reply.pop("received") == 0 and "error" not in reply
    assert host.put(CONTENT) == DIGEST


def test_files_are_there_for_the_next_connection(host: Host) -> None:
    host.put(CONTENT)
    with closing(Host(host.folder)) as second:
        assert second.request("received", digests=[DIGEST]) == {"received": [-1]}


@pytest.mark.parametrize(
    ("op", "fields", "sentence"),
    [
        ("put", {"digest": "0" * 64, "offset": 0, "last": True}, "was damaged on its way: send it again"),
        ("put", {"digest": "../x", "offset": 0, "last": True}, "'../x' is no SHA-256"),
        ("received", {"digests": ["/etc/passwd"]}, "'/etc/passwd' is no SHA-256"),
        ("get", {"digest": DIGEST, "offset": 0, "count": 9}, "is not on the device: build the engine again"),
        ("open", {"runtime": "onnxruntime", "files": {"model.onnx": DIGEST}}, "was not sent to the device"),
        ("inspect", {"runtime": "openvino", "files": {"../x": DIGEST}}, "is no name of a file of an engine"),
    ],
)
def test_a_file_that_is_damaged_or_missing_is_an_error_with_its_exit_code(
    host: Host, op: str, fields: dict[str, object], sentence: str
) -> None:
    reply, values = host.reply(op, {"content": CONTENT}, **fields)
    assert sentence in reply.pop("error")
    assert (reply, values) == ({"exit_code": Damaged.exit_code}, {})
    assert host.put(CONTENT) == DIGEST, "the connection continues"


# --- Engines


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_an_engine_is_loaded_run_and_timed(host: Host, engines: dict[str, Path], name: str) -> None:
    session = host.opened(name, sent(host, engines[name]))
    reply, values = host.reply("infer", {"images": IMAGES}, session=session)
    local = runtimes.runtime(name).open_engine(engines[name], threads(), lambda *_: None)
    assert reply == {"ok": True} and values["logits"].shape == (BATCH, CLASSES)
    np.testing.assert_array_equal(values["logits"], local.infer(IMAGES))
    latencies = host.request("time", {"images": IMAGES}, session=session, count=5, **PLAIN)["latencies"]
    assert len(latencies) == 5 and min(latencies) > 0
    assert host.request("close", session=session) == {}
    assert host.reply("infer", {"images": IMAGES}, session=session)[0]["error"] == f"KeyError: {session}"


def test_an_engine_is_inspected(host: Host, engines: dict[str, Path]) -> None:
    found = host.request("inspect", runtime="openvino", files=sent(host, engines["openvino"]))
    assert found == {"inspected": runtimes.OpenVino().inspect(engines["openvino"], threads())}


def test_several_engines_are_open_at_once(host: Host, engines: dict[str, Path]) -> None:
    files = {name: sent(host, folder) for name, folder in engines.items()}
    first, second, third = (host.opened(name, files[name]) for name in ("onnxruntime", "openvino", "onnxruntime"))
    assert len({first, second, third}) == 3
    host.request("close", session=second)
    logits = [host.reply("infer", {"images": IMAGES}, session=session)[1]["logits"] for session in (first, third)]
    np.testing.assert_array_equal(*logits)
    assert host.opened("openvino", files["openvino"]) not in (first, third)


def test_the_turn_lasts_from_the_first_timed_query_until_no_engine_is_open(
    host: Host, engines: dict[str, Path]
) -> None:
    files = sent(host, engines["onnxruntime"])
    first, second = host.opened("onnxruntime", files), host.opened("onnxruntime", files)
    host.request("infer", {"images": IMAGES}, session=first)
    assert host.request("conditions") == {"conditions": None} and free(host.folder)
    host.request("time", {"images": IMAGES}, session=first, count=1, **PLAIN)
    host.request("time", {"images": IMAGES}, session=second, count=1, **PLAIN)
    conditions = host.request("conditions")["conditions"]
    assert conditions["samples"] >= 1 and not free(host.folder)
    host.request("close", session=first)
    assert not free(host.folder)
    host.request("close", session=second)
    assert free(host.folder) and host.request("conditions") == {"conditions": None}


class Recorded(OnnxRuntime):
    """ONNX Runtime whose sessions record that they are closed."""

    def __init__(self) -> None:
        self.closed: list[int] = []

    def open_engine(self, engine: Path, threads: int, say: runtimes.Say) -> HostSession:
        session = OnnxRuntime.open_engine(self, engine, threads, say)
        say("WARNING", f"loaded with {threads} threads")
        session.close = lambda: self.closed.append(id(session))  # type: ignore[method-assign]
        return session


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    made = Recorded()
    monkeypatch.setitem(runtimes.RUNTIMES, "recorded", made)
    return made


def garbage(host: Host) -> None:
    host.write(b"\xff" * 8)


@pytest.mark.parametrize("ending", [lambda host: None, garbage], ids=["closed", "no message"])
def test_sessions_and_the_turn_end_with_the_connection(
    tmp_path: Path, engines: dict[str, Path], recorded: Recorded, ending: Callable[[Host], None]
) -> None:
    with closing(Host(tmp_path)) as host:
        files = sent(host, engines["onnxruntime"])
        sessions = [host.opened("recorded", files) for _ in range(3)]
        host.request("time", {"images": IMAGES}, session=sessions[0], count=1, **PLAIN)
        host.request("close", session=sessions[1])
        assert len(recorded.closed) == 1 and not free(tmp_path)
        ending(host)
    assert len(set(recorded.closed)) == 3 and free(tmp_path)


def test_messages_of_a_runtime_precede_the_reply(host: Host, engines: dict[str, Path], recorded: Recorded) -> None:
    host.opened("recorded", sent(host, engines["onnxruntime"]))
    assert host.log == [("WARNING", f"loaded with {threads()} threads")]


# --- Builds


class Copied:
    """A runtime whose engine is a copy of the graph."""

    package = "json"

    def described(self) -> dict[str, Any]:
        return {"version": "1", "not_executed": None}

    def build(self, folder: Path, options: dict[str, Any], say: runtimes.Say) -> None:
        say("WARNING", "the graph is copied")
        graph = (folder / "model.onnx").read_bytes()
        if options["refuse"]:
            raise Rejected("the graph is refused")
        (folder / "model.engine").write_bytes(graph[::-1])


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runtimes.RUNTIMES, "copied", Copied())
    monkeypatch.setattr(jobs, "_start", jobs.run)  # in this process, which has the runtime


def test_an_engine_is_built_and_its_files_are_read_back(host: Host, copied: None) -> None:
    files = {"model.onnx": host.put(CONTENT)}
    built = host.request("build", runtime="copied", files=files, options={"refuse": False})
    assert built["files"].keys() == {"model.engine"} and built["seconds"] >= 0
    _, values = host.reply("get", digest=built["files"]["model.engine"], offset=0, count=1000)
    assert values["content"] == CONTENT[::-1]
    assert host.log == [("WARNING", "the graph is copied")]


def test_a_graph_that_is_refused_is_an_error_with_its_exit_code(host: Host, copied: None) -> None:
    files = {"model.onnx": host.put(CONTENT)}
    reply, _ = host.reply("build", runtime="copied", files=files, options={"refuse": True})
    assert reply == {"error": "the graph is refused", "exit_code": Rejected.exit_code}
    assert host.log == [("WARNING", "the graph is copied")]


# --- Errors


@pytest.mark.parametrize("op", ["tune", "", "_say", "__init__"])
def test_an_operation_that_does_not_exist_is_named(host: Host, op: str) -> None:
    assert host.reply(op) == ({"error": f"the runner has no operation {op!r}", "exit_code": 3}, {})
    assert host.request("conditions") == {"conditions": None}, "the connection continues"


@pytest.mark.parametrize(
    ("op", "fields", "error"),
    [
        ("runtime", {}, "KeyError: 'runtime'"),
        ("close", {"session": 1}, "KeyError: 1"),
        ("infer", {"session": "1"}, "KeyError: '1'"),
        ("open", {"runtime": "tvm", "files": {}}, "the runner has no runtime 'tvm'"),
        ("inspect", {"runtime": "onnxruntime", "files": {}}, "AttributeError: 'OnnxRuntime' object has no attribute"),
    ],
)
def test_any_other_error_is_one_line_and_the_connection_continues(
    host: Host, op: str, fields: dict[str, object], error: str
) -> None:
    reply, _ = host.reply(op, None, **fields)
    assert reply["error"].startswith(error) and "\n" not in reply["error"] and reply["exit_code"] == 3
    assert host.request("conditions") == {"conditions": None}


def test_images_of_another_shape_are_an_error_of_the_runtime(host: Host, engines: dict[str, Path]) -> None:
    session = host.opened("onnxruntime", sent(host, engines["onnxruntime"]))
    reply, _ = host.reply("infer", {"images": IMAGES[:, :, 1:]}, session=session)
    assert reply["error"].startswith("InvalidArgument: ") and "\n" not in reply["error"]
    assert host.reply("infer", {"images": IMAGES}, session=session)[0] == {"ok": True}


# --- The process


def test_a_process_serves_over_its_standard_streams_and_other_output_goes_to_standard_error(tmp_path: Path) -> None:
    requests = io.BytesIO()
    messages.write(requests, {"op": "received", "digests": [DIGEST]})
    program = "import os; from targets.runner.serve import serve; serve(); print('printed'); os.write(1, b'written')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=requests.getvalue(),
        capture_output=True,
        cwd=ROOT,
        env={**surroundings(), "EDGELINE_CACHE": str(tmp_path / "cache")},
        check=True,
    )
    replies = io.BytesIO(done.stdout)
    assert messages.skip_to_greeting(replies) == b""
    assert messages.read(replies) == ({"ok": True, "received": [0]}, {})
    assert replies.read() == b""
    assert sorted(done.stderr.split()) in ([b"printed", b"written"], [b"writtenprinted"])
    assert (tmp_path / "cache" / "files").is_dir()


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"EDGELINE_CACHE": "/data/runner", "XDG_CACHE_HOME": "/cache"}, "/data/runner"),
        ({"XDG_CACHE_HOME": "/cache"}, "/cache/edgeline"),
        ({"EDGELINE_CACHE": "~/runner"}, "/users/me/runner"),
        ({"EDGELINE_CACHE": "", "XDG_CACHE_HOME": ""}, "/users/me/.cache/edgeline"),
    ],
)
def test_the_folder_follows_the_environment(
    environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EDGELINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/users/me"} | environment).items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_a_session_that_cannot_be_closed_does_not_keep_the_others_or_the_turn(tmp_path: Path) -> None:
    closed: list[str] = []

    class Session:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            closed.append(self.name)
            raise RuntimeError(self.name)

    server = Server(io.BytesIO(), io.BytesIO(), tmp_path)
    server._sessions = {1: Session("first"), 2: Session("second")}
    server._end_turn = lambda: closed.append("turn")  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        server.run()
    assert sorted(closed) == ["first", "second", "turn"]
