"""Float weights from the Hugging Face Hub, where timm keeps its own: `WEIGHTS=timm`.

What has been downloaded once is taken from the cache and nobody is asked again: the same command means the same
weights, with a network and without. The cache has the layout of the Hub's library, so that each finds the files of the
other: `blobs/<SHA-256 of the content>`, and a link to it in `snapshots/<commit>`. No name in it is taken from an answer
before it was checked to be a digest, and no content is kept that is not the one whose SHA-256 the Hub states.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
from pathlib import Path
from typing import Final, NamedTuple

from models.errors import BadRequest, CannotRunHere
from models.spec import ModelSpec

_FILE = "model.safetensors"
# Read when the library is imported: it tells nobody about this machine, keeps to one cache (Xet would have its own) and
# leaves it to us to say what went wrong. Whoever sets one of them means it.
_MANNERS = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_VERBOSITY": "error"}
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")

log = logging.getLogger("edgeline")


class Origin(NamedTuple):
    """Where a file of the cache comes from."""

    repository: str
    revision: str  # commit
    sha256: str


def download(spec: ModelSpec) -> Path:
    """timm's weights of the model, in the cache of the Hub (below HF_HOME, else XDG_CACHE_HOME).

    A file in the cache that is damaged, or no safetensors file, is removed and downloaded again. Raises BadRequest
    where timm has none, CannotRunHere where they cannot be had.
    """
    if spec.hub is None:
        raise BadRequest(
            f"WEIGHTS=timm: timm publishes no weights of {spec.name}; give a checkpoint, WEIGHTS=<file>, or nothing: "
            "then it is trained on DATA"
        )
    for name, value in _MANNERS.items():
        os.environ.setdefault(name, value)
    from huggingface_hub import hf_hub_url, try_to_load_from_cache

    found = try_to_load_from_cache(spec.hub, _FILE)
    if isinstance(found, str):
        file = Path(found).absolute()  # not `resolve`: what the link points to has no suffix
        if (damage := _damage(file)) is None:
            return file
        log.warning("%s is damaged: %s; removed from the cache", file, damage)
        _drop(file)
    url = hf_hub_url(spec.hub, _FILE)
    try:
        return _fetched(spec.hub, url)
    except Exception as error:  # of the library, or of the one that it speaks HTTP with: another one every few years
        raise CannotRunHere(
            f"WEIGHTS=timm: {url} could not be downloaded: {_reason(error)}; download it elsewhere and give it as "
            "WEIGHTS=<file>"
        ) from error


def origin(file: Path | None) -> Origin | None:
    """The repository and the commit of a file in the cache; None of any other file."""
    if file is None or file.parent.parent.name != "snapshots":
        return None
    blob, revision, repository = file.resolve().name, file.parent.name, file.parent.parent.parent.name
    if not _SHA256.fullmatch(blob) or not _COMMIT.fullmatch(revision) or not repository.startswith("models--"):
        return None
    return Origin(repository.removeprefix("models--").replace("--", "/"), revision, blob)


def _fetched(repository: str, url: str) -> Path:
    """Download `url` into the cache. Raises ValueError where the answer, or what came, is not what it should be."""
    from huggingface_hub import constants, get_hf_file_metadata
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils._headers import build_hf_headers

    # Asked first and once, because a download is tried again for half a minute. The weights are public: no token that
    # may lie on this machine has to travel.
    stated = get_hf_file_metadata(url, token=False)
    digest, revision = stated.etag or "", stated.commit_hash or ""
    if not stated.etag or not stated.commit_hash:
        raise ValueError("it does not seem to be served by a Hugging Face Hub endpoint: it states no commit or digest")
    if not _SHA256.fullmatch(digest) or not _COMMIT.fullmatch(revision):
        raise ValueError(f"its commit and SHA-256 are stated as {revision[:80]!a} and {digest[:80]!a}, which are none")
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
        if (found := _digest(scratch)) != digest:
            raise ValueError(f"the Hub states content of sha256 {digest}, and sha256 {found} came; it is not kept")
        if why := _unreadable(scratch):
            raise ValueError(f"it is not a whole safetensors file ({why}); it is not kept")
        scratch.replace(blob)
    finally:
        scratch.unlink(missing_ok=True)
    return _linked(folder, revision, blob)


def _linked(folder: Path, revision: str, blob: Path) -> Path:
    """The file in the snapshot `revision`, and that snapshot made the one of the branch `main`."""
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
    """Why a file of the cache cannot be used; None where it can."""
    expected = file.resolve().name
    if _SHA256.fullmatch(expected) and (found := _digest(file)) != expected:
        return f"expected sha256 {expected}, found {found}"
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
    """Remove a file of the cache, and the blob that it is a link to where that lies in the cache, too."""
    blob = file.resolve()
    if blob.parent == (file.parent.parent.parent / "blobs").resolve():
        with contextlib.suppress(FileNotFoundError):
            blob.unlink()
    file.unlink(missing_ok=True)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    """What went wrong, in a few words: the library's messages are paragraphs."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids it"
    if isinstance(error, HfHubHTTPError):
        return f"the answer was {error.response.status_code} {error.response.reason_phrase}"
    first_line = str(error).partition("\n")[0].strip()
    return first_line or type(error).__name__
