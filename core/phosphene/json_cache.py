"""A cache of JSON documents in the user's cache folder, which a damaged or unwritable file never breaks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs

#: Files of another layout are ignored and rewritten.
_FORMAT = 1


def cache_folder() -> Path:
    """The folder of all cached files: ``PHOSPHENE_CACHE``, or else the user's (``~/.cache/phosphene``)."""
    return Path(
        os.environ.get("PHOSPHENE_CACHE") or platformdirs.user_cache_path("phosphene", appauthor=False)
    )


def read_cached(name: str, fingerprint: str) -> Any:
    """The document stored under a name with this fingerprint; None if there is none, or if it is damaged."""
    path = _path(name)
    with suppress(OSError, ValueError):  # unreadable or damaged: the caller computes the document again
        if not path.is_file():  # opening a FIFO would wait for a writer
            return None
        header, _, body = path.read_bytes().partition(b"\n")
        if json.loads(header) == _header(fingerprint, body):
            return json.loads(body)
    return None


def write_cached(name: str, fingerprint: str, document: Any) -> None:
    """Store a document under a name, atomically; does nothing where the folder cannot be written."""
    body = json.dumps(document, ensure_ascii=False).encode()
    path = _path(name)
    with suppress(OSError):  # a full or read-only disk: the next process computes the document again
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(json.dumps(_header(fingerprint, body)).encode() + b"\n" + body)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise


def _path(name: str) -> Path:
    return cache_folder() / f"{re.sub('[^A-Za-z0-9.-]+', '_', name)}.json"


def _header(fingerprint: str, body: bytes) -> dict[str, Any]:
    """The first line of a file: its layout, what it was computed from, and the checksum of what follows."""
    return {"format": _FORMAT, "fingerprint": fingerprint, "sha256": hashlib.sha256(body).hexdigest()}
