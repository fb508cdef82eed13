"""`WEIGHTS=timm` with a local server as hub: requests, cached files, and errors. The library is the real one, in a
separate process, since it reads its settings at import.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import models
from models import checkpoint, hub
from models.errors import BadRequest
from tests.support.tiny import ROOT, surroundings

pytestmark = pytest.mark.slow

MODEL = "mobilevit_xxs"
PATH = f"/{models.ALL[MODEL].hub}/resolve/main/model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hf_a_token_that_must_stay_here"  # noqa: S105
WITHOUT = "mobilenetv2_035"  # which timm never trained
UMASK = os.umask(0)
os.umask(UMASK)
TOLD = """
from pipeline import process_setup as surroundings
surroundings.settle()
"""
FETCH = """
import sys
import models
from models import hub
from models.errors import EdgelineError
try:
    print(hub.download(models.ALL[sys.argv[1]]))
except EdgelineError as error:
    sys.exit(f"{error.exit_code} {error}")
"""


@dataclass
class Hub:
    """Responses of the server, and the requests that it received."""

    content: bytes
    status: int = 200
    lost: int = 0  # bytes that it promises and does not send
    is_one: bool = True  # rather than something in between that answers for it
    etag: str | None = None  # in place of the digest of the content
    commit: str = COMMIT
    redirects: bool = False  # as the Hub does: to where it keeps large files, with the digest of what is linked
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # paths and headers
    url: str = ""


@pytest.fixture
def served() -> Iterator[Hub]:
    found = Hub(content=save({"head.fc.weight": torch.ones(2, 3)}))

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            found.requests.append((self.path, {name.lower(): it for name, it in self.headers.items()}))
            status = found.status if self.path in (PATH, "/large") else 404
            digest = hashlib.sha256(found.content).hexdigest() if found.etag is None else found.etag
            if status == 200 and found.redirects and self.path == PATH:
                self.send_response(302)
                self.send_header("Location", f"{found.url}/large")
                self.send_header("X-Linked-ETag", f'"{digest}"')
                self.send_header("X-Linked-Size", str(len(found.content)))
                self.send_header("X-Repo-Commit", found.commit)
                self.send_header("ETag", '"of-the-redirection"')
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(status)
            if status == 200 and found.is_one:
                self.send_header("ETag", f'"{digest}"')
                self.send_header("X-Repo-Commit", found.commit)
                self.send_header("Content-Length", str(len(found.content)))
            elif status != 200:
                self.send_header("X-Error-Code", "EntryNotFound" if status == 404 else "RepoNotFound")
                self.send_header("Content-Length", "0")
            self.end_headers()
            if status == 200 and self.command == "GET":
                self.wfile.write(found.content[: len(found.content) - found.lost])

        do_GET = do_HEAD = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def call(tmp_path: Path, url: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a separate home and cache, and the hub at `url`."""
    (tmp_path / "home").mkdir(exist_ok=True)
    ours = {name: value for name, value in surroundings().items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    ours |= {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    ours |= {"HF_ENDPOINT": url, "HF_TOKEN": SECRET, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=ours | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def fetched(tmp_path: Path, url: str, **environment: str) -> Path:
    result = call(tmp_path, url, "-c", FETCH, MODEL, **environment)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    return Path(result.stdout.strip())


def refused(tmp_path: Path, url: str, **environment: str) -> str:
    """Return the error sentence after checking the exit code."""
    result = call(tmp_path, url, "-c", FETCH, MODEL, **environment)
    assert result.returncode == 1 and result.stdout == ""
    (sentence,) = result.stderr.splitlines()
    return sentence


def nowhere() -> str:
    """Return the address of a server that was just closed."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return f"http://127.0.0.1:{server.server_address[1]}"


# --- Weights that are there -----------------------------------------------------------------------------------------


def test_weights_are_downloaded_into_the_cache_and_nowhere_else(tmp_path: Path, served: Hub) -> None:
    file = fetched(tmp_path, served.url)
    assert file.is_relative_to(tmp_path / "cache" / "huggingface" / "hub")
    assert file.name == "model.safetensors" and file.parent.name == COMMIT
    assert file.read_bytes() == served.content
    assert checkpoint.read(file).keys() == {"head.fc.weight"}
    assert list((tmp_path / "home").iterdir()) == []
    assert [path for path, _ in served.requests] == [PATH] * len(served.requests)


def test_requests_contain_neither_a_token_nor_system_information(tmp_path: Path, served: Hub) -> None:
    fetched(tmp_path, served.url, AI_AGENT="somebody")
    assert served.requests
    for _, headers in served.requests:
        assert "authorization" not in headers
        assert SECRET not in str(headers)
        assert not {"torch", "agent"} & {part.partition("/")[0].strip() for part in headers["user-agent"].split(";")}


def test_a_folder_for_the_library_is_respected(tmp_path: Path, served: Hub) -> None:
    assert fetched(tmp_path, served.url, HF_HOME=str(tmp_path / "mine")).is_relative_to(tmp_path / "mine")
    assert not (tmp_path / "cache").exists()


def test_a_cached_download_is_used_without_a_request(tmp_path: Path, served: Hub) -> None:
    first = fetched(tmp_path, served.url)
    asked = len(served.requests)
    served.content += b" a newer one"
    assert fetched(tmp_path, served.url) == first
    assert len(served.requests) == asked
    assert fetched(tmp_path, nowhere()) == first
    assert fetched(tmp_path, nowhere(), HF_HUB_OFFLINE="1") == first


def test_the_command_line_takes_them_as_it_takes_the_same_file(tmp_path: Path, served: Hub) -> None:
    def key(weights: str) -> object:
        result = call(tmp_path, served.url, "-m", "pipeline", "explain", "--model", MODEL, "--weights", weights)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])["stages"]

    by_name = key("timm")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(served.content)
    assert by_name == key(str(copy))
    copy.write_bytes(save({"head.fc.weight": torch.zeros(2, 3)}))
    assert by_name != key(str(copy))


def test_weights_are_kept_as_the_library_keeps_them(tmp_path: Path, served: Hub) -> None:
    """The file is named by the digest of its content, with a link by commit, and its mode follows the umask."""
    file = fetched(tmp_path, served.url)
    blob = file.resolve()
    assert (blob.name, blob.parent.name) == (hashlib.sha256(served.content).hexdigest(), "blobs")
    assert blob.stat().st_mode & 0o777 == 0o666 & ~UMASK
    assert (file.parent.parent.parent / "refs" / "main").read_text() == COMMIT
    assert hub.origin(file) == hub.Origin(repository=str(models.ALL[MODEL].hub), revision=COMMIT, sha256=blob.name)
    assert hub.origin(blob) is None and hub.origin(None) is None
    found = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(found) == 3  # and nothing half-made


def test_the_hub_keeps_large_files_elsewhere(tmp_path: Path, served: Hub) -> None:
    served.redirects = True
    file = fetched(tmp_path, served.url)
    assert file.read_bytes() == served.content and file.parent.name == COMMIT
    assert {path for path, _ in served.requests} == {PATH, "/large"}


# --- Weights that are not what they should be -----------------------------------------------------------------------

OUTWARDS = ("../../../../elsewhere/x", "/elsewhere/x", "..", "a/b", "x" * 64, "0" * 63, "0" * 64 + "\\", "\x7f")


@pytest.mark.parametrize("redirects", [False, True])
@pytest.mark.parametrize("name", OUTWARDS)
def test_file_names_are_never_taken_from_a_response(tmp_path: Path, served: Hub, name: str, redirects: bool) -> None:
    before = {path for path in tmp_path.rglob("*")}
    served.redirects = redirects
    served.etag = name
    assert "expected 40 and 64 hexadecimal digits" in refused(tmp_path, served.url)
    served.etag, served.commit = None, name
    assert "expected 40 and 64 hexadecimal digits" in refused(tmp_path, served.url)
    assert {path for path in tmp_path.rglob("*")} - before <= {tmp_path / "home", tmp_path / "cache"}


def test_content_with_a_wrong_digest_is_not_kept(tmp_path: Path, served: Hub) -> None:
    right = served.content
    served.etag = hashlib.sha256(right).hexdigest()
    served.content = right[:-1] + bytes([right[-1] ^ 1])
    came = hashlib.sha256(served.content).hexdigest()
    said = refused(tmp_path, served.url)
    assert f"expected content of sha256 {served.etag}, got sha256 {came}; it is not kept" in said
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    served.content = right
    assert fetched(tmp_path, served.url).read_bytes() == right


def test_a_file_of_the_cache_that_was_damaged_is_downloaded_again(tmp_path: Path, served: Hub) -> None:
    file = fetched(tmp_path, served.url)
    damaged = served.content[:-1] + bytes([served.content[-1] ^ 1])
    file.resolve().write_bytes(damaged)
    result = call(tmp_path, served.url, "-c", TOLD + FETCH, MODEL)
    assert result.returncode == 0
    digests = [hashlib.sha256(content).hexdigest() for content in (served.content, damaged)]
    assert result.stderr.splitlines() == [
        f"{file} is damaged: expected sha256 {digests[0]}, found {digests[1]}; removed from the cache"
    ]
    assert file.read_bytes() == served.content


def test_a_damaged_file_is_not_used_where_the_hub_is_away(tmp_path: Path, served: Hub) -> None:
    file = fetched(tmp_path, served.url)
    file.resolve().write_bytes(b"")
    result = call(tmp_path, nowhere(), "-c", FETCH, MODEL)
    assert result.returncode == 1 and "could not be downloaded" in result.stderr
    assert not file.exists() and not file.is_symlink()
    assert fetched(tmp_path, served.url).read_bytes() == served.content


def test_a_file_that_is_not_a_checkpoint_is_not_kept(tmp_path: Path, served: Hub) -> None:
    right = served.content
    served.content = b"<html>Please log in</html>"
    assert "it is not a complete safetensors file (" in refused(tmp_path, served.url)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    served.content = right
    file = fetched(tmp_path, served.url)
    # The library itself keeps what it cannot check: a file that is no link, or under another name than its digest.
    file.unlink()
    file.write_bytes(b"<html>Please log in</html>")
    assert fetched(tmp_path, served.url).read_bytes() == right


# --- Weights that are not -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "answer"), [(404, "404 Not Found"), (401, "401 Unauthorized"), (503, "503 Service Unavailable")]
)
def test_an_error_response_is_quoted(tmp_path: Path, served: Hub, status: int, answer: str) -> None:
    served.status = status
    assert refused(tmp_path, served.url) == (
        f"3 WEIGHTS=timm: {served.url}{PATH} could not be downloaded: the response was {answer}; download it on "
        "another machine and give it as WEIGHTS=<file>"
    )


def test_an_unreachable_hub_is_reported(tmp_path: Path) -> None:
    url = nowhere()
    sentence = (
        r"could not be downloaded: .*Connection refused; download it on another machine and give it as WEIGHTS=<file>$"
    )
    assert re.search(sentence, refused(tmp_path, url))


def test_a_hub_that_does_not_respond_times_out(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # listens, and that is all
        url = f"http://127.0.0.1:{server.server_address[1]}"
        said = refused(tmp_path, url, HF_HUB_ETAG_TIMEOUT="1")
    assert said.startswith(f"3 WEIGHTS=timm: {url}{PATH} could not be downloaded: ")


def test_offline_is_offline(tmp_path: Path, served: Hub) -> None:
    said = refused(tmp_path, served.url, HF_HUB_OFFLINE="1")
    assert (
        "could not be downloaded: HF_HUB_OFFLINE forbids downloads; download it on another machine and give it" in said
    )
    assert served.requests == []


def test_an_invalid_address_is_reported(tmp_path: Path) -> None:
    assert refused(tmp_path, "nonsense").startswith(f"3 WEIGHTS=timm: nonsense{PATH} could not be downloaded: ")


def test_a_login_page_of_a_proxy_is_not_taken_for_weights(tmp_path: Path, served: Hub) -> None:
    """Captive portals respond with status 200 and a login page."""
    served.content, served.is_one = b"<html>Please log in</html>", False
    assert "does not seem to be a Hugging Face Hub endpoint" in refused(tmp_path, served.url)


def test_weights_that_break_off_are_not_kept(tmp_path: Path, served: Hub) -> None:
    served.lost = 50
    assert refused(tmp_path, served.url).startswith(f"3 WEIGHTS=timm: {served.url}{PATH} could not be downloaded: ")
    served.lost = 0
    assert fetched(tmp_path, served.url).read_bytes() == served.content


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, served: Hub) -> None:
    (tmp_path / "cache").write_text("a file, where a folder was expected")
    said = refused(tmp_path, served.url)
    assert said.startswith(f"3 WEIGHTS=timm: {served.url}{PATH} could not be downloaded: ")
    assert str(tmp_path / "cache") in said


def test_the_command_line_reports_it_in_one_sentence(tmp_path: Path, served: Hub) -> None:
    served.status = 404
    store = tmp_path / "store"
    request = ["engine", "--model", MODEL, "--weights", "timm", "--store", str(store)]
    result = call(tmp_path, served.url, "-m", "pipeline", *request)
    assert result.returncode == 3
    assert [json.loads(result.stdout)["error"]] == result.stderr.splitlines()
    assert not store.exists()


def test_a_model_without_timm_weights_is_refused_without_a_request() -> None:
    with pytest.raises(BadRequest, match=f"timm publishes no weights of {WITHOUT}; give a checkpoint with WEIGHTS="):
        hub.download(models.ALL[WITHOUT])


@pytest.mark.parametrize("spec", [spec for spec in models.ALL.values() if spec.hub], ids=lambda spec: spec.name)
def test_a_repository_is_one_of_timm_with_a_tag_of_its_training(spec: models.spec.ModelSpec) -> None:
    owner, _, name = str(spec.hub).partition("/")
    architecture, _, tag = name.partition(".")
    assert owner == "timm"
    assert architecture.startswith(spec.family) and tag.endswith("in1k")
