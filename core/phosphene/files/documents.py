"""Which folders are saved results, and which of their files are the result's own."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Set
from pathlib import Path
from typing import Any

RESULT = "result.json"

PICTURES = "pictures"

#: Every file that ``Result.save`` may write, as a path relative to the folder.
_OWN_FILE = re.compile(
    r"result\.json|arrays\.safetensors|picture\.png|film\.gif|film\.mp4|pictures/[0-9]{3,}\.png"
    r"|index\.parquet|shard-[0-9]{6,}\.safetensors"
)


def is_result_document(document: Any) -> bool:
    """Whether a JSON document has the structure of a saved result's ``result.json``, of any version."""
    if not isinstance(document, dict):
        return False
    version, provenance = document.get("format"), document.get("provenance", ...)
    return (
        isinstance(version, int)
        and not isinstance(version, bool)
        and version >= 1
        and isinstance(document.get("type"), str)
        and isinstance(document.get("fields"), dict)
        and isinstance(document.get("inputs"), dict)
        and (
            provenance is None
            or (isinstance(provenance, dict) and {"method", "distribution"} <= provenance.keys())
        )
    )


def read_own_files(folder: Path) -> Set[str] | None:
    """The existing files of a saved result, as paths relative to its folder; None if it is no result.

    They are recorded in ``result.json``. For a result of version 0.1 or 0.2, which recorded none, they
    are the existing files with a name that a result writes. Raises OSError for a file that cannot be read.
    """
    file = folder / RESULT
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # reading a FIFO would not return
            return None
        document = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        # Any other error is raised: after it, the result's files must not count as the user's.
        return None
    if not is_result_document(document):
        return None
    names = document.get("files")
    if not isinstance(names, list):
        names = result_names(folder)
    # Whatever a document lists, only names that a result writes are its own.
    own = {name for name in names if isinstance(name, str) and is_result_name(name)} | {RESULT}
    return {name for name in own if _is_file(folder / name) and not (folder / name).parent.is_symlink()}


def is_result_name(name: str) -> bool:
    """Whether ``Result.save`` may write a file of this name, a path relative to the folder."""
    return _OWN_FILE.fullmatch(name) is not None


def result_names(folder: Path) -> list[str]:
    """What exists in a folder under a name that a result writes."""
    names = os.listdir(folder)
    if PICTURES in names:
        pictures = folder / PICTURES
        if pictures.is_dir() and not pictures.is_symlink():
            names += [f"{PICTURES}/{name}" for name in os.listdir(pictures)]
    return sorted(filter(is_result_name, names))


def list_files(folder: Path) -> list[str]:
    """All files in a folder, as sorted paths relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _is_file(path: Path) -> bool:
    """Whether there is a file or a symbolic link, which a deletion removes without what it points to."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)
