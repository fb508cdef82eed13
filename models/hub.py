"""Download of timm's float weights from the Hugging Face Hub: `WEIGHTS=timm`.

A downloaded file is reused from the cache without a request to the Hub: the same command gives the same weights, online
and offline. The cache has the layout of the huggingface_hub library, and both share their files: `blobs/<SHA-256 of the
content>`, with a link in `snapshots/<commit>`. File names are taken from a response only after they are checked to be
digests, and content is kept only if it matches the SHA-256 that the Hub states.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from models.errors import BadRequest, CannotRunHere
from models.spec import ModelSpec

_FILE = "model.safetensors"
# Settings that the library reads when it is imported: no telemetry, a single cache (Xet has its own), and no messages
# below errors. Values that the user has set are kept.
_DEFAULTS = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_VERBOSITY": "error"}
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")

log = logging.getLogger("edgeline")


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Origin of a cached file."""

    repository: str
    revision: str  # commit
    sha256: str


def download(spec: ModelSpec) -> Path:
    """Return the path of timm's weights of the model in the Hub's cache (below HF_HOME, else XDG_CACHE_HOME).

    A cached file that is damaged or not a safetensors file is removed and downloaded again. Raises BadRequest if timm
    publishes no weights of the model, CannotRunHere if the download fails.
    """
    if spec.hub is None:
        raise BadRequest(
            f"WEIGHTS=timm: timm publishes no weights of {spec.name}; give a checkpoint with WEIGHTS=<file>, or leave "
            "WEIGHTS out to train on DATA"
        )
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    from huggingface_hub import hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(spec.hub, _FILE)
    if isinstance(cached, str):
        file = Path(cached).absolute()  # not `resolve`: the blob behind the link has no suffix
        if (damage := _damage(file)) is None:
            return file
        log.warning("%s is damaged: %s; removed from the cache", file, damage)
        _drop(file)
    url = hf_hub_url(spec.hub, _FILE)
    try:
        return _fetched(spec.hub, url)
    except Exception as error:  # of the library, or of its HTTP library, which changes between versions
        raise CannotRunHere(
            f"WEIGHTS=timm: {url} could not be downloaded: {_reason(error)}; download it on another machine and give "
            "it as WEIGHTS=<file>"
        ) from error


def origin(file: Path | None) -> Origin | None:
    """Return the repository, commit and SHA-256 of a file in the Hub's cache; None for any other file."""
    if file is None or file.parent.parent.name != "snapshots":
        return None
    blob, revision, repository = file.resolve().name, file.parent.name, file.parent.parent.parent.name
    if not _SHA256.fullmatch(blob) or not _COMMIT.fullmatch(revision) or not repository.startswith("models--"):
        return None
    name = repository.removeprefix("models--").replace("--", "/")
    return Origin(repository=name, revision=revision, sha256=blob)


def _fetched(repository: str, url: str) -> Path:
    """Download `url` to the cache. Raises ValueError if the response's metadata or the content is invalid."""
    from huggingface_hub import constants, get_hf_file_metadata
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils._headers import build_hf_headers

    # The metadata is requested first, without retries: a download is retried for half a minute. The weights are public,
    # so no access token of this machine is sent.
    stated = get_hf_file_metadata(url, token=False)
    digest, revision = stated.etag or "", stated.commit_hash or ""
    if not stated.etag or not stated.commit_hash:
        raise ValueError(
            "the server does not seem to be a Hugging Face Hub endpoint: its response has no commit or digest"
        )
    if not _SHA256.fullmatch(digest) or not _COMMIT.fullmatch(revision):
        raise ValueError(
            f"the response has commit {revision[:80]!a} and SHA-256 {digest[:80]!a}, expected 40 and 64 hexadecimal "
            "digits"
        )
    folder = Path(constants.HF_HUB_CACHE).absolute() / repo_folder_name(repo_id=repository, repo_type="model")
    blob = folder / "blobs" / digest
    blob.parent.mkdir(parents=True, exist_ok=True)
    scratch = blob.with_name(f".{secrets.token_hex(8)}.incomplete")
    try:
        with scratch.open("xb") as file:
            http_get(
                stated.location,
                file,
                headers=build_hf_headers(token=False),
                expected_size=stated.size,
                displayed_filename=_FILE,
            )
        if (actual := _digest(scratch)) != digest:
            raise ValueError(f"expected content of sha256 {digest}, got sha256 {actual}; it is not kept")
        if why := _unreadable(scratch):
            raise ValueError(f"it is not a complete safetensors file ({why}); it is not kept")
        scratch.replace(blob)
    finally:
        scratch.unlink(missing_ok=True)
    return _linked(folder, revision, blob)


def _linked(folder: Path, revision: str, blob: Path) -> Path:
    """Link `blob` in the snapshot `revision`, make it the snapshot of the branch `main`, and return the link."""
    file, reference = folder / "snapshots" / revision / _FILE, folder / "refs" / "main"
    for path in (file, reference):
        path.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{secrets.token_hex(8)}")
    scratch.symlink_to(os.path.relpath(blob, file.parent))
    scratch.replace(file)
    scratch = reference.with_name(f".{secrets.token_hex(8)}")
    scratch.write_text(revision)
    scratch.replace(reference)
    return file


def _damage(file: Path) -> str | None:
    """Return the reason why a cached file cannot be used; None if it is intact."""
    expected = file.resolve().name
    if _SHA256.fullmatch(expected) and (actual := _digest(file)) != expected:
        return f"expected sha256 {expected}, found {actual}"
    return _unreadable(file)


def _unreadable(file: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        return str(error)
    return None


def _drop(file: Path) -> None:
    """Remove a cached file, and the blob that it links to if it lies in the same cache."""
    blob = file.resolve()
    if blob.parent == (file.parent.parent.parent / "blobs").resolve():
        with contextlib.suppress(FileNotFoundError):
            blob.unlink()
    file.unlink(missing_ok=True)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    """Return a short reason for a failed download: the library's messages are paragraphs."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids downloads"
    if isinstance(error, HfHubHTTPError):
        return f"the response was {error.response.status_code} {error.response.reason_phrase}"
    first_line = str(error).partition("\n")[0].strip()
    return first_line or type(error).__name__
