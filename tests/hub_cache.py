"""A cache of the Hugging Face hub, as its client lays it out, and a machine without a network."""

import shutil
import socket
from pathlib import Path

import pytest

#: The commit of every repository in the cache.
COMMIT = "0" * 40


def put_into_cache(cache: Path, repository: str, folder: Path) -> Path:
    """The snapshot of a repository with the files of ``folder``."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    return snapshot


def disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
