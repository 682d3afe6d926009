"""``read_result``: a saved result from its folder, without executing anything in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..builtin.networks import WEIGHTS
from ..errors import InputError, PhospheneError, UnknownName
from ..files.work_folders import sweep
from .base import FindMethod, Result
from .provenance import Provenance
from .saving import FORMAT, decode


def read_result(folder: str | os.PathLike[str], find_method: FindMethod) -> Result:
    """A saved result, with its provenance and inputs, or a bundled one ("builtin:shapes-styles").

    ``find_method`` loads a method by name: the one that computed the result defines its type and builds its
    network. Raises InputError where there is no complete result, UnknownName for a type or a bundled result
    that does not exist.
    """
    if str(folder).startswith("builtin:"):
        name = str(folder).removeprefix("builtin:")
        names = [path.parent.name for path in WEIGHTS.glob("*/result.json")]
        if name not in names:
            raise UnknownName("bundled result", name, sorted(names))
        # Its name, and not the folder on this machine, goes into records.
        return dataclasses.replace(read_result(WEIGHTS / name, find_method), uri=str(folder))
    folder = Path(folder)
    if not folder.exists():  # a process that replaced it may have been killed between two renames
        sweep(folder.resolve().parent, folder.resolve().name)
    if not (folder / "result.json").is_file():
        raise InputError(f"{folder} holds no saved result (no result.json)")
    try:
        document, tensors = _read_files(folder)
        if document["format"] != FORMAT:
            raise ValueError(f"saved in format {document['format']}; this version reads {FORMAT}")
        fields, inputs = (decode(document[part], tensors) for part in ("fields", "inputs"))
        provenance = Provenance(**document["provenance"]) if document["provenance"] else None
        name = document["type"]
    except Exception as error:  # JSON, safetensors and pydantic each raise their own for a damaged file
        raise InputError(f"{folder} is not a complete result: {error}") from error
    if name not in Result.types and provenance:  # the type of a plugin that is not loaded yet
        with contextlib.suppress(PhospheneError):
            find_method(provenance.method)
    if name not in Result.types:
        raise UnknownName("result type", name, Result.types)
    origin = {"provenance": provenance, "inputs": inputs, "uri": str(folder.resolve())}
    return Result.types[name].restore(fields, find_method, **origin)


def _read_files(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Document and tensors of one result, also while another process replaces the folder by a newer one."""
    file = folder / "result.json"
    while True:
        before, error = file.stat(), None
        try:
            document = json.loads(file.read_text())
            tensors = load_file(folder / "arrays.safetensors")
        except Exception as problem:
            error = problem
        after = file.stat()
        # The two files may be of different results if the folder was replaced in between: read them again.
        if (before.st_ino, before.st_ctime_ns) != (after.st_ino, after.st_ctime_ns):
            continue
        if error is not None:
            raise error
        return document, tensors
