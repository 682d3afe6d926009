"""Published weights: from torch's cache or the network, checked, and never waited for in vain."""

import hashlib
import re
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

from phosphene import ModelError


def fetch_weights(url: str) -> Path:
    """The file behind ``url`` in torch's cache, downloaded if it is not there.

    Its SHA-256 is checked against the part of it that the file's name carries, cached or not:
    torch itself checks only what it has just downloaded.
    """
    from torch import hub

    name = Path(urlparse(url).path).name
    path = Path(hub.get_dir(), "checkpoints", name)
    digest = "".join(re.findall(r"-([0-9a-f]{8,})\.", name))
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            hub.download_url_to_file(url, str(path), digest)
        except (OSError, HTTPException, RuntimeError) as error:
            raise unavailable(f"{name} (looked for in {path.parent})", error) from error
    elif not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
        raise ModelError(
            f"{path} is damaged: its SHA-256 does not begin with {digest}; delete it to fetch it again"
        )
    return path


def unavailable(weights: str, error: Exception) -> ModelError:
    """What to say where weights are neither cached nor to be had from the network."""
    return ModelError(
        f"the weights {weights} are not in the cache and cannot be downloaded ({error}): "
        "give weights='a local file', weights=None for a random network, "
        "or take a bundled one, builtin:shapes-vgg"
    )
