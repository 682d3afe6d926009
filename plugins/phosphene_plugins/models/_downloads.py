"""Download of published weights into the cache, with their checksum verified."""

from __future__ import annotations

import hashlib
import re
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

from phosphene import InputError, ModelError


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
    from huggingface_hub import try_to_load_from_cache

    for file in files:
        cached = try_to_load_from_cache(repository, file, cache_dir=cache, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    for file in files:
        if (path := find_on_hub(repository, file, revision=revision, cache=cache)) is not None:
            return path
    raise ModelError(f"{repository} on the Hugging Face hub has no {' or '.join(files)}")


def find_on_hub(
    repository: str, file: str, *, revision: str | None = None, cache: str | None = None
) -> Path | None:
    """A file of a repository on the Hugging Face hub, cached or downloaded; None where it has no such file.

    Raises ModelError at once, without retries, where the hub cannot be reached.
    """
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        cached = try_to_load_from_cache(repository, file, cache_dir=cache, revision=revision)
        if cached is not None:  # a path, or the marker of a file that the repository does not have
            return Path(cached) if isinstance(cached, str) else None
        # One request first: without a network the download itself would retry for most of a minute.
        get_hf_file_metadata(hf_hub_url(repository, file, revision=revision))
        return Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache))
    except EntryNotFoundError:
        return None  # an older repository without safetensors, for example
    except HFValidationError as error:
        raise InputError(f"{repository!r} is no name of a repository on the hub: {error}") from error
    except Exception as error:  # its type depends on the HTTP library of the hub's client
        if file.endswith(".json"):
            raise _repository_unavailable(repository, file, error) from error
        raise weights_unavailable(f"{repository}/{file}", error) from error


def _repository_unavailable(repository: str, file: str, error: Exception) -> ModelError:
    """The error for a repository whose configuration is neither cached nor downloadable."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return ModelError(
        f"{repository}/{file} is not in the cache of the Hugging Face hub and cannot be downloaded "
        f"({reason}): run `hf download {repository} --local-dir FOLDER` on a machine with access to the hub, "
        "and load the folder instead (hf:FOLDER, timm:local-dir:FOLDER)"
    )


def weights_unavailable(weights: str, error: Exception) -> ModelError:
    """The error for weights that are neither cached nor downloadable."""
    return ModelError(
        f"the weights {weights} are not in the cache and cannot be downloaded ({error}): "
        "pass weights='a local file', weights=None for a random network, "
        "or use a bundled model, builtin:shapes-vgg"
    )
