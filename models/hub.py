"""Float weights from the Hugging Face Hub, where timm keeps its own: `WEIGHTS=timm`.

What has been downloaded once is taken from the cache and nobody is asked again: the same command means the same
weights, with a network and without.
"""

from __future__ import annotations

import os
from pathlib import Path

from models.errors import BadRequest, CannotRunHere
from models.spec import ModelSpec

_FILE = "model.safetensors"
# Read when the library is imported: it tells nobody about this machine, keeps to one cache (Xet would have its own) and
# leaves it to us to say what went wrong. Whoever sets one of them means it.
_MANNERS = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_VERBOSITY": "error"}


def download(spec: ModelSpec) -> Path:
    """timm's weights of the model, in the cache of the Hub (below HF_HOME, else XDG_CACHE_HOME).

    Raises BadRequest where timm has none, CannotRunHere where they cannot be had.
    """
    if spec.hub is None:
        raise BadRequest(
            f"WEIGHTS=timm: timm publishes no weights of {spec.name}; give a checkpoint, WEIGHTS=<file>, or nothing: "
            "then it is trained on DATA"
        )
    for name, value in _MANNERS.items():
        os.environ.setdefault(name, value)
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    found = try_to_load_from_cache(spec.hub, _FILE)
    if isinstance(found, str):
        return Path(found).absolute()  # not `resolve`: what the link points to has no suffix
    url = hf_hub_url(spec.hub, _FILE)
    try:
        # Asked first and once, because a download is tried again for half a minute. The weights are public: no token
        # that may lie on this machine has to travel.
        get_hf_file_metadata(url, token=False)
        return Path(hf_hub_download(spec.hub, _FILE, token=False))
    except Exception as error:  # of the library, or of the one that it speaks HTTP with: another one every few years
        raise CannotRunHere(
            f"WEIGHTS=timm: {url} could not be downloaded: {_reason(error)}; download it elsewhere and give it as "
            "WEIGHTS=<file>"
        ) from error


def _reason(error: Exception) -> str:
    """What went wrong, in a few words: the library's messages are paragraphs."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids it"
    if isinstance(error, HfHubHTTPError):
        return f"the answer was {error.response.status_code} {error.response.reason_phrase}"
    first_line = str(error).partition("\n")[0].strip()
    return first_line or type(error).__name__
