"""Messages of hosts and runners: everything that is written is read, and nothing else is accepted."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from targets.runner import messages
from targets.runner.messages import Broken


def written(fields: dict[str, object], **attachments: object) -> io.BytesIO:
    stream = io.BytesIO()
    messages.write(stream, fields, attachments)
    stream.seek(0)
    return stream


def frame(fields: object, content: bytes = b"") -> io.BytesIO:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return io.BytesIO(struct.pack(">I", len(text)) + text + content)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int8, np.int64, np.uint8, np.bool_])
def test_arrays_and_bytes_arrive_as_they_were_sent(dtype: type) -> None:
    array: npt.NDArray[Any] = np.arange(24).reshape(2, 3, 4).astype(dtype)[:, ::2]  # not contiguous
    fields, values = messages.read(written({"op": "é", "n": 1.5}, images=array, empty=b"", content=b"\0\xff"))
    assert fields == {"op": "é", "n": 1.5}
    assert values["content"] == b"\0\xff" and values["empty"] == b""
    assert values["images"].dtype == array.dtype
    np.testing.assert_array_equal(values["images"], array)


@pytest.mark.parametrize("shape", [(0, 3), (1,), ()])
def test_arrays_of_every_shape_arrive(shape: tuple[int, ...]) -> None:
    _, values = messages.read(written({}, array=np.zeros(shape, np.float32)))
    assert values["array"].shape == shape


def test_several_messages_follow_each_other() -> None:
    stream = io.BytesIO()
    for number in range(3):
        messages.write(stream, {"n": number}, {"content": bytes(number)})
    stream.seek(0)
    assert [messages.read(stream)[0]["n"] for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("cut", [0, 3, 4, 20, -1])
def test_a_stream_that_ends_is_broken(cut: int) -> None:
    content = written({"op": "x"}, content=b"12345").getvalue()
    with pytest.raises(Broken, match="the connection was closed"):
        messages.read(io.BytesIO(content[:cut]))


@pytest.mark.parametrize(
    ("stream", "sentence"),
    [
        (io.BytesIO(b"Welcome to Ubuntu 22.04"), r"carries \d+ bytes of JSON in one message"),
        (frame(b"no json"), "carries bytes that are no message"),
        (frame([1]), "carries bytes that are no message"),
        (frame({"op": "x"}), "carries bytes that are no message"),
        (frame({"attachments": [{"name": "a", "bytes": "x"}]}), "carries bytes that are no message"),
        (frame({"attachments": [{"name": "a", "bytes": -1}]}), "announces attachments of -1 bytes"),
        (frame({"attachments": [{"name": "a", "bytes": 1 << 40}]}), "announces attachments of 1099511627776 bytes"),
        (frame({"attachments": [{"name": "a", "bytes": 8, "dtype": "O", "shape": [1]}]}, bytes(8)), "cannot be read"),
        (frame({"attachments": [{"name": "a", "bytes": 8, "dtype": "f4", "shape": [3]}]}, bytes(8)), "cannot be read"),
        (frame({"attachments": [{"name": "a", "bytes": 8, "dtype": "?!", "shape": [3]}]}, bytes(8)), "cannot be read"),
    ],
)
def test_what_is_no_message_is_broken(stream: io.BytesIO, sentence: str) -> None:
    with pytest.raises(Broken, match=sentence):
        messages.read(stream)


def test_output_of_the_login_shell_before_the_greeting_is_skipped() -> None:
    stream = io.BytesIO(b"Welcome\nedgeline-runner 0\n" + messages.GREETING + b"rest")
    assert messages.skip_to_greeting(stream) == b"Welcome\nedgeline-runner 0\n"
    assert stream.read() == b"rest"


@pytest.mark.parametrize("noise", [b"", b"bash: python3: not found\n", bytes(messages.MOST_NOISE + 10)])
def test_a_stream_without_a_greeting_is_broken(noise: bytes) -> None:
    with pytest.raises(Broken):
        messages.skip_to_greeting(io.BytesIO(noise))
