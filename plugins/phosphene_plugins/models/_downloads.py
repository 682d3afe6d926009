"""Published weights: from torch's cache or the network, checked, and never waited for in vain."""

from __future__ import annotations

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


def from_hub(repository: str, *files: str, revision: str | None = None, cache: str | None = None) -> Path:
    """The first of these files that a repository on the Hugging Face hub has: cached, or else downloaded.

    A network that is not there is noticed at once.
    """
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import EntryNotFoundError

    for file in files:
        cached = try_to_load_from_cache(repository, file, cache_dir=cache, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    for file in files:
        try:
            # Asked once: the download itself would try for most of a minute before it gave up.
            get_hf_file_metadata(hf_hub_url(repository, file, revision=revision))
            return Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache))
        except EntryNotFoundError:
            continue  # an older repository, without safetensors
        except Exception as error:  # of whichever HTTP library the hub's client is built on
            raise unavailable(f"{repository}/{file}", error) from error
    raise ModelError(f"{repository} on the Hugging Face hub has no {' or '.join(files)}")


def unavailable(weights: str, error: Exception) -> ModelError:
    """What to say where weights are neither cached nor to be had from the network."""
    return ModelError(
        f"the weights {weights} are not in the cache and cannot be downloaded ({error}): "
        "give weights='a local file', weights=None for a random network, "
        "or take a bundled one, builtin:shapes-vgg"
    )
