"""Download of published weights into the cache, with their checksum verified."""

from __future__ import annotations

import hashlib
import re
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

from phosphene import ModelError


def fetch_weights(url: str) -> Path:
    """The file of ``url`` in torch's cache, downloaded if it is missing.

    Its SHA-256 is compared with the prefix in the file's name, cached or not: torch itself checks new
    downloads only. Raises ModelError for a damaged file and for a failed download.
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
            raise weights_unavailable(f"{name} (not in {path.parent})", error) from error
    elif not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
        raise ModelError(
            f"{path} is damaged: its SHA-256 does not begin with {digest}; delete it to fetch it again"
        )
    return path


def fetch_from_hub(
    repository: str, *files: str, revision: str | None = None, cache: str | None = None
) -> Path:
    """The first of these files that a repository on the Hugging Face hub has, cached or downloaded.

    Raises ModelError at once, without retries, where the hub cannot be reached.
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
            # One request first: without a network the download itself would retry for most of a minute.
            get_hf_file_metadata(hf_hub_url(repository, file, revision=revision))
            return Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache))
        except EntryNotFoundError:
            continue  # an older repository, without safetensors
        except Exception as error:  # its type depends on the HTTP library of the hub's client
            raise weights_unavailable(f"{repository}/{file}", error) from error
    raise ModelError(f"{repository} on the Hugging Face hub has no {' or '.join(files)}")


def weights_unavailable(weights: str, error: Exception) -> ModelError:
    """The error for weights that are neither cached nor downloadable."""
    return ModelError(
        f"the weights {weights} are not in the cache and cannot be downloaded ({error}): "
        "pass weights='a local file', weights=None for a random network, "
        "or use a bundled model, builtin:shapes-vgg"
    )
